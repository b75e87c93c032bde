"""What earlier searches have measured, matched to the space of a new one.

Earlier runs come as recorded runs (`thriftlm.records`). Ours carry the whole run, which is compared
field by field with what this space makes of the same point; of other tables the columns have to
say enough: every varied field, and stored parameters where the table has them. A recipe of the
space on a system of it, measured to as many tokens as this search would train it to before it
judges, counts as tried. Fewer tokens, a system or a recipe outside the space: the law learns of it.
Losses on another corpus or with another tokenizer say nothing and are left out.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from pydantic import ValidationError

from thriftlm import prices
from thriftlm.records import Columns
from thriftlm.search.history.journal import Known, KnownRun
from thriftlm.search.scores.objective import tokens_at_budget
from thriftlm.search.spaces.domains import Choice, Domain
from thriftlm.search.spaces.recorded_table import OUTSIDE, constant, value_in
from thriftlm.search.spaces.space import Space
from thriftlm.spec import InputError, Progress, RunSpec, Spec, Status, digest, identity
from thriftlm_models.counts import non_embedding_params, stored_params

NEEDED = ("run_id", "tokens", "loss")
"""Columns without which recorded runs teach a search nothing."""
SYSTEMS_TRIED = 30
"""Systems tried for a recipe whose own lies outside the space."""
ENOUGH = 0.95
"""Of the tokens to which a search trains before it judges: recipes end at whole steps."""
ENDS: dict[str, Status] = {
    "done": "done",
    "stopped": "stopped",
    "oom": "oom",
    "diverged": "diverged",
}
"""How a recorded run ended. What has another word, or none, was cut short: its points stay, and
unless it failed they can be enough."""
Row = Mapping[str, Any]


@dataclass(frozen=True)
class TakenIn:
    """What of one source is of use to a search."""

    known: Known
    left_out: dict[str, int]
    """Runs that are of no use, by reason."""
    assumed: str
    """What had to be taken for granted; empty where nothing."""

    @property
    def points(self) -> int:
        """Points of the space that are not run again."""
        return sum(one.trial_id is not None for one in self.known.runs)

    def summary(self) -> dict[str, Any]:
        """In numbers."""
        runs = self.known.runs
        return {
            "source": self.known.source,
            "runs": len(runs),
            "points": self.points,
            "law_only": len(runs) - self.points,
            "left_out": self.left_out,
            "assumed": self.assumed,
            "sentence": self.sentence(),
        }

    def sentence(self) -> str:
        """In words."""
        number_of_runs = len(self.known.runs)
        law_only = number_of_runs - self.points
        more = f", {law_only} inform the law" if law_only else ""
        out = "".join(f"; {number} left out: {why}" for why, number in self.left_out.items())
        return (
            f"from {self.known.source}: {number_of_runs} runs taken in, which cover "
            f"{self.points} points of the space{more}{out}"
            + (f"; {self.assumed}" if self.assumed else "")
        )


class LeftOut(Exception):  # noqa: N818
    """A run that is of no use, and why."""


def take_in(space: Space, source: str, columns: Columns, claimed: set[str]) -> TakenIn:
    """What recorded runs mean for a search of `space`.

    Args:
        space: what is to be searched.
        source: where they came from, for messages and the journal.
        columns: of the recorded runs.
        claimed: trials that earlier sources stand for; those of this one are added.

    Raises:
        InputError: a column is missing, or none of the runs is of use.
    """
    missing = [name for name in NEEDED if name not in columns]
    if missing:
        raise InputError(
            f"--from {source}: recorded runs need the columns {', '.join(NEEDED)}; missing: "
            f"{', '.join(missing)}"
        )
    match = _Match(space)
    taken: list[KnownRun] = []
    left_out: Counter[str] = Counter()
    runs = _runs_of(columns)
    for run_id, rows in runs.items():
        try:
            found = match.known(run_id, source, rows)
        except LeftOut as reason:
            left_out[str(reason)] += 1
            continue
        if found.trial_id in claimed:
            found = found.model_copy(update={"trial_id": None})
        elif found.trial_id is not None:
            claimed.add(found.trial_id)
        taken.append(found)
    if not taken:
        reasons = "; ".join(f"{number}: {why}" for why, number in left_out.items())
        raise InputError(
            f"--from {source}: none of its {len(runs)} runs is of use to space {space.name}"
            f"{reasons and f' ({reasons})'}; leave it out"
        )
    says = "run" in columns or {"data.corpus", "data.tokenizer"} <= columns.keys()
    assumed = "" if says else "it does not say its corpus and tokenizer: taken to be the space's"
    return TakenIn(Known(source=source, runs=tuple(taken)), dict(left_out.most_common()), assumed)


def columns_of(rows: Sequence[Row]) -> Columns:
    """Rows as columns."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def first_verdict_tokens(space: Space) -> int:
    """Tokens to which the search trains a trial before anything is decided about it."""
    fidelity = space.search.fidelity
    has_rungs = space.search.algorithm == "factored" or space.scheduler != "none"
    return fidelity.rungs[0] if has_rungs and fidelity.rungs else fidelity.max_tokens


def _runs_of(columns: Columns) -> dict[str, list[Row]]:
    """Rows of each run, by tokens."""
    found: dict[str, list[Row]] = defaultdict(list)
    names = list(columns)
    for cells in zip(*columns.values(), strict=True):
        row = dict(zip(names, cells, strict=True))
        found[str(row["run_id"])].append(row)
    for rows in found.values():
        rows.sort(key=lambda row: _positive(row, "tokens") or 0.0)
    return found


class _Match:
    """Finds the point of a space that a recorded run was made at."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.data = {name: _spellings(space, name) for name in ("corpus", "tokenizer")}
        self.bits = "data.tokenizer" in space.domains

    def known(self, run_id: str, source: str, rows: Sequence[Row]) -> KnownRun:
        """One recorded run.

        Raises:
            LeftOut: it is of no use.
        """
        word = str(rows[-1].get("status") or "")
        status = ENDS.get(word, "running")
        spec = _spec(rows[0])
        self._require_same_data(rows[0], spec)
        point, run, is_pair = self._place(rows[0], spec)
        shown = run if is_pair else spec
        reports = _reports(rows, None if shown is None else shown.system.n_gpus)
        measured = any(p.val_loss is not None and p.tokens > 0 for p in reports)
        if self.bits and measured and not any(p.val_bits_per_byte for p in reports):
            raise LeftOut("no bits per byte, by which a space compares that varies the tokenizer")
        is_result = status in ("oom", "diverged") and is_pair
        if not measured and not is_result:
            raise LeftOut("no loss was measured")
        n_params = self._n_params(rows[0], run or spec)
        recipe_id = digest({"source": source, "run": run_id})
        if run is not None:
            recipe_id = run.recipe_id
        elif spec is not None:
            recipe_id = spec.recipe_id
        found = KnownRun(
            run_id=run_id,
            recipe_id=recipe_id,
            n_params=n_params,
            point=point,
            trial_id=None,
            run=shown,
            usd_per_hour=prices.usd_per_hour(run.system) if is_pair and run else None,
            status=status,
            reports=tuple(reports),
        )
        if run is not None and is_pair and word != "failed" and self._counts_as_tried(found, run):
            return found.model_copy(update={"trial_id": run.trial_id})
        return found

    def _counts_as_tried(self, found: KnownRun, run: RunSpec) -> bool:
        if found.status in ("oom", "diverged"):
            return True
        rates = [p.tokens_per_s for p in found.reports if p.tokens_per_s]
        if not rates or not found.usd_per_hour:
            return False  # nobody knows what it would cost to train
        rate = float(np.median(rates)) * run.system.n_gpus
        budget = self.space.training_budget
        bought = tokens_at_budget(budget.usd, budget.hours, found.usd_per_hour / 3600 / rate, rate)
        enough = min(first_verdict_tokens(self.space), bought)
        return any(p.val_loss is not None and p.tokens >= ENOUGH * enough for p in found.reports)

    def _require_same_data(self, row: Row, spec: RunSpec | None) -> None:
        for name, ours in self.data.items():
            theirs = row.get(f"data.{name}") if spec is None else getattr(spec.data, name)
            if theirs is not None and str(theirs) not in ours:
                raise LeftOut(f"{name} {theirs}, where the space has {' or '.join(sorted(ours))}")

    def _place(self, row: Row, spec: RunSpec | None) -> tuple[dict[str, Any], RunSpec | None, bool]:
        """Where a run lies in the space.

        The point as far as the space has it, a run of that recipe in the space, and whether that is
        on the same system.
        """
        point = {
            path: _inside(domain, _cell(row, spec, path))
            for path, domain in self.space.domains.items()
        }
        recipe = {p: v for p, v in point.items() if not p.startswith("system.")}
        if OUTSIDE in recipe.values() or not self._constants_agree(row):
            return {}, None, False
        if OUTSIDE not in point.values():
            run = self.space.resolve(point, self.space.search.seed)
            if isinstance(run, RunSpec) and _is_run(run, row, spec):
                return point, run, True
        for run in self._elsewhere(recipe):
            if _same_recipe(run, row, spec):
                return recipe, run, False
        return {}, None, False

    def _elsewhere(self, recipe: dict[str, Any]) -> Iterator[RunSpec]:
        """Runs of a recipe on systems of the space, the first few."""
        rng = np.random.default_rng(0)
        points = (self.space.sample(rng) | recipe for _ in range(SYSTEMS_TRIED))
        found = (self.space.resolve(point, self.space.search.seed) for point in points)
        return islice((run for run in found if isinstance(run, RunSpec)), 1)

    def _constants_agree(self, row: Row) -> bool:
        """Whether columns of recipe fields that the space fixes hold its values."""
        for name, value in row.items():
            section = name.partition(".")[0]
            if section not in ("model", "optim") or name in self.space.domains or value is None:
                continue
            fixed = constant(self.space, name)
            if fixed is not None and value_in(fixed, value) is OUTSIDE:
                return False
        return True

    def _n_params(self, row: Row, run: RunSpec | None) -> float:
        if run is not None:
            return float(non_embedding_params(run.model))
        found = _positive(row, "non_embedding_params")
        if not found:
            raise LeftOut("outside the space, and without non_embedding_params for the law")
        return found


def _spellings(space: Space, name: str) -> set[str]:
    """What the data of a space are called, in its file and where workers find them."""
    domain = space.domains.get(f"data.{name}") or constant(space, f"data.{name}")
    written = {str(value) for value in (domain.values if domain else None) or ()}
    return written | {str(getattr(data, name)) for data in space.data_specs()}


def _inside(domain: Domain, word: Any) -> Any:
    """The value of a domain that a cell stands for, `OUTSIDE` where there is none."""
    return value_in(domain if domain.values is None else Choice(domain.values), word)


def _spec(row: Row) -> RunSpec | None:
    """The whole run where the table has it."""
    if not row.get("run"):
        return None
    try:
        return RunSpec.model_validate_json(row["run"])
    except ValidationError as error:
        raise LeftOut("its run cannot be read by this version of thriftlm") from error


def _cell(row: Row, spec: RunSpec | None, path: str) -> Any:
    """A field as it was sampled; else as it was run."""
    if row.get(path) is not None or spec is None:
        return row.get(path)
    section, field = path.split(".", 1)
    return getattr(getattr(spec, section), field, None)


def _same_recipe(run: RunSpec, row: Row, spec: RunSpec | None) -> bool:
    """Whether the run of this space has the loss curve that was recorded, but for its seed."""
    if spec is None:
        params = _positive(row, "params")
        return params is None or math.isclose(params, stored_params(run.model))
    pairs: list[tuple[Spec, Spec]] = [
        (run.model, spec.model),
        (run.optim, spec.optim),
        (run.data, spec.data),
    ]
    return all(identity(ours) == identity(theirs) for ours, theirs in pairs)


def _is_run(run: RunSpec, row: Row, spec: RunSpec | None) -> bool:
    """Whether the run of this space is the one that was recorded, but for its seed."""
    if spec is not None and identity(run.system) != identity(spec.system):
        return False
    return _same_recipe(run, row, spec)


def _reports(rows: Sequence[Row], n_gpus: int | None) -> list[Progress]:
    """Reports of a run. Speeds are kept where the number of GPUs is known.

    Where a table does not say whether the learning rate had decayed, it had at the last report.
    """
    found = []
    for row in rows:
        rate, is_last = _positive(row, "tokens_per_s"), row is rows[-1]
        status = ENDS.get(str(row.get("status")), "running") if is_last else "running"
        decayed = row.get("decayed")
        found.append(
            Progress(
                status=status,
                step=0,
                tokens=int(_positive(row, "tokens") or 0),
                val_loss=_positive(row, "loss"),
                val_bits_per_byte=_positive(row, "bits_per_byte"),
                decayed=is_last if decayed is None else bool(decayed),
                warming_up=bool(row.get("warming_up") or False),
                tokens_per_s=rate / n_gpus if rate and n_gpus else None,
            )
        )
    return found


def _positive(row: Row, name: str) -> float | None:
    """A cell as a finite number above 0, None where it is none."""
    try:
        value = float(row[name])
    except (KeyError, TypeError, ValueError):
        return None
    return value if math.isfinite(value) and value > 0 else None
