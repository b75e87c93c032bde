"""The factored search against its rivals in simulated worlds, as Markdown.

    python tests/benchmarks/worlds.py WORLDS        # once; see there for the data
    python tests/benchmarks/search_worlds.py WORLDS --seeds 20 > .../results/search_worlds.md

What is counted: dollars, in training budgets B, from which the incumbent's true loss at budget
stays within 1% of the table's best for the next half B. A search that never gets there within its
search budget counts as more than that. The loss takes the recipe's best system of the table for
granted; how much dearer per token the best one is that was measured is a column of its own. All
arms start trials one at a time and pay 60 s of start-up per trial. With `--budgets 0.1 0.3 1`
searches have that little to spend, and what they answer in the end is shown. `--arm` and `--world`
select, `--json` collects what every search did.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import search_rivals as rivals

from thriftlm.search.learning.factored import Factored
from thriftlm.search.simulation.simulate import SimulatedSearch, simulate
from thriftlm.search.simulation.truth import Truth, truth_of
from thriftlm.search.spaces.recorded_table import RecordedSpace, read_runs
from thriftlm.search.spaces.space import load_space
from thriftlm.spec import InputError

TOLERANCE, STAYS = 0.01, 0.5
CHECKPOINTS = (0.1, 0.3, 1.0)
ARMS: dict[str, Callable[[Any], Any]] = {
    "factored": Factored,
    "random": lambda space: rivals.Raw(space, sampler="random", asha=False),
    "optuna joint + ASHA": lambda space: rivals.Raw(space, sampler="tpe", asha=True),
    "expert, Optuna": lambda space: rivals.Expert(space, asha=False),
    "expert, Optuna + ASHA": lambda space: rivals.Expert(space, asha=True),
    "expert, our learner": rivals.OurExpert,
    "joint, our learner": rivals.AnySystem,
    "joint, our learner, filtered": rivals.NearlyBestSystem,
    "without calibration": rivals.Uncalibrated,
    "no trends of speed": rivals.LevelsOnly,
    "without Step Law": rivals.WithoutStepLaw,
    "law of whole curves": rivals.WholeCurves,
    "promotion by loss so far": rivals.LossSoFar,
    "without rungs": rivals.WithoutRungs,
    "token rungs": rivals.TokenRungs,
    "dollar rungs": rivals.DollarRungs,
    "without confirmation": rivals.WithoutConfirmation,
    "without probes": rivals.WithoutProbes,
}
PRODUCT = {"--algorithm random": "random", "--algorithm optuna": "optuna"}
"""As `simulate` has them: ranked by our predicted loss, optuna with asha on it."""


def read_world(folder: Path, world: str) -> tuple[RecordedSpace, Truth, float]:
    """A world with its truth and training budget."""
    space = load_space(folder / f"{world}.yaml")
    budget = space.training_budget.usd
    assert budget is not None
    table = folder / f"{world}.parquet"
    runs = read_runs(table, space)
    return RecordedSpace(space, runs), truth_of(runs, space, table), budget


def with_budget(space: RecordedSpace, usd: float) -> RecordedSpace:
    """The same world for a search that may spend so much."""
    other = copy(space)
    other.search_budget = space.search_budget.model_copy(update={"usd": usd, "trials": None})
    return other


def solved_at(found: SimulatedSearch, budget: float) -> float:
    """Training budgets from which the incumbent stays good; infinite where it never does."""
    good = found.table_best_score * (1 + TOLERANCE)
    usd = np.array([row[0] for row in found.trace])
    score = np.array([np.inf if row[4] is None else row[4] for row in found.trace])
    for i in np.flatnonzero(score <= good):
        window = (usd >= usd[i]) & (usd <= usd[i] + STAYS * budget)
        if (score[window] <= good).all() and usd[-1] > usd[i]:
            return float(usd[i] / budget)
    return float("inf")


def excess_at(found: SimulatedSearch, budget: float, share: float) -> float:
    """Relative excess of the incumbent's loss when a share of the training budget is spent."""
    rows = [row for row in found.trace if row[0] <= share * budget and row[4] is not None]
    return rows[-1][4] / found.table_best_score - 1 if rows else float("inf")  # type: ignore[operator]


def searches(
    folder: Path, worlds: Sequence[str], arms: Sequence[str], seeds: int, budgets: Sequence[float]
) -> Iterator[dict[str, Any]]:
    """One record per search."""
    for world in worlds:
        space, truth, budget = read_world(folder, world)
        for arm, share, seed in itertools.product(arms, budgets, range(seeds)):
            since = time.perf_counter()
            found = searched(with_budget(space, share * budget), truth, arm, seed)
            yield {
                "world": world,
                "arm": arm,
                "seed": seed,
                "budgets": share,
                "solved": solved_at(found, budget) if found else np.inf,
                "excess": [
                    excess_at(found, budget, at) if found else np.inf
                    for at in (*CHECKPOINTS, np.inf)
                ],
                "system": found.system_regret if found else None,
                "trials": found.trials if found else 0,
                "seconds": time.perf_counter() - since,
            }


def searched(space: RecordedSpace, truth: Truth, arm: str, seed: int) -> SimulatedSearch | None:
    """One search; None where the budget bears no trial."""
    try:
        if arm in PRODUCT:
            return simulate(space, truth, PRODUCT[arm], seed)
        return simulate(space, truth, "factored", seed, searcher=ARMS[arm])
    except InputError:
        return None


def table(records: Sequence[dict[str, Any]]) -> str:
    """Medians by world and arm: of whole searches, then of those with little to spend."""
    whole = [r for r in records if r["budgets"] > max(CHECKPOINTS)]
    heads = ["world", "arm", "B to 1%", "quartiles", "solved"]
    heads += [f"excess at {share:g} B" for share in CHECKPOINTS]
    heads += ["excess USD per token", "trials", "s per search"]
    lines = _head(heads)
    for (world, arm), mine in _groups(whole):
        most = mine[0]["budgets"]
        solved = np.sort([r["solved"] for r in mine])
        low, middle, high = (_shown(_quantile(solved, q), most) for q in (0.25, 0.5, 0.75))
        cells = [world, arm, middle, f"{low} to {high}"]
        cells.append(f"{np.isfinite(solved).sum()} of {len(mine)}")
        cells += [_excess(mine, i) for i in range(len(CHECKPOINTS))]
        systems = [r["system"] for r in mine if r.get("system") is not None]
        cells.append(f"{np.median(systems):.0%}" if systems else "none")
        cells += [f"{np.median([r[key] for r in mine]):.1f}" for key in ("trials", "seconds")]
        lines.append(f"| {' | '.join(cells)} |")
    small = [r for r in records if r["budgets"] <= max(CHECKPOINTS)]
    if small:
        shares = sorted({r["budgets"] for r in small})
        lines += ["", *_head(["world", "arm", *(f"search budget {s:g} B" for s in shares)])]
    for (world, arm), mine in _groups(small):
        cells = [_excess([r for r in mine if r["budgets"] == s], -1) for s in shares]
        lines.append(f"| {' | '.join([world, arm, *cells])} |")
    return "\n".join(lines)


TARGETS = {
    "random": 10.0,
    "optuna joint + ASHA": 6.0,
    "expert, Optuna": 3.0,
    "expert, Optuna + ASHA": 3.0,
    "expert, our learner": 1 / 1.1,
}
"""Times the dollars of the factored search that a rival must need."""
BY = 1.5
"""Training budgets by which the factored search must be within the tolerance."""


def targets(records: Sequence[dict[str, Any]]) -> str:
    """What rivals need over what the factored search needs, medians; what misses is bold."""
    lines = _head(["world", *TARGETS, "within 1% at"])
    whole = [r for r in records if r["budgets"] > max(CHECKPOINTS)]
    by = dict(_groups(whole))
    for world in dict.fromkeys(r["world"] for r in whole):
        ours, limit = _needed(by[world, "factored"])
        cells = []
        for arm, least in TARGETS.items():
            theirs, most = _needed(by.get((world, arm), []))
            if np.isinf(ours):
                cells.append("**missed**")
            elif np.isinf(theirs):
                times = most / ours
                cells.append(f"> {times:.2g}x" if times >= least else f"**> {times:.2g}x, open**")
            else:
                times = theirs / ours
                cells.append(f"{times:.2g}x" if times >= least else f"**{times:.2g}x, missed**")
        at = f"{ours:.2f} B" if np.isfinite(ours) else f"> {limit:g} B"
        cells.append(at if ours <= BY else f"**{at}, missed**")
        lines.append(f"| {' | '.join([world, *cells])} |")
    return "\n".join(lines)


def _needed(records: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Median training budgets to the tolerance, and how many the search had."""
    if not records:
        return float("nan"), float("nan")
    return _quantile(np.sort([r["solved"] for r in records]), 0.5), records[0]["budgets"]


def _head(heads: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]


def _groups(records: Sequence[dict[str, Any]]) -> Iterator[tuple[tuple[str, str], list[Any]]]:
    for key in dict.fromkeys((r["world"], r["arm"]) for r in records):
        yield key, [r for r in records if (r["world"], r["arm"]) == key]


def _excess(records: Sequence[dict[str, Any]], place: int) -> str:
    if not records:
        return ""
    middle = _quantile(np.sort([r["excess"][place] for r in records]), 0.5)
    return "no answer" if np.isinf(middle) else f"{middle:.2%}"


def _quantile(ordered: Any, q: float) -> float:
    return float(np.quantile(ordered, q, method="higher"))


def _shown(value: float, budgets: float) -> str:
    return f"{value:.2f}" if np.isfinite(value) else f"> {budgets:g}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--world", action="append")
    parser.add_argument("--arm", action="append")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--budgets", type=float, nargs="+", default=[4.0], help="in B")
    parser.add_argument("--json", type=Path, help="records, added to those that are there")
    parser.add_argument("--report", action="store_true", help="only the tables of --json")
    given = parser.parse_args()
    records = json.loads(given.json.read_text()) if given.json and given.json.exists() else []
    if not given.report:
        worlds = given.world or sorted(path.stem for path in given.folder.glob("*.yaml"))
        arms = given.arm or [*ARMS, *PRODUCT]
        for record in searches(given.folder, worlds, arms, given.seeds, given.budgets):
            records.append(record)
            words = [str(record[key]) for key in ("world", "arm", "budgets", "seed")]
            print(*words, f"{record['solved']:.2f} {record['seconds']:.1f}s", file=sys.stderr)
            if given.json:
                given.json.write_text(json.dumps(records))
    if {r["arm"] for r in records} >= {"factored", *TARGETS}:
        print(targets(records), end="\n\n")
    print(table(records))


if __name__ == "__main__":
    main()
