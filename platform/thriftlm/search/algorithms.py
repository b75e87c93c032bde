"""Search algorithms: each proposes the points it wants next, best first.

An algorithm is a pure function of space and history, so that a resumed search decides as the
uninterrupted one would have: its randomness comes from the seed and the number of the draw.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from thriftlm.search.history.journal import Branch, Event
from thriftlm.search.history.state import SearchState, TrialState
from thriftlm.search.scores.objective import Predicted, rank
from thriftlm.search.scores.scoring import FEW_SAMPLES, score_trials
from thriftlm.search.spaces.domains import contains
from thriftlm.search.spaces.space import Rejected, Space
from thriftlm.spec import RunSpec, SystemSpec, digest, identity

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

MAX_DRAWS = 2_000
"""Draws in a row without a new valid point after which a space counts as exhausted."""
GUIDED_DRAWS = 50
"""Draws of tpe per proposal, at 10 to 30 ms each; it repeats itself in a small space."""


@dataclass(frozen=True)
class Proposal:
    """A point of the space and the run it stands for."""

    point: Mapping[str, Any]
    run: RunSpec
    systems: tuple[SystemSpec, ...] = ()
    """What to time instead of training, where it is a probe."""
    branch: Branch | None = None
    """Where it begins, when not at the beginning of its run."""
    ends: tuple[str, str] | None = None
    """The trial whose place it takes, and why that one ends."""

    @property
    def trial_id(self) -> str:
        """Identity of the trial: a probe is another one than the run that it times."""
        if not self.systems:
            return self.run.trial_id
        timed = [identity(system) for system in self.systems]
        return digest({"probe": self.run.trial_id, "systems": timed})


Algorithm = Callable[[Space, SearchState], Iterator[Proposal]]


def random(space: Space, state: SearchState) -> Iterator[Proposal]:
    """Independent draws."""
    return _new(space, state, _draws(space))


def grid(space: Space, state: SearchState) -> Iterator[Proposal]:
    """Every combination, in the order of the file."""
    return _new(space, state, space.grid(), limit=None)


def tpe(space: Space, state: SearchState) -> Iterator[Proposal]:
    """Optuna's tree-structured Parzen estimator on the driving objective.

    Trials that gave no score enter as failures; running ones as their predicted score so far.
    Where the estimator keeps proposing points that are tried or invalid, independent draws follow.
    """
    import optuna  # a second, which a search by another algorithm need not wait for

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {name: d.distribution() for name, d in space.domains.items()}
    history = _history(space, state, distributions)
    directions = ["minimize"] * (2 if space.objective_name == "pareto" else 1)

    seed = int(np.random.default_rng([space.search.seed, len(state.trials)]).integers(2**31))
    sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True)
    study = optuna.create_study(directions=directions, sampler=sampler)
    study.add_trials(history)
    guided = (space.nearest(study.ask(distributions).params) for _ in range(GUIDED_DRAWS))
    return _new(space, state, itertools.chain(guided, _draws(space)))


ALGORITHMS: dict[str, Algorithm] = {"random": random, "grid": grid, "optuna": tpe}


class Searcher:
    """What the desk asks of an algorithm, and tells it. This one proposes, and never pauses."""

    pauses = False
    """Whether stopped trials may go on."""
    predicts = False
    """Whether `predicted` has an answer."""
    exhausted = "every point of the space that fits has been tried"
    """Why a search ends when nothing is proposed any more."""

    def __init__(self, space: Space, algorithm: Algorithm) -> None:
        self.space, self.algorithm = space, algorithm

    def observe(self, event: Event) -> None:
        """Take an event of the journal into account; each comes once, in order."""

    def restrict(self, fits: Callable[[SystemSpec], bool]) -> None:
        """Told once, before the first event, which systems the cluster can ever hold."""

    def propose(self, state: SearchState) -> Iterator[Proposal]:
        """New trials, best first."""
        return self.algorithm(self.space, state)

    def probe(self, state: SearchState) -> Proposal | None:
        """Systems that are worth timing before anything else is done."""
        return None

    def resume(self, state: SearchState, is_last: bool) -> str | None:
        """The paused trial worth more than a new one; `is_last`: there can be no new one."""
        return None

    def pause(self, trial: TrialState) -> str | None:
        """Why a running trial should wait after its next report; begins with `PAUSED`."""
        return None

    def pauses_at(self, trial: TrialState) -> int | None:
        """Tokens at which a trial that was just allocated will be told to wait, if it will."""
        return None

    def leader(self, state: SearchState) -> str | None:
        """The trial to answer with now."""
        scores = score_trials(self.space, state, state.trials.values(), samples=FEW_SAMPLES)
        return next((t for t in rank(scores) if state.trials[t].repeat_of is None), None)

    def predicted(self) -> Mapping[str, Predicted]:
        """Its own predictions of the loss at budget by `configuration_of`, drawn jointly."""
        return {}


def started(space: Space) -> Searcher:
    """The searcher that a space asks for, before its first event."""
    if space.search.algorithm == "factored":
        from thriftlm.search.learning.factored import Factored

        return Factored(space)
    if space.scheduler == "pbt":
        from thriftlm.search.pbt import Population

        return Population(space)
    return Searcher(space, ALGORITHMS[space.search.algorithm])


def _draws(space: Space) -> Iterator[dict[str, Any]]:
    """Points at random, the same ones for every driver of a search."""
    for index in itertools.count():
        yield space.sample(np.random.default_rng([space.search.seed, index]))


def _new(
    space: Space,
    state: SearchState,
    points: Iterator[dict[str, Any]],
    *,
    limit: int | None = MAX_DRAWS,
) -> Iterator[Proposal]:
    """The valid points that have not been tried, each once."""
    seen = set(state.trials)
    misses = 0
    for point in points:
        run = space.resolve(point, space.search.seed)
        if isinstance(run, Rejected) or run.trial_id in seen:
            misses += 1
            if limit is not None and misses >= limit:
                return
            continue
        misses = 0
        seen.add(run.trial_id)
        yield Proposal(point, run)


def _is_inside(space: Space, trial: TrialState) -> bool:
    domains = space.domains.items()
    return all(contains(domain, trial.point[path]) for path, domain in domains)


def _history(
    space: Space, state: SearchState, distributions: dict[str, Any]
) -> "list[FrozenTrial]":
    from optuna.trial import TrialState as OptunaState
    from optuna.trial import create_trial

    scores = score_trials(space, state, state.trials.values(), samples=FEW_SAMPLES)
    history = []
    for trial in state.trials.values():
        if trial.number < len(space.starts) and not _is_inside(space, trial):
            continue  # the user's own configuration, with values that the space does not have
        score = scores.get(trial.trial_id)
        values = None
        if score is not None:
            values = [score.value]
            if space.objective_name == "pareto":
                values = [score.loss_at_budget, score.usd_per_btok]
        elif not trial.has_ended:
            continue
        history.append(
            create_trial(
                params={path: trial.point[path] for path in distributions},
                distributions=distributions,
                values=values,
                state=OptunaState.COMPLETE if values else OptunaState.FAIL,
            )
        )
    return history
