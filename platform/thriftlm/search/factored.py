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
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from thriftlm.planning.law import Curve
from thriftlm.search.algorithms import Proposal, Searcher
from thriftlm.search.budget import FIRST_REPORT_SECONDS
from thriftlm.search.curve_model import EARLIEST, CurveModel, Features, Points, Posterior
from thriftlm.search.journal import Allocated, Ended, Event, Released, Reported, Suggested
from thriftlm.search.menu import Menu, menu_of
from thriftlm.search.objective import PESSIMISM_SDS
from thriftlm.search.space import Space
from thriftlm.search.standing import Record, Standing
from thriftlm.search.state import PAUSED, SearchState, TrialState
from thriftlm.search.system_model import Fact, SystemModel
from thriftlm.spec import Progress, SystemSpec

Floats = NDArray[np.float64]

CANDIDATES = 256
"""Recipes drawn for each proposal, of those that were not tried; never more than two thirds."""
MOST_RECIPES, MOST_POINTS, APART = 64, 2, 1.7
"""Recipes that the surrogate is fitted to (half the best, half the latest) and points of each
curve, the last and an earlier one at this ratio of tokens: what bounds the time of a suggestion."""
LATE = 4.0
"""Only the last factor of so many tokens of a curve is fitted: what comes before bends away from
every law, and a law that has to follow it predicts worse."""
MOST_NEARBY = 500
"""Recipes, the latest, whose divergence tells on others."""
GROWTH = 1.25
"""The law is fitted again whenever there are this many times the points."""
COST_POWER = 0.5
"""Expected improvement is divided by the price to this power: 1 would only choose cheap trials
(cost cooling of EI per unit cost, Lee et al., arXiv 2003.10870)."""
CONFIRMED = 1 / 3
"""Share of the budget's tokens that a winner is trained to before it is believed."""
RESERVE = 2.0
"""The winner is confirmed when this many times the price of doing so is left."""
PROPOSED = 20
"""Recipes resolved per proposal until one of them is a run."""


class Factored(Searcher):
    """The searcher of `algorithm: factored`."""

    pauses = True

    def __init__(self, space: Space) -> None:
        self.space = space
        self.menu: Menu = menu_of(space)
        self.systems = SystemModel.over(self.menu.prior)
        self.curves = CurveModel()
        self.places: dict[str, tuple[int, int]] = {}
        self.trials_of: dict[int, list[str]] = defaultdict(list)
        self.records: dict[int, Record] = {}
        self.standing = Standing.of(len(self.menu.recipes))
        self.targets: dict[str, float] = {}
        self.failed: set[str] = set()
        self.learned_from = 0
        self.data: tuple[NDArray[np.intp], Points] | None = None
        self.posterior: tuple[NDArray[np.intp], Posterior] | None = None
        self.restrict(lambda system: True)
        self._budget_tokens()

    def restrict(self, fits: Callable[[SystemSpec], bool]) -> None:
        """Propose nothing on systems that the cluster never holds."""
        self.fits = np.array([fits(system) for system in self.menu.specs])
        self.runs_somewhere = self.menu.runs_on_any(self.fits)

    # --- what happened ----------------------------------------------------------------------------

    def observe(self, event: Event) -> None:
        """Take an event of the journal into account."""
        match event:
            case Suggested(trial_id=trial_id, point=point):
                recipe, _ = self.places[trial_id] = self.menu.locate(point)
                self.trials_of[recipe].append(trial_id)
                self.standing.trials[recipe] += 1
            case Allocated(trial_id=trial_id):
                self.targets[trial_id] = self._next_rung(trial_id)
            case Reported(trial_id=trial_id, progress=progress):
                self._measured(trial_id, progress)
            case Ended(trial_id=trial_id, status=status):
                if status in ("oom", "failed", "diverged"):
                    self._failed(trial_id)
            case Released():
                self._learn()
            case _:
                return
        self.posterior = None

    def _failed(self, trial_id: str) -> None:
        if trial_id not in self.failed:
            self.failed.add(trial_id)
            self.standing.trials[self.places[trial_id][0]] -= 1

    def _measured(self, trial_id: str, progress: Progress) -> None:
        recipe, system = self.places[trial_id]
        self._timed(Fact(int(self.menu.shape_of[recipe]), system), progress)
        if progress.status == "oom":
            self._failed(trial_id)
            return
        record = self.records.setdefault(recipe, Record([], []))
        if progress.status == "diverged":
            record.diverged = True
        elif progress.val_loss is not None and progress.tokens > 0 and not progress.warming_up:
            while record.tokens and record.tokens[-1] >= progress.tokens:
                record.tokens.pop(), record.loss.pop()
            record.tokens.append(float(progress.tokens))
            record.loss.append(progress.val_loss)
        self._stands(recipe)

    def _stands(self, recipe: int) -> None:
        """Enter a recipe where its record puts it."""
        record, rungs = self.records[recipe], self._rungs(recipe)
        tokens = record.tokens[-1] if record.tokens else 0.0
        at = self.standing
        at.tokens[recipe], at.loss[recipe] = tokens, record.loss[-1] if record.loss else np.nan
        at.is_known[recipe] = bool(record.loss) or record.diverged
        at.may_win[recipe] = bool(record.loss) and not record.diverged
        at.level[recipe] = sum(rung <= 1.05 * tokens for rung in rungs)
        at.may_go_on[recipe] = tokens < 0.95 * rungs[-1]
        self.data = None

    def _timed(self, fact: Fact, progress: Progress) -> None:
        """What a system did teaches the costs of all."""
        rate, oom = progress.tokens_per_s, progress.status == "oom"
        if oom or rate is not None:
            total = None if rate is None or oom else rate * self.menu.specs[fact.system].n_gpus
            if self.systems.observe(fact, total, oom):
                self._budget_tokens()

    def _budget_tokens(self) -> None:
        """D_B of every recipe, on the system that is believed to be its best."""
        most = float(self.space.search.fidelity.max_tokens)
        if self.systems.knows_speed:
            self.tokens_at_budget = self.menu.most_of_recipes(self._bought())
        else:  # nobody has measured such a machine yet
            self.tokens_at_budget = np.full(len(self.menu.recipes), most)
        middling = float(np.median(np.minimum(self.tokens_at_budget, most)))
        self.log_early = float(np.log(middling / EARLIEST))
        for recipe in self.records:
            self._stands(recipe)

    def _bought(self) -> Floats:
        """Tokens that the training budget buys a shape on each system; 1 where it doesn't run."""
        budget, usd_per_hour = self.space.training_budget, self.menu.usd_per_hour
        costs = self.systems.all_costs()
        speed = np.exp(costs.log_tokens_per_s)
        fits = self.menu.runs_on & (costs.p_oom < 0.5)
        fits = np.where(fits.any(axis=1, keepdims=True), fits, self.menu.runs_on)
        by_usd = np.inf if budget.usd is None else budget.usd * 3600 / usd_per_hour * speed
        by_hours = np.inf if budget.hours is None else budget.hours * 3600 * speed
        return np.where(fits, np.minimum(by_usd, by_hours), 1.0)

    # --- rungs ------------------------------------------------------------------------------------

    def _rungs(self, recipe: int) -> list[float]:
        """Tokens at which a trial of a recipe waits, up to what the budget buys."""
        fidelity = self.space.search.fidelity
        end = min(float(fidelity.max_tokens), float(self.tokens_at_budget[recipe]))
        found, rung = [], self._first_rung(end)
        while rung < 0.7 * end:
            found.append(rung)
            rung *= fidelity.factor
        return [*found, end]

    def _first_rung(self, end: float) -> float:
        """Halfway between equal tokens and equal dollars.

        At equal tokens large models cost too much, at equal dollars they are still warming up.
        """
        fidelity = self.space.search.fidelity
        return fidelity.min_tokens * float(np.sqrt(end / fidelity.max_tokens))

    def _next_rung(self, trial_id: str) -> float:
        recipe = self.places[trial_id][0]
        rungs = self._rungs(recipe)
        return next((rung for rung in rungs if rung > 1.05 * self._tokens(recipe)), rungs[-1])

    def _tokens(self, recipe: int) -> float:
        return float(self.standing.tokens[recipe])

    def pause(self, trial: TrialState) -> str | None:
        """Why a running trial should wait now."""
        if trial.tokens < self.targets[trial.trial_id]:
            return None
        return f"{PAUSED} at {trial.tokens} tokens"

    def pauses_at(self, trial: TrialState) -> int | None:
        """The rung, or the end, where its budget buys no more."""
        return math.ceil(self.targets[trial.trial_id])

    def resume(self, state: SearchState, is_last: bool) -> str | None:
        """The paused trial to go on with: one of the best third at its rung, or the winner."""
        may_go_on = self.standing.may_go_on
        at = ((self.places[t.trial_id][0], t.trial_id) for t in state.paused)
        paused = {recipe: trial_id for recipe, trial_id in at if may_go_on[recipe]}
        if not paused:
            return None
        if winner := self._to_confirm(state, paused, is_last or not len(self._left())):
            return winner
        return self._promoted(state, paused)

    def _to_confirm(self, state: SearchState, paused: dict[int, str], is_last: bool) -> str | None:
        leader = self.leader(state)
        if leader is None or (recipe := self.places[leader][0]) not in paused:
            return None
        missing = CONFIRMED * self.tokens_at_budget[recipe] - self._tokens(recipe)
        if missing <= 0:
            return None
        total = self.space.search_budget.usd
        left = np.inf if total is None else total - state.spent_usd(state.last_at)
        price = missing * self._usd_per_token(*self.places[leader])
        return leader if is_last or left < RESERVE * price else None

    def _usd_per_token(self, recipe: int, system: int) -> float:
        costs = self.systems.costs(int(self.menu.shape_of[recipe]))
        return float(costs.usd_per_token(self.menu.usd_per_hour)[system])

    def _promoted(self, state: SearchState, paused: dict[int, str]) -> str | None:
        """Of the highest rung that has one: a trial among the best third that waits there."""
        tried = self._usable()
        if not len(tried):
            return None
        levels, scores = self.standing.level[tried], self._ranking(tried)
        may = np.zeros(len(self.menu.recipes), bool)
        may[list(paused)] = True
        may[[self.places[t.trial_id][0] for t in state.running]] = False
        for level in np.unique(levels)[::-1]:
            reached = np.flatnonzero(levels >= level)
            best = reached[np.argsort(scores[reached], kind="stable")]
            kept = best[: len(reached) // self.space.search.fidelity.factor]
            going_on = kept[(levels[kept] == level) & may[tried[kept]]]
            if len(going_on):
                return paused[int(tried[going_on[0]])]
        return None

    def _ranking(self, tried: NDArray[np.intp]) -> Floats:
        """What promotion goes by: the predicted score."""
        recipes, posterior = self._posterior()
        scores = np.full(len(self.menu.recipes), np.nan)
        if len(tried) > len(recipes):
            scores[tried] = self._by_law(tried)
        scores[recipes] = posterior.mean
        return np.asarray(scores[tried])

    def _by_law(self, recipes: NDArray[np.intp]) -> Floats:
        """Log loss at budget where each keeps its distance from the law: a rough score."""
        law, n = self.curves.law, np.exp(self.menu.log_n[recipes])
        now, then = self.standing.tokens[recipes], self.tokens_at_budget[recipes]
        to_come = law.loss(n, then) / law.loss(n, now)
        return np.asarray(np.log(self.standing.loss[recipes] * to_come))

    # --- scores -----------------------------------------------------------------------------------

    def _usable(self) -> NDArray[np.intp]:
        """Recipes with a measured point that may win."""
        tried = np.fromiter(self.records, np.intp, len(self.records))
        return tried[self.standing.may_win[tried]]

    def _posterior(self) -> tuple[NDArray[np.intp], Posterior]:
        """Scores of the recipes that the surrogate is fitted to."""
        if self.posterior is None:
            recipes, points = self._data()
            posterior = self.curves.posterior(self._features(recipes), points)
            self.posterior = recipes, posterior
        return self.posterior

    def _features(self, recipes: NDArray[np.intp]) -> Features:
        log_d = np.log(self.tokens_at_budget[recipes])
        return self.menu.features(recipes, log_d, self.log_early)

    def _data(self) -> tuple[NDArray[np.intp], Points]:
        """The recipes that count, and their points by place."""
        if self.data is None:
            usable = self._usable()
            if len(usable) > MOST_RECIPES:
                half = MOST_RECIPES // 2
                older, latest = usable[:-half], usable[-half:]
                best = np.argsort(self._by_law(older), kind="stable")[:half]
                usable = np.concatenate([older[best], latest])
            self.data = usable, self._points(usable)
        return self.data

    def _learn(self) -> None:
        """Fit the law when there is more: at an event, so that a replay does the same."""
        usable, points = self._data()
        if len(points.recipe) > GROWTH * self.learned_from:
            self.learned_from = len(points.recipe)
            self.curves.fit_law([self._curve(r) for r in usable.tolist()])
            self.data = None  # the law chooses the recipes

    def _points(self, recipes: NDArray[np.intp]) -> Points:
        rows: list[tuple[int, float, float]] = []
        for place, recipe in enumerate(recipes.tolist()):
            record, last = self.records[recipe], np.inf
            taken = 0
            for tokens, loss in zip(reversed(record.tokens), reversed(record.loss), strict=True):
                if tokens <= last / APART and taken < MOST_POINTS:
                    rows.append((place, np.log(tokens), np.log(loss)))
                    last, taken = tokens, taken + 1
        columns = np.array(rows).reshape(-1, 3).T
        return Points(columns[0].astype(np.intp), columns[1], columns[2])

    def _curve(self, recipe: int) -> Curve:
        record = self.records[recipe]
        tokens, loss = np.array(record.tokens), np.array(record.loss)
        late = tokens >= tokens[-1] / LATE
        yes = np.ones(int(late.sum()), bool)
        n = float(np.exp(self.menu.log_n[recipe]))
        return Curve(str(recipe), n, tokens[late], loss[late], yes, ~yes)

    def leader(self, state: SearchState) -> str | None:
        """The trial to answer with now: the lowest pessimistic score."""
        tried = self._usable()
        if not len(tried):
            return None
        recipes, posterior = self._posterior()
        spread = posterior.sd_within(np.arange(len(recipes)))
        best = int(recipes[np.argmin(posterior.mean + PESSIMISM_SDS * spread)])
        tried_on = [t for t in self.trials_of[best] if t in state.trials and t not in self.failed]
        return max(tried_on, key=lambda t: state.trials[t].tokens, default=None)

    # --- what is next -----------------------------------------------------------------------------

    def propose(self, state: SearchState) -> Iterator[Proposal]:
        """New trials, best first."""
        rng = np.random.default_rng([self.space.search.seed, len(state.trials)])
        left = self._left()
        if not len(left):
            return
        drawn = rng.permutation(left)[: min(CANDIDATES, -(-2 * len(left) // 3))]
        for recipe in drawn[np.argsort(-self._worth(drawn, state), kind="stable")][:PROPOSED]:
            run, system = None, self._system(int(recipe), rng)
            while system is not None and (run := self.menu.resolve(int(recipe), system)) is None:
                system = self._system(int(recipe), rng)
            if run is not None and system is not None and run.trial_id not in state.trials:
                yield Proposal(self.menu.point(int(recipe), system), run)

    def _left(self) -> NDArray[np.intp]:
        """Recipes that may be proposed: nothing is known of them, and no trial may still tell."""
        taken = (self.standing.trials > 0) | self.standing.is_known
        return np.flatnonzero(~taken & self.runs_somewhere)

    def _worth(self, candidates: NDArray[np.intp], state: SearchState) -> Floats:
        """Expected improvement over the leader per price, of each candidate."""
        known, points = self._data()
        going = [self.places[t.trial_id][0] for t in state.running]
        blind = np.array([r for r in dict.fromkeys(going) if r not in set(known.tolist())], np.intp)
        recipes = np.concatenate([known, blind, candidates])
        posterior = self.curves.posterior(self._features(recipes), points)
        covariance = posterior.covariance
        if len(blind):  # as if they had been measured
            rows = covariance[len(known) : len(known) + len(blind)]
            own = rows[:, len(known) : len(known) + len(blind)] + 1e-5 * np.eye(len(blind))
            covariance = covariance - rows.T @ np.linalg.solve(own, rows)
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
        tried = np.fromiter(self.records, np.intp, len(self.records))[-MOST_NEARBY:]
        broke = np.array([self.records[r].diverged for r in tried.tolist()], float)
        if not broke.any():
            return np.zeros(len(candidates))
        one, other = self._features(candidates), self._features(tried)
        distance = (one.u[:, None] - other.u[None, :]) ** 2
        distance += (0.5 * (one.log_n[:, None] - other.log_n[None, :])) ** 2
        distance += (one.words[:, None, :] != other.words[None, :, :]).sum(axis=2)
        weight = np.exp(-2 * distance)
        return np.asarray(weight @ broke / (weight.sum(axis=1) + 0.3))

    def _system(self, recipe: int, rng: np.random.Generator) -> int | None:
        """The system to try a recipe on: the cheapest, chance has no part."""
        price = self._prices(recipe)
        return int(np.argmin(price)) if np.isfinite(price).any() else None

    def _prices(self, recipe: int) -> Floats:
        """Dollars to the first rung, expected failures included (S,); infinite where it can't."""
        allowed = self.menu.allowed(recipe) & self.fits
        for trial_id in self.trials_of[recipe]:
            if trial_id in self.failed:
                allowed[self.places[trial_id][1]] = False
        costs = self.systems.costs(int(self.menu.shape_of[recipe]))
        usd = self.menu.usd_per_hour
        start = usd * FIRST_REPORT_SECONDS / 3600
        price = costs.usd_per_token(usd) * self._rungs(recipe)[0] + start
        price = price + start * costs.p_oom / np.maximum(1 - costs.p_oom, 1e-3)
        price = np.where(costs.p_oom > 0.5, price * 1e6, price)
        return np.where(allowed & np.isfinite(costs.log_tokens_per_s), price, np.inf)


def expected_improvement(gain: Floats, sd: Floats) -> Floats:
    """Mean of max(0, X) for X normal with that mean and standard deviation."""
    z = gain / sd
    return np.asarray(gain * ndtr(z) + sd * np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi))
