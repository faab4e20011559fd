"""The exporter's graph without its weights.

`onnxruntime_genai.models.builder` knows how each architecture becomes a fused, accelerator-specific decoder. It is
given a model whose matrices lie on torch's `meta` device (shapes, no memory) and whose other parameters are real; its
graph is kept and the matrices become graph inputs, to be replaced by `graph.surgery`. This file is the only one that
knows the exporter; it is pinned to 0.18 in pyproject.toml.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import importlib.util
import io
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from packager.errors import ExportError, UnsupportedModelError
from packager.graph.names import EMBEDDING, GENAI_FILE, GRAPH_FILE, MATRIX_SUFFIX
from packager.io.files import write_text
from packager.io.leftovers import scratch_folder

DRAWN_AS = {
    "CwmForCausalLM": "LlamaForCausalLM",
    "GlmForCausalLM": "Ernie4_5ForCausalLM",
    "HeliumForCausalLM": "Ernie4_5ForCausalLM",
    "Ministral3ForCausalLM": "LlamaForCausalLM",
    "MinistralForCausalLM": "LlamaForCausalLM",
    "Qwen3_5ForCausalLM": "Qwen3_5ForConditionalGeneration",
    "SeedOssForCausalLM": "LlamaForCausalLM",
}
"""Architectures that the exporter does not name, and the one that it knows of the same layers (tests hold both against
torch)."""
_OLMO_EPSILON = 1e-5  # written out in transformers' OlmoLayerNorm
_TABLE_ERROR = 0.02
"""Above what float32 angles of far positions differ by, far below what another scaling does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """A weight of the graph that awaits its bytes: W of shape (rows, cols), whichever way the graph holds it."""

    name: str
    rows: int
    cols: int


def side_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The parameters that are no unit's, by name: all but the weights of linear layers and of the table of tokens.

    They are norms, biases, the kernels of short convolutions: small, and in the graph as floats.
    """
    owners = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    matrices = {id(module.weight) for module in [*owners, model.get_input_embeddings()]}  # type: ignore[operator]
    for name, parameter in model.named_parameters():
        if id(parameter) not in matrices:
            yield name, parameter


def meta_model(config: PretrainedConfig, vectors: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """The architecture of `config` with `vectors` (its `side_parameters` by name) real and the rest on `meta`."""
    with torch.device("meta"):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, _ in list(side_parameters(model)):
        if name not in vectors:
            raise UnsupportedModelError(f"the checkpoint has no {name}, which {type(model).__name__} needs")
        owner, _, attribute = name.rpartition(".")
        real = torch.nn.Parameter(vectors[name].to(torch.float32), requires_grad=False)
        setattr(model.get_submodule(owner), attribute, real)
    return model


def export_skeleton(
    config: PretrainedConfig, vectors: Mapping[str, torch.Tensor], provider: str, out: Path
) -> tuple[list[Matrix], int]:
    """Write the weightless graph for execution provider `provider` and its genai_config.json into folder `out`.

    Returns the matrices that surgery has to supply, in the graph's order, and the number of nodes. Raises
    UnsupportedModelError when the exporter does not know the architecture.
    """
    architecture = (config.architectures or ["(none)"])[0]
    architecture = DRAWN_AS.get(architecture, architecture)
    builder, base = _exporter()
    captured: list[ir.Model] = []
    working = _readable(config)
    working.architectures = [architecture]
    model = meta_model(config, vectors)
    _refuse_second_head(model)
    with scratch_folder() as folder:
        # The exporter reads generation settings from the folder the config says it came from.
        scratch = str(folder)
        working._name_or_path = scratch
        if (source := getattr(config, "_generation_settings", None)) is not None:
            Path(scratch, "generation_config.json").write_text(json.dumps(source), encoding="utf-8")
        seams = {
            "load_weights": lambda self, path: model,
            "save_model": lambda self, folder: captured.append(self.model),
            "save_processing": lambda self, name, kwargs, folder: None,
            "make_attention_qk_rope": _unturned_layers(base.make_attention_qk_rope),
            "make_layernorm": _own_norms(base.make_layernorm),
            "make_embedding": _exact_scale(base.make_embedding),
        }
        with _patched(base, seams), _quiet() as log:
            try:
                builder.create_model(
                    architecture,
                    "",
                    scratch,
                    "fp32" if provider == "cpu" else "fp16",
                    provider,
                    scratch,
                    hf_details={"extra_kwargs": {}, "hf_name": scratch, "hf_config": working},
                    prune_lm_head=True,
                    # Caches cut to the sliding window save memory, but are read by onnxruntime-genai alone, and even
                    # there a generation of fewer tokens than the window fails ("KV cache capacity must be at least …").
                    windowed_kv_cache=False,
                    fuse_qkv=False,
                    hf_token=False,
                )
            except NotImplementedError:
                raise UnsupportedModelError(
                    f"architecture {architecture} is not one the exporter knows: expected a decoder such as "
                    "LlamaForCausalLM, MistralForCausalLM, Qwen3ForCausalLM, Gemma3ForCausalLM or Phi3ForCausalLM"
                ) from None
            except Exception as error:
                raise UnsupportedModelError(
                    f"the exporter cannot draw {_described(config)} ({type(error).__name__}: {error}); it had said: "
                    f"{' '.join(log.getvalue().split())[-160:]}"
                ) from error
        genai = json.loads(Path(scratch, GENAI_FILE).read_text(encoding="utf-8"))
    graph_model = captured[0]
    _fix_cache_width(graph_model, int(genai["model"]["decoder"]["head_size"]))
    _fix_rotary_tables(graph_model, model, config)
    matrices = _detach_matrices(graph_model)
    try:
        _load_constants(graph_model)
    except (NotImplementedError, RuntimeError) as error:  # a weight that is no unit, nor among the vectors
        raise UnsupportedModelError(
            f"the exporter's graph of {_described(config)} holds weights that are neither matrices of linear layers "
            f"nor parameters of their own ({error}): it cannot be packed"
        ) from error
    out.mkdir(parents=True, exist_ok=True)
    graph_model.graph.sort()
    ir.save(graph_model, out / GRAPH_FILE)
    write_text(out / GENAI_FILE, json.dumps(genai, indent=2, sort_keys=True))
    return matrices, len(graph_model.graph)


def _refuse_second_head(model: torch.nn.Module) -> None:
    """UnsupportedModelError where a layer has as many outputs as there are tokens: the exporter takes it for the head,
    and its graph is wrong without a word."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head and module.out_features == head.out_features:
            raise UnsupportedModelError(
                f"layer {name} of {type(model).__name__} has {module.out_features} outputs, one for each token: "
                "the exporter takes it for the head, so this model cannot be packed"
            )


def _described(config: PretrainedConfig) -> str:
    """The architecture, and the kinds of its layers where they are said."""
    name = (config.architectures or [config.model_type])[0]
    kinds = sorted({str(kind) for kind in getattr(config, "layer_types", None) or ()})
    return f"{name}, whose layers are of the kinds {', '.join(kinds)}," if kinds else str(name)


def _exporter() -> tuple[Any, Any]:
    """The exporter's `builder` module and its base `Model` class.

    Its modules import each other as scripts: the package puts its folder on sys.path, where `builder` and
    `builders` are top-level names. The class is patched where it is defined.
    """
    with _quiet():
        models = importlib.import_module("onnxruntime_genai.models")
        folder = str(Path(models.__path__[0]))
        if folder not in sys.path:
            sys.path.append(folder)
        return importlib.import_module("builder"), importlib.import_module("builders.base").Model


def _unturned_layers(make_rope: Callable[..., tuple[str, str]]) -> Callable[..., tuple[str, str]]:
    """The exporter's method that turns queries and keys, passed over for layers without rotary embedding.

    For those layers of SmolLM3 the exporter takes the rotation out of the attention operator only to add it before.
    """

    def guarded(self: Any, layer_id: int, **kwargs: Any) -> tuple[str, str]:
        turned = getattr(self, "no_rope_layers", None)
        return make_rope(self, layer_id, **kwargs) if turned is None or turned[layer_id] else ("", "")

    return guarded


def _own_norms(make_norm: Callable[..., None]) -> Callable[..., None]:
    """The exporter's method that draws a norm, made to draw the model's own: it takes the small number from a setting
    that not every family has, and OLMo's norms, which subtract the mean, for ones that do not."""

    def faithful(self: Any, layer_id: int, layernorm: Any, skip: bool, simple: bool, location: str) -> None:
        epsilon = getattr(layernorm, "variance_epsilon", getattr(layernorm, "eps", None))
        if type(layernorm).__name__ == "OlmoLayerNorm":
            epsilon, simple = _OLMO_EPSILON, False
        if isinstance(epsilon, float):
            self.layernorm_attrs["epsilon"] = epsilon
        make_norm(self, layer_id, layernorm, skip, simple, location)

    return faithful


def _exact_scale(make_embedding: Callable[..., None]) -> Callable[..., None]:
    """The exporter's method that draws the embedding, with Gemma's √hidden, which it rounds to two decimals, exact."""

    def exact(self: Any, embedding: Any) -> None:
        root = math.sqrt(self.hidden_size)
        if self.embed_attrs["scale"] == round(root, 2):
            self.embed_attrs["scale"] = root
        make_embedding(self, embedding)

    return exact


@contextlib.contextmanager
def _patched(owner: Any, replacements: Mapping[str, Any]) -> Iterator[None]:
    saved = {name: getattr(owner, name) for name in replacements}
    for name, value in replacements.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in saved.items():
            setattr(owner, name, value)


@contextlib.contextmanager
def _quiet() -> Iterator[io.StringIO]:
    """The exporter prints its progress; it is kept for error messages instead."""
    log = io.StringIO()
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        yield log


def _readable(config: PretrainedConfig) -> PretrainedConfig:
    """A copy that the exporter reads as transformers does.

    transformers 5 nests `rope_parameters` by kind of layer for models such as Gemma 3; the exporter expects one flat
    dict and, for the sliding layers, `rope_local_base_freq`. Models such as Mistral slide in every layer and say so by
    `sliding_window` alone; the exporter takes layers to slide only where `layer_types` says it.
    """
    copy = config.__class__.from_dict(config.to_dict())
    rope = getattr(copy, "rope_parameters", None)
    if isinstance(rope, dict) and "full_attention" in rope:
        copy.rope_parameters = dict(rope["full_attention"])
        sliding = rope.get("sliding_attention") or {}
        copy.rope_local_base_freq = sliding.get("rope_theta", 10_000.0)
    if isinstance(rope, dict) and "rope_type" in rope:
        if rope["rope_type"] != "longrope" and hasattr(copy, "original_max_position_embeddings"):
            # By two lengths that differ Phi-3's builder takes a model for one of longrope.
            copy.original_max_position_embeddings = copy.max_position_embeddings
        # Phi's builder reads the name that transformers 4 gave it.
        copy.rope_parameters = {"type": rope["rope_type"], **rope}
        if rope["rope_type"] in ("linear", "yarn"):
            # Tables that do not change with the prompt's length are the model's own (`_fix_rotary_tables`).
            kept = ("rope_theta", "partial_rotary_factor")
            copy.rope_parameters = {"rope_type": "default"} | {key: rope[key] for key in kept if key in rope}
    if (config.architectures or [""])[0] == "Qwen3_5ForCausalLM" and isinstance(rope, dict):
        # It turns by three positions, of text all the same: how channels are shared among them says nothing then.
        pairs = int(copy.head_dim * rope.get("partial_rotary_factor", 1.0)) // 2
        copy.rope_parameters = {"mrope_section": [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3], **rope}
    if getattr(copy, "sliding_window", None) and getattr(copy, "layer_types", None) is None:
        copy.layer_types = ["sliding_attention"] * copy.num_hidden_layers
    return copy


def _fix_cache_width(model: ir.Model, head_size: int) -> None:
    """Give the caches' symbolic last dimension its number: other loaders need it."""
    for value in [*model.graph.inputs, *model.graph.outputs]:
        if value.shape is not None and len(value.shape) == 4 and not isinstance(value.shape[3], int):
            value.shape = ir.Shape([*list(value.shape)[:3], head_size])


def _fix_rotary_tables(graph_model: ir.Model, model: torch.nn.Module, config: PretrainedConfig) -> None:
    """Give the graph the cosines and sines of the model's own rotary embedding, where the exporter's differ.

    The exporter knows neither linear nor YaRN scaling in every family, nor the linear scaling of Gemma 3's full layers.
    A table that is right stays as it is, to the byte; those of longrope, of which there are two, are not touched.
    """
    owners = [module for module in model.modules() if type(module).__name__.endswith("RotaryEmbedding")]
    tables = {
        name: value
        for name, value in graph_model.graph.initializers.items()
        if name.startswith(("cos_cache", "sin_cache")) and value.const_value is not None
    }
    if not owners or not tables:
        return
    rotary: Any = type(owners[0])(config=config.get_text_config())
    kinds = {"_local": ("sliding_attention",), "_global": ("full_attention",)}
    for name, value in tables.items():
        table = value.const_value
        assert table is not None
        rows, width = table.shape.numpy()
        layer_kind = next((kind for suffix, kind in kinds.items() if name.endswith(suffix)), ())
        positions = torch.arange(rows)[None]
        try:
            pair = rotary(torch.zeros(1, 1, 2 * width), positions, *layer_kind)
        except (TypeError, AttributeError, KeyError):  # a rotary embedding of another kind: the graph check decides
            return
        whole = pair[name.startswith("sin_cache")][0].float()
        if whole.shape[-1] == 2 * width:
            # Both halves of a head turn alike, or each pair of neighbours does.
            whole = whole[:, :width] if torch.equal(whole[:, :width], whole[:, width:]) else whole[:, ::2]
        found = torch.from_numpy(table.numpy().astype("float32"))
        if whole.shape == found.shape and float((whole - found).abs().max()) > _TABLE_ERROR:
            tensor = ir.Tensor(whole.numpy().astype(table.numpy().dtype), name=name)
            value.const_value = tensor


def _detach_matrices(model: ir.Model) -> list[Matrix]:
    """Turn every weight matrix into a graph input, so that the graph is valid and weightless."""
    graph = model.graph
    matrices = []
    for name, value in list(graph.initializers.items()):
        shape = value.shape
        if shape is None or len(shape) != 2 or not (name.endswith(MATRIX_SUFFIX) or name == f"{EMBEDDING}.weight"):
            continue
        first, second = shape.numpy()
        if name.endswith(MATRIX_SUFFIX):
            matrices.append(Matrix(name=name.removesuffix(MATRIX_SUFFIX), rows=second, cols=first))
        else:
            matrices.append(Matrix(name=EMBEDDING, rows=first, cols=second))
        graph.initializers.pop(name)
        value.const_value = None
        graph.inputs.append(value)
    return matrices


def _load_constants(model: ir.Model) -> None:
    """Put the values of what is left of the weights into the graph."""
    for name, value in model.graph.initializers.items():
        if isinstance(value.const_value, ir.LazyTensor):
            value.const_value = ir.Tensor(value.const_value.numpy(), name=name)


@functools.cache
def exporter_architectures() -> frozenset[str]:
    """Names of the model classes that become graphs: those that the installed exporter has a builder for, read from
    its source without running it, and those drawn as one of them."""
    spec = importlib.util.find_spec("onnxruntime_genai")
    if spec is None or not spec.submodule_search_locations:
        raise ExportError("onnxruntime-genai is not installed: pip install onnxruntime-genai")
    source = Path(spec.submodule_search_locations[0], "models", "builder.py").read_text(encoding="utf-8")
    # The exporter dispatches by `config.architectures[0] == "NAME"`.
    named = frozenset(
        side.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Compare) and ast.unparse(node.left) == "config.architectures[0]"
        for side in node.comparators
        if isinstance(side, ast.Constant) and isinstance(side.value, str)
    )
    return named | DRAWN_AS.keys()
