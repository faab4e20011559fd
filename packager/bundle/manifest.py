"""`packager.json`, a bundle's manifest, typed and checked."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from packager.bundle.folder import REQUIRED_ROLES
from packager.errors import ArtifactError
from packager.forms.registry import Form, form_bytes, parse_form
from packager.io.files import require_distinct, sha256_json
from packager.io.records import Amount, Count, Dimension, Positive, from_plain, shown, without_none
from packager.planning.predicted_memory import PredictedMemory
from packager.profile import PROVIDERS
from packager.scoremap.identity import ModelIdentity

SCHEMA = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class BundleFile:
    """One file of the bundle, by its path within."""

    path: str
    role: str
    bytes: Count
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class BundleUnit:
    """One unit and the form it is stored in."""

    name: str
    kind: str
    rows: Dimension
    cols: Dimension
    matrix: str
    start: Count
    form: str

    def parsed(self) -> Form:
        """The form itself."""
        return parse_form(self.form)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """What the bundle is bounded to. `provider` is the execution provider, `vocabulary` the number of tokens."""

    budget_bytes: Positive
    context_tokens: Dimension
    prompt_tokens: Dimension
    vocabulary: Dimension
    provider: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Predicted:
    """What the plan promised: the process's peak with its terms, the rise of the loss, the bytes of weights."""

    peak_bytes: Count
    loss_nats: float
    file_bytes: Count
    memory: PredictedMemory


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What validation measured: mean losses on the held-out text in nats per token, on the runtime, over the source
    model's, and of the same weights in torch; memory of the process and its speed with a full context. None where it
    was not measured.
    """

    heldout_nats: float | None = None
    loss_nats: float | None = None
    torch_heldout_nats: float | None = None
    peak_bytes: Count | None = None
    anonymous_bytes: Count | None = None
    mapped_bytes: Count | None = None
    context_tokens: Count | None = None
    load_seconds: Amount | None = None
    prefill_tokens_per_second: Amount | None = None
    decode_tokens_per_second: Amount | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Polish:
    """How block scales were tuned: for how long, on what text, the divergence from the source model on held-out text
    before and after in nats per token, and how many units' scales were kept, 0 where it was no better."""

    minutes: float
    steps: int
    text: str
    heldout_divergence_before_nats: float
    heldout_divergence_after_nats: float
    units: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Everything in a bundle and where it comes from. `bundle_sha256` is over `files`; `measured` comes with
    validation, `polish` says how block scales were tuned, where they were."""

    schema: int
    bundle_sha256: str
    files: tuple[BundleFile, ...]
    model: ModelIdentity
    map_sha256: str
    plan_sha256: str
    profile: str
    profile_sha256: str
    units: tuple[BundleUnit, ...]
    bounds: Bounds
    predicted: Predicted
    versions: dict[str, str]
    measured: Measured | None = None
    polish: Polish | None = None
    cache: str = "float"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `packager.json`."""
        data = without_none(self)
        return data | {"measured": without_none(self.measured)} if self.measured is not None else data


def parse_manifest(data: dict[str, Any], where: str) -> Manifest:
    """The manifest in `data`, read from `where`, checked in itself: its files' hash, its units' bytes, its graph."""
    if data.get("schema") != SCHEMA:
        raise ArtifactError(
            f"{where} has schema {shown(data.get('schema'))}, this version reads {SCHEMA}: build the bundle again"
        )
    manifest = from_plain(Manifest, data, where)
    require_distinct([entry.path for entry in manifest.files], where)
    if files_hash(manifest.files) != manifest.bundle_sha256:
        raise ArtifactError(
            f"{where}: its files do not add up to its bundle_sha256: the manifest was altered, build the bundle again"
        )
    for role in REQUIRED_ROLES:
        if sum(entry.role == role for entry in manifest.files) != 1:
            raise ArtifactError(
                f"{where}: expected one file with role {role!r}: the manifest was altered, build the bundle again"
            )
    if manifest.bounds.provider not in PROVIDERS:
        raise ArtifactError(
            f"{where}: bounds.provider {manifest.bounds.provider!r}: expected one of {', '.join(PROVIDERS)}: the "
            "manifest was altered, build the bundle again"
        )
    try:
        total = sum(form_bytes(unit.parsed(), unit.rows, unit.cols) for unit in manifest.units)
    except ArtifactError as error:
        raise ArtifactError(f"{where}: units: {error}") from None
    if total != manifest.predicted.file_bytes:
        raise ArtifactError(
            f"{where}: its units come to {total} bytes, expected {manifest.predicted.file_bytes}: the manifest was "
            "altered, build the bundle again"
        )
    return manifest


def files_hash(files: tuple[BundleFile, ...]) -> str:
    """The hash that names a bundle."""
    return sha256_json([asdict(entry) for entry in files])
