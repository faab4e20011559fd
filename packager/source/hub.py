"""Models of the Hugging Face hub: `owner/name` or `owner/name@revision`, small files first, then the weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from packager.errors import ModelError
from packager.source.quiet import one_line
from packager.source.stored_weights import INDEX_FILE, SINGLE_FILE, indexed_files

_PART = r"[A-Za-z0-9](?:[\w.-]*[\w-])?"
_NAME = re.compile(rf"({_PART})/({_PART})(?:@(\w[\w./-]*))?")


def is_hub_name(source: str) -> bool:
    """Whether `source` is written like `owner/name` or `owner/name@revision`."""
    return _NAME.fullmatch(source) is not None


def repository_name(source: str) -> str:
    """`name` of `owner/name@revision`."""
    return source.partition("@")[0].rpartition("/")[2]


def cached_name(folder: Path) -> str:
    """The name of the model in `folder`: the repository's, where it is a commit in the hub's cache
    (`models--owner--name/snapshots/COMMIT`), else the folder's."""
    folder = folder.resolve()
    kind, *parts = folder.parent.parent.name.split("--", 2)
    return parts[-1] if folder.parent.name == "snapshots" and kind == "models" and parts else folder.name


def fetch(source: str, small_files: Sequence[str], check: Callable[[Path], object]) -> Path:
    """The folder of `source` in the hub's cache, fetched where it is not there.

    The files that match `small_files` come first, and `check` may refuse the model by them: the weights are fetched
    only after it. ModelError says in one line why the hub does not give the model.
    """
    repository, _, revision = source.partition("@")
    small = [*small_files, INDEX_FILE]
    folder = _snapshot(source, repository, revision, small)
    check(folder)
    index = folder / INDEX_FILE
    weights = indexed_files(index) if index.is_file() else [SINGLE_FILE]
    return _snapshot(source, repository, revision, [*small, *weights])


def _snapshot(source: str, repository: str, revision: str, patterns: list[str]) -> Path:
    from huggingface_hub import errors, snapshot_download

    failed = f"model {source!r} is no folder here and could not be fetched from the hub: "
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
    except errors.GatedRepoError:
        reason = f"it is gated: accept its terms at https://huggingface.co/{repository}, then log in (hf auth login)"
    except errors.RepositoryNotFoundError:
        reason = "there is no such model, or it is private: check the name, or log in (hf auth login)"
    except errors.RevisionNotFoundError:
        reason = f"it has no branch, tag or commit {revision!r}"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        reason = "it is not in the cache here, and the hub cannot be reached: go online, or give a folder"
    except (errors.HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        reason = one_line(error)
    raise ModelError(failed + reason)
