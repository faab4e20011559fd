"""Safetensors as byte ranges: what is written is read, and no damage passes."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from packager.errors import ArtifactError
from packager.io.safetensors_ranges import Region, StoredTensor, join, read_header

DTYPES = {"U8": np.uint8, "I32": np.int32, "F16": np.float16, "F32": np.float32, "I64": np.int64}
names = st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__" and "\0" not in name)
tensors = st.dictionaries(
    names,
    st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=3), st.integers(0, 2**32 - 1)),
    min_size=1,
    max_size=6,
)
in_a_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)


def arrays(spec: dict[str, tuple[str, list[int], int]]) -> dict[str, np.ndarray[Any, Any]]:
    made = {}
    for name, (dtype, shape, seed) in spec.items():
        made[name] = np.random.default_rng(seed).integers(0, 100, tuple(shape)).astype(DTYPES[dtype])
    return made


def written(path: Path, header: object, data: bytes = b"") -> Path:
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


@in_a_folder
@given(tensors, st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2))
def test_headers_say_where_the_bytes_lie(
    tmp_path: Path, spec: dict[str, tuple[str, list[int], int]], metadata: dict[str, str]
) -> None:
    expected = arrays(spec)
    path = tmp_path / "some.safetensors"
    save_file(expected, path, metadata=metadata)
    found, noted = read_header(path)
    assert noted == metadata
    assert set(found) == set(expected)
    content = path.read_bytes()
    for name, tensor in found.items():
        region = tensor.region
        assert content[region.offset : region.offset + region.length] == expected[name].tobytes()
        assert tensor.shape == expected[name].shape


@in_a_folder
@given(tensors, st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2))
def test_joined_files_are_whole_to_other_readers(
    tmp_path: Path, spec: dict[str, tuple[str, list[int], int]], metadata: dict[str, str]
) -> None:
    expected = arrays(spec)
    source, joined = tmp_path / "source.safetensors", tmp_path / "joined.safetensors"
    save_file(expected, source)
    join([(name + "+", tensor) for name, tensor in read_header(source)[0].items()], joined, metadata)
    loaded = load_file(joined)
    assert set(loaded) == {name + "+" for name in expected}
    for name, array in expected.items():
        np.testing.assert_array_equal(loaded[name + "+"], array)
    assert read_header(joined)[1] == metadata


@in_a_folder
@given(tensors, st.data())
def test_a_truncated_file_is_always_refused(
    tmp_path: Path, spec: dict[str, tuple[str, list[int], int]], data: st.DataObject
) -> None:
    path = tmp_path / "some.safetensors"
    save_file(arrays(spec), path)
    content = path.read_bytes()
    stored = read_header(path)[0].values()
    end = max(tensor.region.offset + tensor.region.length for tensor in stored)
    path.write_bytes(content[: data.draw(st.integers(0, end - 1))])
    with pytest.raises(ArtifactError, match=r"some\.safetensors (is not a whole safetensors file|is cut short)"):
        read_header(path)


@in_a_folder
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "some.safetensors"
    path.write_bytes(content)
    try:
        found, _ = read_header(path)
    except ArtifactError:
        return
    assert all(tensor.region.offset + tensor.region.length <= path.stat().st_size for tensor in found.values())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "x"]), inner, max_size=3)
    ),
    max_leaves=12,
)


@in_a_folder
@given(json_values)
def test_any_header_is_read_or_refused(tmp_path: Path, header: object) -> None:
    path = written(tmp_path / "some.safetensors", header, b"12345678")
    try:
        found, _ = read_header(path)
    except ArtifactError:
        return
    assert all(tensor.region.offset + tensor.region.length <= path.stat().st_size for tensor in found.values())


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([], "expected a JSON object as header, found list"),
        ({"a": 3}, "header entry 'a' is malformed (TypeError: 'int' object is not subscriptable)"),
        ({"a": {"shape": [1], "data_offsets": [0, 1]}}, "header entry 'a' is malformed (KeyError: 'dtype')"),
        (
            {"a": {"dtype": "F4", "shape": [1], "data_offsets": [0, 1]}},
            "header entry 'a' is malformed (KeyError: 'F4')",
        ),
        (
            {"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 1]}},
            "tensor 'a' of shape (2,) and dtype U8 does not match its offsets [0, 1]",
        ),
        (
            {"a": {"dtype": "U8", "shape": [-1], "data_offsets": [1, 0]}},
            "tensor 'a' of shape (-1,) and dtype U8 does not match its offsets [1, 0]",
        ),
        (
            {"a": {"dtype": "U8", "shape": [1], "data_offsets": [-1, 0]}},
            "tensor 'a' of shape (1,) and dtype U8 does not match its offsets [-1, 0]",
        ),
        (
            {"a": {"dtype": "U8", "shape": ["1"], "data_offsets": [0, 1]}},
            "tensor 'a' of shape ('1',) and dtype U8 does not match its offsets [0, 1]",
        ),
        (
            {"a": {"dtype": "U8", "shape": [1.5], "data_offsets": [0, 1]}},
            "tensor 'a' of shape (1.5,) and dtype U8 does not match its offsets [0, 1]",
        ),
        ({"__metadata__": 3}, "__metadata__ is not an object of strings"),
        ({"__metadata__": {"a": 3}}, "__metadata__ is not an object of strings"),
    ],
)
def test_malformed_headers_are_located(tmp_path: Path, header: object, message: str) -> None:
    path = written(tmp_path / "some.safetensors", header, b"12345678")
    with pytest.raises(ArtifactError) as caught:
        read_header(path)
    assert str(caught.value) == f"{path}: {message}"


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as caught:
        read_header(tmp_path / "no")
    assert str(caught.value) == f"{tmp_path / 'no'} is missing"
    (tmp_path / "folder").mkdir()
    with pytest.raises(ArtifactError, match="folder is not a whole safetensors file"):
        read_header(tmp_path / "folder")
    (tmp_path / "huge").write_bytes(struct.pack("<Q", 2**63) + b"{}")
    with pytest.raises(ArtifactError) as caught:
        read_header(tmp_path / "huge")
    assert (
        str(caught.value)
        == f"{tmp_path / 'huge'} is not a whole safetensors file: its header does not fit in its 10 bytes"
    )


@pytest.mark.parametrize("header", [b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b"{", b"\xff\xfe\xff", b"{}x"])
def test_headers_that_json_cannot_read_are_refused(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "some.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ArtifactError, match=r"some\.safetensors is not a whole safetensors file \("):
        read_header(path)


def test_join_refuses_a_name_given_twice(tmp_path: Path) -> None:
    save_file({"a": np.zeros(3, np.uint8)}, tmp_path / "one")
    tensor = read_header(tmp_path / "one")[0]["a"]
    with pytest.raises(ArtifactError) as caught:
        join([("b", tensor), ("b", tensor)], tmp_path / "out")
    assert str(caught.value) == f"{tmp_path / 'out'}: tensor 'b' given twice"
    assert not (tmp_path / "out").exists()


def test_join_refuses_a_source_that_ends_early(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"123")
    tensor = StoredTensor(dtype="U8", shape=(4,), region=Region(path=tmp_path / "short", offset=0, length=4))
    with pytest.raises(ArtifactError) as caught:
        join([("a", tensor)], tmp_path / "out")
    assert re.fullmatch(
        rf"{re.escape(str(tmp_path / 'short'))} is cut short: it ends \d+ bytes before byte \d+", str(caught.value)
    )
