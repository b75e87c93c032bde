"""Recorded runs as a world that a search can be replayed in, and a space that is held to them."""

import math
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thriftlm.search.spaces.domains import (
    Choice,
    Domain,
    Recorded,
    Steps,
    Value,
    is_number,
    recorded,
)
from thriftlm.search.spaces.section import Rejected
from thriftlm.search.spaces.settings import SCHEDULERS
from thriftlm.search.spaces.space import Point, Space
from thriftlm.search.spaces.start import Start
from thriftlm.spec import InputError, RunSpec

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

NEEDED = ("run_id", "tokens", "loss", "tokens_per_s", "usd_per_hour", "status")
SECTIONS = ("model.", "optim.", "data.", "system.")
BROKEN = ("oom", "failed")
"""How a run ends that says nothing of its recipe."""


@dataclass(frozen=True, eq=False)
class Runs:
    """Recorded runs, each the pair of a recipe and a system; reports of a run by tokens."""

    ids: list[str]
    recipe: Indices
    """Of each run, its place in `recipes`."""
    system: Indices
    """Of each run, its place in `systems`."""
    recipes: list[dict[str, Value]]
    """Varied fields of model, optim and data."""
    systems: list[dict[str, Value]]
    """Varied fields of system."""
    first: Indices
    """Where the reports of each run begin; one more entry than runs."""
    tokens: Floats
    loss: Floats
    tokens_per_s: Floats
    usd_per_hour: Floats
    status: list[str]
    """How each run ended."""
    says_market: bool = False
    """Whether the table says which market its prices are of."""

    def __len__(self) -> int:
        return len(self.ids)

    def reports(self, run: int) -> slice:
        """Where the reports of a run are."""
        return slice(int(self.first[run]), int(self.first[run + 1]))

    def speed(self, run: int) -> float:
        """Median tokens per second of all its GPUs; NaN where it never ran."""
        return float(self._speeds[run])

    @cached_property
    def _speeds(self) -> Floats:
        found = np.full(len(self), np.nan)
        for run in range(len(self)):
            rates = self.tokens_per_s[self.reports(run)]
            known = rates[np.isfinite(rates) & (rates > 0)]
            if len(known):
                found[run] = np.median(known)
        return found

    def next_report(self, run: int, tokens: float) -> int:
        """Where the first report of a run after so many tokens is; its last where there is none."""
        where = self.reports(run)
        done = int(np.searchsorted(self.tokens[where], tokens, side="right")) if tokens else 0
        return min(int(self.first[run]) + done, int(self.first[run + 1]) - 1)

    def price(self, run: int) -> float:
        """USD per hour of everything billed."""
        return float(self.usd_per_hour[self.first[run]])


def read_runs(path: Path, space: Space) -> Runs:
    """The recorded runs of a table that belong to a space.

    Raises:
        InputError: it cannot be read, lacks a column, holds nothing of the space, or has no price.
    """
    table = _read(path)
    missing = [name for name in (*NEEDED, *space.domains) if name not in table.column_names]
    if missing:
        raise InputError(
            f"{path}: simulate needs the columns {', '.join(NEEDED)} and one per varied field of "
            f"the space; missing: {', '.join(missing)}"
        )
    codes, ids = _encoded(table["run_id"])
    tokens = _numbers(table, "tokens", path)
    order = np.lexsort((tokens, codes))
    starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
    heads = order[starts]
    inside = np.ones(len(heads), bool)
    cells: dict[str, list[Value]] = {}
    for name in table.column_names:
        if not name.startswith(SECTIONS):
            continue
        column, words = _encoded(table[name])
        domain = space.domains.get(name) or constant(space, name)
        if domain is None:
            continue
        values = [value_in(domain, word) for word in words]
        known = np.array([value is not OUTSIDE for value in values])
        inside &= known[column[heads]]
        if name in space.domains:
            cells[name] = [values[code] for code in column[heads]]
    if not inside.any():
        raise InputError(
            f"{path}: none of its {len(heads)} runs lies in space {space.name}; "
            "compare the values of its columns with the space file"
        )
    return _runs(table, path, order, starts, np.flatnonzero(inside), cells, ids)


def _runs(
    table: Any,
    path: Path,
    order: Indices,
    starts: Indices,
    kept: Indices,
    cells: Mapping[str, list[Value]],
    ids: list[Any],
) -> Runs:
    """The kept runs; of several with one recipe and system, the first."""
    ends = np.append(starts[1:], len(order))
    learn = [name for name in cells if not name.startswith("system.")]
    where = [name for name in cells if name.startswith("system.")]
    recipes: dict[tuple[Value, ...], int] = {}
    systems: dict[tuple[Value, ...], int] = {}
    pairs: dict[tuple[int, int], int] = {}
    for run in kept.tolist():
        r = recipes.setdefault(tuple(cells[name][run] for name in learn), len(recipes))
        s = systems.setdefault(tuple(cells[name][run] for name in where), len(systems))
        pairs.setdefault((r, s), run)
    chosen = np.array(list(pairs.values()))
    rows = np.concatenate([order[starts[run] : ends[run]] for run in chosen])
    lengths = (ends - starts)[chosen]
    codes, _ = _encoded(table["run_id"])
    status, words = _encoded(table["status"])
    last = order[ends[chosen] - 1]
    prices = _numbers(table, "usd_per_hour", path)[rows]
    if not (np.isfinite(prices) & (prices > 0)).all():
        raise InputError(f"{path}: usd_per_hour must be above 0 in every row")
    return Runs(
        ids=[str(ids[codes[order[starts[run]]]]) for run in chosen],
        recipe=np.array([r for r, _ in pairs]),
        system=np.array([s for _, s in pairs]),
        recipes=[dict(zip(learn, key, strict=True)) for key in recipes],
        systems=[dict(zip(where, key, strict=True)) for key in systems],
        first=np.concatenate([[0], np.cumsum(lengths)]),
        tokens=_numbers(table, "tokens", path)[rows],
        loss=_numbers(table, "loss", path)[rows],
        tokens_per_s=_numbers(table, "tokens_per_s", path)[rows],
        usd_per_hour=prices,
        status=[str(words[code]) for code in status[last]],
        says_market="system.market" in table.column_names,
    )


def _read(path: Path) -> Any:
    import pyarrow as pa
    from pyarrow import csv, parquet

    try:
        return csv.read_csv(path) if path.suffix == ".csv" else parquet.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: cannot be read as recorded runs: {reason}") from error


def _encoded(column: Any) -> tuple[Indices, list[Any]]:
    """Codes (rows,) and the values that they stand for."""
    import pyarrow as pa

    combined = column.combine_chunks()
    if not pa.types.is_dictionary(combined.type):
        combined = combined.dictionary_encode(null_encoding="encode")
    codes = combined.indices.to_numpy(zero_copy_only=False).astype(np.intp)
    return codes, combined.dictionary.to_pylist()


def _numbers(table: Any, name: str, path: Path) -> Floats:
    import pyarrow as pa

    try:
        column = table[name].cast(pa.float64())
    except pa.ArrowInvalid as error:
        raise InputError(f"{path}: {name} must hold numbers: {error}") from error
    return np.asarray(column.to_numpy(), np.float64)


OUTSIDE = object()
"""Stands for a value that is not in a domain."""


def constant(space: Space, name: str) -> Choice | None:
    """What a space fixes a field to where it says so plainly."""
    section, field = name.split(".", 1)
    document = space.document()
    given = document if section == "data" else document.get("space", {})
    value = (given.get(section) or {}).get(field)
    return Choice((value,)) if isinstance(value, str | int | float | bool) else None


def value_in(domain: Domain, word: Any) -> Any:
    """The value of the domain that a cell stands for, `OUTSIDE` where there is none."""
    if isinstance(domain, Choice):
        return next((value for value in domain.values if _equal(value, word)), OUTSIDE)
    if isinstance(domain, Recorded) or isinstance(word, bool) or not isinstance(word, int | float):
        return OUTSIDE
    low, high = float(domain.low), float(domain.high)
    if not low * (1 - 1e-9) <= word <= high * (1 + 1e-9):
        return OUTSIDE
    if isinstance(domain, Steps) and isinstance(domain.step, int):
        return int(word) if float(word).is_integer() else OUTSIDE
    return float(min(max(word, low), high))


def _equal(value: Value, word: Any) -> bool:
    if is_number(value) and is_number(word):
        return math.isclose(value, word, rel_tol=1e-9)
    return str(value) == str(word)


class RecordedSpace(Space):
    """A space that proposes nothing but recorded runs.

    Args:
        space: what is searched.
        runs: what of it was recorded.

    Raises:
        InputError: none of the recorded runs is a valid run of the space.
    """

    def __init__(self, space: Space, runs: Runs) -> None:
        self.__dict__.update(space.__dict__)
        self.runs = runs
        points = [*runs.recipes, *runs.systems]
        self.domains = {
            path: recorded([point[path] for point in points if path in point])
            for path in space.domains
        }
        self._coordinates = [self._places(points) for points in (runs.recipes, runs.systems)]
        self._resolved: dict[int, RunSpec | Rejected] = {}
        self.run_of: dict[str, int] = {}
        """Recorded run by trial id, of every point that was resolved."""
        self.shared: dict[str, Any] = {}
        """What searches of it compute once."""
        self._require_one()
        self.starts = [self._recorded(start) for start in space.starts]

    @property
    def size(self) -> int | None:
        """Recorded runs."""
        return len(self.runs)

    def point(self, run: int) -> dict[str, Value]:
        """The point of a recorded run."""
        runs = self.runs
        found = runs.recipes[int(runs.recipe[run])] | runs.systems[int(runs.system[run])]
        return {path: found[path] for path in self.domains}

    def sample(self, rng: np.random.Generator) -> dict[str, Value]:
        """One recorded run, all equally likely."""
        return self.point(int(rng.integers(len(self.runs))))

    def grid(self) -> Iterator[dict[str, Value]]:
        """Every recorded run."""
        return (self.point(run) for run in range(len(self.runs)))

    def nearest(self, point: Point) -> dict[str, Value]:
        """The recorded run nearest to a point: its nearest recipe, then that one's systems."""
        recipe = int(np.argmin(self._distances(0, point)))
        known = np.flatnonzero(self.runs.recipe == recipe)
        systems = self.runs.system[known]
        return self.point(int(known[np.argmin(self._distances(1, point)[systems])]))

    def searched_by(self, algorithm: str, seed: int) -> "RecordedSpace":
        """The same space with another algorithm and seed; what was resolved is shared.

        A scheduler that does not go with the algorithm gives way to the one that does. Nothing is
        repeated: the table has one run of each point.

        Raises:
            InputError: unknown algorithm.
        """
        if algorithm not in SCHEDULERS:
            known = ", ".join(SCHEDULERS)
            raise InputError(f"--algorithm must be one of {known}, got {algorithm}")
        other = copy(self)
        given = self.search.model_dump() | {"algorithm": algorithm, "seed": seed, "repeats": 1}
        if self.search.scheduler not in SCHEDULERS[algorithm]:
            given["scheduler"] = "auto"
        other.search = type(self.search).model_validate(given)
        other.scheduler = other.search.resolved_scheduler
        return other

    def resolve(self, point: Point, seed: int) -> RunSpec | Rejected:
        """The run at a point, or why there is none; its seed is the one it was recorded with."""
        run = self._index.get(tuple(point[path] for path in self.domains))
        if run is None:
            return Rejected("not recorded", "not recorded: the table has no run at this point")
        if run not in self._resolved:
            found = self._resolved[run] = super().resolve(point, 0)
            if isinstance(found, RunSpec):
                self.run_of.setdefault(found.trial_id, run)
        return self._resolved[run]

    @property
    def _index(self) -> dict[tuple[Value, ...], int]:
        if "_by_point" not in self.__dict__:
            self._by_point = {tuple(self.point(run).values()): run for run in range(len(self.runs))}
        return self._by_point

    def _recorded(self, start: Start) -> Start:
        """The recorded run nearest to a start, of those that have all that its entry gives.

        Raises:
            InputError: the table has none.
        """
        given = {path: start.point[path] for path in start.given if path in self.domains}
        others = {path: value for path, value in start.point.items() if path not in self.domains}
        recipes, systems = (
            np.array([all(_equal(x, given.get(p, x)) for p, x in one.items()) for one in points])
            for points in (self.runs.recipes, self.runs.systems)
        )
        found = np.flatnonzero(recipes[self.runs.recipe] & systems[self.runs.system])
        if others or not len(found):
            wanted = ", ".join(f"{path}={value}" for path, value in (given | others).items())
            raise InputError(
                f"start_from[{start.entry}]: the table has no run with {wanted}, and a replay is "
                "held to recorded runs; change the entry, or leave it out with --set start_from=[]"
            )
        far = self._distances(0, start.point)[self.runs.recipe[found]]
        far += self._distances(1, start.point)[self.runs.system[found]]
        rejected = ""
        for run in found[np.argsort(far, kind="stable")].tolist():
            resolved = self.resolve(self.point(run), self.search.seed)
            if isinstance(resolved, RunSpec):
                return replace(start, point=self.point(run))
            rejected = rejected or resolved.detail
        raise InputError(f"start_from[{start.entry}]: no recorded run of it is valid: {rejected}")

    def _places(self, points: list[dict[str, Value]]) -> list[tuple[str, Any]]:
        found: list[tuple[str, Any]] = []
        for path in points[0]:
            domain = self.domains[path]
            assert isinstance(domain, Recorded)
            places = [domain.scaled(point[path]) for point in points]
            if None in places:
                found.append((path, np.array([str(point[path]) for point in points])))
            else:
                found.append((path, np.array(places, float)))
        return found

    def _distances(self, which: int, point: Point) -> Floats:
        """Sum over fields of the scaled difference of numbers, and 1 where words differ."""
        total = np.zeros(len((self.runs.recipes, self.runs.systems)[which]))
        for path, places in self._coordinates[which]:
            domain = self.domains[path]
            assert isinstance(domain, Recorded)
            here = domain.scaled(point[path]) if places.dtype == np.float64 else None
            if here is None:
                total += places != str(point[path])
            else:
                total += np.abs(places - here)
        return total

    def _require_one(self) -> None:
        reasons: dict[str, str] = {}
        for point in self.grid():
            found = self.resolve(point, self.search.seed)
            if isinstance(found, RunSpec):
                return
            reasons.setdefault(found.reason, found.detail)
        raise InputError(
            f"no recorded run is a valid run of space {self.name}: {'; '.join(reasons.values())}"
        )
