"""The verbs as functions: typed arguments in, artefacts out, with the command's defaults.

The first argument goes by position, the others by name. Maps may be given as folders or opened, which spares reading
them again; profiles by name, as a path to a TOML file, or loaded. A budget is bytes, or text such as "300MiB" or "60%"
of the device's memory. What cannot be done is an exception of `packager.errors`; a full disk is an OSError. Nothing is
printed: long work tells a `progress` how far it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from packager.api import arguments
from packager.api.arguments import Context, as_flag, as_path, as_paths, as_text, checked
from packager.errors import ArtifactError, UsageError, require_extra
from packager.profile import DeviceProfile, shipped_profiles, with_memory
from packager.profile import load_profile as _load_profile
from packager.progress import Progress, Silent

if TYPE_CHECKING:
    from packager.bundle.opening import OpenedBundle
    from packager.memory.calibrate import MeasuredCoefficients
    from packager.pipeline import Built
    from packager.planning.plan import Plan, Request
    from packager.planning.size_curve import Curve
    from packager.scoremap.opening import OpenedMap
    from packager.scoremap.settings import AcipSettings, ScoreSettings
    from packager.scoring.polish_plan import Polishing
    from packager.scoring.score import ScoreReport
    from packager.validation.report import ValidationReport

AnyPath: TypeAlias = str | PathLike[str]
Paths: TypeAlias = AnyPath | Sequence[AnyPath]
AnyProfile: TypeAlias = AnyPath | DeviceProfile

SOME_SIZES = 8
"""What of a curve is measured where only a text is given."""
SCORE_LIBRARIES = (
    "torch",
    "transformers",
    "accelerate",
    "gguf",
    "huggingface_hub",
    "optimum",
    "pyarrow",
    "tokenizers",
)


def pack(
    model: AnyPath,
    *,
    profile: AnyProfile,
    out: AnyPath,
    budget: int | str | None = None,
    context: Context | None = None,
    kv_cache: str | None = None,
    map: AnyPath | None = None,
    calibration: Paths | None = None,
    tokens: int = 32768,
    seed: int = 0,
    quick: bool = False,
    device: str = "cpu",
    float_only: bool = False,
    method: str = "curvature",
    acip: AcipSettings | Mapping[str, Any] | None = None,
    validate: bool = True,
    force: bool = False,
    progress: Progress | None = None,
) -> Built:
    """Score a model unless its map is there, plan, build and validate. Needs the extra `score`.

    `map` is where the score map is kept or found: MODEL.map beside the bundle, unless given. For the other arguments
    see `score` and `build`. A bundle whose checks fail is written too: look at `report.passed`.

    >>> import packager
    >>> built = packager.pack("./pico-llama", profile="laptop-16gb", out="laptop.bundle", map="pico.map",
    ...                       calibration="text.txt", tokens=2048, quick=True, validate=False)
    >>> built.plan.peak_bytes <= built.plan.budget_bytes
    True
    """
    request = _request(profile, budget, context, kv_cache)
    floats = as_flag(float_only, "float_only") or not request.profile.bits
    settings = _settings(tokens, seed, quick, request.profile.provider, floats, method, acip)
    source, target, kept = _model(model), as_path(out, "out"), None if map is None else as_path(map, "map")
    texts, listener = as_paths(calibration, "calibration"), _listener(progress)
    validated, replacing = as_flag(validate, "validate"), as_flag(force, "force")
    torch_device = _device(device, "'pack'")
    from packager import pipeline

    return pipeline.pack(
        source,
        request,
        target,
        calibration_paths=texts,
        settings=settings,
        device=torch_device,
        validate=validated,
        force=replacing,
        progress=listener,
        map_folder=kept,
    )


def score(
    model: AnyPath,
    *,
    out: AnyPath,
    calibration: Paths | None = None,
    tokens: int = 32768,
    seed: int = 0,
    quick: bool = False,
    provider: str = "cpu",
    device: str = "cpu",
    float_only: bool = False,
    method: str = "curvature",
    acip: AcipSettings | Mapping[str, Any] | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> ScoreReport:
    """Compute the score map of a model, once, into folder `out`. Needs the extra `score`.

    `model` is a Hugging Face folder, a hub name, a .gguf file, or "demo". `calibration` names texts (.txt, .jsonl with
    a field "text", .parquet), built-in text where None. `quick` takes fewer tokens and options. `acip` says what of
    `AcipSettings` differs from the method's defaults. A run that was stopped goes on where it was.

    >>> import packager
    >>> report = packager.score("./pico-llama", out="new.map", calibration="text.txt", tokens=2048, quick=True)
    >>> report.identity.model.architecture
    'LlamaForCausalLM'
    """
    settings = _settings(
        tokens, seed, quick, checked(arguments.PROVIDER, provider, "provider"), float_only, method, acip
    )
    source, target, texts = _model(model), as_path(out, "out"), as_paths(calibration, "calibration")
    listener, replacing = _listener(progress), as_flag(force, "force")
    torch_device = _device(device, "'score'")
    from packager.scoring.score import score_model
    from packager.source.checkpoint import open_checkpoint

    return score_model(
        open_checkpoint(source),
        target,
        settings,
        calibration_paths=texts,
        device=torch_device,
        force=replacing,
        progress=listener,
    )


def plan(
    map: AnyPath | OpenedMap,
    *,
    profile: AnyProfile,
    budget: int | str | None = None,
    context: Context | None = None,
    kv_cache: str | None = None,
    out: AnyPath | None = None,
) -> Plan:
    """The largest model of a map that fits; needs no model and no runtime. `out` is the plan.json to write, if any.

    `context` counts prompt and answer together: the profile's where None; "auto" is the profile's minimum, and beyond
    it what costs no quality. `kv_cache` is "float", "int8", or "auto" for whichever is predicted to lose less.
    InfeasibleBudgetError says what is missing, and what would fit.

    >>> import packager
    >>> plan = packager.plan("pico.map", profile="laptop-16gb", budget="5%", context=512)
    >>> plan.peak_bytes <= plan.budget_bytes
    True
    """
    request = _request(profile, budget, context, kv_cache)
    target = None if out is None else as_path(out, "out")
    found = request.plan(_opened(map))
    if target is not None:
        write_plan(found, out=target)
    return found


def frontier(
    map: AnyPath | OpenedMap, *, profile: AnyProfile, budget: int | str | None = None, kv_cache: str | None = None
) -> tuple[Plan, ...]:
    """What a budget can be spent on: plans of ever longer context at ever higher loss, from the profile's minimum
    context. The first is what `plan` takes where the context is "auto".

    >>> import packager
    >>> plans = packager.frontier("pico.map", profile="laptop-16gb", budget="5%")
    >>> plans[0] == packager.plan("pico.map", profile="laptop-16gb", budget="5%", context="auto")
    True
    """
    return _request(profile, budget, "auto", kv_cache).frontier(_opened(map))


def write_plan(plan: Plan, *, out: AnyPath) -> None:
    """Write a plan as JSON. The same plan gives the same bytes.

    >>> import packager
    >>> packager.write_plan(packager.plan("pico.map", profile="laptop-16gb"), out="plan.json")
    >>> packager.inspect("plan.json").profile
    'laptop-16gb'
    """
    from packager.io.files import dump_json, write_text

    write_text(as_path(out, "out"), dump_json(plan.to_dict()))


def build(
    map: AnyPath | OpenedMap,
    *,
    profile: AnyProfile,
    out: AnyPath,
    budget: int | str | None = None,
    context: Context | None = None,
    kv_cache: str | None = None,
    polish: float | None = None,
    model: AnyPath | None = None,
    calibration: Paths | None = None,
    validate: bool = True,
    force: bool = False,
    progress: Progress | None = None,
) -> Built:
    """Write the bundle for a device from a map to folder `out`, validated on this machine's runtime.

    `polish` tunes the block scales of this one size for so many minutes against the map's own `model`, on `calibration`
    text; it needs the extra `score`. `force` replaces a bundle. A bundle whose checks fail is written too: look at
    `report.passed`. For the other arguments see `plan`.

    >>> import packager
    >>> built = packager.build("pico.map", profile="laptop-16gb", out="box.bundle", budget="5%", validate=False)
    >>> built.plan.cache in ("float", "int8")
    True
    """
    request = _request(profile, budget, context, kv_cache)
    target, texts, listener = as_path(out, "out"), as_paths(calibration, "calibration"), _listener(progress)
    validated, replacing = as_flag(validate, "validate"), as_flag(force, "force")
    minutes = None if polish is None else checked(arguments.MINUTES, polish, "polish")
    source = None if model is None else _model(model)
    opened = _opened(map)
    polishing = None if minutes is None else _polishing(minutes, source, texts)
    from packager import pipeline

    return pipeline.build(
        opened,
        request,
        target,
        validate=validated,
        force=replacing,
        progress=listener,
        polishing=polishing,
    )


def validate(bundle: AnyPath, *, progress: Progress | None = None) -> ValidationReport:
    """Check a bundle on this machine's runtime under its memory limit, and write the report into it.

    A check that fails is a row of the report, not an exception.

    >>> import packager
    >>> report = packager.validate("pico.bundle")
    >>> [check.name for check in report.checks if check.passed is False]
    []
    """
    root, listener = as_path(bundle, "bundle"), _listener(progress)
    from packager.validation.report import earlier_rounds, write_report
    from packager.validation.validate import validate_bundle

    opened = open_bundle(root)
    rounds = earlier_rounds(root, opened.manifest.bundle_sha256)
    report = validate_bundle(opened, progress=listener, rounds=rounds)
    write_report(report, root)
    return report


def curve(
    map: AnyPath | OpenedMap,
    *,
    profile: AnyProfile | None = None,
    context: int | None = None,
    sizes: int = 30,
    measure: int | None = None,
    text: AnyPath | None = None,
    windows: int = 8,
    progress: Progress | None = None,
) -> Curve:
    """What every size of a map costs: `sizes` of them, of the weights file, or of the process on `profile`.

    The losses are predicted; `measure` builds so many of the sizes and measures theirs on the runtime, on held-out text
    of the map or on `windows` windows of `text`, which needs the extra `score`.

    >>> import packager
    >>> points = packager.curve("pico.map", sizes=5).points
    >>> points[0].file_bytes < points[-1].file_bytes
    True
    """
    count, most_windows = checked(arguments.SIZES, sizes, "sizes"), checked(arguments.WINDOWS, windows, "windows")
    wanted = None if measure is None else checked(arguments.SIZES, measure, "measure")
    tokens = None if context is None else checked(arguments.CONTEXT_TOKENS, context, "context")
    path, listener = None if text is None else as_path(text, "text"), _listener(progress)
    from packager.planning.plan import NO_DEVICE

    device = load_profile(NO_DEVICE if profile is None else profile)
    if path is not None:
        require_extra("score", SCORE_LIBRARIES, "measuring on a text of your own")
        wanted = wanted or SOME_SIZES
    opened = _opened(map)
    from packager.planning.plan import Request
    from packager.planning.size_curve import evenly, predict

    request = Request(profile=device, context_tokens=tokens)
    predicted, plans = predict(opened, request, count, by_peak=profile is not None)
    if wanted is None:
        return predicted
    from packager.validation import measure_sizes

    measured_text = (
        measure_sizes.held_out_text(opened) if path is None else measure_sizes.text_of_file(opened, path, most_windows)
    )
    chosen = {position: plans[position] for position in evenly(wanted, len(plans))}
    return measure_sizes.measure(opened, device, predicted, chosen, measured_text, progress=listener)


def run(bundle: AnyPath, *, prompt: str, tokens: int = 128, chat: bool = True) -> Iterator[str]:
    """The bundle's greedy answer to `prompt`, piece by piece as it comes: at most `tokens` new tokens.

    Without `chat` the prompt is continued as it is, without the chat template.

    >>> import packager
    >>> answer = "".join(packager.run("pico.bundle", prompt="Where is the water?", tokens=4))
    >>> isinstance(answer, str)
    True
    """
    root, text = as_path(bundle, "bundle"), as_text(prompt, "prompt")
    most, templated = checked(arguments.ANSWER_TOKENS, tokens, "tokens"), as_flag(chat, "chat")
    from packager.runtime.sessions import generate

    opened = open_bundle(root)
    return generate(
        root,
        text,
        context_tokens=opened.manifest.bounds.context_tokens,
        most_tokens=most,
        chat=templated and opened.folder.chat_template.is_file(),
    )


def inspect(path: AnyPath) -> OpenedMap | OpenedBundle | Plan:
    """What lies at `path`, opened and checked: a map, a bundle, or a plan.

    >>> import packager
    >>> packager.inspect("pico.bundle").manifest.profile
    'pico-box'
    """
    where = as_path(path, "path")
    from packager.bundle.folder import BundleFolder
    from packager.planning.plan import PLAN_FILE, read_plan
    from packager.scoremap.folder import MapFolder

    if MapFolder(root=where).scoremap.is_file():
        return open_map(where)
    if BundleFolder(root=where).exists():
        return open_bundle(where)
    if where.is_file() or (where / PLAN_FILE).is_file():
        return read_plan(where if where.is_file() else where / PLAN_FILE)
    raise ArtifactError(f"{where} is no score map, plan or bundle")


def open_map(path: AnyPath) -> OpenedMap:
    """A score map, checked and ready to plan with; its store of weights is not read.

    >>> import packager
    >>> packager.open_map("pico.map").identity.model.name
    'pico-llama'
    """
    folder = as_path(path, "path")
    from packager.scoremap import opening

    return opening.open_map(folder)


def open_bundle(path: AnyPath) -> OpenedBundle:
    """A bundle, every file checked against its manifest.

    >>> import packager
    >>> packager.open_bundle("pico.bundle").manifest.bounds.context_tokens
    512
    """
    folder = as_path(path, "path")
    from packager.bundle import opening

    return opening.open_bundle(folder)


def profiles() -> tuple[DeviceProfile, ...]:
    """The device profiles that come with the package, by name.

    >>> import packager
    >>> "laptop-16gb" in [profile.name for profile in packager.profiles()]
    True
    """
    return tuple(_load_profile(name) for name in shipped_profiles())


def load_profile(profile: AnyProfile) -> DeviceProfile:
    """A device profile by name or from a TOML file; one that is loaded stays as it is.

    >>> import packager
    >>> packager.load_profile("laptop-16gb").memory_bytes
    17179869184
    """
    if isinstance(profile, DeviceProfile):
        return profile
    if not isinstance(profile, str | PathLike):
        raise UsageError(f"profile: expected a name, a path to a .toml file or a DeviceProfile, found {profile!r}")
    return _load_profile(str(as_path(profile, "profile")))


def calibrate_profile(
    base: AnyProfile, *, out: AnyPath, force: bool = False, progress: Progress | None = None
) -> MeasuredCoefficients:
    """Measure this machine's memory coefficients (a minute or two) and write `base` with them to the .toml file `out`.
    Needs the extra `score`.

    >>> import packager
    >>> packager.calibrate_profile("laptop-16gb", out="mine.json")
    Traceback (most recent call last):
    packager.errors.UsageError: out: expected the name of a .toml file, found 'mine.json'
    """
    profile, target, listener = load_profile(base), as_path(out, "out"), _listener(progress)
    if target.suffix != ".toml":
        raise UsageError(f"out: expected the name of a .toml file, found {str(target)!r}")
    if target.exists() and not as_flag(force, "force"):
        raise ArtifactError(f"{target} exists already: choose another name, or pass --force to replace it")
    require_extra("score", SCORE_LIBRARIES, "'profiles calibrate'")
    from packager.io.files import write_text
    from packager.memory.calibrate import calibrate

    target.parent.mkdir(parents=True, exist_ok=True)
    found = calibrate(profile, target.parent, listener)
    write_text(target, with_memory(profile, found.section()))
    return found


def _opened(map: AnyPath | OpenedMap) -> OpenedMap:
    from packager.scoremap.opening import OpenedMap

    if isinstance(map, OpenedMap):
        return map
    if not isinstance(map, str | PathLike):
        raise UsageError(f"map: expected a folder or an opened map, found {map!r}")
    return open_map(as_path(map, "map"))


def _model(model: AnyPath) -> str:
    return str(as_path(model, "model"))


def _listener(progress: Progress | None) -> Progress:
    if progress is None:
        return Silent()
    if isinstance(progress, Progress):
        return progress
    raise UsageError(f"progress: expected an object with phase, advance and warn, found {progress!r}")


def _request(profile: AnyProfile, budget: int | str | None, context: Context | None, kv_cache: str | None) -> Request:
    device = load_profile(profile)
    budget_bytes = _budget(budget, device)
    tokens = None if context is None else checked(arguments.CONTEXT, context, "context")
    cache = None if kv_cache is None else checked(arguments.KV_CACHE, kv_cache, "kv_cache")
    from packager.planning.plan import Request

    return Request(profile=device, budget_bytes=budget_bytes, context_tokens=tokens, cache=cache)


def _budget(budget: int | str | None, profile: DeviceProfile) -> int | None:
    from packager.sizes import parse_size

    if budget is None:
        return None
    if isinstance(budget, str):
        return parse_size(budget, of_bytes=profile.memory_bytes)
    return checked(arguments.BUDGET_BYTES, budget, "budget")


def _device(device: str, purpose: str) -> str:
    """A device that torch has here. MissingExtraError where there is no torch."""
    name = checked(arguments.DEVICE, device, "device")
    require_extra("score", SCORE_LIBRARIES, purpose)
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


def _settings(
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


def _polishing(minutes: float, model: str | None, texts: tuple[Path, ...]) -> Polishing:
    if model is None:
        raise UsageError("polish needs the map's own model: name it too (--polish 10 --model FOLDER)")
    require_extra("score", SCORE_LIBRARIES, "polishing")
    from packager.scoring.polish_plan import Polishing
    from packager.source.checkpoint import open_checkpoint

    return Polishing(checkpoint=open_checkpoint(model), minutes=minutes, calibration_paths=texts)
