"""Chooses and weighs the cached samples of a run or an evaluation: a study is a choice from one cache.

`--only` and `--except` take names or conditions, `--sample-weights` a file. A name is a sample id or a clip id, also
with `*` and `?`, or a file of them. A condition is tests of columns joined by `and`, such as `speed>5 and
turn=sharp|gentle`; whatever else is asked of the samples is a file that pandas writes. `COLUMNS` says what can be
tested. Nothing is chosen by accident: a name that fits no sample is refused, and so is a choice of none.
"""

import csv
import hashlib
import io
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import translate
from itertools import repeat
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from alpacache.config import number
from alpacache.driving.route import COMMANDS
from alpacache.driving.sample import Floats, SampleRef
from alpacache.driving.splits import Side, Split, covered_us, parse_split, side_of
from alpacache.driving.strata import STRATA, TURNS, Strata
from alpacache.errors import UsageError
from alpacache.masking import masked_values
from alpacache.sources.config import is_file
from alpacache.sources.name_lists import fitting, listed, read_names, read_table

_NUMBERS = ("t0", "view", "curvature", "speed")
_WORDS: Mapping[str, Sequence[str]] = {"clip": (), "stratum": STRATA, "turn": TURNS, "command": COMMANDS}
COLUMNS = (*_NUMBERS, *_WORDS)
"""`clip` (glob); `t0`, seconds on the clip's own clock; `view`; `stratum`, any that a sample is in; `turn`;
`curvature`, the largest ahead, 1/m; `speed`, the mean ahead, m/s; `command` of the route."""
_TEST = re.compile(r"\s*(\w+)\s*(<=|>=|!=|=|<|>)\s*(\S.*?)\s*", re.DOTALL)
_OPERATORS: Mapping[str, Callable[[Any, Any], Any]] = {
    **{"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "=": operator.eq, "!=": operator.ne}
}
_ID_COLUMNS = ("sample_id", "clip_id")


class SampleTable(Protocol):
    """The samples that are chosen from, by index."""

    def __len__(self) -> int: ...

    def sample_id(self, index: int) -> str: ...

    def strata_of(self, indices: Sequence[int]) -> Sequence[Strata]:
        """Strata of some samples; raises the error of one that cannot be read."""

    def commands_of(self, indices: Sequence[int]) -> Sequence[str]:
        """What the routes of some samples command. Raises `UsageError` where no sample can have a route."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleChoice:
    """A choice as it is written."""

    only: tuple[str, ...] = ()
    """Names, files and conditions, of which a sample must fit one; empty takes all."""
    exclude: tuple[str, ...] = ()
    """Entries of which a sample must fit none."""
    split: str | None = None
    """Take one side of this split, as `parse_split` reads it; None takes both."""
    side: Side = "train"
    weights: str | None = None
    """Table of weights by sample or clip id; samples that it does not name have weight 1."""

    def moved(self, place: Callable[[str], str]) -> "SampleChoice":
        """The same with other paths for its files."""
        only, exclude = (
            tuple(place(entry) if is_file(entry) else entry for entry in entries)
            for entries in (self.only, self.exclude)
        )
        return replace(self, only=only, exclude=exclude, weights=None if self.weights is None else place(self.weights))

    @property
    def text(self) -> dict[str, Any]:
        """The choice as it was given, for records."""
        given = {"only": list(self.only), "except": list(self.exclude), "sample_weights": self.weights}
        if self.split is not None:
            given |= {"split_by": self.split, "side": self.side}
        return {key: value for key, value in given.items() if value}

    def resolve(self, table: SampleTable) -> "ChosenSamples":
        """Find the samples. Raises `UsageError` for names of no sample, a condition without sense, a choice of none."""
        of, ids = len(table), _Names(table)
        left = np.ones(of, bool) if self.split is None else _on_side(ids, parse_split(self.split), self.side)
        for conditions in (False, True):  # a name costs nothing, a condition may read the paths of those left
            for entry in self.exclude:
                if is_condition(entry) == conditions:
                    left[_fitting(entry, table, ids, np.flatnonzero(left), option="--except")] = False
        taken = np.zeros(of, bool) if self.only else left.copy()
        for conditions in (False, True):
            for entry in self.only:
                if is_condition(entry) == conditions:
                    taken[_fitting(entry, table, ids, np.flatnonzero(left & ~taken), option="--only")] = True
        taken &= left
        weights = None
        if self.weights is not None:
            weights = _weights(self.weights, ids, of)
            taken &= weights > 0
        indices = np.flatnonzero(taken)
        if not indices.size:
            raise UsageError(f"none of {of} samples is chosen by {self}; `alpacache info` shows what a store holds.")
        if weights is not None:
            weights = weights[indices]
            weights = None if (weights == weights[0]).all() else weights
        names = [table.sample_id(index) for index in indices.tolist()]
        return ChosenSamples(indices=indices, weights=weights, of=of, text=self.text, sha256=_digest(names, weights))

    def __str__(self) -> str:
        parts = [f"{option} {entry!r}" for option, entry in self._options]
        return " ".join(parts) + (f" (side {self.side})" if self.split is not None else "")

    @property
    def _options(self) -> Iterator[tuple[str, str]]:
        yield from (("--only", entry) for entry in self.only)
        yield from (("--except", entry) for entry in self.exclude)
        if self.weights is not None:
            yield "--sample-weights", self.weights
        if self.split is not None:
            yield "--split-by", self.split


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenSamples:
    """The samples that a choice came to."""

    indices: NDArray[np.int64]
    """Chosen rows, in the order of the table."""
    weights: Floats | None
    """Weight of each, above 0; None where all are alike."""
    of: int
    """Samples there were to choose from."""
    text: Mapping[str, Any] = field(default_factory=dict)
    """The choice as it was given."""
    sha256: str
    """Digest of the ids and weights."""

    @property
    def record(self) -> dict[str, Any]:
        """What a run or an evaluation records of it; plain JSON."""
        text: dict[str, Any] = masked_values(dict(self.text))
        return {**text, "samples": len(self.indices), "of": self.of, "sha256": self.sha256}

    def table(self, sample_ids: Sequence[str]) -> str:
        """The samples and their weights as a csv file, which `--only` and `--sample-weights` read back."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["sample_id", "weight"])
        writer.writerows(zip(sample_ids, repeat(1.0) if self.weights is None else self.weights.tolist(), strict=False))
        return text.getvalue()


def find_samples(entries: Sequence[str], table: SampleTable, *, option: str) -> list[int]:
    """Indices of the samples that fit one of these entries, in the order of the entries, each once.

    Raises `UsageError` for a name or a condition that no sample fits, in the name of `option`.
    """
    ids, everything = _Names(table), np.arange(len(table))
    found: dict[int, None] = {}
    for entry in entries:
        fit = [int(index) for index in _fitting(entry, table, ids, everything, option=option)]
        if not fit:
            raise UsageError(f"{option} {entry[:200]!r}: none of {len(table)} samples fits it.")
        found |= dict.fromkeys(fit)
    return list(found)


def words_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a choice's record that was given, by option; the rest is what it came to."""
    return {key: value for key, value in record.items() if key not in ("samples", "of", "sha256")}


def is_condition(entry: str) -> bool:
    """Tell whether an entry is a condition, not a name or a file: it has an operator."""
    return not is_file(entry) and any(sign in entry for sign in "<>=")


def parse_condition(text: str) -> list[tuple[str, str, list[str]]]:
    """Column, operator and values of each test of a condition. Raises `UsageError`."""
    tests = []
    for part in re.split(r"\sand\s", text):
        where = f"condition {text[:200]!r}"
        if (match := _TEST.fullmatch(part)) is None:
            raise UsageError(
                f"{where}: {part.strip()[:80]!r} is no test; expected such as speed>5 or turn=sharp|gentle."
            )
        column, sign, values = match[1], match[2], [value.strip() for value in match[3].split("|")]
        if column not in COLUMNS:
            raise UsageError(f"{where}: there is no column {column!r}; known: {', '.join(COLUMNS)}.")
        if column in _WORDS and sign not in ("=", "!="):
            raise UsageError(f"{where}: {column} {sign} makes no sense; expected {column}=... or {column}!=...")
        if len(values) > 1 and sign not in ("=", "!="):
            raise UsageError(f"{where}: {column}{sign} takes one number, not {match[3][:80]!r}.")
        for value in values:
            _check_value(column, value, where)
        tests.append((column, sign, values))
    return tests


def check_entries(entries: Sequence[str]) -> None:
    """Raise an error for an entry that can be seen to make no sense before any store is opened.

    `UsageError` for a condition, `ValueError` with what is expected for nothing.
    """
    for entry in entries:
        if not entry.strip():
            raise ValueError("ids, a file of them, or a condition")
        if is_condition(entry):
            parse_condition(entry)


def _check_value(column: str, value: str, where: str) -> None:
    if column in _NUMBERS:
        try:
            finite = math.isfinite(number(value))
        except ValueError:
            finite = False
        if not finite:
            raise UsageError(f"{where}: {column} is compared with {value[:80]!r}; expected a number.")
    elif not value or ((known := _WORDS[column]) and value not in known):
        raise UsageError(f"{where}: {column} is never {value[:80]!r}; expected one of {', '.join(_WORDS[column])}.")


class _Names:
    """Samples by their id and by their clip's."""

    def __init__(self, table: SampleTable) -> None:
        self.samples = [table.sample_id(index) for index in range(len(table))]
        self.clips = [sample_id.rpartition("@")[0] for sample_id in self.samples]
        self._indices: dict[str, list[int]] = {}
        for index, names in enumerate(zip(self.samples, self.clips, strict=True)):
            for name in names:
                self._indices.setdefault(name, []).append(index)

    def find(self, name: str) -> list[int]:
        """Samples of this id or clip, or of those that a pattern fits."""
        return [index for known in fitting(name, self._indices) for index in self._indices[known]]


def _fitting(
    entry: str, table: SampleTable, ids: _Names, among: NDArray[np.int64], *, option: str
) -> NDArray[np.int64] | list[int]:
    """Samples that an entry names, or those of `among` that its condition holds for."""
    if is_condition(entry):
        for column, sign, values in parse_condition(entry):
            among = among[_holds(column, sign, values, table, ids, among)]
        return among
    names = read_names(entry, _ID_COLUMNS, what=f"{option} {entry}") if is_file(entry) else [entry]
    found = [ids.find(name) for name in names]
    _refuse_unknown([name for name, indices in zip(names, found, strict=True) if not indices], names, option, entry)
    return [index for indices in found for index in indices]


def _on_side(ids: _Names, split: Split, side: Side) -> NDArray[np.bool_]:
    """Tell for each sample whether it is on one side of a split.

    Raises `UsageError` for blocks longer than what is there of a clip, unless all of it is on that side already, as in
    a store that was extracted so.
    """
    refs = [*map(SampleRef.parse, ids.samples)]
    found = np.array([side_of(split, ref.clip_id, ref.t0_us) == side for ref in refs], bool)
    if split is not None and not found.all():
        split.check_lengths(covered_us(refs), of="clips, by the time that their samples cover")
    return found


def _holds(
    column: str, sign: str, values: Sequence[str], table: SampleTable, ids: _Names, among: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Tell for each of some samples whether a test holds."""
    rows: list[int] = among.tolist()
    if column in _NUMBERS:
        numbers = np.array(_numbers(column, table, ids, rows), np.float64)
        tests = [_OPERATORS[sign](numbers, number(value)) for value in values]
        held: NDArray[np.bool_] = (np.all if sign == "!=" else np.any)(tests, axis=0)
        return held
    if column == "clip":
        patterns = [re.compile(translate(value)) for value in values]
        fits = [any(pattern.match(ids.clips[row]) for pattern in patterns) for row in rows]
    elif column == "command":
        fits = [command in values for command in table.commands_of(rows)]
    else:
        names = [one.labels if column == "stratum" else (one.turn,) for one in table.strata_of(rows)]
        fits = [not set(values).isdisjoint(of_one) for of_one in names]
    return np.array(fits, bool) ^ (sign == "!=")


def _numbers(column: str, table: SampleTable, ids: _Names, rows: Sequence[int]) -> list[float]:
    if column in ("t0", "view"):
        refs = [SampleRef.parse(ids.samples[row]) for row in rows]
        return [ref.t0_us / 1e6 if column == "t0" else ref.view for ref in refs]
    strata = table.strata_of(rows)
    return [one.largest_curvature_pm if column == "curvature" else one.mean_speed_mps for one in strata]


def _weights(file: str, ids: _Names, count: int) -> Floats:
    """Weight of each sample by a table. Raises `UsageError` for what is no weight, or names no sample."""
    what = f"--sample-weights {file}"
    table = read_table(file, (*_ID_COLUMNS, "weight"), what=what)
    key = next((column for column in _ID_COLUMNS if column in table), None)
    if key is None or "weight" not in table:
        raise UsageError(f"{what}: expected the columns {' or '.join(_ID_COLUMNS)}, and weight.")
    weights: dict[str, float] = {}
    bad = []
    for name, text in zip(table[key], table["weight"], strict=True):
        try:
            weight = number(text.strip())
        except ValueError:
            weight = math.nan
        if not 0 <= weight < math.inf or weights.setdefault(name.strip(), weight) != weight:
            bad.append(f"{name.strip()}={text.strip()}")
    if bad:
        expected = "expected one number a name, 0 or above and finite"
        raise UsageError(f"{what}: {len(bad)} of {len(table[key])} weights cannot be used, {listed(bad)}; {expected}.")
    found = {name: ids.find(name) for name in weights}
    _refuse_unknown([name for name, indices in found.items() if not indices], list(weights), "--sample-weights", file)
    values, is_named, twice = np.ones(count), np.zeros(count, bool), dict[str, None]()
    for name, weight in weights.items():
        places = np.array(found[name])
        twice |= {ids.samples[place]: None for place in places[is_named[places] & (values[places] != weight)]}
        values[places], is_named[places] = weight, True
    if twice:
        raise UsageError(
            f"{what}: names that are ids, clips or patterns give {len(twice)} of {count} samples several weights, "
            f"{listed([*twice])}; expected one each."
        )
    return values


def _refuse_unknown(unknown: Sequence[str], names: Sequence[str], option: str, entry: str) -> None:
    if unknown:
        raise UsageError(
            f"{option} {entry[:200]}: {len(unknown)} of {len(names)} names fit no sample of the stores: "
            f"{listed(unknown)}. A name is a sample id (CLIP@T0_US#VIEW) or a clip id, also with * and ?; a condition "
            "has =, < or >, a file ends in .txt, .csv or .parquet."
        )


def _digest(names: Sequence[str], weights: Floats | None) -> str:
    digest = hashlib.sha256()
    for place, name in enumerate(names):
        digest.update(f"{name}\n".encode() if weights is None else f"{name} {float(weights[place])!r}\n".encode())
    return digest.hexdigest()
