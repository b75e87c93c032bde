"""The factored search against its rivals in simulated worlds, as Markdown.

    python tests/benchmarks/worlds.py WORLDS        # once; see there for the data
    python tests/benchmarks/search_worlds.py WORLDS --seeds 20 > .../results/search_worlds.md

What is counted: dollars, in training budgets B, from which the incumbent's true loss at budget
stays within 1% of the table's best for the next half B. A search that never gets there within its
search budget counts as more than that. The loss takes the recipe's best system of the table for
granted; how much dearer per token the best one is that was measured is a column of its own. All
arms start trials one at a time and pay 60 s of start-up per trial. `--arm` and `--world` select,
`--json` writes what every search did.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import search_rivals as rivals

from thriftlm.search.factored import Factored
from thriftlm.search.recorded_table import RecordedSpace, Truth, read_runs, truth_of
from thriftlm.search.simulate import SimulatedSearch, simulate
from thriftlm.search.space import load_space

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
    "without Step Law": rivals.WithoutStepLaw,
    "law of whole curves": rivals.WholeCurves,
    "promotion by loss so far": rivals.LossSoFar,
    "without rungs": rivals.WithoutRungs,
    "token rungs": rivals.TokenRungs,
    "dollar rungs": rivals.DollarRungs,
    "without confirmation": rivals.WithoutConfirmation,
    "without probes": rivals.WithoutProbes,
}
PRODUCT = ("random", "optuna")
"""As `simulate --algorithm` has them: with our objective, and asha on predicted loss."""


def held(folder: Path, world: str, search_budgets: float) -> tuple[RecordedSpace, Truth, float]:
    """A world with its truth and training budget, the search budget set."""
    space = load_space(folder / f"{world}.yaml")
    budget = space.training_budget.usd
    assert budget is not None
    space.search_budget = space.search_budget.model_copy(
        update={"usd": search_budgets * budget, "trials": None}
    )
    table = folder / f"{world}.parquet"
    runs = read_runs(table, space)
    return RecordedSpace(space, runs), truth_of(runs, space, table), budget


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
    folder: Path, worlds: Sequence[str], arms: Sequence[str], seeds: int, budgets: float
) -> Iterator[dict[str, Any]]:
    """One record per search."""
    for world in worlds:
        space, truth, budget = held(folder, world, budgets)
        for arm in arms:
            for seed in range(seeds):
                since = time.perf_counter()
                algorithm = arm.removeprefix("--algorithm ")
                made = {} if algorithm in PRODUCT and arm != algorithm else {"searcher": ARMS[arm]}
                name = "factored" if made else algorithm
                found = simulate(space, truth, name, seed, **made)  # type: ignore[arg-type]
                yield {
                    "world": world,
                    "arm": arm,
                    "seed": seed,
                    "solved": solved_at(found, budget),
                    "excess": [excess_at(found, budget, share) for share in CHECKPOINTS],
                    "final": excess_at(found, budget, np.inf),
                    "system": found.system_regret,
                    "spent": found.spent_usd / budget,
                    "trials": found.trials,
                    "seconds": time.perf_counter() - since,
                }


def table(records: Sequence[dict[str, Any]], budgets: float) -> str:
    """Medians by world and arm."""
    heads = ["world", "arm", "B to 1%", "quartiles", "solved"]
    heads += [f"excess at {share:g} B" for share in CHECKPOINTS]
    heads += ["excess USD per token", "trials", "s per search"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for world, arm in dict.fromkeys((r["world"], r["arm"]) for r in records):
        mine = [r for r in records if (r["world"], r["arm"]) == (world, arm)]
        solved = np.sort([r["solved"] for r in mine])
        low, middle, high = (_shown(_quantile(solved, q), budgets) for q in (0.25, 0.5, 0.75))
        excess = np.median([r["excess"] for r in mine], axis=0)
        cells = [world, arm, middle, f"{low} to {high}"]
        cells.append(f"{np.isfinite(solved).sum()} of {len(mine)}")
        cells += ["none yet" if np.isinf(x) else f"{x:.2%}" for x in excess]
        systems = [r["system"] for r in mine if r["system"] is not None]
        cells.append(f"{np.median(systems):.0%}" if systems else "none")
        cells += [f"{np.median([r[key] for r in mine]):.1f}" for key in ("trials", "seconds")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


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
    parser.add_argument("--budgets", type=float, default=3.0, help="search budget in B")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    worlds = given.world or sorted(path.stem for path in given.folder.glob("*.yaml"))
    records = []
    for record in searches(
        given.folder, worlds, given.arm or list(ARMS), given.seeds, given.budgets
    ):
        records.append(record)
        print(
            record["world"],
            record["arm"],
            record["seed"],
            f"{record['solved']:.2f}",
            f"{record['seconds']:.1f}s",
            file=sys.stderr,
        )
        if given.json:
            given.json.write_text(json.dumps(records))
    print(table(records, given.budgets))


if __name__ == "__main__":
    main()
