"""The score map: what every unit could give up, in one order.

`scoremap.safetensors` holds it: the units and their options as JSON in the metadata, and as arrays the bytes and
losses of all options and the moves. Planning reads this file and `map.json` and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from packager.errors import ArtifactError
from packager.forms.kinds import Kind
from packager.forms.registry import Form, form_bytes, parse_form
from packager.io.files import dump_json
from packager.io.plain_json import strict_json
from packager.io.records import Count, Dimension, from_plain, shown
from packager.scoremap.folder import SCOREMAP_FILE, MapFolder

SCHEMA = 2
_METADATA_KEY = "scoremap"
_MOST_LABEL = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """What is compressed on its own: `rows` rows, from row `start`, of the exported graph's weight `matrix`.

    Mostly a whole matrix. A vocabulary is cut where its tokens grow rare. Kind `tied`: embedding and head are one.
    """

    name: str
    kind: Kind
    rows: Dimension
    cols: Dimension
    matrix: str
    start: Count = 0

    @property
    def elements(self) -> int:
        """Number of weights."""
        return self.rows * self.cols


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One way to store a unit: real packed `bytes`, and the predicted rise of the loss in nats per token."""

    form: Form
    bytes: int
    loss_nats: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """Unit number `unit` goes from its option `option - 1` to `option`."""

    unit: int
    option: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreMap:
    """Units, each unit's options from largest to smallest on its lower convex hull, and every move in one order."""

    units: tuple[Unit, ...]
    options: tuple[tuple[Option, ...], ...]
    moves: tuple[Move, ...]


def front(options: Iterable[Option]) -> tuple[Option, ...]:
    """The options that no other beats in both bytes and loss, from most bytes to least."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.bytes, o.loss_nats, o.form.label)):
        if not kept or option.loss_nats < kept[-1].loss_nats:
            kept.append(option)
    return tuple(reversed(kept))


def hull(options: Iterable[Option]) -> tuple[Option, ...]:
    """The lower convex hull of (bytes, loss), from most bytes to least: each step down costs more per byte saved.

    An option that costs at least as many bytes as another without being better is left out.
    """
    chain: list[Option] = []
    for option in reversed(front(options)):
        while len(chain) >= 2 and _slope(chain[-2], chain[-1]) <= _slope(chain[-1], option):
            chain.pop()
        chain.append(option)
    return tuple(reversed(chain))


def _slope(smaller: Option, larger: Option) -> float:
    """Loss added per byte saved when going from `larger` to `smaller`."""
    return (smaller.loss_nats - larger.loss_nats) / (larger.bytes - smaller.bytes)


def merge(units: Sequence[Unit], options: Sequence[Sequence[Option]]) -> tuple[Move, ...]:
    """All units' steps in one order, by loss added per byte saved; ties by the unit's name, then by step. A total order
    that does not depend on the order of the units."""
    steps = [
        (_slope(chain[step], chain[step - 1]), unit.name, step, number)
        for number, (unit, chain) in enumerate(zip(units, options, strict=True))
        for step in range(1, len(chain))
    ]
    return tuple(Move(unit=number, option=step) for _, _, step, number in sorted(steps))


def make_map(units: Sequence[Unit], options: Sequence[Iterable[Option]]) -> ScoreMap:
    """The map of `units` with the given options, of which those on the hulls stay."""
    hulls = tuple(hull(choices) for choices in options)
    for unit, chain in zip(units, hulls, strict=True):
        if not chain:
            raise ArtifactError(f"unit {unit.name} has no option")
    return ScoreMap(units=tuple(units), options=hulls, moves=merge(units, hulls))


def restricted(scoremap: ScoreMap, allowed: Callable[[Unit, Form], bool]) -> ScoreMap:
    """The map with only the forms a device can run; hulls and order are made anew from what is left."""
    kept = [
        [option for option in chain if allowed(unit, option.form)]
        for unit, chain in zip(scoremap.units, scoremap.options, strict=True)
    ]
    for unit, chain in zip(scoremap.units, kept, strict=True):
        if not chain:
            raise ArtifactError(
                f"unit {unit.name}: none of its options runs on this device; score again with options it has kernels "
                "for"
            )
    if all(len(some) == len(chain) for some, chain in zip(kept, scoremap.options, strict=True)):
        return scoremap
    return make_map(scoremap.units, kept)


def reweighed(scoremap: ScoreMap, weigh: Callable[[Unit, Form], int]) -> ScoreMap:
    """The map with `bytes` of another resource, such as resident memory; hulls and order are made anew."""
    options = [
        [Option(form=option.form, bytes=weigh(unit, option.form), loss_nats=option.loss_nats) for option in chain]
        for unit, chain in zip(scoremap.units, scoremap.options, strict=True)
    ]
    return make_map(scoremap.units, options)


def map_tensors(scoremap: ScoreMap) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Arrays and metadata of `scoremap.safetensors`."""
    described = [
        asdict(unit) | {"options": [option.form.label for option in chain]}
        for unit, chain in zip(scoremap.units, scoremap.options, strict=True)
    ]
    flat = [option for chain in scoremap.options for option in chain]
    arrays: dict[str, NDArray[Any]] = {
        "option_bytes": np.array([option.bytes for option in flat], np.int64),
        "option_loss_nats": np.array([option.loss_nats for option in flat], np.float64),
        "moves": np.array([(move.unit, move.option) for move in scoremap.moves], np.int32).reshape(-1, 2),
    }
    # One key: safetensors writes several in random order, and the file's hash names the map.
    return arrays, {_METADATA_KEY: dump_json({"schema": SCHEMA, "units": described})}


def read_map(root: Path) -> ScoreMap:
    """The score map in `.map` folder `root`, checked: known forms, exact bytes, convex hulls, the right order."""
    from safetensors import SafetensorError, safe_open

    path = MapFolder(root=root).scoremap
    if not path.is_file():
        raise ArtifactError(f"{root} is not a score map ({SCOREMAP_FILE} is missing): make one with 'packager score'")
    try:
        with safe_open(path, framework="numpy") as file:
            described = strict_json((file.metadata() or {})[_METADATA_KEY])
            sizes, losses, moves = (file.get_tensor(name) for name in ("option_bytes", "option_loss_nats", "moves"))
        if described.get("schema") != SCHEMA:
            found = shown(described.get("schema"))
            raise ArtifactError(f"{path} has schema {found}, this version reads {SCHEMA}: score the model again")
        if unknown := sorted(set(described) - {"schema", "units"}):
            raise ValueError(f"key {unknown[0]!a} is unknown")
        entries = [dict(entry) for entry in described["units"]]
        labels = [[str(label) for label in entry.pop("options")] for entry in entries]
        if (
            sizes.shape != losses.shape
            or sizes.shape != (sum(map(len, labels)),)
            or moves.ndim != 2
            or moves.shape[1] != 2
            or (sizes.dtype, losses.dtype, moves.dtype) != (np.int64, np.float64, np.int32)
        ):
            raise ValueError(
                f"arrays of shapes {sizes.shape}, {losses.shape}, {moves.shape} for {sum(map(len, labels))} options"
            )
        if not all(labels) or not all(len(label) <= _MOST_LABEL for chain in labels for label in chain):
            raise ValueError("a unit without options, or one with an endless name")
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise ArtifactError(f"{path} is damaged ({reason}): score the model again") from error
    units, chains, position, seen = [], [], 0, set[str]()
    for number, (entry, names) in enumerate(zip(entries, labels, strict=True)):
        unit = from_plain(Unit, entry, f"{path}: units[{number}]")
        chain: list[Option] = []
        for label in names:
            where = f"{path}: units[{unit.name!r}].options[{label}]"
            try:
                form = parse_form(label)
            except ArtifactError as error:
                raise ArtifactError(
                    f"{where}: {error}; the map is of another version or damaged: score the model again"
                ) from None
            option = Option(form=form, bytes=int(sizes[position]), loss_nats=float(losses[position]))
            exact = form_bytes(form, unit.rows, unit.cols)
            if option.bytes != exact or not math.isfinite(option.loss_nats):
                raise ArtifactError(
                    f"{where} claims {option.bytes} bytes and loss {option.loss_nats}, expected {exact} bytes"
                )
            if chain and option.bytes >= chain[-1].bytes:
                raise ArtifactError(
                    f"{where} is no smaller than the option before it: the file is damaged, score the model again"
                )
            chain.append(option)
            position += 1
        if unit.name in seen:
            raise ArtifactError(f"{path}: unit {unit.name!a} stands twice: the file is damaged, score the model again")
        seen.add(unit.name)
        units.append(unit)
        chains.append(tuple(chain))
    scoremap = ScoreMap(
        units=tuple(units), options=tuple(chains), moves=tuple(Move(unit=int(u), option=int(o)) for u, o in moves)
    )
    if scoremap.moves != merge(scoremap.units, scoremap.options):
        raise ArtifactError(
            f"{path}: its moves are not in the order of its losses: the file is damaged, score the model again"
        )
    return scoremap
