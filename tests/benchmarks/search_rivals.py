"""Rivals of the factored search, as people run them: raw loss, plain Optuna, plain ASHA.

And the factored search with a part left out, or another in its place, to see what the part earns.
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import optuna

from thriftlm.planning.law import Curve
from thriftlm.search.algorithms import Proposal, Searcher
from thriftlm.search.asha import rung_reached, survives
from thriftlm.search.history.journal import Ended, Event, Reported
from thriftlm.search.history.state import SearchState, TrialState
from thriftlm.search.learning.curve_model import Features
from thriftlm.search.learning.factored import Factored
from thriftlm.search.learning.system_model import Fact, SystemModel
from thriftlm.search.spaces.section import Rejected
from thriftlm.search.spaces.space import Space
from thriftlm.spec import Progress

optuna.logging.set_verbosity(optuna.logging.WARNING)
PROBES = 12
"""Systems that the expert times before he settles on one."""


class Raw(Searcher):
    """Random or TPE draws over the whole space, ranked by loss so far; ASHA stops by it."""

    def __init__(self, space: Space, sampler: str, asha: bool) -> None:
        self.space, self.sampler, self.asha = space, sampler, asha
        self.trials: dict[str, Any] = {}
        self.rungs: dict[int, dict[str, float]] = {}
        self.loss: dict[str, tuple[int, float]] = {}
        seed = space.search.seed
        self.rng = np.random.default_rng(seed)
        tpe = optuna.samplers.TPESampler(seed=seed, multivariate=True, group=False)
        self.study = optuna.create_study(sampler=tpe)
        self.domains = dict(space.domains)
        self.fixed: dict[str, Any] = {}

    def observe(self, event: Event) -> None:
        match event:
            case Reported(trial_id=trial_id, progress=progress):
                if progress.val_loss is not None and progress.status in ("running", "done"):
                    self.loss[trial_id] = progress.tokens, progress.val_loss
                elif progress.status in ("oom", "diverged"):
                    self.loss.pop(trial_id, None)
            case Ended(trial_id=trial_id):
                asked = self.trials.get(trial_id)
                if asked is not None:
                    seen = self.loss.get(trial_id)
                    failed = optuna.trial.TrialState.FAIL
                    if seen is None:
                        self.study.tell(asked, state=failed)
                    else:
                        self.study.tell(asked, seen[1])

    def propose(self, state: SearchState) -> Iterator[Proposal]:
        for _ in range(2000):
            asked = None
            if self.sampler == "tpe":
                free = {p: d.distribution() for p, d in self.domains.items() if p not in self.fixed}
                asked = self.study.ask(free)
                point = self.space.nearest({**asked.params, **self.fixed})
            else:
                point = self.space.sample(self.rng)
            run = self.space.resolve(point, self.space.search.seed)
            if isinstance(run, Rejected) or run.trial_id in state.trials:
                if asked is not None:
                    self.study.tell(asked, state=optuna.trial.TrialState.FAIL)
                continue
            self.trials[run.trial_id] = asked
            yield Proposal(point, run)
            return

    def pause(self, trial: TrialState) -> str | None:
        if not self.asha:
            return None
        fidelity = self.space.search.fidelity
        before = trial.curve[-2].tokens if len(trial.curve) > 1 else 0
        rung = rung_reached(fidelity.rungs, before, trial.tokens)
        if rung is None or trial.loss is None:
            return None
        values = self.rungs.setdefault(rung, {})
        values[trial.trial_id] = trial.loss
        return None if survives(trial.trial_id, values, fidelity.factor) else "asha: not in the top"

    def leader(self, state: SearchState) -> str | None:
        """The lowest loss at the highest rung that anyone reached; without ASHA, of all."""
        if not self.loss:
            return None
        top = self.space.search.fidelity.rungs
        level = {t: sum(r <= tokens for r in top) for t, (tokens, _) in self.loss.items()}
        highest = max(level.values())
        return min((t for t in level if level[t] == highest), key=lambda t: self.loss[t][1])


class Expert(Raw):
    """First times a grid of systems with the first recipe, then fixes the cheapest."""

    def __init__(self, space: Space, asha: bool) -> None:
        super().__init__(space, "tpe", asha)
        self.has_probed = False

    def propose(self, state: SearchState) -> Iterator[Proposal]:
        if not self.has_probed and (next_one := probe(self.space, state)):
            yield next_one
            return
        if not self.has_probed:
            self.has_probed, self.fixed = True, probed_best(self.space, state)
        yield from super().propose(state)

    def pause(self, trial: TrialState) -> str | None:
        return super().pause(trial) if self.has_probed else "probe: timed"


def probe(space: Space, state: SearchState) -> Proposal | None:
    """The next probe: one recipe, systems spread over cards and gangs by the expert's habit.

    Memory is what an expert knows beforehand: he takes the fused kernel and a small micro batch.
    Where the table lacks the recipe on a system, another recipe is timed there.
    """
    if len(state.trials) >= PROBES:
        return None
    runs = space.runs  # type: ignore[attr-defined]
    middle = sorted(range(len(runs.recipes)), key=lambda r: str(runs.recipes[r]))
    usual = middle[len(middle) // 2]
    habits = {"system.n_gpus": (8, 1, 16, 4), "system.gpu": (), "system.micro_batch": (8, 4)}
    there = {key: list(dict.fromkeys(s[key] for s in runs.systems)) for key in habits}
    tried = {key: [x for x in usual if x in there[key]] for key, usual in habits.items()}
    done = {tuple(t.point.values()) for t in state.trials.values()}
    for values in itertools.product(*(tried[key] or there[key] for key in habits)):
        wanted = dict(zip(habits, values, strict=True)) | {"system.attention": "flash"}
        fits = [all(s.get(k, v) == v for k, v in wanted.items()) for s in runs.systems]
        recorded = np.flatnonzero(np.array(fits)[runs.system])
        if not len(recorded):
            continue
        here = recorded[runs.recipe[recorded] == usual]
        point = space.point(int((here if len(here) else recorded)[0]))  # type: ignore[attr-defined]
        run = space.resolve(point, 0)
        if tuple(point.values()) not in done and not isinstance(run, Rejected):
            return Proposal(point, run)
    return None


def probed_best(space: Space, state: SearchState) -> dict[str, Any]:
    """System fields of the probe with the most tokens per dollar."""
    best, found = 0.0, {}
    for trial in state.trials.values():
        rate = trial.tokens_per_s()
        if rate and trial.allocations and rate / trial.allocations[0].usd_per_hour > best:
            best = rate / trial.allocations[0].usd_per_hour
            found = {p: v for p, v in trial.point.items() if p.startswith("system.")}
    return found


class OurExpert(Factored):
    """The expert's system with the factored search's learner."""

    def __init__(self, space: Space) -> None:
        super().__init__(space)
        self.fixed: int | None = None
        self.has_probed = False

    def probe(self, state: SearchState) -> Proposal | None:
        return None

    def propose(self, state: SearchState) -> Iterator[Proposal]:
        if not self.has_probed and (next_one := probe(self.space, state)):
            yield next_one
            return
        if not self.has_probed:
            self.has_probed, best = True, probed_best(self.space, state)
            systems = enumerate(self.menu.systems)
            same = (s for s, x in systems if best and all(best[p] == v for p, v in x.items()))
            self.fixed = next(same, None)
        yield from super().propose(state)

    def pause(self, trial: TrialState) -> str | None:
        return super().pause(trial) if self.has_probed else "probe: timed"

    def _system(self, recipe: int, rng: np.random.Generator) -> int | None:
        found = super()._system(recipe, rng)
        if self.fixed is not None and self.menu.allowed(recipe)[self.fixed]:
            return self.fixed
        return found


# --- the factored search with another part --------------------------------------------------------


class AnySystem(Factored):
    """Joint: a system is drawn from all."""

    def _system(self, recipe: int, rng: np.random.Generator) -> int | None:
        able = np.flatnonzero(np.isfinite(self._prices(recipe)))
        return int(rng.choice(able)) if len(able) else None


class NearlyBestSystem(Factored):
    """Joint, the estimate as filter: drawn from those within 1.3 times the cheapest."""

    def _system(self, recipe: int, rng: np.random.Generator) -> int | None:
        price = self._prices(recipe)
        able = np.flatnonzero(np.isfinite(price) & (price <= 1.3 * price.min()))
        return int(rng.choice(able)) if len(able) else None


class LevelsOnly(Factored):
    """How speed changes with micro batch, gang and model is no trend."""

    def _begin(self) -> None:
        super()._begin()
        prior = self.systems.prior
        levels = np.isin(prior.design, (0.0, 1.0)).all(axis=0)
        levels = np.append(levels, np.zeros(prior.by_size.shape[1], bool))
        variance = np.where(levels, prior.variance, 1e-12)
        self.systems = self.prober.systems = SystemModel(replace(prior, variance=variance))


class WithoutStepLaw(Factored):
    """Learning rate and batch as they are, around their middle."""

    def _features(self, recipes: Any) -> Features:
        rate, batch = self.menu.log_rate, self.menu.log_batch
        u, v = rate[recipes] - rate.mean(), batch[recipes] - batch.mean()
        return replace(super()._features(recipes), u=u, v=v)


class WholeCurves(Factored):
    """The law is fitted to curves from their first report."""

    def _curve(self, recipe: int) -> Curve:
        record, n = self.records[recipe], float(np.exp(self.menu.log_n[recipe]))
        yes = np.ones(len(record.tokens), bool)
        return Curve(str(recipe), n, np.array(record.tokens), np.array(record.loss), yes, ~yes)


class LossSoFar(Factored):
    """Promotion by the last loss."""

    def _ranking(self, tried: Any) -> Any:
        return self.standing.loss[tried]


class WithoutRungs(Factored):
    """Every trial trains to its end."""

    def _rungs(self, recipe: int) -> list[float]:
        return super()._rungs(recipe)[-1:]


class TokenRungs(Factored):
    """The first rung at the same tokens for all."""

    def _first_rung(self, end: float) -> float:
        return float(self.space.search.fidelity.min_tokens)


class DollarRungs(Factored):
    """The first rung at the same share of every recipe's budget."""

    def _first_rung(self, end: float) -> float:
        fidelity = self.space.search.fidelity
        return end * fidelity.min_tokens / fidelity.max_tokens


class WithoutProbes(Factored):
    """No system is timed for its own sake."""

    def probe(self, state: SearchState) -> Proposal | None:
        return None


class Uncalibrated(WithoutProbes):
    """Nothing measured changes the estimate of a system."""

    def _timed(self, fact: Fact, progress: Progress) -> None:
        pass


class WithoutConfirmation(Factored):
    """The winner is believed as it stands."""

    def _to_confirm(self, state: SearchState, is_last: bool) -> str | None:
        return None
