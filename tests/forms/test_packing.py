"""Bits to bytes and back, and what the kernels make of the bytes."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from packager.forms.blocks import BITS, BlockForm
from packager.forms.floats import FloatForm
from packager.forms.low_rank import LowRankForm
from packager.forms.packing import pack_bits, unpack_bits


@given(st.sampled_from(BITS), st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_pack_and_unpack_are_inverse(bits: int, rows: int, count: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, count)).astype(np.uint8)
    packed = pack_bits(codes, bits)
    assert packed.dtype == np.uint8
    assert packed.shape == (rows, -(-count * bits // 8))
    np.testing.assert_array_equal(unpack_bits(packed, bits, count), codes)


def test_first_code_lies_in_the_lowest_bits() -> None:
    assert pack_bits(np.array([1, 2, 3], np.uint8), 4).tolist() == [0x21, 0x03]
    assert pack_bits(np.array([1, 2, 3, 0, 2], np.uint8), 2).tolist() == [0b00_11_10_01, 0b10]
    assert pack_bits(np.array([7, 255], np.uint8), 8).tolist() == [7, 255]


@given(
    st.sampled_from(BITS),
    st.sampled_from([16, 32, 64]),
    st.booleans(),
    st.integers(1, 4),
    st.integers(1, 130),
    st.integers(0, 2**32 - 1),
)
def test_blocks_have_the_bytes_of_their_form_and_dequantise_exactly(
    bits: int, block: int, zeros: bool, rows: int, cols: int, seed: int
) -> None:
    form = BlockForm(bits=bits, block=block, zeros=zeros)
    generator = np.random.default_rng(seed)
    blocks = form.blocks(cols)
    codes = generator.integers(0, 2**bits, (rows, cols)).astype(np.uint8)
    scales = generator.normal(size=(rows, blocks)).astype(np.float32)
    points = generator.integers(0, 2**bits, (rows, blocks)).astype(np.uint8) if zeros else None
    packed = form.pack(codes, scales, points)
    assert {name: (str(tensor.dtype), tensor.shape) for name, tensor in packed.items()} == {
        name: (spec.dtype, spec.shape) for name, spec in form.tensors(rows, cols).items()
    }
    centre = np.repeat(points if points is not None else np.full((rows, blocks), 2 ** (bits - 1)), block, axis=1)[
        :, :cols
    ].astype(np.float32)
    expected = (codes.astype(np.float32) - centre) * np.repeat(scales, block, axis=1)[:, :cols]
    np.testing.assert_array_equal(form.dequantize(packed, rows, cols), expected)


def test_padding_dequantises_to_zero() -> None:
    for zeros in (None, np.array([[5, 9]], np.uint8)):
        form = BlockForm(bits=4, block=32, zeros=zeros is not None)
        packed = form.pack(np.full((1, 40), 3, np.uint8), np.ones((1, 2), np.float32), zeros)
        assert not form.dequantize(packed, 1, 64)[:, 40:].any()


def test_float_and_low_rank() -> None:
    weight = np.arange(6, dtype=np.float16).reshape(2, 3)
    found = FloatForm(label="f16").dequantize({"weight": weight}, 2, 3)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, weight)
    factors = BlockForm(bits=8, block=16, zeros=False)
    generator = np.random.default_rng(0)
    down = factors.pack(generator.integers(0, 256, (16, 40)).astype(np.uint8), np.ones((16, 3), np.float32), None)
    up = factors.pack(generator.integers(0, 256, (5, 16)).astype(np.uint8), np.ones((5, 1), np.float32), None)
    tensors = {f"down.{name}": tensor for name, tensor in down.items()} | {
        f"up.{name}": tensor for name, tensor in up.items()
    }
    product = factors.dequantize(up, 5, 16) @ factors.dequantize(down, 16, 40)
    np.testing.assert_array_equal(LowRankForm(rank=16, factors=factors).dequantize(tensors, 5, 40), product)


def _session(
    node: onnx.NodeProto, inputs: list[onnx.ValueInfoProto], tensors: dict[str, np.ndarray], output: str
) -> ort.InferenceSession:  # type: ignore[type-arg]
    initializers = [onnx.numpy_helper.from_array(tensor, name) for name, tensor in tensors.items()]
    graph = helper.make_graph(
        [node], "kernel", inputs, [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)], initializers
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)], ir_version=10
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(BITS),
    st.sampled_from([16, 32, 64, 128]),
    st.booleans(),
    st.integers(1, 20),
    st.integers(1, 150),
    st.integers(0, 2**32 - 1),
)
def test_the_matmul_kernel_reads_these_bytes(
    bits: int, block: int, zeros: bool, rows: int, cols: int, seed: int
) -> None:
    form = BlockForm(bits=bits, block=block, zeros=zeros)
    generator = np.random.default_rng(seed)
    blocks = form.blocks(cols)
    codes = generator.integers(0, 2**bits, (rows, cols)).astype(np.uint8)
    scales = generator.uniform(0.5, 1.5, (rows, blocks)).astype(np.float32)
    points = generator.integers(0, 2**bits, (rows, blocks)).astype(np.uint8) if zeros else None
    tensors = form.pack(codes, scales, points)
    node = helper.make_node(
        "MatMulNBits",
        ["x", *tensors],
        ["y"],
        domain="com.microsoft",
        K=cols,
        N=rows,
        bits=bits,
        block_size=block,
        accuracy_level=0,
    )
    session = _session(node, [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, cols])], tensors, "y")
    x = generator.normal(size=(3, cols)).astype(np.float32)
    expected = x @ form.dequantize(tensors, rows, cols).T
    np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, atol=1e-4 * 2**bits * cols**0.5, rtol=1e-4)


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("cols", [64, 96, 200])
def test_the_gather_kernel_reads_these_bytes(bits: int, zeros: bool, cols: int) -> None:
    form = BlockForm(bits=bits, block=64, zeros=zeros)
    generator = np.random.default_rng(1)
    blocks = form.blocks(cols)
    points = generator.integers(0, 2**bits, (9, blocks)).astype(np.uint8) if zeros else None
    tensors = form.pack(
        generator.integers(0, 2**bits, (9, cols)).astype(np.uint8),
        generator.normal(size=(9, blocks)).astype(np.float32),
        points,
    )
    flat = tensors | {"codes": tensors["codes"].reshape(9, -1)}
    inputs = ["codes", "ids", "scales", *(["zeros"] if zeros else [])]
    node = helper.make_node(
        "GatherBlockQuantized",
        inputs,
        ["y"],
        domain="com.microsoft",
        bits=bits,
        block_size=64,
        gather_axis=0,
        quantize_axis=1,
    )
    session = _session(node, [helper.make_tensor_value_info("ids", TensorProto.INT64, [3])], flat, "y")
    ids = np.array([8, 0, 3])
    np.testing.assert_allclose(
        session.run(None, {"ids": ids})[0][:, :cols], form.dequantize(tensors, 9, cols)[ids], rtol=1e-6
    )
