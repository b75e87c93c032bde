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
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from thriftlm.planning.law import Curve
from thriftlm.search.algorithms import Proposal, Searcher
from thriftlm.search.budget import FIRST_REPORT_SECONDS
from thriftlm.search.curve_model import (
    CurveModel,
    Features,
    Points,
    Posterior,
    expected_improvement,
)
from thriftlm.search.journal import Allocated, Ended, Event, Probed, Reported, Suggested
from thriftlm.search.menu import Menu, menu_of
from thriftlm.search.objective import PESSIMISM_SDS
from thriftlm.search.probing import Prober
from thriftlm.search.space import Space
from thriftlm.search.state import PAUSED, SearchState, TrialState
from thriftlm.search.system_model import Fact, SystemModel
from thriftlm.spec import Progress

Floats = NDArray[np.float64]

CANDIDATES = 256
"""Recipes drawn for each proposal, of those that were not tried; never more than two thirds."""
MOST_RECIPES, MOST_POINTS = 64, 4
"""Recipes that the surrogate is fitted to (half the best, half the latest) and points of each
curve, the last and earlier ones at half the tokens each: what bounds the time of a suggestion."""
GROWTH = 1.25
"""The surrogate's scales are learned again whenever there are this many times the points."""
COST_POWER = 0.5
"""Expected improvement is divided by the price to this power: 1 would only choose cheap trials
(cost cooling of EI per unit cost, Lee et al., arXiv 2003.10870)."""
CONFIRMED = 1 / 3
"""Share of the budget's tokens that a winner is trained to before it is believed."""
RESERVE = 2.0
"""The winner is confirmed when this many times the price of doing so is left."""
FUTURE_SHARE = 0.25
"""Of the training budget: dollars that a cheaper system would save on, when a probe is weighed."""
PROPOSED = 20
"""Recipes resolved per proposal until one of them is a run."""


@dataclass(frozen=True)
class Parts:
    """What can be left out of the search, to see what it earns."""

    calibrate: bool = True
    """Measured throughput teaches the estimate."""
    explore: bool = True
    """A dearer system is chosen where what it teaches is worth more."""
    step_law: bool = True
    """Learning rate and batch are searched around Step Law."""
    predicted: bool = True
    """Trials go on by predicted final loss; without it by their loss so far."""
    rungs: bool = True
    """Trials pause; without it each trains to the end."""
    dollar_rungs: bool = False
    """Rungs are shares of each recipe's budget, instead of tokens."""
    confirm: bool = True
    """The winner is trained to a third of its budget before the money ends."""
    probe: bool = True
    """Before a winner is confirmed, or after, systems are timed with it where that pays."""
    system: str = "best"
    """`best`, `random`, `filtered` (at random within 1.3 of the best), or `fixed` (by a grid)."""


@dataclass
class Record:
    """What is known of one recipe."""

    tokens: list[float]
    loss: list[float]
    diverged: bool = False


class Factored(Searcher):
    """The searcher of `algorithm: factored`."""

    pauses = True

    def __init__(self, space: Space, parts: Parts = Parts()) -> None:
        self.space, self.parts = space, parts
        self.menu: Menu = menu_of(space)
        self.systems = SystemModel.over(self.menu.prior)
        self.curves = CurveModel()
        self.places: dict[str, tuple[int, int]] = {}
        self.records: dict[int, Record] = {}
        self.targets: dict[str, float] = {}
        self.failed: set[str] = set()
        self.prober = Prober(space, self.menu, self.systems)
        self.learned_from = 0
        self.posterior: tuple[NDArray[np.intp], Posterior] | None = None
        self._budget_tokens()

    # --- what happened ----------------------------------------------------------------------------

    def observe(self, event: Event) -> None:
        """Take an event of the journal into account."""
        match event:
            case Suggested(trial_id=trial_id, point=point, systems=systems):
                self.places[trial_id] = self.menu.locate(point)
                self.prober.trials |= {trial_id} if systems else set()
            case Probed(trial_id=trial_id, timing=timing):
                if self.prober.timed(self.places[trial_id][0], timing):
                    self._budget_tokens()
            case Allocated(trial_id=trial_id):
                self.targets[trial_id] = self._next_rung(trial_id)
            case Reported(trial_id=trial_id, progress=progress):
                self._measured(trial_id, progress)
            case Ended(trial_id=trial_id, status=status):
                if status in ("oom", "failed", "diverged") and trial_id not in self.prober.trials:
                    self.failed.add(trial_id)
            case _:
                return
        self.posterior = None

    def _measured(self, trial_id: str, progress: Progress) -> None:
        recipe, system = self.places[trial_id]
        fact = Fact(int(self.menu.shape_of[recipe]), system)
        rate = progress.tokens_per_s
        oom = progress.status == "oom"
        if self.parts.calibrate and (oom or rate is not None):
            total = None if rate is None or oom else rate * self.menu.specs[system].n_gpus
            if self.systems.observe(fact, total, oom):
                self._budget_tokens()
        if oom:
            self.failed.add(trial_id)
            return
        record = self.records.setdefault(recipe, Record([], []))
        if progress.status == "diverged":
            record.diverged = True
        elif progress.val_loss is not None and progress.tokens > 0 and not progress.warming_up:
            while record.tokens and record.tokens[-1] >= progress.tokens:
                record.tokens.pop(), record.loss.pop()
            record.tokens.append(float(progress.tokens))
            record.loss.append(progress.val_loss)

    def _budget_tokens(self) -> None:
        """D_B of every recipe, on the system that is believed to be its best."""
        budget, usd_per_hour = self.space.training_budget, self.menu.usd_per_hour
        costs = self.systems.all_costs()
        speed = np.exp(costs.log_tokens_per_s)
        fits = self.menu.runs_on & (costs.p_oom < 0.5)
        fits = np.where(fits.any(axis=1, keepdims=True), fits, self.menu.runs_on)
        by_usd = np.inf if budget.usd is None else budget.usd * 3600 / usd_per_hour * speed
        by_hours = np.inf if budget.hours is None else budget.hours * 3600 * speed
        bought = np.where(fits, np.minimum(by_usd, by_hours), 1.0)
        self.tokens_at_budget = bought.max(axis=1)[self.menu.shape_of]

    # --- rungs ------------------------------------------------------------------------------------

    def _rungs(self, recipe: int) -> list[float]:
        """Tokens at which a trial of a recipe waits: token rungs up to what the budget buys."""
        fidelity = self.space.search.fidelity
        end = min(float(fidelity.max_tokens), self.tokens_at_budget[recipe])
        if not self.parts.rungs:
            return [end]
        if self.parts.dollar_rungs:
            share = fidelity.min_tokens / fidelity.max_tokens
            found = []
            while share < 1:
                found.append(end * share)
                share *= fidelity.factor
            return [*found, end]
        return [*(float(rung) for rung in fidelity.rungs if rung < 0.7 * end), end]

    def _next_rung(self, trial_id: str) -> float:
        recipe = self.places[trial_id][0]
        rungs = self._rungs(recipe)
        return next((rung for rung in rungs if rung > 1.05 * self._tokens(recipe)), rungs[-1])

    def _tokens(self, recipe: int) -> float:
        record = self.records.get(recipe)
        return record.tokens[-1] if record and record.tokens else 0.0

    def pause(self, trial: TrialState) -> str | None:
        """Why a running trial should wait now."""
        if trial.tokens < self.targets[trial.trial_id]:
            return None
        return f"{PAUSED} at {trial.tokens} tokens"

    def probe(self, state: SearchState) -> Proposal | None:
        """Systems to time with the leader, once it is confirmed or the next thing is to do so."""
        if not self.parts.probe or (leader := self.leader(state)) is None:
            return None
        missing, price = self._to_be_confirmed(leader)
        if missing > 0 and self._left(state) > RESERVE * price:
            return None
        recipe = self.places[leader][0]
        return self.prober.proposal(state, recipe, self._able(recipe))

    def pauses_at(self, trial: TrialState) -> int | None:
        """The rung, or the end, where its budget buys no more."""
        return math.ceil(self.targets[trial.trial_id])

    def resume(self, state: SearchState, is_last: bool) -> str | None:
        """The paused trial to go on with: one of the best third at its rung, or the winner."""
        paused = {
            self.places[t.trial_id][0]: t.trial_id
            for t in state.waiting
            if t.is_paused and self._may_go_on(t.trial_id)
        }
        if not paused:
            return None
        if self.parts.confirm and (winner := self._to_confirm(state, paused, is_last)):
            return winner
        return self._promoted(state, paused)

    def _may_go_on(self, trial_id: str) -> bool:
        recipe = self.places[trial_id][0]
        return self._tokens(recipe) < 0.95 * self._rungs(recipe)[-1]

    def _to_confirm(self, state: SearchState, paused: dict[int, str], is_last: bool) -> str | None:
        leader = self.leader(state)
        if leader is None or self.places[leader][0] not in paused:
            return None
        missing, price = self._to_be_confirmed(leader)
        if missing <= 0:
            return None
        return leader if is_last or self._left(state) < RESERVE * price else None

    def _to_be_confirmed(self, leader: str) -> tuple[float, float]:
        """Tokens that the leader lacks to be believed, and what they cost."""
        recipe = self.places[leader][0]
        missing = float(CONFIRMED * self.tokens_at_budget[recipe] - self._tokens(recipe))
        return missing, missing * self._usd_per_token(*self.places[leader])

    def _left(self, state: SearchState) -> float:
        """Dollars of the search budget that are not spent."""
        total = self.space.search_budget.usd
        return np.inf if total is None else total - state.spent_usd(state.last_at)

    def _usd_per_token(self, recipe: int, system: int) -> float:
        costs = self.systems.costs(int(self.menu.shape_of[recipe]))
        return float(costs.usd_per_token(self.menu.usd_per_hour)[system])

    def _promoted(self, state: SearchState, paused: dict[int, str]) -> str | None:
        """Of the highest rung that has one: a trial among the best third that waits there."""
        tried = self._usable()
        if not len(tried):
            return None
        levels = {r: self._level(r) for r in tried.tolist()}
        going = {self.places[t.trial_id][0] for t in state.running}
        scores = self._ranking(tried)
        for level in sorted(set(levels.values()), reverse=True):
            reached = [r for r in levels if levels[r] >= level]
            reached.sort(key=lambda r: scores[r])
            kept = reached[: len(reached) // self.space.search.fidelity.factor]
            for recipe in kept:
                if levels[recipe] == level and recipe in paused and recipe not in going:
                    return paused[recipe]
        return None

    def _level(self, recipe: int) -> int:
        tokens = self._tokens(recipe)
        return sum(rung <= 1.05 * tokens for rung in self._rungs(recipe))

    def _ranking(self, tried: NDArray[np.intp]) -> dict[int, float]:
        """What promotion goes by: predicted score, or loss so far."""
        if not self.parts.predicted:
            return {r: self.records[r].loss[-1] for r in tried.tolist()}
        recipes, posterior = self._posterior()
        place = {r: i for i, r in enumerate(recipes.tolist())}
        means = posterior.mean
        return {r: float(means[place[r]]) if r in place else np.inf for r in tried.tolist()}

    # --- scores -----------------------------------------------------------------------------------

    def _usable(self) -> NDArray[np.intp]:
        """Recipes with a measured point that may win."""
        return np.array([r for r, x in self.records.items() if x.loss and not x.diverged], np.intp)

    def _posterior(self) -> tuple[NDArray[np.intp], Posterior]:
        """Scores of the recipes that the surrogate is fitted to."""
        if self.posterior is None:
            recipes, points = self._data()
            posterior = self.curves.posterior(self._features().take(recipes), points)
            self.posterior = recipes, posterior
        return self.posterior

    def _features(self) -> Features:
        return self.menu.features(np.log(self.tokens_at_budget), self.parts.step_law)

    def _data(self) -> tuple[NDArray[np.intp], Points]:
        """The recipes that count, and their points by place; learns when there is more."""
        usable = self._usable()
        if len(usable) > MOST_RECIPES:
            half = MOST_RECIPES // 2
            older, latest = usable[:-half], usable[-half:]
            law = self.curves.law
            n, d = np.exp(self.menu.log_n), self.tokens_at_budget
            at = {r: float(law.loss(n[r], self._tokens(r))) for r in older.tolist()}
            gap = [
                self.records[r].loss[-1] / at[r] * float(law.loss(n[r], d[r]))
                for r in older.tolist()
            ]
            usable = np.concatenate([older[np.argsort(gap, kind="stable")[:half]], latest])
        points = self._points(usable)
        if len(points.recipe) > GROWTH * self.learned_from:
            self.learned_from = len(points.recipe)
            self.curves.fit_law([self._curve(r) for r in usable.tolist()])
            self.curves.learn(self._features().take(usable), points)
        return usable, points

    def _points(self, recipes: NDArray[np.intp]) -> Points:
        rows: list[tuple[int, float, float]] = []
        for place, recipe in enumerate(recipes.tolist()):
            record, last = self.records[recipe], np.inf
            taken = 0
            for tokens, loss in zip(reversed(record.tokens), reversed(record.loss), strict=True):
                if tokens <= last / 2 and taken < MOST_POINTS:
                    rows.append((place, np.log(tokens), np.log(loss)))
                    last, taken = tokens, taken + 1
        columns = np.array(rows).reshape(-1, 3).T
        return Points(columns[0].astype(np.intp), columns[1], columns[2])

    def _curve(self, recipe: int) -> Curve:
        record = self.records[recipe]
        yes = np.ones(len(record.tokens), bool)
        n = float(np.exp(self.menu.log_n[recipe]))
        return Curve(str(recipe), n, np.array(record.tokens), np.array(record.loss), yes, ~yes)

    def leader(self, state: SearchState) -> str | None:
        """The trial to answer with now: the lowest pessimistic score."""
        tried = self._usable()
        if not len(tried):
            return None
        recipes, posterior = self._posterior()
        spread = posterior.sd_within(np.arange(len(recipes)))
        best = int(recipes[np.argmin(posterior.mean + PESSIMISM_SDS * spread)])
        by_recipe = defaultdict(list)
        for trial_id, (recipe, _) in self.places.items():
            if trial_id in state.trials and trial_id not in self.failed | self.prober.trials:
                by_recipe[recipe].append(trial_id)
        return max(by_recipe[best], key=lambda t: state.trials[t].tokens, default=None)

    # --- what is next -----------------------------------------------------------------------------

    def propose(self, state: SearchState) -> Iterator[Proposal]:
        """New trials, best first."""
        rng = np.random.default_rng([self.space.search.seed, len(state.trials)])
        taken = {self.places[t][0] for t in state.trials if t not in self.failed}
        taken |= {r for r, x in self.records.items() if x.loss or x.diverged}
        left = np.array([r for r in range(len(self.menu.recipes)) if r not in taken], np.intp)
        left = left[[bool(self.menu.allowed(r).any()) for r in left.tolist()]]
        if not len(left):
            return
        drawn = rng.permutation(left)[: min(CANDIDATES, -(-2 * len(left) // 3))]
        for recipe in drawn[np.argsort(-self._worth(drawn, state), kind="stable")][:PROPOSED]:
            system = self._system(int(recipe), state, rng)
            run = None if system is None else self.menu.resolve(int(recipe), system)
            if run is not None and system is not None and run.trial_id not in state.trials:
                yield Proposal(self.menu.point(int(recipe), system), run)

    def _worth(self, candidates: NDArray[np.intp], state: SearchState) -> Floats:
        """Expected improvement over the leader per price, of each candidate."""
        known, points = self._data()
        going = [self.places[t.trial_id][0] for t in state.running]
        blind = np.array([r for r in dict.fromkeys(going) if r not in set(known.tolist())], np.intp)
        recipes = np.concatenate([known, blind, candidates])
        posterior = self.curves.posterior(self._features().take(recipes), points)
        covariance = posterior.covariance
        for i in range(len(known), len(known) + len(blind)):  # as if they had been measured
            covariance = covariance - np.outer(covariance[i], covariance[i]) / (
                covariance[i, i] + 1e-5
            )
        posterior = Posterior(posterior.mean, covariance)
        new = slice(len(known) + len(blind), None)
        if not len(known):
            return -posterior.mean[new]
        spread = posterior.sd_within(np.arange(len(known)))
        best = int(np.argmin(posterior.mean[: len(known)] + PESSIMISM_SDS * spread))
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
        tried = np.array(list(self.records), np.intp)
        broke = np.array([self.records[r].diverged for r in tried.tolist()], float)
        if not broke.any():
            return np.zeros(len(candidates))
        features = self._features()
        one, other = features.take(candidates), features.take(tried)
        distance = (one.u[:, None] - other.u[None, :]) ** 2
        distance += (0.5 * (one.log_n[:, None] - other.log_n[None, :])) ** 2
        distance += (one.words[:, None, :] != other.words[None, :, :]).sum(axis=2)
        weight = np.exp(-2 * distance)
        return np.asarray(weight @ broke / (weight.sum(axis=1) + 0.3))

    def _system(self, recipe: int, state: SearchState, rng: np.random.Generator) -> int | None:
        """The system to try a recipe on."""
        allowed = self._able(recipe)
        costs = self.systems.costs(int(self.menu.shape_of[recipe]))
        usd = self.menu.usd_per_hour
        able = allowed & np.isfinite(costs.log_tokens_per_s)
        if not able.any():
            return None
        if self.parts.system == "random":
            return int(rng.choice(np.flatnonzero(able)))
        tokens = self._rungs(recipe)[0]
        start = usd * FIRST_REPORT_SECONDS / 3600
        price = costs.usd_per_token(usd) * tokens + start
        price = price + start * costs.p_oom / np.maximum(1 - costs.p_oom, 1e-3)
        price = np.where(able, np.where(costs.p_oom > 0.5, price * 1e6, price), np.inf)
        best = int(np.argmin(price))
        if self.parts.system == "filtered":
            return int(rng.choice(np.flatnonzero(price <= 1.3 * price[best])))
        if not self.parts.explore:
            return best
        future = FUTURE_SHARE * (self.space.training_budget.usd or 0.0)
        gain = costs.log_tokens_per_s - np.log(usd)
        with np.errstate(invalid="ignore"):
            hope = expected_improvement(gain - gain[best], costs.sd + 1e-9) * (1 - costs.p_oom)
            value = np.where(np.isfinite(price), hope * future - (price - price[best]), -np.inf)
        return int(np.argmax(value))

    def _able(self, recipe: int) -> NDArray[np.bool_]:
        """Systems that have not failed with a recipe, nor refused its shape (S,)."""
        allowed = self.menu.allowed(recipe) & self.prober.supported(recipe)
        failed = (self.places[trial_id] for trial_id in self.failed)
        allowed[[system for other, system in failed if other == recipe]] = False
        return allowed
