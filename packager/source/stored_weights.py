"""The weight files of a Hugging Face folder, by their headers: whole, readable, without contradictions, and the
weights of the model that the configuration describes."""

from __future__ import annotations

import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from packager.errors import ArtifactError, ModelError
from packager.io.files import read_json
from packager.io.safetensors_ranges import StoredTensor, read_header

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Constants that are computed anew: frequencies of rotation, masks of attention.
_HARMLESS = re.compile(r"(.*\.)?(rotary_emb\.[\w.]*|rope\.freqs|masked_bias|attn\.bias|attention\.bias|position_ids)")
_FLOATS = ("F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2")


def require_readable(path: Path) -> None:
    """ModelError when `path` is a file that may not be read."""
    try:
        with path.open("rb"):
            pass
    except PermissionError:
        raise ModelError(
            f"{path} may not be read (its permissions are {stat.filemode(path.stat().st_mode)}): give yourself the "
            "right to (chmod u+r) or run as its owner"
        ) from None
    except IsADirectoryError:
        raise ModelError(f"{path} is a folder: expected a file") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error


def weight_files(folder: Path, source: str) -> tuple[Path, ...]:
    """The safetensors files that make up the model in `folder`: those of its index, or the one file."""
    index, single = folder / INDEX_FILE, folder / SINGLE_FILE
    if index.is_file():
        require_readable(index)
        names = indexed_files(index)
        files = tuple(folder / name for name in names)
        if missing := [file.name for file in files if not file.is_file()]:
            raise ModelError(
                f"{source} lacks {missing[0]}, which its index names ({len(missing)} of {len(files)} files missing)"
            )
        if single.is_file() and names != [SINGLE_FILE]:
            raise ModelError(
                f"{source} holds both {SINGLE_FILE} and an index of {len(names)} other files ({names[0]} …): one of "
                "them is left over, remove it"
            )
        return files
    if single.is_file():
        return (single,)
    if others := sorted(folder.glob("*.safetensors")):
        raise ModelError(
            f"{source} holds {others[0].name} but neither {SINGLE_FILE} nor {INDEX_FILE}: "
            + ("rename it to that" if len(others) == 1 else "download the index as well")
        )
    if pickles := sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern)):
        raise ModelError(
            f"{source} holds only pickled weights ({pickles[0]}), which can run code when read: convert them to "
            "safetensors first"
        )
    raise ModelError(f"{source} holds no *.safetensors: expected a Hugging Face model folder")


def indexed_files(index: Path) -> list[str]:
    """Names of the files that an index of shards lists; ModelError when it lists anything else."""
    return sorted(set(_weight_map(index).values()))


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor → name of the file that holds it, of an index of shards."""
    try:
        found = read_json(index)["weight_map"]
        whole = bool(found) and all(isinstance(text, str) for pair in found.items() for text in pair)
    except (ArtifactError, KeyError, AttributeError, TypeError):
        whole = False
    if not whole:
        raise ModelError(f"{index} has no weight_map of file names: the checkpoint is damaged, download it again")
    for name in sorted(set(found.values())):
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise ModelError(
                f"{index} names {name!r}, which is not a safetensors file in its folder: the checkpoint is damaged, "
                "download it again"
            )
    return dict(found)


def stored_tensors(files: tuple[Path, ...]) -> dict[str, StoredTensor]:
    """Every tensor of the files. ModelError when a file is damaged, two hold a tensor, or one lacks what the index
    says it holds."""
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        require_readable(file)
        try:
            header, _ = read_header(file)
        except ArtifactError as error:
            raise ModelError(f"{error}: download the checkpoint again") from None
        for name, tensor in header.items():
            if name in tensors:
                raise ModelError(
                    f"{file.parent}: the tensor {name} is in both {tensors[name].region.path.name} and {file.name}: "
                    "the files are of different checkpoints, download them again"
                )
            tensors[name] = tensor
    index = files[0].parent / INDEX_FILE
    for name, holder in _weight_map(index).items() if index.is_file() else ():
        if name not in tensors or tensors[name].region.path.name != holder:
            raise ModelError(
                f"{index} says that {name} is in {holder}, which does not hold it: the files are of different "
                "checkpoints, download them again"
            )
    return tensors


def require_match(source: str, tensors: Mapping[str, StoredTensor], model: torch.nn.Module, tied: bool) -> None:
    """ModelError when the files lack a weight of `model` (which may lie on `meta`), hold one of another shape or kind,
    or hold weights that it has no use for.

    Models whose tensors transformers joins or renames as it loads them are left to what it reports then.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    if get_model_conversion_mapping(model, add_legacy=False):
        return
    expected = dict(model.state_dict())
    found = _with_prefix(tensors, expected, model)
    pairs = tied_pairs(model) if tied else {}
    partners = pairs | {source_name: name for name, source_name in pairs.items()}
    for name, parameter in expected.items():
        tensor = found.get(name)
        if tensor is None:
            if partners.get(name) in found:
                continue
            missing = sum(key not in found and partners.get(key) not in found for key in expected)
            raise lacking(source, name, missing)
        if tensor.shape != tuple(parameter.shape):
            raise mismatched(source, name, tensor.shape, tuple(parameter.shape))
        if parameter.is_floating_point() and tensor.dtype not in _FLOATS:
            raise ModelError(
                f"{source}: {name} is stored as {tensor.dtype}, expected floats: give the unquantised original"
            )
    if extra := sorted(name for name in found if name not in expected):
        refuse_unexpected(source, extra, model)


def lacking(source: str, name: str, count: int) -> ModelError:
    """The error for a checkpoint without tensor `name`, one of `count` that it lacks."""
    if name.endswith("lm_head.weight") and count == 1:
        return ModelError(
            f"{source} lacks {name}, and its configuration says that the head is not the embedding: set "
            "tie_word_embeddings to true in config.json if it is, or download the checkpoint again"
        )
    return ModelError(
        f"{source} lacks the tensor {name} ({count} missing): the checkpoint is incomplete, download it again"
    )


def mismatched(source: str, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> ModelError:
    """The error for a tensor of another shape than the configuration gives it."""
    return ModelError(
        f"{source}: {name} is of shape {found}, but config.json makes it {expected}: the configuration and the weights "
        "are of different models, download the checkpoint again"
    )


def refuse_unexpected(source: str, names: list[str], model: Any) -> None:
    """ModelError for tensors that `model` has no use for, but for constants and what its class says it ignores."""
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    left = [
        name for name in names if not _HARMLESS.fullmatch(name) and not any(pattern.search(name) for pattern in ignored)
    ]
    if left:
        raise ModelError(
            f"{source} holds the tensor {left[0]}, which {type(model).__name__} as config.json describes it does not "
            f"use ({len(left)} such): the configuration is of another model, or the file holds parts that are not "
            "merged (adapters)"
        )


def tied_pairs(model: torch.nn.Module) -> dict[str, str]:
    """Names of weights → the weight that they are where the model ties them, as its class says."""
    pairs = getattr(model, "_tied_weights_keys", None)
    return dict(pairs) if isinstance(pairs, dict) else {}


def _with_prefix(
    tensors: Mapping[str, StoredTensor], expected: Mapping[str, Any], model: torch.nn.Module
) -> dict[str, StoredTensor]:
    """The tensors under the names of `expected`: a checkpoint of the bare model lacks the prefix, and transformers
    puts it there."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return {
        name if name in expected or prefix + name not in expected else prefix + name: tensor
        for name, tensor in tensors.items()
    }
