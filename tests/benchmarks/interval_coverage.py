"""How often the 90% interval of a predicted loss holds what was recorded, in simulated worlds.

    python tests/benchmarks/worlds.py WORLDS; python tests/benchmarks/fresh_worlds.py WORLDS 101 ...
    python tests/benchmarks/interval_coverage.py WORLDS > .../results/interval_coverage.md

Factored searches of 0.3, 1 and 3 training budgets; at the end of each the predictions of all its
recipes, and that of its leader, are held against the recorded loss at the same tokens.
"""

import sys
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import search_worlds

from thriftlm.search.learning.factored import Factored
from thriftlm.search.scores.objective import Predicted
from thriftlm.search.scores.scoring import configuration_of
from thriftlm.search.simulation.simulate import simulate
from thriftlm.search.spaces.recorded_table import Runs
from thriftlm.spec import InputError

BUDGETS, SEEDS = (0.3, 1.0, 3.0), 4
HEAD = (__doc__ or "").splitlines()[0]


class Held(NamedTuple):
    """One prediction against what was recorded."""

    budgets: float
    leads: bool
    inside: bool


def recorded(runs: Runs, recipe: int, tokens: float) -> float | None:
    """Loss of a recipe after so many tokens, by one of its runs that went there."""
    for run in np.flatnonzero(runs.recipe == recipe).tolist():
        where = runs.reports(run)
        at, loss = runs.tokens[where], runs.loss[where]
        usable = np.isfinite(loss) & (at > 0)
        if usable.sum() > 1 and at[usable][0] <= tokens <= at[usable][-1]:
            return float(np.interp(np.log(tokens), np.log(at[usable]), loss[usable]))
    return None


def holds(predicted: Predicted, loss: float) -> bool:
    low, high = np.quantile(predicted.draws, [0.05, 0.95])
    return bool(low <= loss <= high)


def held(folder: Path, world: str) -> list[Held]:
    space, truth, budget = search_worlds.read_world(folder, world)
    found = []
    for share in BUDGETS:
        for seed in range(SEEDS):
            made: list[Factored] = []
            with suppress(InputError):  # the budget bears no trial
                simulate(
                    search_worlds.with_budget(space, share * budget),
                    truth,
                    "factored",
                    seed,
                    searcher=lambda given, made=made: made.append(Factored(given)) or made[-1],
                )
            searcher = made[-1]
            at = {configuration_of(run): r for r, run in enumerate(searcher.menu.runs)}
            best = next(iter(searcher._ranked()), None)
            for name, predicted in searcher.predicted().items():
                loss = recorded(space.runs, at[name], predicted.tokens)
                if loss is not None:
                    found.append(Held(share, at[name] == best, holds(predicted, loss)))
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    by_world = {path.stem: held(folder, path.stem) for path in sorted(folder.glob("*.yaml"))}
    everything = [one for some in by_world.values() for one in some]
    leaders = [one for one in everything if one.leads]
    groups: dict[str, list[Held]] = defaultdict(list)
    groups["all recipes"], groups["leaders"] = everything, leaders
    for share in BUDGETS:
        name = f"leaders, search budget {share:g} B"
        groups[name] = [one for one in leaders if one.budgets == share]
    groups |= by_world
    print(f"{HEAD} Nominal is 90%; {SEEDS} seeds.\n")
    print("| | predictions | inside |\n|---|---|---|")
    for name, some in groups.items():
        if some:
            print(f"| {name} | {len(some)} | {np.mean([one.inside for one in some]):.0%} |")


if __name__ == "__main__":
    main()
