"""Winner and runner-up with other seeds, so that luck of a seed does not decide between them.

When nothing else is left to do, both are trained again with the seeds that follow the search's own,
each to the tokens of its first run, on the same system. Money is kept for that; seeds that it does
not bear are left out, and the answer says so.
"""

from collections.abc import Iterator, Sequence

from thriftlm.search.budget import STOP_SECONDS, Budget, FirstReport
from thriftlm.search.history.journal import Event, Suggested
from thriftlm.search.history.state import SearchState, TrialState
from thriftlm.search.scores.ranking import ranking
from thriftlm.search.spaces.settings import SearchBudget
from thriftlm.search.spaces.space import Space
from thriftlm.spec import RunSpec

CONTENDERS = 2
"""Winner and runner-up."""
MARGIN = 1.05
"""A repeat may take so much longer than the first run did."""


def exploring(limits: SearchBudget, repeats: int, first_report: FirstReport | None) -> Budget:
    """What the search may use before its repeats: less than the budget, see `Budget.kept`.

    Their trials are left out of the limit too, unless fewer than two trials would remain.
    """
    needed = CONTENDERS * (repeats - 1)
    trials = limits.trials
    if trials is not None and trials - needed >= CONTENDERS:
        trials -= needed
    return Budget(limits.usd, limits.hours, trials, first_report, repeats)


def have_begun(state: SearchState) -> bool:
    """Whether a repeat was proposed; nothing else starts any more."""
    return any(trial.repeat_of is not None for trial in state.trials.values())


def contenders(space: Space, events: Sequence[Event]) -> list[str]:
    """Winner and runner-up before their repeats, which are the last trials."""
    first = (i for i, e in enumerate(events) if isinstance(e, Suggested) and e.repeat_of)
    found = ranking(space, SearchState(events[: next(first, len(events))]))
    return [trial.trial_id for trial in (found.winner, found.runner_up) if trial]


def missing(
    state: SearchState, contenders: Sequence[TrialState], seed: int, repeats: int
) -> Iterator[list[tuple[TrialState, RunSpec]]]:
    """What is left to train, a list for each seed: first runs and their repeats."""
    for other in range(seed + 1, seed + repeats):
        pairs = [(t, t.run.model_copy(update={"seed": other})) for t in contenders]
        left = [(t, run) for t, run in pairs if run.trial_id not in state.trials]
        if left:
            yield left


def seconds(first: TrialState) -> float:
    """Of an allocation that repeats a trial: what that took, and a stop one report late.

    What a child of scheduler pbt took over is trained too.
    """
    held, reports = first.held_seconds(first.allocations[-1].since), max(1, len(first.curve))
    own = max(1, first.tokens - first.taken_over)
    return MARGIN * held * first.tokens / own * (1 + 1 / reports) + STOP_SECONDS


def price(first: TrialState) -> float:
    """Dollars of repeating a trial."""
    return first.allocations[-1].usd_per_hour * seconds(first) / 3600


def are_borne(budget: Budget, state: SearchState, now: float, firsts: Sequence[TrialState]) -> bool:
    """Whether the search budget bears repeating these trials beside what runs."""
    if budget.trials is not None and state.n_started + len(firsts) > budget.trials:
        return False
    going = [(t, state.trials[t.repeat_of]) for t in state.running if t.repeat_of is not None]
    open_usd = sum(max(0.0, price(first) - trial.usd(now)) for trial, first in going)
    usd = state.spent_usd(now) + open_usd + sum(price(first) for first in firsts)
    if budget.usd is not None and usd > budget.usd:
        return False
    longest = max(seconds(first) for first in firsts)
    return budget.hours is None or state.hours(now) + longest / 3600 <= budget.hours


def reached(state: SearchState, trial: TrialState) -> str | None:
    """Why a repeat must end: it has the tokens of its first run."""
    if trial.repeat_of is None or trial.tokens < state.trials[trial.repeat_of].tokens:
        return None
    return f"repeat: as many tokens as {trial.repeat_of}"
