"""Second moments of inputs and output gradients on calibration text: the H and G of every unit.

For a unit y = W x: G = E[g gᵀ] over tokens, with g the gradient of the summed token cross-entropy by y, and H = E[|g|²
x xᵀ] / E[|g|²]: the tokens that a unit's output matters for weigh more. With H = E[x xᵀ] inputs and gradients would
have to be independent, and those of keys and values are not: a few tokens that all others attend to carry most of the
gradient. The weighted H is the partner of G = I in the Kronecker product nearest to E[g gᵀ ⊗ x xᵀ] (Van Loan &
Pitsianis 1993), and close to what GuidedQuant rounds under (Kim et al. 2025, arXiv 2505.07004).

Labels are those of the text: the empirical Fisher matrix (Kunstner et al. 2019, arXiv 1905.12558).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from packager.scoring.rounding import activation_error
from packager.source.unit_weights import Source

_STATISTICS_BYTES = 3 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Curvature:
    """`pairs`: H (cols, cols) of a unit's inputs, and G (rows, rows) of its outputs' gradients or, where the rows are a
    vocabulary, a weight for each row (rows,). A tied unit has two pairs of which the prices add.

    `rounding` (cols, cols) is the H to round under: half the first moment weighted by gradients, half unweighted, for
    few tokens may carry most of the weight. `noise` is, by the elements that are rounded together, the variance (cols,)
    of the error in each channel when inputs are rounded to 8 bits; zeros where they never are (a table that is looked
    up).
    """

    pairs: tuple[tuple[Tensor, Tensor], ...]
    rounding: Tensor
    noise: dict[int, Tensor]


def groups(sources: Sequence[Source]) -> list[list[Source]]:
    """Units whose statistics fit in memory together; each group costs one pass over the calibration text.

    The bound is fixed, so that a resumed run finds the groups that it left.
    """
    found: list[list[Source]] = [[]]
    size = 0
    for source in sources:
        unit = source.unit
        cost = 4 * (3 * unit.cols**2 + (unit.rows**2 if unit.kind == "linear" else unit.cols**2))
        if found[-1] and size + cost > _STATISTICS_BYTES:
            found.append([])
            size = 0
        found[-1].append(source)
        size += cost
    return found


def collect(
    model: torch.nn.Module,
    sources: Sequence[Source],
    windows: Tensor,
    *,
    blocks: Sequence[int],
    batch: int,
    progress: Callable[[int], None],
) -> dict[str, Curvature]:
    """Curvature of `sources` on `windows` (n, length). Parameters get no gradient; the model is left as it was.

    `blocks` are those whose noise is measured. `progress` is called with the number of windows done so far. Cost: one
    forward and one backward pass through the model, and for each unit tokens · (2 cols² + rows²) multiply-adds.
    """
    collector = _Collector(model, sources, blocks)
    precision = torch.get_float32_matmul_precision()
    try:
        # Inputs of the products rounded to bfloat16 where the processor multiplies them faster, sums in float32: the
        # moments are averages over thousands of tokens, far noisier than that.
        torch.set_float32_matmul_precision("medium")
        for start in range(0, len(windows), batch):
            collector.run(windows[start : start + batch])
            progress(min(start + batch, len(windows)))
    finally:
        torch.set_float32_matmul_precision(precision)
        collector.detach()
    return {source.unit.name: collector.curvature(source) for source in sources}


class _Collector:
    """Hooks on a model and the sums they fill."""

    def __init__(self, model: torch.nn.Module, sources: Sequence[Source], blocks: Sequence[int]) -> None:
        self._model = model
        self._device = next(model.parameters()).device
        self._blocks = blocks
        self._tokens = 0
        self._inputs: dict[str, Tensor] = {}
        self._weighted: dict[str, Tensor] = {}
        self._noise: dict[str, Tensor] = {}  # (len(blocks), cols) each
        self._weights: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}
        self._alias: dict[str, str] = {}
        self._last_input: tuple[Tensor, str] | None = None
        self._last_errors: tuple[Tensor, Tensor] | None = None
        self._embedding = model.get_input_embeddings()  # type: ignore[operator]
        self._head = model.get_output_embeddings()  # type: ignore[operator]
        self._vocabulary = any(source.unit.kind != "linear" for source in sources)
        self._flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        for parameter, _ in self._flags:
            parameter.requires_grad_(False)
        self._handles = [self._embedding.register_forward_hook(self._embedded)]
        if self._vocabulary:
            self._handles.append(self._head.register_forward_pre_hook(self._head_input))
        linear = [source for source in sources if source.unit.kind == "linear"]
        for name in dict.fromkeys(source.module for source in linear):
            parts = [source for source in linear if source.module == name]
            self._handles.append(model.get_submodule(name).register_forward_hook(self._linear_hook(name, parts)))
        rows = self._embedding.weight.shape[0]
        self._counts = torch.zeros(rows, dtype=torch.float64, device=self._device)
        self._mass = torch.zeros(rows, dtype=torch.float64, device=self._device)
        self._variance = torch.zeros(rows, dtype=torch.float64, device=self._device)

    def run(self, ids: Tensor) -> None:
        """One forward and backward pass over (batch, length) token ids."""
        ids = ids.to(self._device)
        self._last_input = self._last_errors = None
        with torch.enable_grad():
            logits = self._model(input_ids=ids, use_cache=False).logits.float().flatten(0, 1)
        with torch.no_grad():
            chances = torch.softmax(logits, dim=-1)
            labels = torch.roll(ids, -1, 1).flatten()
            if self._vocabulary:
                self._counts += torch.bincount(ids.flatten(), minlength=len(self._counts))
                self._mass += chances.sum(0)
                self._variance += (chances - chances.square()).sum(0)
            # d(cross-entropy)/d(logits) = softmax - onehot: no graph through the loss is needed.
            chances[torch.arange(len(labels)), labels] -= 1
            chances.view(*ids.shape, -1)[:, -1] = 0  # after the last token of a window the text says nothing
        logits.backward(chances)
        self._tokens += ids.numel()

    def detach(self) -> None:
        """Take the hooks off and give the parameters their gradient flags back."""
        for handle in self._handles:
            handle.remove()
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)

    def curvature(self, source: Source) -> Curvature:
        """What was collected for one unit; to be asked once for each."""
        name = source.unit.name
        if source.unit.kind == "linear":
            weight = self._weights[name].clamp(min=torch.finfo(torch.float32).tiny)
            # In place and once: the sums are as large as all that is made of them.
            weighted, plain = self._weighted.pop(name).div_(weight), self._inputs[self._alias[source.module]]
            whole = self._gradients[source.module]
            gradients = whole[source.start : source.stop, source.start : source.stop] / self._tokens
            if len(gradients) == len(whole):
                del self._gradients[source.module]
            return Curvature(
                pairs=((weighted, gradients),),
                rounding=_scaled(weighted) + _scaled(plain),
                noise=self._by_block(self._noise[name] / weight),
            )
        head_inputs = self._inputs["head"] / self._tokens
        head = (head_inputs, (self._variance / self._tokens).float()[source.start : source.stop])
        # Tokens that the sample lacks still occur: the model's own expectation of each token stands in for half.
        frequency = (0.5 * self._counts + 0.5 * self._mass) / self._tokens
        lookup = (self._gradients["embedding"] / self._tokens, frequency.float()[source.start : source.stop])
        pairs = {"head": (head,), "embedding": (lookup,), "tied": (head, lookup)}[source.unit.kind]
        # A tied unit's two moments count by the total weight of its rows.
        rounding = torch.stack([hessian * gradient.sum() for hessian, gradient in pairs]).sum(0)
        noise = (
            torch.zeros(len(self._blocks), source.unit.cols, device=self._device)
            if source.unit.kind == "embedding"
            else self._noise["head"] / self._tokens
        )
        return Curvature(pairs=pairs, rounding=rounding, noise=self._by_block(noise))

    def _by_block(self, rows: Tensor) -> dict[int, Tensor]:
        return dict(zip(self._blocks, rows, strict=True))

    def _linear_hook(
        self, name: str, parts: Sequence[Source]
    ) -> Callable[[torch.nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: torch.nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            inputs = _rows(arguments[0])
            self._plain(name, arguments[0])
            output.register_hook(lambda gradient: self._seen(name, parts, inputs, _rows(gradient)))  # type: ignore[no-untyped-call]  # torch's own stub

        return hook

    def _plain(self, name: str, tensor: Tensor) -> None:
        # q, k and v (gate and up) read one tensor: its second moment is collected once.
        # The last one is held, so that its address cannot be another's.
        last = self._last_input
        if last is not None and last[0].data_ptr() == tensor.data_ptr() and last[0].shape == tensor.shape:
            self._alias[name] = last[1]
            return
        self._last_input = (tensor, name)
        self._alias[name] = name
        rows = _rows(tensor)
        _accumulate(self._inputs, name, rows, rows)

    def _seen(self, name: str, parts: Sequence[Source], inputs: Tensor, gradient: Tensor) -> None:
        """One module's inputs (T, K) and the gradients of its outputs (T, N)."""
        _accumulate(self._gradients, name, gradient, gradient)
        errors = self._errors(inputs)
        for part in parts:
            weight = gradient[:, part.start : part.stop].square().sum(1)
            key = part.unit.name
            _add(self._weights, key, weight.sum())
            _accumulate(self._weighted, key, inputs, inputs * weight[:, None])
            _add(self._noise, key, weight @ errors)

    def _errors(self, inputs: Tensor) -> Tensor:
        # As for the plain moment: gradients of q, k and v (gate and up) come one after the other.
        last = self._last_errors
        if last is None or last[0].data_ptr() != inputs.data_ptr() or last[0].shape != inputs.shape:
            self._last_errors = last = (inputs, _squared_errors(inputs, self._blocks))
        return last[1]

    def _head_input(self, _: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs = _rows(arguments[0])
        _accumulate(self._inputs, "head", inputs, inputs)
        _add(self._noise, "head", _squared_errors(inputs, self._blocks).sum(1))

    def _embedded(self, module: torch.nn.Module, _: tuple[Tensor, ...], output: Tensor) -> Tensor:
        output = output.detach().requires_grad_(True)
        if self._vocabulary:
            # Gemma's embedding multiplies by a constant inside the module: the table's gradient carries it.
            scale = float(getattr(module, "embed_scale", 1.0))

            def seen(gradient: Tensor) -> None:
                rows = _rows(gradient) * scale
                _accumulate(self._gradients, "embedding", rows, rows)

            output.register_hook(seen)  # type: ignore[no-untyped-call]  # as above
        return output


def _rows(tensor: Tensor) -> Tensor:
    """(…, width) → (tokens, width) float32, without a graph."""
    return tensor.detach().reshape(-1, tensor.shape[-1]).float()


def _squared_errors(inputs: Tensor, blocks: Sequence[int]) -> Tensor:
    """(len(blocks), T, K): how far rounding to 8 bits moves each of (T, K) inputs, squared, by block size."""
    errors = inputs.new_empty(len(blocks), *inputs.shape)
    for row, block in zip(errors, blocks, strict=True):
        row.copy_(activation_error(inputs, block).square_())
    return errors


def _scaled(moment: Tensor) -> Tensor:
    """A second moment in units of its mean diagonal."""
    return 0.5 * moment / moment.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)


def _accumulate(sums: dict[str, Tensor], name: str, left: Tensor, right: Tensor) -> None:
    """Add leftᵀ right of (T, N) and (T, K), in place."""
    if name in sums:
        sums[name].addmm_(left.T, right)
    else:
        sums[name] = left.T @ right


def _add(sums: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    sums[name] = sums[name].add_(tensor) if name in sums else tensor
