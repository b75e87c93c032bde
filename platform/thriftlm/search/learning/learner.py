"""What a factored search knows: curves of recipes, speeds of systems, and what follows from both.

It is fed with the events of the journal and nothing else, so that the same history gives the same
knowledge, also when it is replayed.
"""

from collections import defaultdict
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from thriftlm.planning.law import Curve
from thriftlm.search.algorithms import Searcher
from thriftlm.search.history.journal import (
    Ended,
    Event,
    Known,
    KnownRun,
    Probed,
    Released,
    Reported,
    SearchStarted,
    Suggested,
)
from thriftlm.search.learning.curve_model import EARLIEST, CurveModel, Features, Points, Posterior
from thriftlm.search.learning.menu import Menu, menu_of
from thriftlm.search.learning.probing import Prober
from thriftlm.search.learning.standing import Record, Standing
from thriftlm.search.learning.system_model import Fact, SystemModel
from thriftlm.search.learning.warm_start import head_start
from thriftlm.search.scores.objective import Predicted, fresh_tokens, loss_of
from thriftlm.search.scores.scalar import line, predictions
from thriftlm.search.scores.scoring import configuration_of, loss_unit
from thriftlm.search.spaces.space import Space
from thriftlm.spec import Progress, SystemSpec

Floats = NDArray[np.float64]

MOST_RECIPES, MOST_POINTS, APART = 64, 2, 1.7
"""Recipes that the surrogate is fitted to (half the best, half the latest) and points of each
curve, the last and an earlier one at this ratio of tokens: what bounds the time of a suggestion."""
LATE = 4.0
"""Only the last factor of so many tokens of a curve is fitted: what comes before bends away from
every law, and a law that has to follow it predicts worse."""
GROWTH = 1.25
"""The law is fitted again whenever there are this many times the points."""


class Learner(Searcher):
    """Takes events in; `factored.Factored` decides by what it knows."""

    def __init__(self, space: Space) -> None:
        self.space, self.unit = space, loss_unit(space)
        self.unique_tokens: float | None = None
        self.targets: dict[str, float] = {}
        self.known: list[KnownRun] = []
        self.holds: Callable[[SystemSpec], bool] = lambda system: True
        self._begin()

    def restrict(self, fits: Callable[[SystemSpec], bool]) -> None:
        """Propose nothing on systems that the cluster never holds."""
        self.holds = fits
        self.fits = np.array([fits(system) for system in self.menu.specs])
        self.runs_somewhere = self.menu.runs_on_any(self.fits)

    def _begin(self) -> None:
        """Know what earlier searches measured, which comes before the first trial."""
        also = [one.point for one in self.known if one.point]
        self.menu: Menu = menu_of(self.space, also)
        self.restrict(self.holds)
        self.systems = SystemModel(self.menu.prior)
        self.prober = Prober(self.space, self.menu, self.systems)
        self.curves = CurveModel()
        self.standing = Standing.of(len(self.menu.recipes))
        self.taught = head_start(self.menu, self.known, self.unit)
        self.places, self.failed = dict(self.taught.places), set(self.taught.failed)
        self.repeats: set[str] = set()
        self.trials_of: dict[int, list[str]] = defaultdict(list)
        for trial_id, (recipe, _) in self.places.items():
            self.trials_of[recipe].append(trial_id)
            self.standing.trials[recipe] += trial_id not in self.failed
        self.records = {recipe: record.copy() for recipe, record in self.taught.records.items()}
        self.trained: dict[int, float] = {}
        self.learned_from = 0
        self.data: tuple[NDArray[np.intp], Points] | None = None
        self.posterior: tuple[NDArray[np.intp], Posterior] | None = None
        for shape, system, total, oom in self.taught.facts:
            self.systems.observe(Fact(shape, system), total, oom)
        self._budget_tokens()
        self._learn()

    # --- what happened ----------------------------------------------------------------------------

    def observe(self, event: Event) -> None:
        """Take an event of the journal into account."""
        match event:
            case SearchStarted(unique_tokens=unique_tokens):
                self.unique_tokens = min(unique_tokens.values(), default=None)
            case Known(runs=runs):
                self.known += runs
                self._begin()
            case Suggested():
                self._suggested(event)
            case Probed(trial_id=trial_id, timing=timing):
                if self.prober.timed(self.places[trial_id][0], timing):
                    self._budget_tokens()
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

    def _suggested(self, event: Suggested) -> None:
        trial_id = event.trial_id
        recipe, _ = self.places[trial_id] = self.menu.locate(event.point)
        if event.systems:
            self.prober.trials.add(trial_id)
        elif event.repeat_of is not None:
            self.repeats.add(trial_id)
        else:
            self.trials_of[recipe].append(trial_id)
            self.standing.trials[recipe] += 1

    def _failed(self, trial_id: str) -> None:
        is_own = trial_id not in self.prober.trials | self.repeats
        if is_own and trial_id not in self.failed:
            self.failed.add(trial_id)
            self.standing.trials[self.places[trial_id][0]] -= 1

    def _measured(self, trial_id: str, progress: Progress) -> None:
        recipe, system = self.places[trial_id]
        self._timed(Fact(int(self.menu.shape_of[recipe]), system), progress)
        if progress.status == "oom":
            self._failed(trial_id)
            return
        record = self.records.setdefault(recipe, Record())
        loss = loss_of(progress, self.unit)
        if trial_id in self.repeats:
            if loss is not None and progress.status != "diverged":
                record.others.setdefault(trial_id, {})[float(progress.tokens)] = loss
        elif progress.status == "diverged":
            record.diverged = True
        elif loss is not None and progress.tokens > 0 and not progress.warming_up:
            self.trained[recipe] = float(progress.tokens)
            known = self.taught.records.get(recipe)
            if known is None or progress.tokens > known.last_tokens:
                record.add(float(progress.tokens), loss)
        self._stands(recipe)

    def _stands(self, recipe: int) -> None:
        """Enter a recipe where its record puts it."""
        record, rungs = self.records[recipe], self._rungs(recipe)
        tokens = record.last_tokens
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

    # --- budget and rungs -------------------------------------------------------------------------

    def _budget_tokens(self) -> None:
        """D_B of every recipe, on the system that is believed to be its best."""
        most = float(self.space.search.fidelity.max_tokens)
        if self.systems.knows_speed:
            self.tokens_at_budget = self.menu.most_of_recipes(self._bought())
        else:  # nobody has measured such a machine yet
            self.tokens_at_budget = np.full(len(self.menu.recipes), most)
            self.log_speed = self.log_usd = np.zeros(len(self.menu.recipes))
        middling = float(np.median(np.minimum(self.tokens_at_budget, most)))
        self.log_early = float(np.log(middling / EARLIEST))
        for recipe in self.records:
            self._stands(recipe)

    def _bought(self) -> Floats:
        """Tokens that the training budget buys a shape on each system; 1 where it doesn't run."""
        budget, usd_per_hour = self.space.training_budget, self.menu.usd_per_hour
        log_speed = self.systems.tokens_per_s()
        speed = np.exp(log_speed)
        fits = self.menu.runs_on & (self.systems.all_p_oom() < 0.5)
        fits = np.where(fits.any(axis=1, keepdims=True), fits, self.menu.runs_on)
        by_usd = np.inf if budget.usd is None else budget.usd * 3600 / usd_per_hour * speed
        by_hours = np.inf if budget.hours is None else budget.hours * 3600 * speed
        bought = np.where(fits, np.minimum(by_usd, by_hours), 1.0)
        best = np.arange(len(bought)), bought.argmax(axis=1)
        usd = np.log(np.broadcast_to(usd_per_hour / 3600, bought.shape)[best])
        self.log_speed = log_speed[best][self.menu.shape_of]
        self.log_usd = usd[self.menu.shape_of] - self.log_speed
        return bought

    def _valued(
        self, recipes: NDArray[np.intp], posterior: Posterior, tried: int, vary: bool = True
    ) -> Posterior:
        """What drives, instead of log loss; in `pareto` with another weight for every trial."""
        rng = np.random.default_rng([self.space.search.seed, len(self.places)])
        share = float(rng.random()) if vary else 0.5
        asked, weights = self.space.objective_name, self.space.objective_weights
        usd, speed = self.log_usd[recipes], self.log_speed[recipes]
        return line(asked, weights, posterior.mean, usd, speed, tried, share).of(posterior)

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

    def _tokens(self, recipe: int) -> float:
        return float(self.standing.tokens[recipe])

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
        fresh = fresh_tokens(self.tokens_at_budget[recipes], self.unique_tokens)
        return self.menu.features(recipes, np.log(fresh), self.log_early)

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
            curves = [self._curve(r) for r in usable.tolist()]
            self.curves.fit_law([*curves, *self.taught.elsewhere])
            self.data = None  # the law chooses the recipes

    def _points(self, recipes: NDArray[np.intp]) -> Points:
        rows: list[tuple[int, float, float]] = []
        for place, recipe in enumerate(recipes.tolist()):
            record, last = self.records[recipe], np.inf
            taken = 0
            for tokens, loss in zip(reversed(record.tokens), reversed(record.loss), strict=True):
                if tokens <= last / APART and taken < MOST_POINTS:
                    rows.append((place, tokens, np.log(record.mean(tokens, loss))))
                    last, taken = tokens, taken + 1
        places, at, log_loss = np.array(rows).reshape(-1, 3).T
        fresh = fresh_tokens(at, self.unique_tokens)
        return Points(places.astype(np.intp), np.log(fresh), log_loss)

    def _curve(self, recipe: int) -> Curve:
        record = self.records[recipe]
        tokens, loss = np.array(record.tokens), np.array(record.loss)
        late = tokens >= tokens[-1] / LATE
        yes = np.ones(int(late.sum()), bool)
        n, fresh = float(np.exp(self.menu.log_n[recipe])), fresh_tokens(tokens, self.unique_tokens)
        return Curve(str(recipe), n, fresh[late], loss[late], yes, ~yes)

    def _by_law(self, recipes: NDArray[np.intp]) -> Floats:
        """Log loss at budget where each keeps its distance from the law: a rough score."""
        law, n = self.curves.law, np.exp(self.menu.log_n[recipes])
        now = fresh_tokens(self.standing.tokens[recipes], self.unique_tokens)
        then = fresh_tokens(self.tokens_at_budget[recipes], self.unique_tokens)
        to_come = law.loss(n, then) / law.loss(n, now)
        return np.asarray(np.log(self.standing.loss[recipes] * to_come))

    def predicted(self) -> dict[str, Predicted]:
        """Loss at budget of every recipe that was measured, by `configuration_of`."""
        if not len(self._usable()):
            return {}
        self.learned_from = 0
        self._learn()
        known, points = self._data()
        rest = [r for r in self._usable().tolist() if r not in set(known.tolist())]
        recipes = np.array([*known.tolist(), *rest])
        posterior = self.curves.posterior(self._features(recipes), points)
        names = [configuration_of(self.menu.runs[r]) for r in recipes.tolist()]
        tokens = fresh_tokens(self.tokens_at_budget, self.unique_tokens)[recipes]
        measured = np.log(self.standing.loss[recipes])
        return predictions(names, tokens, posterior, measured, self.space.search.seed)
