"""Which part of the torch model each matrix of the exported graph is.

The exporter names its matrices alike for every architecture (`model.layers.3.attn.q_proj`); transformers does not,
and packs some (`qkv_proj`, `gate_up_proj` in Phi-3). Every linear layer must be claimed exactly once.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from packager.errors import UnsupportedModelError
from packager.forms.kinds import Kind
from packager.graph.names import EMBEDDING, HEAD
from packager.graph.skeleton import Matrix
from packager.scoremap.model import Unit

_CUT_ROWS = 2048
_CUT_SHARES = (1 / 12, 1 / 3, 2 / 3)
_LAYER = re.compile(r"model\.layers\.(\d+)\.(attn|mlp|conv|linear_attn)\.(\w+)")
_OWNERS = {
    "attn": ("self_attn", "attention", "attn"),
    "mlp": ("mlp", "feed_forward", "shared_mlp"),
    "conv": ("conv",),
    "linear_attn": ("linear_attn",),
}
_ALIASES = {
    "o_proj": ("o_proj", "dense", "out_proj"),
    "gate_proj": ("gate_proj", "w1"),
    "up_proj": ("up_proj", "w3"),
    "down_proj": ("down_proj", "dense_4h_to_h", "w2", "output_linear"),
    "qkv_proj": ("in_proj_qkv",),
    "z_proj": ("in_proj_z",),
    "a_proj": ("in_proj_a",),
    "b_proj": ("in_proj_b",),
}
_PACKED = {
    "q_proj": ("qkv_proj",),
    "k_proj": ("qkv_proj",),
    "v_proj": ("qkv_proj",),
    "gate_proj": ("gate_up_proj", "input_linear"),
    "up_proj": ("gate_up_proj", "input_linear"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Rows `start` to `stop` of module `module`'s weight are unit `unit`."""

    unit: Unit
    module: str
    start: int
    stop: int

    def weight(self, model: torch.nn.Module) -> torch.Tensor:
        """The unit's (rows, cols) slice of the model's parameter; writing to it writes to the model."""
        parameter = model.get_submodule(self.module).weight
        assert isinstance(parameter, torch.Tensor)
        return parameter.data[self.start : self.stop]


def matrices_of(units: Iterable[tuple[str, int, int]]) -> list[Matrix]:
    """The graph's matrices that (matrix, rows, cols) of a map's units are parts of, in the units' order."""
    rows: dict[tuple[str, int], int] = {}
    for name, count, cols in units:
        rows[name, cols] = rows.get((name, cols), 0) + count
    return [Matrix(name=name, rows=count, cols=cols) for (name, cols), count in rows.items()]


def find_sources(matrices: Sequence[Matrix], model: torch.nn.Module) -> list[Source]:
    """A source for every matrix; embedding and head are one where the model ties them, and are cut by rows.

    Raises UnsupportedModelError when a matrix has no source, or a linear layer is left over.
    """
    embedding = _name_of(model, model.get_input_embeddings())  # type: ignore[operator]
    output = model.get_output_embeddings()  # type: ignore[operator]
    tied = output is not None and output.weight is model.get_submodule(embedding).weight
    sources = []
    for matrix in matrices:
        if matrix.name == EMBEDDING:
            if tied:
                continue
            sources += _vocabulary(matrix, "embedding", embedding)
        elif matrix.name == HEAD:
            sources += _vocabulary(matrix, "tied" if tied else "head", embedding if tied else _name_of(model, output))
        else:
            sources.append(_layer_source(matrix, model))
    _check(sources, model)
    return sources


def _vocabulary(matrix: Matrix, kind: Kind, module: str) -> list[Source]:
    """A vocabulary's rows, cut in four where it is large.

    Tokenizers number tokens by the order of their merges, so the first ones are the common ones: they pay for most of
    the loss and for few of the bytes, and can afford more bits than the long tail.
    """
    cuts = [0, matrix.rows]
    if matrix.rows >= _CUT_ROWS:
        cuts = [0, *(int(matrix.rows * share) // 64 * 64 for share in _CUT_SHARES), matrix.rows]
    sources = []
    for start, stop in itertools.pairwise(cuts):
        name = matrix.name if len(cuts) == 2 else f"{matrix.name}[{start}:{stop}]"
        unit = Unit(name=name, kind=kind, rows=stop - start, cols=matrix.cols, matrix=matrix.name, start=start)
        sources.append(Source(unit=unit, module=module, start=start, stop=stop))
    return sources


def _layer_source(matrix: Matrix, model: torch.nn.Module) -> Source:
    match = _LAYER.fullmatch(matrix.name)
    if match is None:
        raise UnsupportedModelError(
            f"the exported graph has a weight {matrix.name!r} whose place in the model is not known"
        )
    layer, block, role = match.groups()
    unit = Unit(name=matrix.name, kind="linear", rows=matrix.rows, cols=matrix.cols, matrix=matrix.name)
    modules = {name for name, _ in model.named_modules()}
    prefixes = [name for name in modules if name.endswith(f"layers.{layer}")]
    for prefix in sorted(prefixes, key=len):
        for owner in _OWNERS[block]:
            for alias in _ALIASES.get(role, (role,)):
                name = f"{prefix}.{owner}.{alias}"
                if name in modules:
                    return Source(unit=unit, module=name, start=0, stop=matrix.rows)
            for packing in _PACKED.get(role, ()):
                name = f"{prefix}.{owner}.{packing}"
                if name in modules:
                    start = _packed_start(role, _shape(model, name)[0], matrix.rows)
                    return Source(unit=unit, module=name, start=start, stop=start + matrix.rows)
    raise UnsupportedModelError(
        f"the exported graph has a weight {matrix.name!r} for which {type(model).__name__} has no layer"
    )


def _packed_start(role: str, total: int, rows: int) -> int:
    """First row of `role` in a packed weight of `total` rows: q | k | v with k and v alike, or gate | up."""
    match role:
        case "q_proj" | "gate_proj":
            return 0
        case "k_proj":
            return total - 2 * rows
        case _:
            return total - rows


def _shape(model: torch.nn.Module, module: str) -> tuple[int, ...]:
    """Shape of a module's weight."""
    parameter = model.get_submodule(module).weight
    assert isinstance(parameter, torch.Tensor)
    return tuple(parameter.shape)


def _name_of(model: torch.nn.Module, module: object) -> str:
    name: str
    for name, candidate in model.named_modules():
        if candidate is module:
            return name
    raise UnsupportedModelError(f"{type(model).__name__} does not name its embedding or output head")


def _check(sources: Sequence[Source], model: torch.nn.Module) -> None:
    claimed: dict[str, int] = {}
    for source in sources:
        shape = _shape(model, source.module)
        if shape[1] != source.unit.cols or source.stop > shape[0]:
            raise UnsupportedModelError(
                f"{source.unit.name} is {source.unit.rows} × {source.unit.cols} in the graph, its layer "
                f"{source.module} is {shape}"
            )
        claimed[source.module] = claimed.get(source.module, 0) + source.unit.rows
    table = model.get_input_embeddings().weight  # type: ignore[operator]
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name not in claimed and module.weight is not table:
            raise UnsupportedModelError(f"layer {name} of {type(model).__name__} has no weight in the exported graph")
    for name, rows in claimed.items():
        if rows != _shape(model, name)[0]:
            raise UnsupportedModelError(
                f"layer {name}: {rows} of its {_shape(model, name)[0]} rows are in the exported graph"
            )
