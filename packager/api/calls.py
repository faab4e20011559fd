"""The verbs as functions: typed arguments in, artefacts out, with the command's defaults.

The first argument goes by position, the others by name. Maps may be given as folders or opened, which spares reading
them again; profiles by name, as a path to a TOML file, or loaded. A budget is bytes, or text such as "300MiB" or "60%"
of the device's memory. What cannot be done, for want of space too, is an exception of `packager.errors`. Nothing is
printed: long work tells a `progress` how far it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packager.api import arguments
from packager.api.arguments import Context, as_flag, as_path, as_paths, as_text, checked
from packager.api.given import (
    SCORE_LIBRARIES,
    AnyPath,
    AnyProfile,
    Paths,
    device_here,
    listener_of,
    model_name,
    opened_bundle,
    opened_map,
    paths_of,
    polishing_with,
    profile_of,
    request_for,
    sampling,
    scoring_settings,
    target_for,
)
from packager.api.near_names import is_artefact, is_bundle, is_map, require_there
from packager.errors import ArtifactError, OutputError, UsageError, require_extra
from packager.profile import DeviceProfile, shipped_profiles, with_memory
from packager.progress import Progress

if TYPE_CHECKING:
    from packager.bundle.opening import OpenedBundle
    from packager.memory.calibrate import MeasuredCoefficients
    from packager.pipeline import Built
    from packager.planning.plan import Plan
    from packager.planning.size_curve import Curve
    from packager.runtime.answers import Answer, Conversation
    from packager.scoremap.opening import OpenedMap
    from packager.scoremap.settings import AcipSettings
    from packager.scoring.score import ScoreReport
    from packager.validation.report import ValidationReport

SOME_SIZES = 8
"""What of a curve is measured where only a text is given."""


def pack(
    model: AnyPath,
    *,
    profile: AnyProfile,
    out: AnyPath,
    budget: int | str | None = None,
    context: Context | None = None,
    kv_cache: str | None = None,
    max_rise: float | None = None,
    file_size: int | str | None = None,
    ratio: float | None = None,
    fill: bool = False,
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
    request = request_for(profile, budget, context, kv_cache, target_for(max_rise, file_size, ratio, fill))
    floats = as_flag(float_only, "float_only") or not request.profile.bits
    settings = scoring_settings(tokens, seed, quick, request.profile.provider, floats, method, acip)
    source, target, kept = model_name(model), as_path(out, "out"), None if map is None else as_path(map, "map")
    texts, listener = as_paths(calibration, "calibration"), listener_of(progress)
    validated, replacing = as_flag(validate, "validate"), as_flag(force, "force")
    torch_device = device_here(device, "'pack'")
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
    settings = scoring_settings(
        tokens, seed, quick, checked(arguments.PROVIDER, provider, "provider"), float_only, method, acip
    )
    source, target, texts = model_name(model), as_path(out, "out"), as_paths(calibration, "calibration")
    listener, replacing = listener_of(progress), as_flag(force, "force")
    torch_device = device_here(device, "'score'")
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
    max_rise: float | None = None,
    file_size: int | str | None = None,
    ratio: float | None = None,
    fill: bool = False,
    out: AnyPath | None = None,
    force: bool = False,
) -> Plan:
    """The best model of a map that fits; needs no model and no runtime. `out` is the plan.json to write, if any:
    `force` replaces a file there that is no plan.

    Of all sizes that fit it is the smallest within 0.002 nats per token of the best, or with `fill` the largest.
    `max_rise` takes the smallest whose predicted rise of the loss, in nats per token, is at most that; `file_size`
    bounds graph and weights together (bytes, or text such as "90MB"), `ratio` the weights as a share of the float16
    model's. All that are given hold. A margin is kept free beside the predicted peak (`plan.margin_bytes`), for nothing
    is measured; `build` measures and keeps none unless told not to validate.

    `context` counts prompt and answer together: the profile's where None; "auto" is the profile's minimum, and beyond
    it what costs no quality. `kv_cache` is "float", "int8", or "auto" for whichever is predicted to lose less.
    InfeasibleBudgetError says what is missing, and what would fit.

    >>> import packager
    >>> plan = packager.plan("pico.map", profile="laptop-16gb", budget="5%", context=512)
    >>> plan.peak_bytes <= plan.budget_bytes
    True
    """
    request = request_for(profile, budget, context, kv_cache, target_for(max_rise, file_size, ratio, fill))
    target, replacing = None if out is None else as_path(out, "out"), as_flag(force, "force")
    if target is not None:
        _require_plan_file(target, paths_of(map, profile), force=replacing)
    found = request.unmeasured().plan(opened_map(map))
    if target is not None:
        write_plan(found, out=target, force=replacing)
    return found


def frontier(
    map: AnyPath | OpenedMap,
    *,
    profile: AnyProfile,
    budget: int | str | None = None,
    kv_cache: str | None = None,
    max_rise: float | None = None,
    file_size: int | str | None = None,
    ratio: float | None = None,
    fill: bool = False,
) -> tuple[Plan, ...]:
    """What a budget can be spent on: plans of ever longer context at ever higher loss, from the profile's minimum
    context. The first is what `plan` takes where the context is "auto".

    >>> import packager
    >>> plans = packager.frontier("pico.map", profile="laptop-16gb", budget="5%")
    >>> plans[0] == packager.plan("pico.map", profile="laptop-16gb", budget="5%", context="auto")
    True
    """
    request = request_for(profile, budget, "auto", kv_cache, target_for(max_rise, file_size, ratio, fill))
    return request.unmeasured().frontier(opened_map(map))


def write_plan(plan: Plan, *, out: AnyPath, force: bool = False, inputs: Paths | None = None) -> None:
    """Write a plan as JSON, over an older plan too; `force` replaces any other file. The same plan gives the same
    bytes. `inputs`, what it was made from, are never written over or into.

    >>> import packager
    >>> packager.write_plan(packager.plan("pico.map", profile="laptop-16gb"), out="plan.json")
    >>> packager.inspect("plan.json").profile
    'laptop-16gb'
    """
    from packager.io.files import dump_json
    from packager.io.outputs import write_output

    target = as_path(out, "out")
    _require_plan_file(target, as_paths(inputs, "inputs"), force=as_flag(force, "force"))
    write_output(target, dump_json(plan.to_dict()).encode())


def _require_plan_file(target: Path, inputs: Iterable[Path], *, force: bool) -> None:
    from packager.io.outputs import require_file
    from packager.planning.plan import is_plan

    require_file(target, force=force, ours=is_plan, inputs=inputs)


def build(
    map: AnyPath | OpenedMap,
    *,
    profile: AnyProfile,
    out: AnyPath,
    budget: int | str | None = None,
    context: Context | None = None,
    kv_cache: str | None = None,
    max_rise: float | None = None,
    file_size: int | str | None = None,
    ratio: float | None = None,
    fill: bool = False,
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
    request = request_for(profile, budget, context, kv_cache, target_for(max_rise, file_size, ratio, fill))
    target, texts, listener = as_path(out, "out"), as_paths(calibration, "calibration"), listener_of(progress)
    validated, replacing = as_flag(validate, "validate"), as_flag(force, "force")
    minutes = None if polish is None else checked(arguments.MINUTES, polish, "polish")
    source = None if model is None else model_name(model)
    opened = opened_map(map)
    polishing = None if minutes is None else polishing_with(minutes, source, texts)
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

    A check that fails is a row of the report, not an exception; a report that cannot be written is a warning.

    >>> import packager
    >>> report = packager.validate("pico.bundle")
    >>> [check.name for check in report.checks if check.passed is False]
    []
    """
    root, listener = as_path(bundle, "bundle"), listener_of(progress)
    from packager.io.failures import explained
    from packager.validation.report import earlier_rounds
    from packager.validation.report_page import write_report
    from packager.validation.validate import validate_bundle

    opened = open_bundle(root)
    rounds = earlier_rounds(root, opened.manifest.bundle_sha256)
    report = validate_bundle(opened, progress=listener, rounds=rounds)
    try:
        with explained(opened.folder.report):
            write_report(report, root)
    except OutputError as error:
        listener.warn(f"the report is not kept: {error}")
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
    path, listener = None if text is None else as_path(text, "text"), listener_of(progress)
    from packager.planning.plan import NO_DEVICE

    device = profile_of(NO_DEVICE if profile is None else profile)
    if path is not None:
        require_extra("score", SCORE_LIBRARIES, "measuring on a text of your own")
        wanted = wanted or SOME_SIZES
    opened = opened_map(map)
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


def run(
    bundle: AnyPath | OpenedBundle,
    *,
    prompt: str,
    tokens: int = 128,
    chat: bool = True,
    system: str | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
) -> Answer:
    """The bundle's answer to `prompt`, piece by piece as it comes: at most `tokens` new tokens.

    Without `chat` the prompt is continued as it is, without the chat template. `system` is said before it. The
    likeliest token is taken each time, unless a `temperature` lets chance choose among the `top_k` likeliest (0: all)
    that together have probability `top_p`; the same `seed` chooses the same. The answer counts its `tokens`, and its
    `tokens_per_second`. Whether the bundle is valid is not asked: `report.json` beside it says.

    >>> import packager
    >>> answer = packager.run("pico.bundle", prompt="Where is the water?", tokens=4)
    >>> isinstance("".join(answer), str) and answer.tokens <= 4
    True
    """
    text = as_text(prompt, "prompt")
    most, templated = checked(arguments.ANSWER_TOKENS, tokens, "tokens"), as_flag(chat, "chat")
    line, chosen = None if system is None else as_text(system, "system"), sampling(temperature, top_p, top_k, seed)
    if line is not None and not templated:
        raise UsageError("system: a raw prompt has no system line: put it into the prompt")
    opened = opened_bundle(bundle)
    if line is not None:
        _require_template(opened, "system")
    from packager.runtime.answers import Speaker, generate

    speaker = Speaker(opened.folder.root, context_tokens=opened.manifest.bounds.context_tokens, sampling=chosen)
    has_template = opened.folder.chat_template.is_file()
    return generate(speaker, text, system=line, most_tokens=most, chat=templated and has_template)


def chat(
    bundle: AnyPath | OpenedBundle,
    *,
    system: str | None = None,
    tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
) -> Conversation:
    """A conversation with a bundle: each `say(text)` is answered as by `run`, in the light of what was said before, as
    far as the context holds it; `forgotten` counts the oldest turns that it no longer holds.

    >>> import packager
    >>> packager.chat("pico.bundle", system=3)
    Traceback (most recent call last):
    packager.errors.UsageError: system: expected text, found 3
    """
    most = checked(arguments.ANSWER_TOKENS, tokens, "tokens")
    line, chosen = None if system is None else as_text(system, "system"), sampling(temperature, top_p, top_k, seed)
    opened = opened_bundle(bundle)
    _require_template(opened, "chat")
    from packager.runtime.answers import Conversation, Speaker

    speaker = Speaker(opened.folder.root, context_tokens=opened.manifest.bounds.context_tokens, sampling=chosen)
    return Conversation(speaker, system=line, most_tokens=most)


def _require_template(opened: OpenedBundle, what: str) -> None:
    if not opened.folder.chat_template.is_file():
        raise UsageError(f"{what}: {opened.folder.root} has no chat template: its model only continues a prompt")


def inspect(path: AnyPath) -> OpenedMap | OpenedBundle | Plan:
    """What lies at `path`, opened and checked: a map, a bundle, or a plan.

    >>> import packager
    >>> packager.inspect("pico.bundle").manifest.profile
    'pico-box'
    """
    where = as_path(path, "path")
    require_there(where, "score map, plan or bundle", is_artefact)
    from packager.planning.plan import PLAN_FILE, read_plan

    if is_map(where):
        return open_map(where)
    if is_bundle(where):
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
    return opened_map(as_path(path, "path"))


def open_bundle(path: AnyPath) -> OpenedBundle:
    """A bundle, every file checked against its manifest.

    >>> import packager
    >>> packager.open_bundle("pico.bundle").manifest.bounds.context_tokens
    512
    """
    return opened_bundle(as_path(path, "path"))


def profiles() -> tuple[DeviceProfile, ...]:
    """The device profiles that come with the package, by name.

    >>> import packager
    >>> "laptop-16gb" in [profile.name for profile in packager.profiles()]
    True
    """
    return tuple(profile_of(name) for name in shipped_profiles())


def load_profile(profile: AnyProfile) -> DeviceProfile:
    """A device profile by name or from a TOML file; one that is loaded stays as it is.

    >>> import packager
    >>> packager.load_profile("laptop-16gb").memory_bytes
    17179869184
    """
    return profile_of(profile)


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
    profile, target, listener = profile_of(base), as_path(out, "out"), listener_of(progress)
    if target.suffix != ".toml":
        raise UsageError(f"out: expected the name of a .toml file, found {str(target)!r}")
    from packager.io.outputs import require_file, write_output

    replacing = as_flag(force, "force")
    require_extra("score", SCORE_LIBRARIES, "'profiles calibrate'")
    require_file(target, force=replacing)
    from packager.memory.calibrate import calibrate

    found = calibrate(profile, target.parent, listener)
    write_output(target, with_memory(profile, found.section()).encode())
    return found
