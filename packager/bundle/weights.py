"""A unit's tensors in the graph of a bundle: where their bytes lie, and how to put others in their place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from packager.bundle.manifest import BundleUnit
from packager.errors import ArtifactError


def unit_tensors(graph: ir.Graph, unit: BundleUnit) -> dict[str, ir.TensorProtocol]:
    """The tensors of a unit by their names in its form: the initializers that surgery named after it. ArtifactError
    where one is not there."""
    return {part: _tensor(graph, unit.name, part) for part in unit.parsed().tensors(unit.rows, unit.cols)}


def overwrite_scales(graph_file: Path, scales: Mapping[str, NDArray[np.generic]]) -> None:
    """Put `scales` (unit → the scales of its blocks) in the place of those in the graph's weights.

    Neither the graph nor any size changes. ArtifactError where a unit has no scales of that many bytes.
    """
    graph = ir.load(graph_file).graph
    for unit, values in scales.items():
        tensor, content = _tensor(graph, unit, "scales"), np.ascontiguousarray(values).tobytes()
        if not isinstance(tensor, ir.ExternalTensor) or tensor.offset is None or tensor.length != len(content):
            raise ArtifactError(f"{graph_file}: {unit} has no scales of {len(content)} bytes")
        with (graph_file.parent / tensor.location).open("r+b") as file:
            file.seek(tensor.offset)
            file.write(content)


def _tensor(graph: ir.Graph, unit: str, part: str) -> ir.TensorProtocol:
    value = graph.initializers.get(f"{unit}.{part}")
    if value is None or value.const_value is None:
        raise ArtifactError(f"the graph has no {unit}.{part}: graph and manifest do not belong together")
    return value.const_value
