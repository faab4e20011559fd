"""`reference.safetensors`: what a reference in torch needs besides the matrices, and the text that losses are of.

Scoring writes it into the map, a build copies it into the bundle. Its tensors:

vector.NAME               what is no unit's (norms, biases, kernels of convolutions) by its name in the model, float32
heldout                   (windows, length) token ids of the held-out text, int32
heldout_nats              (windows, length - 1) what each token but the first costs the source model, float32
cache.LAYER.key, .value   the scales of a cache of 8-bit codes, where the map has one
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from packager.errors import ArtifactError

if TYPE_CHECKING:
    from packager.graph.kv_cache_codes import LayerScales

REFERENCE_FILE = "reference.safetensors"
HELD_OUT = "heldout"
_NATS = "heldout_nats"
_VECTOR, _CACHE = "vector.", "cache."
_KEY, _VALUE = "key", "value"


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """The held-out text: token ids (windows, length), and in nats (windows, length - 1) what each token but the first
    costs the source model."""

    windows: NDArray[np.int64]
    source_nats: NDArray[np.float32]

    def cut(self, context_tokens: int) -> HeldOut:
        """The same windows, no longer than a context."""
        return HeldOut(windows=self.windows[:, :context_tokens], source_nats=self.source_nats[:, : context_tokens - 1])


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceFile:
    """The file at `path`. Its methods raise ArtifactError where it is missing, damaged, or lacks what they read."""

    path: Path

    def held_out(self) -> HeldOut:
        """The held-out text and its losses."""
        stored = self._tensors()
        try:
            windows, nats = stored[HELD_OUT], stored[_NATS]
        except KeyError as error:
            raise self._lacks(error) from None
        count, length = windows.shape if windows.ndim == 2 else (0, 0)
        if windows.dtype != np.int32 or count < 1 or length < 2 or int(windows.min()) < 0:
            raise self._odd(HELD_OUT, "windows of at least two token ids")
        if nats.dtype != np.float32 or nats.shape != (count, length - 1) or not np.isfinite(nats).all():
            raise self._odd(_NATS, "a finite loss for each token of the windows but the first")
        return HeldOut(windows=windows.astype(np.int64), source_nats=nats)

    def vectors(self) -> dict[str, NDArray[np.float32]]:
        """Parameters that are no unit's matrix by their name in the model."""
        found = {name: tensor for name, tensor in self._tensors().items() if name.startswith(_VECTOR)}
        for name, tensor in found.items():
            if tensor.dtype != np.float32 or not np.isfinite(tensor).all():
                raise self._odd(name, "finite float32 numbers")
        return {name.removeprefix(_VECTOR): tensor for name, tensor in found.items()}

    def kv_scales(self) -> LayerScales:
        """Layer → the scales of its keys and values; empty where the map has no cache of 8-bit codes."""
        stored = self._tensors()
        ending = f".{_KEY}"
        numbers = [
            name.removeprefix(_CACHE).removesuffix(ending)
            for name in stored
            if name.startswith(_CACHE) and name.endswith(ending)
        ]
        if odd := [number for number in numbers if not (number.isascii() and number.isdigit() and len(number) <= 4)]:
            raise self._odd(f"{_CACHE}{odd[0][:40]}{ending}", "the number of a layer in its name")
        try:
            scales = {
                layer: (stored[_scale(layer, _KEY)], stored[_scale(layer, _VALUE)])
                for layer in sorted(map(int, numbers))
            }
        except KeyError as error:
            raise self._lacks(error) from None
        for layer, pair in scales.items():
            for role, steps in zip((_KEY, _VALUE), pair, strict=True):
                if steps.dtype != np.float32 or not np.isfinite(steps).all() or not (steps > 0).all():
                    raise self._odd(_scale(layer, role), "positive float32 numbers")
        return scales

    def write(self, vectors: Mapping[str, NDArray[np.float32]], held_out: HeldOut, scales: LayerScales) -> None:
        """Write the file."""
        from safetensors.numpy import save_file

        tensors: dict[str, NDArray[Any]] = {f"{_VECTOR}{name}": tensor for name, tensor in vectors.items()}
        tensors |= {HELD_OUT: held_out.windows.astype(np.int32), _NATS: held_out.source_nats.astype(np.float32)}
        for layer, (key, value) in scales.items():
            tensors |= {_scale(layer, _KEY): key, _scale(layer, _VALUE): value}
        save_file(tensors, self.path)

    def _tensors(self) -> dict[str, NDArray[Any]]:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            stored: dict[str, NDArray[Any]] = load_file(self.path)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{self.path} cannot be read ({str(error)[:200]}): score the model again") from error
        return stored

    def _odd(self, name: str, expected: str) -> ArtifactError:
        return ArtifactError(f"{self.path}: {name!a} is damaged: expected {expected}: score the model again")

    def _lacks(self, error: KeyError) -> ArtifactError:
        return ArtifactError(f"{self.path} has no {error}: it is damaged, score the model again")


def _scale(layer: int, role: str) -> str:
    return f"{_CACHE}{layer}.{role}"
