"""The factored search: what a recipe loses and what a system costs are learned apart.

Recipes are proposed by expected improvement of the predicted loss at budget per dollar, and each
goes to the system that the calibrated estimate expects to be cheapest. Trials train to a rung, wait
there, and the best third goes on from its checkpoint: best by predicted final loss, never by loss
so far. The answer is the trial whose pessimistic prediction is lowest, and before the money ends it
is trained to a third of its budget.

The searcher is fed with the events of the journal and nothing else, so that the same history gives
the same decisions, also when it is replayed.
"""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from thriftlm.search.algorithms import Proposal
from thriftlm.search.budget import FIRST_REPORT_SECONDS
from thriftlm.search.cluster.gangs import resources
from thriftlm.search.history.journal import Allocated, Event
from thriftlm.search.history.state import PAUSED, SearchState, TrialState
from thriftlm.search.learning.curve_model import Posterior, nearness
from thriftlm.search.learning.learner import Floats, Learner
from thriftlm.search.repeats import exploring
from thriftlm.search.scores.objective import PESSIMISM_SDS
from thriftlm.search.scores.scalar import expected_improvement
from thriftlm.search.spaces.space import Space

CANDIDATES = 256
"""Recipes drawn for each proposal, of those that were not tried; never more than two thirds."""
MOST_NEARBY = 500
"""Recipes, the latest, whose divergence tells on others."""
COST_POWER = 0.5
"""Expected improvement is divided by the price to this power: 1 would only choose cheap trials
(cost cooling of EI per unit cost, Lee et al., arXiv 2003.10870)."""
CONFIRMED = 1 / 3
"""Share of the budget's tokens that a winner is trained to before it is believed."""
RESERVE = 2.0
"""The winner is confirmed when this many times the price of doing so is left."""
PROPOSED = 20
"""Recipes resolved per proposal until one of them is a run."""


class Factored(Learner):
    """The searcher of `algorithm: factored`."""

    pauses = predicts = True

    def __init__(self, space: Space) -> None:
        self.is_warm: NDArray[np.bool_] = np.zeros(0, bool)
        super().__init__(space)
        self.exploring = exploring(space.search_budget, space.search.repeats, None)

    def observe(self, event: Event) -> None:
        """Take an event of the journal into account."""
        super().observe(event)
        if isinstance(event, Allocated):
            self.targets[event.trial_id] = self._next_rung(event.trial_id)

    # --- which trial goes on ----------------------------------------------------------------------

    def _next_rung(self, trial_id: str) -> float:
        recipe = self.places[trial_id][0]
        rungs, is_known = self._rungs(recipe), trial_id in self.taught.places
        done = self._tokens(recipe) if is_known else self.trained.get(recipe, 0.0)
        return next((rung for rung in rungs if rung > 1.05 * done), rungs[-1])

    def pause(self, trial: TrialState) -> str | None:
        """Why a running trial should wait now."""
        if trial.tokens < self.targets[trial.trial_id]:
            return None
        return f"{PAUSED} at {trial.tokens} tokens"

    def pauses_at(self, trial: TrialState) -> int | None:
        """The rung, or the end, where its budget buys no more."""
        return math.ceil(self.targets[trial.trial_id])

    def probe(self, state: SearchState) -> Proposal | None:
        """Systems to time with the leader: what they cost decides how many tokens all will get."""
        if (leader := self.leader(state)) is None or state.trials[leader].is_only_known:
            return None
        recipe = self.places[leader][0]
        return self.prober.proposal(state, recipe, self._able(recipe))

    def resume(self, state: SearchState, is_last: bool) -> str | None:
        """The paused trial to go on with: one of the best third at its rung, or the winner."""
        if not state.paused and (is_last or not self.taught.places):
            return None
        is_last = is_last or not len(self._untried())
        if winner := self._to_confirm(state, is_last):
            return winner
        return self._promoted(state)

    def _waits(self, recipe: int, state: SearchState) -> str | None:
        """The paused trial of a recipe that may go on, where none of it is running."""
        trials = [state.trials[trial_id] for trial_id in self.trials_of[recipe]]
        if not self.standing.may_go_on[recipe] or any(trial.is_running for trial in trials):
            return None
        return next((trial.trial_id for trial in trials if trial.is_paused), None)

    def _to_confirm(self, state: SearchState, is_last: bool) -> str | None:
        leader = self.leader(state)
        if leader is None or not self._may_be_confirmed(state, leader, is_last):
            return None
        missing, price = self._to_be_confirmed(state, leader)
        if missing <= 0:
            return None
        return leader if is_last or self._left(state) < RESERVE * price else None

    def _may_be_confirmed(self, state: SearchState, leader: str, is_last: bool) -> bool:
        recipe = self.places[leader][0]
        if state.trials[leader].is_only_known:  # a new trial here
            return not is_last and bool(self.standing.may_go_on[recipe])
        return self._waits(recipe, state) is not None

    def _to_be_confirmed(self, state: SearchState, leader: str) -> tuple[float, float]:
        """Tokens that the leader lacks to be believed, and what they cost."""
        recipe = self.places[leader][0]
        missing = float(CONFIRMED * self.tokens_at_budget[recipe] - self._tokens(recipe))
        more = self._tokens(recipe) if state.trials[leader].is_only_known else 0.0
        return missing, (missing + more) * self._usd_per_token(*self.places[leader])

    def _left(self, state: SearchState) -> float:
        """Dollars of the search budget that are neither spent nor kept for repeats."""
        total, now = self.space.search_budget.usd, state.last_at
        if total is None:
            return np.inf
        kept = self.exploring.kept(total, state, lambda trial: trial.usd(now))
        return total - state.spent_usd(now) - kept

    def _usd_per_token(self, recipe: int, system: int) -> float:
        costs = self.systems.costs(int(self.menu.shape_of[recipe]))
        return float(costs.usd_per_token(self.menu.usd_per_hour)[system])

    def _promoted(self, state: SearchState) -> str | None:
        """Of the highest rung that has one: a trial among the best third that waits there."""
        tried = self._usable()
        if not len(tried):
            return None
        levels, scores = self.standing.level[tried], self._ranking(tried)
        for level in np.unique(levels)[::-1]:
            reached = np.flatnonzero(levels >= level)
            best = reached[np.argsort(scores[reached], kind="stable")]
            kept = best[: len(reached) // self.space.search.fidelity.factor]
            for recipe in tried[kept[levels[kept] == level]].tolist():
                if waiting := self._waits(recipe, state):
                    return waiting
        return None

    def _ranking(self, tried: NDArray[np.intp]) -> Floats:
        """What promotion goes by: the predicted value."""
        recipes, posterior = self._posterior()
        scores = np.full(len(self.menu.recipes), np.nan)
        if len(tried) > len(recipes):
            scores[tried] = self._by_law(tried)
        scores[recipes] = posterior.mean
        logs = Posterior(scores[tried], np.zeros((0, 0)))
        return self._valued(tried, logs, len(tried)).mean

    def leader(self, state: SearchState) -> str | None:
        """The trial to answer with now: the lowest pessimistic value."""
        is_open, trials_of = self.taught.open, self.trials_of
        best = next((r for r in self._ranked() if r not in is_open or trials_of[r]), -1)
        tried_on = [t for t in trials_of[best] if t in state.trials and t not in self.failed]
        return max(tried_on, key=lambda t: state.trials[t].tokens, default=None)

    def _ranked(self) -> list[int]:
        """Recipes that may win, the lowest pessimistic value first."""
        if not len(self._usable()):
            return []
        recipes, posterior = self._posterior()
        posterior = self._valued(recipes, posterior, len(recipes), vary=False)
        spread = posterior.sd_within(np.arange(len(recipes)))
        order = np.argsort(posterior.mean + PESSIMISM_SDS * spread, kind="stable")
        return [int(recipe) for recipe in recipes[order]]

    # --- what is next -----------------------------------------------------------------------------

    def propose(self, state: SearchState) -> Iterator[Proposal]:
        """New trials, best first."""
        rng = np.random.default_rng([self.space.search.seed, len(state.trials)])
        self.is_warm = self._warm(state)
        left = self._untried()
        if not len(left):
            return
        drawn = rng.permutation(left)[: min(CANDIDATES, -(-2 * len(left) // 3))]
        best = drawn[np.argsort(-self._worth(drawn, state), kind="stable")][:PROPOSED].tolist()
        believed = self._ranked()[:1] if self.taught.open else []
        wanted = [r for r in believed if r in left]  # known, and not run in this space yet
        for recipe in [*wanted, *best]:
            run, system = None, self._system(recipe, rng)
            while system is not None and (run := self.menu.resolve(recipe, system)) is None:
                system = self._system(recipe, rng)
            if run is not None and system is not None and run.trial_id not in state.trials:
                yield Proposal(self.menu.point(recipe, system), run)

    def _untried(self) -> NDArray[np.intp]:
        """Recipes that may be proposed: nothing is known of them, and no trial may still tell."""
        still_open = np.zeros(len(self.menu.recipes), bool)
        still_open[list(self.taught.open)] = True
        taken = (self.standing.trials > 0) | (self.standing.is_known & ~still_open)
        return np.flatnonzero(~taken & self.runs_somewhere)

    def _worth(self, candidates: NDArray[np.intp], state: SearchState) -> Floats:
        """Expected improvement over the leader per price, of each candidate."""
        known, points = self._data()
        going = [self.places[t.trial_id][0] for t in state.running]
        blind = np.array([r for r in dict.fromkeys(going) if r not in set(known.tolist())], np.intp)
        seen = np.concatenate([known, blind])
        fresh = candidates[~np.isin(candidates, seen)]  # of the others the loss is known already
        recipes = np.concatenate([seen, fresh])
        place = {recipe: i for i, recipe in enumerate(recipes.tolist())}
        new = np.array([place[recipe] for recipe in candidates.tolist()])
        posterior = self.curves.posterior(self._features(recipes), points)
        covariance = posterior.covariance
        if len(blind):  # as if they had been measured
            rows = covariance[len(known) : len(seen)]
            own = rows[:, len(known) : len(seen)] + 1e-5 * np.eye(len(blind))
            covariance = covariance - rows.T @ np.linalg.solve(own, rows)
        posterior = self._valued(recipes, Posterior(posterior.mean, covariance), len(known))
        if not len(seen):
            return np.asarray(-posterior.mean[new])
        led = np.arange(len(known) or len(seen))  # nothing is measured: what runs is believed
        spread = posterior.sd_within(led)
        best = int(np.argmin(posterior.mean[led] + PESSIMISM_SDS * spread))
        gain = posterior.mean[best] - posterior.mean[new]
        sd = posterior.sd_of_difference(best)[new] + 1e-9
        improvement = expected_improvement(gain, sd)
        price = np.array([self._first_price(r) for r in candidates.tolist()])
        return np.asarray(improvement * (1 - self._p_diverges(candidates)) / price**COST_POWER)

    def _first_price(self, recipe: int) -> float:
        """Dollars to the first rung where they buy most tokens."""
        usd = self.space.training_budget.usd
        share = float(self._rungs(recipe)[0] / self.tokens_at_budget[recipe])
        return share if usd is None else share * usd

    def _p_diverges(self, candidates: NDArray[np.intp]) -> Floats:
        """Share of diverged runs among those nearby in learning rate and size, shrunk to none."""
        tried = np.fromiter(self.records, np.intp, len(self.records))[-MOST_NEARBY:]
        broke = np.array([self.records[r].diverged for r in tried.tolist()], float)
        if not broke.any():
            return np.zeros(len(candidates))
        weight = nearness(self._features(candidates), self._features(tried))
        return np.asarray(weight @ broke / (weight.sum(axis=1) + 0.3))

    def _system(self, recipe: int, rng: np.random.Generator) -> int | None:
        """The system to try a recipe on: the cheapest, chance has no part."""
        price = self._prices(recipe)
        return int(np.argmin(price)) if np.isfinite(price).any() else None

    def _warm(self, state: SearchState) -> NDArray[np.bool_]:
        """Systems for which a gang lives, so that a trial need not start one (S,)."""
        warm = np.zeros(len(self.menu.specs), bool)
        if not state.gangs:
            return warm
        live = {resources(gang.system) for gang in state.idle.values()}
        live |= {resources(trial.run.system) for trial in state.running}
        for places in self.prober.gangs:
            warm[places] = resources(self.menu.specs[places[0]]) in live
        return warm

    def _able(self, recipe: int) -> NDArray[np.bool_]:
        """Systems that have not failed with a recipe, nor refused its shape (S,)."""
        allowed = self.menu.allowed(recipe) & self.fits & self.prober.supported(recipe)
        for trial_id in self.trials_of[recipe]:
            if trial_id in self.failed:
                allowed[self.places[trial_id][1]] = False
        return np.asarray(allowed)

    def _prices(self, recipe: int) -> Floats:
        """Dollars to the first rung, expected failures included (S,); infinite where it can't."""
        costs = self.systems.costs(int(self.menu.shape_of[recipe]))
        usd = self.menu.usd_per_hour
        start = usd * FIRST_REPORT_SECONDS / 3600
        price = costs.usd_per_token(usd) * self._rungs(recipe)[0]
        price = price + np.where(self.is_warm, 0.0, start)
        price = price + start * costs.p_oom / np.maximum(1 - costs.p_oom, 1e-3)
        price = np.where(costs.p_oom > 0.5, price * 1e6, price)
        return np.where(self._able(recipe) & np.isfinite(costs.log_tokens_per_s), price, np.inf)
