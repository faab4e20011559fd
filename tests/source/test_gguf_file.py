"""GGUF files: read as transformers reads them, or refused for what it would pass over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Pico
from gguf import GGMLQuantizationType, GGUFWriter, RopeScalingType
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from packager.errors import ModelError, PackagerError, UnsupportedModelError
from packager.source.checkpoint import open_checkpoint
from packager.source.gguf_file import open_gguf
from packager.source.gguf_header import read_gguf_header

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers.": "blk.",
}
Change = Callable[[GGUFWriter], None]


def gguf_name(name: str) -> str:
    for there, here in _NAMES.items():
        name = name.replace(there, here)
    return name


def permuted(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Queries or keys as llama.cpp's converter orders their rows."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(
    path: Path,
    pico: Pico,
    tokenizer: PreTrainedTokenizerFast,
    change: Change = lambda writer: None,
    *,
    skip: str = "",
    arch: str = "llama",
) -> Path:
    """The pico LLaMA as llama.cpp's converter would write it, and what `change` adds."""
    config: Any = pico.model.config
    writer = GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([1] * len(vocabulary))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, parameter in pico.model.named_parameters():
        value = parameter.detach().numpy()
        if "q_proj" in name:
            value = permuted(value, config.num_attention_heads)
        elif "k_proj" in name:
            value = permuted(value, config.num_key_value_heads)
        if name != skip:
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(value))
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def written(picos: Callable[[str], Pico], tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Callable[..., Path]:
    def get(change: Change = lambda writer: None, **named: Any) -> Path:
        return write(tmp_path / "pico.gguf", picos("llama"), tokenizer, change, **named)

    return get


def refusal(path: Path, kind: type[ModelError] = UnsupportedModelError) -> str:
    with pytest.raises(kind) as caught:
        open_checkpoint(str(path)).config()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_loads_as_it_was_written(
    written: Callable[..., Path], picos: Callable[[str], Pico], capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = open_checkpoint(str(written()))
    capfd.readouterr()  # of making the model
    found = checkpoint.load().state_dict()
    assert all(torch.equal(found[key], value) for key, value in picos("llama").model.state_dict().items())
    assert checkpoint.name == "pico"
    assert capfd.readouterr() == ("", "")


def test_the_name_need_not_say_what_it_is(written: Callable[..., Path]) -> None:
    path = written()
    bare = path.rename(path.with_name("sha256-0123"))
    assert open_checkpoint(str(bare)).gguf


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda writer: writer.add_rope_scaling_type(RopeScalingType.LINEAR), "llama.rope.scaling.type = linear"),
        (lambda writer: writer.add_rope_scaling_factor(8.0), "llama.rope.scaling.factor = 8.0"),
        (lambda writer: writer.add_attention_scale(0.5), "llama.attention.scale = 0.5"),
        (lambda writer: writer.add_attn_logit_softcapping(50.0), "llama.attn_logit_softcapping = 50.0"),
        (lambda writer: writer.add_final_logit_softcapping(30.0), "llama.final_logit_softcapping = 30.0"),
        (lambda writer: writer.add_sliding_window(512), "llama.attention.sliding_window = 512"),
        (lambda writer: writer.add_expert_count(8), "llama.expert_count = 8"),
        (lambda writer: writer.add_logit_scale(0.25), "llama.logit_scale = 0.25"),
        (lambda writer: writer.add_uint32("llama.attention.key_length", 32), "llama.rope.dimension_count = 16"),
        (lambda writer: writer.add_string("llama.attention.scale", "much"), "llama.attention.scale = much"),
        (lambda writer: writer.add_value_length(32), "llama.attention.value_length = 32"),
        (lambda writer: writer.add_causal_attention(False), "llama.attention.causal = False"),
        (lambda writer: writer.add_float32("llama.no_such_thing", 2.0), "llama.no_such_thing = 2.0"),
        (lambda writer: writer.add_float32("elsewhere.value", 2.0), "elsewhere.value = 2.0"),
    ],
)
def test_fields_that_would_be_passed_over_are_named(written: Callable[..., Path], change: Change, said: str) -> None:
    path = written(change)
    assert refusal(path) == (
        f"{path} says {said}, which transformers does not read from GGUF and which may change what the model says: "
        "give the model's Hugging Face folder instead"
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda writer: writer.add_rope_scaling_type(RopeScalingType.NONE),
        lambda writer: writer.add_rope_scaling_factor(1.0),
        lambda writer: writer.add_attention_scale(0.25),  # 16 to the power of -1/2
        lambda writer: writer.add_sliding_window(0),
        lambda writer: writer.add_expert_count(0),
        lambda writer: writer.add_key_length(16),
        lambda writer: writer.add_value_length(16),
        lambda writer: writer.add_name("a name"),
        lambda writer: writer.add_string("quantize.imatrix.file", "some.dat"),
        lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(8, dtype=np.float32)),
    ],
)
def test_fields_that_change_nothing_are_passed_over(written: Callable[..., Path], change: Change) -> None:
    open_checkpoint(str(written(change))).config()


def test_llama_3s_scaling_is_read_from_its_divisors(written: Callable[..., Path]) -> None:
    said = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(hidden_size=64, num_attention_heads=1, head_dim=64, rope_parameters=said)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 10000.0 ** (-torch.arange(0, 64, 2) / 64)
    divisors = (plain / scaled).numpy().astype(np.float32)
    assert divisors.max() == pytest.approx(8.0)
    path = written(lambda writer: writer.add_tensor("rope_freqs.weight", divisors))
    found = open_checkpoint(str(path)).load().config.rope_parameters  # type: ignore[union-attr]
    assert found == pytest.approx(said)


def test_other_divisors_are_refused(written: Callable[..., Path]) -> None:
    path = written(lambda writer: writer.add_tensor("rope_freqs.weight", np.arange(1, 9, dtype=np.float32)))
    assert "scales its rotation by rope_freqs.weight in a way that is not Llama 3's" in refusal(path)


def test_tensors_without_a_place_are_named(written: Callable[..., Path]) -> None:
    path = written(lambda writer: writer.add_tensor("blk.2.ffn_up.weight", np.ones((104, 64), dtype=np.float32)))
    assert refusal(path, ModelError) == (
        f"{path} holds the tensor blk.2.ffn_up.weight, which LlamaForCausalLM has no place for (1 such): give the "
        "model's Hugging Face folder instead"
    )


def test_a_tensor_that_is_missing_is_named(written: Callable[..., Path]) -> None:
    path = written(skip="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ModelError, match=r"lacks the tensor model.layers.1.mlp.up_proj.weight \(1 missing\)"):
        open_checkpoint(str(path)).load()


def test_tensor_types_that_cannot_be_read_are_named(written: Callable[..., Path]) -> None:
    path = written(
        lambda writer: writer.add_tensor(
            "extra.weight", np.zeros((1, 32), dtype=np.uint8), raw_dtype=GGMLQuantizationType.I8
        )
    )
    assert f"{path}: extra.weight is of type I8" in refusal(path)


def test_tensor_types_that_the_library_does_not_know(written: Callable[..., Path]) -> None:
    path = written()
    content = path.read_bytes()
    name = b"output_norm.weight"
    place = content.index(name) + len(name) + 4 + 8  # its one dimension follows the name
    path.write_bytes(content[:place] + (999).to_bytes(4, "little") + content[place + 4 :])
    assert "output_norm.weight is of type 999, which the installed gguf library does not know" in refusal(path)


def test_parts_of_a_split_model(written: Callable[..., Path]) -> None:
    path = written()
    part = path.rename(path.with_name("big-00002-of-00003.gguf"))
    assert refusal(part) == (
        f"{part} is part 2 of 3 of a split model: join the parts with llama.cpp's tool (llama-gguf-split --merge "
        "big-00001-of-00003.gguf big.gguf) and give big.gguf"
    )
    renamed = written(lambda writer: (writer.add_uint16("split.no", 1), writer.add_uint16("split.count", 2))[0])
    assert "is part 2 of 2 of a split model" in refusal(renamed)


@pytest.mark.parametrize("arch", ["clip", "bert", "whisper", "deepseek2", "no-such"])
def test_architectures_that_are_not_read_from_gguf(written: Callable[..., Path], arch: str) -> None:
    path = written(arch=arch)
    assert refusal(path) == (
        f"{path} is of architecture {arch!r}, which transformers cannot read from GGUF: give the model's Hugging Face "
        "folder instead"
    )


def test_architectures_that_are_read_and_have_no_graph(written: Callable[..., Path]) -> None:
    assert "that the exporter has no graph for" in refusal(written(arch="starcoder2"))


def test_files_of_other_things(written: Callable[..., Path]) -> None:
    assert "is of general.type 'adapter', not a whole" in refusal(written(lambda writer: writer.add_type("adapter")))


def test_files_cut_short(written: Callable[..., Path]) -> None:
    path = written()
    content = path.read_bytes()
    for length in (5, 40, 300, 5000, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        assert refusal(path, ModelError) == (
            f"{path} is cut short: it has {length} bytes, fewer than its head says: download it again"
        )


@given(data=st.data())
def test_a_damaged_head_is_an_error_of_ours(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory, picos: Any, tokenizer: Any
) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged-gguf"
    folder.mkdir(exist_ok=True)
    whole = folder / "whole.gguf"
    if not whole.exists():
        write(whole, picos("llama"), tokenizer)
    head = bytearray(whole.read_bytes()[:12_000])
    for _ in range(data.draw(st.integers(1, 4))):
        head[data.draw(st.integers(0, len(head) - 1))] = data.draw(st.integers(0, 255))
    path = folder / "damaged.gguf"
    path.write_bytes(bytes(head) + whole.read_bytes()[12_000:])
    try:
        open_gguf(path)
    except PackagerError as error:
        assert "\n" not in str(error)  # noqa: PT017  an error is not required


def test_the_header_is_the_librarys(written: Callable[..., Path]) -> None:
    from gguf import GGUFReader

    path = written()
    header, reader = read_gguf_header(path), GGUFReader(path)
    assert header.fields["llama.block_count"] == reader.get_field("llama.block_count").contents()  # type: ignore[union-attr]
    for tensor in reader.tensors:
        found = header.tensors[tensor.name]
        assert (found.start, found.stop - found.start) == (tensor.data_offset, tensor.n_bytes)
        assert found.shape == tuple(reversed(tensor.shape.tolist()))
        assert found.type == tensor.tensor_type
