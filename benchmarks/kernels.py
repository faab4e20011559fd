"""Which codes the runtime has kernels for: the time of one product by a matrix in every form of codes, beside floats.

    python benchmarks/kernels.py [--rows 1536] [--cols 1536] [--threads 1]
                                 [--provider CPUExecutionProvider] [--json FILE]

One row of activations is a decoded token, 128 are a chunk of a prompt. The forms take turns, and the best of each
form's times counts. The last column is what the package believes (`has_kernels`); where it is right, no form with a
kernel is anywhere near as slow as one without. Speeds mean nothing on a busy machine.
"""

from __future__ import annotations

import time

import numpy as np
import onnx
import onnxruntime as ort
from common import make_parser, show, write_figures
from onnx import TensorProto, helper, numpy_helper

from packager.forms.blocks import BITS, BlockForm
from packager.forms.codes import BLOCKS
from packager.forms.floats import FloatForm
from packager.forms.registry import form_bytes, has_kernels

_CHUNK = 128
_ROUNDS = 5
_SECONDS = 0.02
_OPSETS = (("", 21), ("com.microsoft", 1))


def graph(form: BlockForm | FloatForm, rows: int, cols: int) -> bytes:
    """A graph of one product: x (n, cols) → y (n, rows)."""
    random = np.random.default_rng(0)
    tensors = []
    for name, spec in form.tensors(rows, cols).items():
        content = (
            random.integers(0, 256, spec.shape, dtype=np.uint8)
            if spec.dtype == "uint8"
            else random.random(spec.shape, dtype=np.float32) / 100
        )
        tensors.append(numpy_helper.from_array(content, name))
    inputs = ["x", *(tensor.name for tensor in tensors)]
    if isinstance(form, FloatForm):
        node = helper.make_node("FusedMatMul", inputs, ["y"], domain="com.microsoft", transB=1)
    else:
        node = helper.make_node(
            "MatMulNBits",
            inputs,
            ["y"],
            domain="com.microsoft",
            K=cols,
            N=rows,
            bits=form.bits,
            block_size=form.block,
            accuracy_level=4,
        )
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, width])
        for name, width in (("x", cols), ("y", rows))
    )
    model = helper.make_model(
        helper.make_graph([node], "product", [x], [y], tensors),
        opset_imports=[helper.make_opsetid(*opset) for opset in _OPSETS],
    )
    model.ir_version = onnx.IR_VERSION_2024_3_25
    serialized: bytes = model.SerializeToString()
    return serialized


def seconds(session: ort.InferenceSession, x: np.ndarray) -> float:
    """Of one product, from as many as fit the clock's patience."""
    count, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < _SECONDS or not count:
        session.run(None, {"x": x})
        count += 1
    return spent / count


def main() -> None:
    parser = make_parser(__doc__, threads=1, json=None)
    parser.add_argument("--rows", type=int, default=1536, help="outputs of the matrix (default: 1536)")
    parser.add_argument("--cols", type=int, default=1536, help="inputs of the matrix (default: 1536)")
    parser.add_argument(
        "--provider", default="CPUExecutionProvider", help="execution provider, as the runtime names it"
    )
    arguments = parser.parse_args()

    options = ort.SessionOptions()
    options.intra_op_num_threads = arguments.threads
    forms: list[FloatForm | BlockForm] = [
        FloatForm(label="f32"),
        *(
            BlockForm(bits=bits, block=block, zeros=zeros)
            for bits in BITS
            for zeros in (False, True)
            for block in BLOCKS
        ),
    ]
    sessions = [
        ort.InferenceSession(graph(form, arguments.rows, arguments.cols), options, providers=[arguments.provider])
        for form in forms
    ]
    inputs = [
        np.random.default_rng(1).standard_normal((rows, arguments.cols), dtype=np.float32) for rows in (1, _CHUNK)
    ]
    best = np.full((len(forms), len(inputs)), np.inf)
    for _ in range(_ROUNDS):
        for number, session in enumerate(sessions):
            best[number] = np.minimum(best[number], [seconds(session, x) for x in inputs])

    rows, data = [], []
    for form, (one, chunk) in zip(forms, best.tolist(), strict=True):
        size = form_bytes(form, arguments.rows, arguments.cols)
        kernel = has_kernels(form, BITS)
        speeds = (
            f"{one * 1e6:,.0f}",
            f"{size / one / 1e9:.1f}",
            f"{best[0, 0] / one:.2f}",
            f"{chunk * 1e6:,.0f}",
            f"{best[0, 1] / chunk:.2f}",
        )
        rows.append([form.label, f"{size:,}", *speeds, "yes" if kernel else "no"])
        data.append(
            {"form": form.label, "bytes": size, "one_row_seconds": one, "chunk_seconds": chunk, "kernel": kernel}
        )
    header = [
        "form",
        "bytes",
        "one row, µs",
        "GB/s",
        "× float's speed",
        f"{_CHUNK} rows, µs",
        "× float's speed",
        "kernel",
    ]
    show(f"a product by ({arguments.rows}, {arguments.cols}), {arguments.threads} threads", header, rows)
    write_figures(arguments.json, data)
    slow, fast = (
        extreme(item["one_row_seconds"] for item in data if item["kernel"] == kernel)
        for extreme, kernel in ((min, False), (max, True))
    )
    print(f"\none row: the fastest form without a kernel takes {slow / fast:.1f} times as long as the slowest with one")


if __name__ == "__main__":
    main()
