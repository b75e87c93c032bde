"""Searches replayed against recorded runs, on a simulated clock.

The desk decides as it does on Ray; only the cluster is simulated, and the journal stays in memory.
A trial reports where its recorded run did and obeys a stop at once. It pays for start-up whenever
it is given resources, and for tokens at the recorded speed and price. How a recorded run ended (out
of memory, diverged) is what the trial ends with, at what it has cost by then.
"""

import heapq
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from thriftlm.search.algorithms import Searcher, started
from thriftlm.search.budget import FIRST_REPORT_SECONDS
from thriftlm.search.capacity import Capacity
from thriftlm.search.desk import Desk, Finished, Wait
from thriftlm.search.journal import Event, Journal, SearchStarted
from thriftlm.search.measured_systems import best_systems
from thriftlm.search.recorded_table import BROKEN, RecordedSpace, Truth
from thriftlm.search.simulated_probe import timings
from thriftlm.search.space import Space
from thriftlm.search.state import TrialState
from thriftlm.spec import InputError, Progress, RunSpec, Spec, Status, SystemSpec
from thriftlm.timings import Timing

START_UP_SECONDS = FIRST_REPORT_SECONDS
"""From allocation to the first token: what the budget expects before a trial has shown it."""
Row = tuple[float, str, int, str | None, float | None]


class SimulatedSearch(Spec):
    """One search against a table. Losses are in the table's unit."""

    seed: int
    """Seed of the searcher."""
    algorithm: str
    """Who searched."""
    trace: list[Row]
    """At each report: dollars spent, run, its tokens, incumbent, the incumbent's true loss."""
    best_run_id: str | None
    """Recorded run that the search ended with; None where it learned nothing."""
    best_score: float | None
    """Its true loss at the training budget."""
    table_best_score: float
    """The best of the table."""
    regret: float | None
    """`best_score` minus `table_best_score`."""
    system_regret: float | None
    """Relative excess in dollars per token of the best system that was measured with the answer's
    model over the best in the table."""
    spent_usd: float
    """What the search cost."""
    trials: int
    """Trials started."""
    reason: str
    """Why it ended."""


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


class Unlimited(Capacity):
    """A cluster that holds everything."""

    def can_hold(self, system: SystemSpec, running: Any) -> bool:
        """Always."""
        return True


@dataclass
class Clock:
    """Seconds since the search began."""

    now: float = 0.0

    def __call__(self) -> float:
        """The time now."""
        return self.now


@dataclass
class Cluster:
    """Runs the trials of a desk from recorded runs, and asks it as Tune's loop does."""

    desk: Desk
    space: RecordedSpace
    truth: Truth
    clock: Clock
    start_up_seconds: float
    trace: list[Row] = field(default_factory=list)
    incumbent: int | None = None

    def __post_init__(self) -> None:
        self.runs = self.space.runs
        self.order = itertools.count()
        self.queue: list[tuple[float, int, Callable[[], None]]] = []

    def run(self) -> str:
        """Why nothing started any more; the search is closed."""
        reason: str | None = None
        while True:
            while reason is None:
                match self.desk.next_trial():
                    case Finished(why):
                        reason = why
                    case Wait():
                        break
                    case trial:
                        self._start(trial)
            if not self.queue:
                break
            self.clock.now, _, action = heapq.heappop(self.queue)
            action()
        reason = reason or "nothing could start"
        self.desk.close(reason)
        return reason

    def _after(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self.queue, (self.clock.now + seconds, next(self.order), action))

    def _start(self, trial: TrialState) -> None:
        if trial.systems:
            self._after_timing(trial, timings(self.space, trial), self.start_up_seconds)
            return
        run = self.space.run_of[trial.trial_id]
        where = self.runs.reports(run)
        done = int(np.searchsorted(self.runs.tokens[where], trial.tokens, side="right"))
        if trial.tokens == 0:
            done = 0
        self._after_report(trial, run, where.start + done, trial.tokens, self.start_up_seconds)

    def _after_report(
        self, trial: TrialState, run: int, at: int, tokens: float, delay: float
    ) -> None:
        speed = self.runs.speed(run)
        more = self.runs.tokens[at] - tokens
        seconds = delay + (more / speed if np.isfinite(speed) else 0.0)
        self._after(seconds, lambda: self._report(trial, run, at))

    def _after_timing(self, trial: TrialState, left: Iterator[Timing], delay: float) -> None:
        timing = next(left, None)
        if timing is None:
            self.desk.end(trial.trial_id, "done")
        else:
            self._after(delay + timing.seconds, lambda: self._timed(trial, timing, left))

    def _timed(self, trial: TrialState, timing: Timing, left: Iterator[Timing]) -> None:
        if self.desk.probed(trial.trial_id, timing):
            self.desk.end(trial.trial_id, "stopped")
        else:
            self._after_timing(trial, left, 0.0)

    def _report(self, trial: TrialState, run: int, at: int) -> None:
        progress = self._progress(trial.run, run, at)
        stop = self.desk.report(trial.trial_id, progress, None)
        if stop or progress.status != "running":
            status: Status = progress.status if progress.status != "running" else "stopped"
            self.desk.end(trial.trial_id, status)
            self.incumbent = self._leader()
        else:
            self._after_report(trial, run, at + 1, self.runs.tokens[at], 0.0)
        best, worth = None, None
        if self.incumbent is not None:
            best = self.runs.ids[self.incumbent]
            worth = self._worth(self.incumbent)
        spent = self.desk.state.spent_usd(self.clock.now)
        self.trace.append((spent, self.runs.ids[run], progress.tokens, best, worth))

    def system_regret(self, run: int) -> float | None:
        """As of `SimulatedSearch`, of a recorded run that is the answer."""
        runs = self.runs
        same = np.flatnonzero(runs.recipe == runs.recipe[run]).tolist()
        alike = [one for one in same if runs.speed(one) > 0]
        leader = self.desk.leader()
        if leader is None or not alike:
            return None
        state = self.desk.state
        found = best_systems(state)[state.trials[leader].shape]
        best = min(runs.price(one) / (3600 * runs.speed(one)) for one in alike)
        return found.usd_per_token / best - 1

    def _worth(self, run: int) -> float | None:
        worth = float(self.truth.loss[self.runs.recipe[run]])
        return worth if np.isfinite(worth) else None

    def _leader(self) -> int | None:
        """Recorded run of the trial that the search would answer with now."""
        trial_id = self.desk.leader()
        return None if trial_id is None else self.space.run_of[trial_id]

    def _progress(self, spec: RunSpec, run: int, at: int) -> Progress:
        runs = self.runs
        tokens, loss = runs.tokens[at], runs.loss[at]
        ended = at + 1 == runs.first[run + 1]
        status: Status = "running"
        if ended and runs.status[run] in (*BROKEN, "diverged"):
            status = "diverged" if runs.status[run] == "diverged" else "oom"
        elif ended or runs.tokens[at + 1] > spec.tokens:
            status = "done"
        rate = runs.tokens_per_s[at]
        return Progress(
            status=status,
            step=int(tokens // spec.optim.batch_tokens),
            tokens=int(tokens),
            val_loss=float(loss) if np.isfinite(loss) else None,
            decayed=True,
            tokens_per_s=float(rate) / spec.system.n_gpus if np.isfinite(rate) else None,
        )


def simulate(
    space: RecordedSpace,
    truth: Truth,
    algorithm: str,
    seed: int,
    start_up_seconds: float = START_UP_SECONDS,
    searcher: Callable[[Space], Searcher] = started,
) -> SimulatedSearch:
    """One search against recorded runs.

    Args:
        space: held to the recorded runs.
        truth: what they are worth.
        algorithm: who searches.
        seed: of the searcher.
        start_up_seconds: billed before the first token of every allocation.
        searcher: makes who proposes; the one that the algorithm names.

    Raises:
        InputError: the search budget does not bear a single trial.
    """
    held = space.searched_by(algorithm, seed)
    runs, clock, journal = space.runs, Clock(), MemoryJournal()
    journal.append(
        SearchStarted(
            at=0.0, search_id=space.name, space=space.document(), versions={}, unique_tokens={}
        )
    )

    def price_of(run: RunSpec) -> tuple[float, str]:
        return runs.price(held.run_of[run.trial_id]), "recorded"

    def first_report(run: RunSpec) -> float:
        at = held.run_of[run.trial_id]
        speed = runs.speed(at)
        first = runs.tokens[runs.first[at]]
        return start_up_seconds + (float(first) / speed if np.isfinite(speed) else 0.0)

    desk = Desk(held, journal, Unlimited({}), clock, price_of, first_report, searcher)
    cluster = Cluster(desk, held, truth, clock, start_up_seconds)
    reason = cluster.run()
    begun = [trial for trial in desk.state.trials.values() if trial.allocations]
    if not begun:
        raise InputError(f"no trial could start: {reason}; raise search_budget with --set")
    best = cluster.incumbent
    worth = None if best is None else cluster._worth(best)
    return SimulatedSearch(
        seed=seed,
        algorithm=algorithm,
        trace=cluster.trace,
        best_run_id=None if best is None else runs.ids[best],
        best_score=worth,
        table_best_score=truth.best,
        regret=None if worth is None else worth - truth.best,
        system_regret=None if best is None else cluster.system_regret(best),
        spent_usd=desk.state.spent_usd(clock.now),
        trials=len(begun),
        reason=reason,
    )
