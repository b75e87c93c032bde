"""When a probe is worth its price.

A probe times systems of one kind of gang on one allocation, for the shape (model, batch, optimizer)
of the trial that leads. The training budget is spent on a system that was measured, never on one
that an estimate promises; so what a probe can earn is the share of that budget which a system saves
that is cheaper per token than the best one measured so far.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from thriftlm.search.algorithms import Proposal
from thriftlm.search.budget import FIRST_REPORT_SECONDS
from thriftlm.search.cluster.gangs import resources
from thriftlm.search.history.state import SearchState
from thriftlm.search.learning.menu import Menu
from thriftlm.search.learning.system_model import Costs, Fact, SystemModel
from thriftlm.search.spaces.space import Space
from thriftlm.spec import SystemSpec
from thriftlm.timings import Timing, expected_seconds

Floats = NDArray[np.float64]

PROBE_SHARE = 0.05
"""Of the search budget, which all probes of a search may cost at most."""
MOST_PROBED = 8
"""Systems in one probe at most."""
DRAWS = 512
"""Of the speeds of all systems of a probe, to average what the best of them saves."""


@dataclass(frozen=True)
class Plan:
    """A probe that is worth its price."""

    systems: list[int]
    """Places in the menu, most promising first."""
    value_usd: float
    """Dollars of the training budget that it is expected to save."""
    price_usd: float


class Prober:
    """Proposes probes of a search, and remembers what they said.

    Args:
        space: what is searched.
        menu: its recipes and systems.
        systems: learns from what is timed.
    """

    def __init__(self, space: Space, menu: Menu, systems: SystemModel) -> None:
        self.space, self.menu, self.systems = space, menu, systems
        self.trials: set[str] = set()
        self.unsupported: set[Fact] = set()
        self.gangs = gangs_of(menu.specs)

    def timed(self, recipe: int, timing: Timing) -> bool:
        """Learn from a system that was timed with a recipe; whether costs have changed."""
        fact = Fact(int(self.menu.shape_of[recipe]), self.menu.specs.index(timing.system))
        if timing.status == "unsupported":
            self.unsupported.add(fact)
            return False
        return self.systems.observe(fact, timing.total_tokens_per_s, timing.status == "oom")

    def supported(self, recipe: int) -> NDArray[np.bool_]:
        """Systems that no probe found unable to run a recipe (S,)."""
        shape = int(self.menu.shape_of[recipe])
        able = np.ones(len(self.menu.specs), bool)
        able[[fact.system for fact in self.unsupported if fact.shape == shape]] = False
        return able

    def proposal(self, state: SearchState, recipe: int, able: NDArray[np.bool_]) -> Proposal | None:
        """A probe of a recipe's shape where one pays, one at a time.

        Where a probe broke, the system that it was timing is not timed again.

        Args:
            state: of the search.
            recipe: that leads.
            able: systems that may be timed or used (S,).
        """
        usd, most = self.space.training_budget.usd, self.space.search_budget.usd
        before = [state.trials[one] for one in self.trials]
        if usd is None or not all(trial.has_ended for trial in before):
            return None
        for trial in before:
            if trial.status in ("oom", "failed") and trial.systems_left:
                place = self.menu.specs.index(trial.systems_left[0])
                self.unsupported.add(Fact(int(self.menu.shape_of[recipe]), place))
        able = able & self.supported(recipe)
        spent = sum(trial.usd(state.last_at) for trial in before)
        found = plan(
            self.systems.costs(int(self.menu.shape_of[recipe])),
            self.menu.usd_per_hour,
            self.gangs,
            able,
            batch_tokens=self.menu.runs[recipe].optim.batch_tokens,
            training_usd=usd,
            most_usd=np.inf if most is None else PROBE_SHARE * most - spent,
        )
        if found is None:
            return None
        resolved = [(place, self.menu.resolve(recipe, place)) for place in found.systems]
        runs = [(place, run) for place, run in resolved if run is not None]
        if not runs:
            return None
        listed = tuple(run.system for _, run in runs)
        return Proposal(self.menu.point(recipe, runs[0][0]), runs[0][1], listed)


def plan(
    costs: Costs,
    usd_per_hour: Floats,
    gangs: Sequence[Sequence[int]],
    able: NDArray[np.bool_],
    *,
    batch_tokens: int,
    training_usd: float,
    most_usd: float,
) -> Plan | None:
    """The probe of one shape that earns most beyond its price; None where none pays.

    Args:
        costs: of the shape on every system (S,), measured ones with no spread.
        usd_per_hour: of every system (S,).
        gangs: places of the systems that one allocation can time.
        able: systems that may be timed or used.
        batch_tokens: of an optimizer step.
        training_usd: the training budget, which a cheaper system saves a share of.
        most_usd: what a probe may cost.
    """
    usable = able & np.isfinite(costs.log_tokens_per_s) & (costs.p_oom < 0.5)
    if not usable.any():
        return None
    per_dollar = np.where(usable, costs.log_tokens_per_s - np.log(usd_per_hour), -np.inf)
    measured = usable & (costs.sd == 0)
    now = float(per_dollar[measured if measured.any() else usable].max())
    open_ = usable & ~measured
    hope = per_dollar + costs.sd - now
    best: Plan | None = None
    for gang in gangs:
        chosen = [s for s in gang if open_[s] and hope[s] > 0]
        chosen = sorted(chosen, key=lambda s: -float(hope[s]))[:MOST_PROBED]
        if not chosen:
            continue
        step = batch_tokens * np.exp(-costs.log_tokens_per_s[chosen])
        seconds = FIRST_REPORT_SECONDS + sum(map(expected_seconds, step.tolist()))
        price = float(usd_per_hour[chosen[0]] * seconds / 3600)
        gain = per_dollar[chosen] - now
        value = training_usd * _expected_saving(gain, costs.sd[chosen], costs.p_oom[chosen])
        pays = value > price and price <= most_usd
        if pays and (best is None or value - price > best.value_usd - best.price_usd):
            best = Plan(chosen, value, price)
    return best


def gangs_of(specs: Sequence[SystemSpec]) -> list[list[int]]:
    """Places of the systems that one allocation can time, gang by gang."""
    found: dict[tuple[object, ...], list[int]] = {}
    for place, spec in enumerate(specs):
        found.setdefault(resources(spec), []).append(place)
    return list(found.values())


@cache
def _draws() -> tuple[Floats, Floats]:
    """Standard normal and uniform numbers, always the same (DRAWS, MOST_PROBED)."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((DRAWS, MOST_PROBED)), rng.random((DRAWS, MOST_PROBED))


def _expected_saving(gain: Floats, sd: Floats, p_oom: Floats) -> float:
    """Share of the dollars per token that timing systems saves, on average.

    Args:
        gain: expected log of tokens per dollar over the best measured system's.
        sd: of it.
        p_oom: chance that the system runs out of memory instead.
    """
    normal, uniform = (draws[:, : len(gain)] for draws in _draws())
    drawn = np.where(uniform < p_oom, 0.0, gain + sd * normal)
    return float(np.mean(-np.expm1(-np.maximum(drawn.max(axis=1), 0.0))))
