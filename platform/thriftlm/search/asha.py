"""Asynchronous successive halving over tokens, stopping variant (Li et al., arXiv 1810.05934)."""

import math
from collections.abc import Iterable, Mapping, Sequence

from thriftlm.search.history.state import SearchState, TrialState
from thriftlm.search.scores.scoring import FEW_SAMPLES, score_trials
from thriftlm.search.spaces.space import Space


def rung_reached(rungs: Iterable[int], before: int, now: int) -> int | None:
    """The highest rung between two numbers of trained tokens, None when none was passed."""
    return max((rung for rung in rungs if before < rung <= now), default=None)


def survives(trial_id: str, values: Mapping[str, float], factor: int = 3) -> bool:
    """Whether a trial is in the top `1/factor` of those that reached a rung; lower is better.

    The share is rounded up, so the first trial at a rung goes on: there is nothing yet to compare
    it with. Keeping a third costs under .001 nats on recorded learning-rate sweeps where keeping
    the best alone costs up to .014.
    """
    kept = math.ceil(len(values) / factor)
    return sorted(values, key=lambda other: values[other]).index(trial_id) < kept


def bracket(number: int, n_rungs: int, factor: int) -> int:
    """The Hyperband bracket of a trial: how many of the last rungs may stop it.

    Brackets hedge against a rung that misjudges: bracket `n_rungs` has all of them, bracket 0 has
    none and trains to the end. Of all trials, in turn, each bracket takes as many as Hyperband
    gives it, `ceil((n_rungs + 1) / (s + 1) * factor^s)` (Li et al., arXiv 1603.06560, algorithm 1),
    and compares them asynchronously within it.
    """
    sizes = bracket_sizes(n_rungs, factor)
    place = number % sum(sizes)
    for s in range(n_rungs, 0, -1):
        if place < sizes[s]:
            return s
        place -= sizes[s]
    return 0


def bracket_sizes(n_rungs: int, factor: int) -> list[int]:
    """Trials of each bracket, from the one without a rung to the one with all."""
    return [math.ceil((n_rungs + 1) / (s + 1) * factor**s) for s in range(n_rungs + 1)]


def rungs_of(scheduler: str, number: int, rungs: Sequence[int], factor: int) -> Sequence[int]:
    """The rungs at which a scheduler looks at the trial of that number."""
    match scheduler:
        case "asha":
            return rungs
        case "hyperband":
            return rungs[len(rungs) - bracket(number, len(rungs), factor) :]
    return ()


def halving_reason(space: Space, state: SearchState, trial: TrialState) -> str | None:
    """Why a trial must end after its last report, None where it goes on."""
    fidelity = space.search.fidelity

    def rungs(one: TrialState) -> Sequence[int]:
        return rungs_of(space.scheduler, one.number, fidelity.rungs, fidelity.factor)

    own, before = rungs(trial), trial.curve[-2].tokens if len(trial.curve) > 1 else 0
    rung = rung_reached(own, before, trial.tokens)
    if rung is None:
        return None
    trials = (t for t in state.trials.values() if t.repeat_of is None)
    reached = [t for t in trials if t.tokens >= rung and rungs(t) == own]
    scores = score_trials(space, state, reached, until_tokens=rung, samples=FEW_SAMPLES)
    values = {trial_id: score.value for trial_id, score in scores.items()}
    if trial.trial_id in values and not survives(trial.trial_id, values, fidelity.factor):
        place = f"not in the top 1/{fidelity.factor} of {len(values)} at {rung} tokens"
        return f"{space.scheduler}: {place}"
    return None
