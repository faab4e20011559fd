"""A sweep as a picture, PNG or SVG. Needs matplotlib, which the extra `plot` brings."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from packager.errors import UsageError, require_extra
from packager.planning.size_curve import BY_PEAK, Curve
from packager.sizes import format_size

FORMATS = (".png", ".svg")
_NOISY_NATS = 0.01


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
    from matplotlib.ticker import LogLocator, NullLocator

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
    # Linear about zero, where measured rises are noise of either sign.
    axes.set_yscale("symlog", linthresh=_NOISY_NATS)
    axes.set_ylim(bottom=min([-_NOISY_NATS / 2, *(item.rise_nats - 2 * item.noise_nats for _, item in measured)]))
    axes.set_xlabel(
        f"peak memory of the process on {curve.profile}, context {curve.context_tokens} tokens"
        if by_peak
        else "weights file"
    )
    axes.set_ylabel("rise of the loss, nats per token")
    axes.set_title(f"{curve.model}: one score map, {len(curve.points)} sizes")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(loc="upper right")
