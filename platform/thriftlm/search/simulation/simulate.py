"""Searches replayed against recorded runs, on a simulated clock.

The desk decides as it does on Ray; only the cluster is simulated (`simulated_cluster.py`), and the
journal stays in memory.
"""

from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np

from thriftlm.search.algorithms import Searcher, started
from thriftlm.search.desk import Desk
from thriftlm.search.history.journal import Event, Journal, SearchStarted
from thriftlm.search.history.state import TrialState
from thriftlm.search.simulation.simulated_cluster import Clock, Cluster, Conditions, Row
from thriftlm.search.simulation.simulated_probe import first_timing_seconds
from thriftlm.search.simulation.spot import SpotCapacity
from thriftlm.search.simulation.truth import Truth
from thriftlm.search.spaces.recorded_table import RecordedSpace
from thriftlm.search.spaces.space import Space
from thriftlm.spec import InputError, RunSpec, Spec

AS_RECORDED = Conditions()
PreemptionRow = tuple[float, float, str, float, float, float]


class SimulatedSearch(Spec):
    """One search against a table. Losses are in the table's unit."""

    seed: int
    """Seed of the searcher."""
    algorithm: str
    """Who searched."""
    trace: list[Row]
    """At each report and preemption: dollars spent, run, its tokens (that were kept), incumbent,
    the incumbent's true loss."""
    best_run_id: str | None
    """Recorded run that the search ended with; None where it learned nothing."""
    best_score: float | None
    """Its true loss at the training budget."""
    table_best_score: float | None
    """The best of the table; None where every run of it broke or diverged."""
    regret: float | None
    """`best_score` minus `table_best_score`."""
    system_regret: float | None
    """Relative excess in dollars per token of the best system that was measured with the answer's
    model over the best in the table."""
    spent_usd: float
    """What the search cost."""
    hours: float
    """Until its last trial had ended."""
    preemptions: list[PreemptionRow]
    """At each: dollars spent, hours, run, its tokens, those of them kept, dollars lost by it."""
    preempted_usd: float
    """Dollars that preemptions cost: work that was lost, and starting again."""
    trials: int
    """Trials started."""
    reason: str
    """Why it ended."""
    learned: list[str]
    """How its trials ended and, where there is no answer, what that says."""


class MemoryJournal(Journal):
    """A journal that is never written."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.path = Path("simulated/journal")

    def append(self, event: Event) -> None:
        """Keep the event."""
        self.events.append(event)

    def close(self) -> None:
        """Nothing."""


def simulate(
    space: RecordedSpace,
    truth: Truth,
    algorithm: str,
    seed: int,
    conditions: Conditions = AS_RECORDED,
    searcher: Callable[[Space], Searcher] = started,
    journal: Journal | None = None,
) -> SimulatedSearch:
    """One search against recorded runs.

    Args:
        space: held to the recorded runs.
        truth: what they are worth.
        algorithm: who searches.
        seed: of the searcher, and of what goes wrong.
        conditions: what trials meet besides what was recorded.
        searcher: makes who proposes; the one that the algorithm names.
        journal: empty; what happened is in it afterwards. It stays in memory when not given.

    Raises:
        InputError: the search budget does not bear a single trial, or the scheduler is pbt.
    """
    held = space.searched_by(algorithm, seed)
    if held.scheduler == "pbt":
        raise InputError(
            "scheduler pbt cannot be simulated: its trials change their learning rate on the way, "
            "and a table has no such runs; --set search.scheduler=asha"
        )
    runs, clock, journal = space.runs, Clock(), journal or MemoryJournal()
    journal.append(
        SearchStarted(
            at=0.0, search_id=space.name, space=space.document(), versions={}, unique_tokens={}
        )
    )
    if conditions.spot is not None:
        refuse_without_spot(held)
        conditions = replace(conditions, spot=conditions.spot.begun_at(seed))
    desk = desk_of(held, journal, clock, conditions, searcher)
    cluster = Cluster(desk, held, truth, clock, conditions)
    reason = cluster.run()
    begun = [trial for trial in desk.state.trials.values() if trial.allocations]
    if not begun:
        needed = "; ".join([reason, *desk.learned()[1:]])
        raise InputError(f"no trial could start: {needed}; raise search_budget with --set")
    best = cluster.incumbent
    worth = None if best is None else cluster.worth(best)
    lost = [astuple(one) for one in cluster.preemptions]
    return SimulatedSearch(
        seed=seed,
        algorithm=algorithm,
        trace=cluster.trace,
        best_run_id=None if best is None else runs.ids[best],
        best_score=worth,
        table_best_score=truth.best if np.isfinite(truth.best) else None,
        regret=None if worth is None else worth - truth.best,
        system_regret=None if best is None else cluster.system_regret(best),
        spent_usd=desk.state.spent_usd(clock.now),
        hours=clock.now / 3600,
        preemptions=lost,
        preempted_usd=sum(one.lost_usd for one in cluster.preemptions),
        trials=len(begun),
        reason=reason,
        learned=desk.learned(),
    )


def refuse_without_spot(space: RecordedSpace) -> None:
    """Make sure that a spot trace can matter.

    Raises:
        InputError: no system of the space is rented on spot.
    """
    named = {point.get("system.market") for point in space.runs.systems} - {None}
    if "spot" not in (named or {system.market for system in space.systems()}):
        raise InputError(
            "--spot-trace preempts systems with market: spot, and no recorded run of this space is "
            "on one; add market: spot to the space's system section, or "
            "--set space.system.market=spot"
        )


def desk_of(
    held: RecordedSpace,
    journal: Journal,
    clock: Clock,
    conditions: Conditions,
    searcher: Callable[[Space], Searcher] = started,
) -> Desk:
    """The desk of a search against recorded runs, after what its journal has."""
    runs = held.runs

    def price_of(run: RunSpec) -> tuple[float, str]:
        return runs.price(held.run_of[run.trial_id]), "recorded"

    def first_report(trial: TrialState) -> float:
        if trial.systems:
            return conditions.start_up_seconds + first_timing_seconds(held, trial)
        run = held.run_of[trial.trial_id]
        speed = runs.speed(run)
        more = runs.tokens[runs.next_report(run, trial.tokens)] - trial.tokens
        return conditions.start_up_seconds + (float(more) / speed if np.isfinite(speed) else 0.0)

    capacity = SpotCapacity({}, conditions.spot, clock)
    return Desk(held, journal, capacity, clock, price_of, first_report, searcher)
