"""What recorded recipes are worth, which a simulated search does not know."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from thriftlm.search.scores.objective import tokens_at_budget
from thriftlm.search.spaces.recorded_table import BROKEN, Runs
from thriftlm.search.spaces.space import Space
from thriftlm.spec import InputError

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Truth:
    """What each recorded recipe is worth: its loss at D_B of its best system in the table."""

    tokens: Floats
    """D_B of each recipe; NaN where no system ran it."""
    loss: Floats
    """Of each recipe; infinite where every run of it broke or diverged."""

    @property
    def best(self) -> float:
        """The lowest loss of the table."""
        return float(self.loss.min())


def truth_of(runs: Runs, space: Space, path: Path) -> Truth:
    """The worth of every recipe.

    Raises:
        InputError: D_B of a recipe lies outside its recorded tokens.
    """
    budget = space.training_budget
    tokens = np.full(len(runs.recipes), np.nan)
    best = np.full(len(runs.recipes), -1)
    for run in range(len(runs)):
        speed, recipe = runs.speed(run), runs.recipe[run]
        if np.isnan(speed) or runs.status[run] in (*BROKEN, "diverged"):
            continue
        here = tokens_at_budget(budget.usd, budget.hours, runs.price(run) / (3600 * speed), speed)
        if not here <= tokens[recipe]:
            tokens[recipe], best[recipe] = here, run
    loss = np.full(len(runs.recipes), np.inf)
    for recipe, run in enumerate(best.tolist()):
        if run >= 0:
            loss[recipe] = _loss_at(runs, run, tokens[recipe], path)
    return Truth(tokens, loss)


def _loss_at(runs: Runs, run: int, tokens: float, path: Path) -> float:
    """Recorded loss at a token count, linear in log tokens between two reports."""
    where = runs.reports(run)
    usable = np.isfinite(runs.loss[where]) & (runs.tokens[where] > 0)
    at, loss = runs.tokens[where][usable], runs.loss[where][usable]
    if not len(at):
        return float("inf")
    if not at[0] <= tokens <= at[-1] * (1 + 1e-9):
        raise InputError(
            f"{path}: the training budget buys run {runs.ids[run]} {tokens:.4g} tokens on its best "
            f"system, recorded are {at[0]:.4g} to {at[-1]:.4g}; change training_budget with --set, "
            "or leave the run out of the table"
        )
    return float(np.interp(np.log(tokens), np.log(at), loss))
