"""A sweep as a picture, PNG or SVG. Needs matplotlib, which the extra `plot` brings."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from packager.errors import UsageError, require_extra
from packager.planning.size_curve import BY_PEAK, Curve
from packager.sizes import format_size

FORMATS = (".png", ".svg")
_LEAST_NATS = 0.001
"""Below this, or below the noise of what was measured, the axis is linear: a logarithm never reaches 0."""


def require_plot(out: Path) -> None:
    """UsageError when `out` is no kind of picture, MissingExtraError when nothing here can draw one: better said before
    hours of measuring."""
    if out.suffix.lower() not in FORMATS:
        raise UsageError(f"{out}: expected a name that ends in {' or '.join(FORMATS)}")
    require_extra("plot", ["matplotlib"], f"drawing {out}")


def curve_picture(curve: Curve, suffix: str) -> bytes:
    """The curve as the bytes of a picture; `suffix` is one of FORMATS. The same curve gives the same SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": curve.map_sha256}):
        figure = Figure(figsize=(8, 5), layout="constrained")
        _draw(figure.add_subplot(), curve)
        out = io.BytesIO()
        figure.savefig(
            out,
            format=suffix.lower().removeprefix("."),
            dpi=150,
            metadata={"Date": None} if suffix.lower() == ".svg" else None,
        )
    return out.getvalue()


def _draw(axes: Any, curve: Curve) -> None:
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

    by_peak = curve.bounded == BY_PEAK
    sizes = [point.peak_bytes if by_peak else point.file_bytes for point in curve.points]
    axes.plot(
        sizes,
        [point.predicted_nats for point in curve.points],
        marker=".",
        label="predicted, on held-out calibration text",
    )
    measured = [
        (size, point.measured) for size, point in zip(sizes, curve.points, strict=True) if point.measured is not None
    ]
    if measured and curve.measurement is not None:
        rises, errors = [item.rise_nats for _, item in measured], [item.noise_nats for _, item in measured]
        label = (
            f"measured on ONNX Runtime, {curve.measurement.text} ({curve.measurement.tokens:,} "
            "tokens; bars: standard error)"
        )
        axes.errorbar([size for size, _ in measured], rises, yerr=errors, fmt="o", markersize=4, capsize=2, label=label)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(base=2, subs=(1, 1.5), numticks=50))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda size, _: format_size(size))
    linear = _linear_below([item.noise_nats for _, item in measured])
    axes.set_yscale("symlog", linthresh=linear, linscale=0.5)
    lowest = min([0.0, *(item.rise_nats - item.noise_nats for _, item in measured)])
    axes.set_ylim(bottom=lowest)
    axes.yaxis.set_major_locator(FixedLocator(_ticks(linear, *axes.get_ylim())))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda nats, _: f"{nats:g}")
    axes.set_xlabel(
        f"peak memory of the process on {curve.profile}, context {curve.context_tokens} tokens"
        if by_peak
        else "weights file"
    )
    axes.set_ylabel("rise of the loss, nats per token")
    axes.set_title(f"{curve.model}: one score map, {len(curve.points)} sizes")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(loc="upper right")


def _linear_below(noises: Sequence[float]) -> float:
    """Where the axis turns linear: about what the median of the standard errors is, a round number."""
    median = sorted(noises)[len(noises) // 2] if noises else 0.0
    return next((step for step in _steps() if step >= max(median, _LEAST_NATS)), _LEAST_NATS)


def _steps() -> list[float]:
    """0.001, 0.002, 0.005, 0.01 … 500."""
    return [digit * 10.0**power for power in range(-3, 3) for digit in (1, 2, 5)]


def _ticks(linear: float, low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`, of either sign, and 0; none between 0 and `linear`."""
    steps = [step for step in _steps() if step >= linear * 0.999]
    return [tick for tick in [*(-step for step in reversed(steps)), 0.0, *steps] if low <= tick <= high]
