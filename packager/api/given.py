"""What was given, made into what the rooms below take: profiles, maps, requests and settings, checked on the way.

Nothing heavy is imported before it is known to be there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from packager.api import arguments
from packager.api.arguments import Context, as_flag, as_path, checked
from packager.api.near_names import is_bundle, is_map, require_there
from packager.api.threads import let_threads_sleep
from packager.errors import UsageError, require_extra
from packager.profile import DeviceProfile, load_profile
from packager.progress import Progress, Silent

if TYPE_CHECKING:
    from packager.bundle.opening import OpenedBundle
    from packager.planning.plan import Request
    from packager.planning.target import Target
    from packager.runtime.answers import Sampling
    from packager.scoremap.opening import OpenedMap
    from packager.scoremap.settings import AcipSettings, ScoreSettings
    from packager.scoring.polish_plan import Polishing

AnyPath: TypeAlias = str | PathLike[str]
Paths: TypeAlias = AnyPath | Sequence[AnyPath]
AnyProfile: TypeAlias = AnyPath | DeviceProfile

SCORE_LIBRARIES = (
    "torch",
    "transformers",
    "accelerate",
    "gguf",
    "huggingface_hub",
    "jinja2",
    "optimum",
    "pyarrow",
    "tokenizers",
)


def profile_of(profile: AnyProfile) -> DeviceProfile:
    """A profile by name, from a file, or as it is. UsageError for what is none of these."""
    if isinstance(profile, DeviceProfile):
        return profile
    if not isinstance(profile, str | PathLike):
        raise UsageError(f"profile: expected a name, a path to a .toml file or a DeviceProfile, found {profile!r}")
    return load_profile(str(as_path(profile, "profile")))


def opened_map(map: AnyPath | OpenedMap) -> OpenedMap:
    """A map from its folder, or as it is. UsageError for what is neither."""
    from packager.scoremap.opening import OpenedMap, open_map

    if isinstance(map, OpenedMap):
        return map
    if not isinstance(map, str | PathLike):
        raise UsageError(f"map: expected a folder or an opened map, found {map!r}")
    folder = as_path(map, "map")
    require_there(folder, "score map", is_map)
    return open_map(folder)


def paths_of(*given: object) -> list[Path]:
    """Where what was given lies on disk, of what was given as a path or as an opened map."""
    from packager.scoremap.opening import OpenedMap

    found = [item.folder.root if isinstance(item, OpenedMap) else item for item in given]
    return [Path(item) for item in found if isinstance(item, str | PathLike)]


def opened_bundle(bundle: AnyPath | OpenedBundle) -> OpenedBundle:
    """A bundle from its folder, every file checked, or as it is. UsageError for what is neither."""
    from packager.bundle import opening

    if isinstance(bundle, opening.OpenedBundle):
        return bundle
    folder = as_path(bundle, "bundle")
    require_there(folder, "bundle", is_bundle)
    return opening.open_bundle(folder)


def model_name(model: AnyPath) -> str:
    """A model's folder, file or name, as text."""
    return str(as_path(model, "model"))


def listener_of(progress: Progress | None) -> Progress:
    """Who is told, if only silence. UsageError for what cannot listen."""
    if progress is None:
        return Silent()
    if isinstance(progress, Progress):
        return progress
    raise UsageError(f"progress: expected an object with phase, advance and warn, found {progress!r}")


def request_for(
    profile: AnyProfile,
    budget: int | str | None,
    context: Context | None,
    kv_cache: str | None,
    target: Target,
) -> Request:
    """What to build for, checked."""
    device = profile_of(profile)
    budget_bytes = _budget(budget, device)
    tokens = None if context is None else checked(arguments.CONTEXT, context, "context")
    cache = None if kv_cache is None else checked(arguments.KV_CACHE, kv_cache, "kv_cache")
    from packager.planning.plan import Request

    return Request(profile=device, budget_bytes=budget_bytes, context_tokens=tokens, cache=cache, target=target)


def target_for(max_rise: float | None, file_size: int | str | None, ratio: float | None, fill: bool) -> Target:
    """What bounds a size beside the budget, checked."""
    rise = None if max_rise is None else checked(arguments.RISE_NATS, max_rise, "max_rise")
    share = None if ratio is None else checked(arguments.RATIO, ratio, "ratio")
    from packager.planning.target import Target
    from packager.sizes import parse_size

    if isinstance(file_size, str):
        most: int | None = parse_size(file_size)
    else:
        most = None if file_size is None else checked(arguments.FILE_BYTES, file_size, "file_size")
    return Target(max_rise_nats=rise, most_bytes=most, most_ratio=share, fill=as_flag(fill, "fill"))


def _budget(budget: int | str | None, profile: DeviceProfile) -> int | None:
    from packager.sizes import parse_size

    if budget is None:
        return None
    if isinstance(budget, str):
        return parse_size(budget, of_bytes=profile.memory_bytes)
    return checked(arguments.BUDGET_BYTES, budget, "budget")


def device_here(device: str, purpose: str) -> str:
    """A device that torch has here. MissingExtraError where there is no torch."""
    name = checked(arguments.DEVICE, device, "device")
    require_extra("score", SCORE_LIBRARIES, purpose)
    let_threads_sleep()
    if name != "cpu":
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise UsageError(
                f"device: {name} is not here: PyTorch {torch.__version__} finds no CUDA device; expected cpu"
            )
        if int(name.partition(":")[2] or 0) >= count:
            raise UsageError(f"device: {name} is not here: expected cuda:0 to cuda:{count - 1}")
    return name


def scoring_settings(
    tokens: int,
    seed: int,
    quick: bool,
    provider: str,
    float_only: bool,
    method: str,
    acip: AcipSettings | Mapping[str, Any] | None,
) -> ScoreSettings:
    """The settings, checked before torch is asked for, with the defaults that `quick` has. `acip` is what differs from
    the defaults of the method, a whole AcipSettings, or None for another method.
    """
    from packager.scoremap.settings import QUICK_TOKENS, ScoreSettings

    chosen = checked(arguments.METHOD, method, "method")
    if chosen != "acip" and acip is not None:
        raise UsageError(
            "ACIP's settings are of another method: ask for the method acip (--method acip), or leave them out"
        )
    count, rough = checked(arguments.TOKENS, tokens, "tokens"), as_flag(quick, "quick")
    return ScoreSettings(
        tokens=min(count, QUICK_TOKENS) if rough else count,
        seed=checked(arguments.SEED, seed, "seed"),
        quick=rough,
        provider=provider,
        float_only=as_flag(float_only, "float_only"),
        acip=_acip(acip or {}, quick=rough) if chosen == "acip" else None,
    )


def _acip(acip: AcipSettings | Mapping[str, Any], *, quick: bool) -> AcipSettings:
    from packager.scoremap.settings import QUICK_ACIP, AcipSettings

    if isinstance(acip, AcipSettings):
        return acip
    if not isinstance(acip, Mapping):
        raise UsageError(f"acip: expected AcipSettings, or what differs from the defaults, found {acip!r}")
    if unknown := [key for key in acip if key not in arguments.ACIP]:
        raise UsageError(f"acip: {unknown[0]!r} is unknown: expected some of {', '.join(arguments.ACIP)}")
    given = {key: checked(arguments.ACIP[key], value, f"acip[{key!r}]") for key, value in acip.items()}
    return dataclasses.replace(QUICK_ACIP if quick else AcipSettings(), **given)


def polishing_with(minutes: float, model: str | None, texts: tuple[Path, ...]) -> Polishing:
    """What polish needs beside a map. UsageError where no model was named, MissingExtraError without torch."""
    if model is None:
        raise UsageError("polish needs the map's own model: name it too (--polish 10 --model FOLDER)")
    require_extra("score", SCORE_LIBRARIES, "polishing")
    let_threads_sleep()
    from packager.scoring.polish_plan import Polishing
    from packager.source.checkpoint import open_checkpoint

    return Polishing(checkpoint=open_checkpoint(model), minutes=minutes, calibration_paths=texts)


def sampling(temperature: float, top_p: float, top_k: int, seed: int | None) -> Sampling:
    """How tokens are chosen, checked. UsageError for what only a temperature above 0 gives a meaning."""
    warmth = checked(arguments.TEMPERATURE, temperature, "temperature")
    share, count = checked(arguments.TOP_P, top_p, "top_p"), checked(arguments.TOP_K, top_k, "top_k")
    start = None if seed is None else checked(arguments.SAMPLING_SEED, seed, "seed")
    if not warmth and (share < 1 or count or start is not None):
        idle = "top_p" if share < 1 else "top_k" if count else "seed"
        raise UsageError(
            f"{idle}: at temperature 0 the likeliest token is always taken: set a temperature too, or leave it out"
        )
    from packager.runtime.answers import Sampling

    return Sampling(temperature=warmth, top_p=share, top_k=count, seed=start)
