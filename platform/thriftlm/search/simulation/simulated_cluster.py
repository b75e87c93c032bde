"""A cluster that runs trials from recorded runs on a simulated clock, and what goes wrong on it.

A trial reports where its recorded run did. It pays for start-up whenever it is given resources, and
for tokens at the recorded speed and price. How a recorded run ended (out of memory, diverged) is
what the trial ends with, at what it has cost by then. A trial that is preempted goes on from its
last checkpoint, which it writes every `checkpoint_every_tokens` and where it is stopped. Probes are
not preempted.
"""

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from thriftlm.search.budget import FIRST_REPORT_SECONDS, STOP_SECONDS
from thriftlm.search.desk import Desk, Finished, Wait
from thriftlm.search.history.state import TrialState
from thriftlm.search.scores.measured_systems import best_systems
from thriftlm.search.simulation.simulated_probe import timings
from thriftlm.search.simulation.spot import SpotCapacity, SpotTrace
from thriftlm.search.simulation.truth import Truth
from thriftlm.search.spaces.recorded_table import BROKEN, RecordedSpace
from thriftlm.spec import Progress, RunSpec, Status
from thriftlm.timings import Timing

START_UP_SECONDS = FIRST_REPORT_SECONDS
"""From allocation to the first token: what the budget expects before a trial has shown it."""
FRUITLESS = 50
"""Preemptions in a row without a new checkpoint after which a trial counts as failed."""
MOST_LOOKS = 50
"""Looks at the budget while one report is late."""
Row = tuple[float, str, int, str | None, float | None]


@dataclass(frozen=True)
class Conditions:
    """What trials meet besides what was recorded."""

    start_up_seconds: float = START_UP_SECONDS
    """Billed before the first token of every allocation."""
    spot: SpotTrace | None = None
    """Preempts trials on spot systems; without it spot has room for all, and takes none back."""
    crashes_per_hour: float = 0.0
    """Mean number of worker crashes in an hour of one trial, each of which ends it as failed."""
    unevenness: float = 0.0
    """Standard deviation of the log of the time between two reports over the recorded one."""
    stops_late: bool = False
    """A stop is obeyed at the report after the one at which it was asked, as on Ray; else at it."""


@dataclass
class Clock:
    """Seconds since the search began."""

    now: float = 0.0

    def __call__(self) -> float:
        """The time now."""
        return self.now


@dataclass
class Preemption:
    """What the market took back."""

    usd: float
    """Spent by the search until then."""
    hours: float
    """Since the search began."""
    run_id: str
    """Recorded run of the trial."""
    tokens: float
    """That the trial had trained."""
    kept_tokens: float
    """That were in its last checkpoint."""
    lost_usd: float
    """Paid since that checkpoint, and for starting again where that follows one."""


@dataclass
class Life:
    """One allocation of a trial."""

    trial: TrialState
    run: int
    since: float
    tokens: float
    """Where it went on."""
    at: int
    """The report that is next."""
    begun: float
    """When training towards it began."""
    due: float = 0.0
    """When it comes."""
    is_over: bool = False


@dataclass
class Cluster:
    """Runs the trials of a desk, and asks it as Tune's loop does."""

    desk: Desk
    space: RecordedSpace
    truth: Truth
    clock: Clock
    conditions: Conditions
    trace: list[Row] = field(default_factory=list)
    preemptions: list[Preemption] = field(default_factory=list)
    incumbent: int | None = None

    def __post_init__(self) -> None:
        self.runs = self.space.runs
        self.order = itertools.count()
        self.queue: list[tuple[float, int, Callable[[], None]]] = []
        self.lives: dict[str, Life] = {}
        self.probes: set[str] = set()
        self.saved: dict[str, float] = {}
        self.cut_short: dict[str, Preemption] = {}
        self.fruitless: Counter[str] = Counter()
        self.reason: str | None = None

    def run(self) -> str:
        """Why nothing started any more; the search is closed."""
        self._await_market()
        while True:
            while self.reason is None:
                match self.desk.next_trial():
                    case Finished(why):
                        self.reason = why
                    case Wait():
                        break
                    case trial:
                        self._start(trial)
            if not self.queue or (self.reason and not self.lives and not self.probes):
                break
            self.clock.now, _, action = heapq.heappop(self.queue)
            action()
        self.reason = self.reason or "nothing could start"
        self.desk.close(self.reason)
        return self.reason

    def _after(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self.queue, (self.clock.now + seconds, next(self.order), action))

    # --- the life of a trial ----------------------------------------------------------------------

    def _start(self, trial: TrialState) -> None:
        if trial.systems:
            self.probes.add(trial.trial_id)
            left = timings(self.space, trial)
            self._after_timing(trial, left, self.conditions.start_up_seconds)
            return
        trial_id, now = trial.trial_id, self.clock.now
        run, tokens = self.space.run_of[trial_id], self.saved.get(trial_id, 0.0)
        start_up = self.conditions.start_up_seconds
        life = Life(trial, run, now, tokens, self.runs.next_report(run, tokens), now + start_up)
        self.lives[trial_id] = life
        if self.conditions.crashes_per_hour:
            wait = 3600 / self.conditions.crashes_per_hour * self._rng(life, 0).exponential()
            self._after(wait, lambda: None if life.is_over else self._end(life, "failed"))
        self._await_report(life)

    def _await_report(self, life: Life) -> None:
        speed, now = self.runs.speed(life.run), self.clock.now
        more = self.runs.tokens[life.at] - self._tokens_before(life)
        seconds = life.begun - now + (more / speed if np.isfinite(speed) else 0.0)
        if self.conditions.unevenness:
            draw = self._rng(life, life.at + 1).lognormal(0, self.conditions.unevenness)
            seconds *= float(draw)
        life.due = now + seconds
        self._after(seconds, lambda: None if life.is_over else self._report(life))
        if self.conditions.unevenness:
            self._watch(life)

    def _tokens_before(self, life: Life) -> float:
        """Tokens at the report before the next, or at which the trial went on since."""
        first = self.runs.next_report(life.run, life.tokens)
        return life.tokens if life.at == first else float(self.runs.tokens[life.at - 1])

    def _rng(self, life: Life, draw: int) -> np.random.Generator:
        seed, trial = self.space.search.seed, life.trial
        return np.random.default_rng([seed, trial.number, len(trial.allocations), draw])

    def _watch(self, life: Life) -> None:
        """Let the desk look at the budget from when a trial is late until its report."""
        trial = life.trial
        last = trial.reported_at[-1] if trial.reported_at else life.since
        late = last + self.desk.budget.longest_interval(self.desk.state, trial)
        step = max(STOP_SECONDS, (life.due - late) / MOST_LOOKS)
        for at in np.arange(late, life.due, step).tolist():
            self._after(at - self.clock.now, self._look)

    def _look(self) -> None:
        self.desk.check_budget()

    def _report(self, life: Life) -> None:
        trial, at = life.trial, life.at
        progress = self._progress(trial.run, life.run, at)
        was_asked = trial.stop_reason is not None
        stop = self.desk.report(trial.trial_id, progress, None)
        obeys = was_asked if self.conditions.stops_late else stop
        if obeys or progress.status != "running":
            self.saved[trial.trial_id] = float(self.runs.tokens[at])
            self._end(life, progress.status if progress.status != "running" else "stopped")
        else:
            life.at, life.begun = at + 1, self.clock.now
            self._await_report(life)
            if self.incumbent is None:
                self.incumbent = self._leader()
        self._note(life.run, progress.tokens)

    def _end(self, life: Life, status: Status | Literal["failed"], reason: str = "") -> None:
        self._take(life)
        self._charge_restart(life)
        self.desk.end(life.trial.trial_id, status, reason)
        self.incumbent = self._leader()

    def _take(self, life: Life) -> None:
        life.is_over = True
        del self.lives[life.trial.trial_id]

    def _charge_restart(self, life: Life) -> None:
        """Add the start-up of a life that follows on a checkpoint to what the preemption cost."""
        restart = self.cut_short.pop(life.trial.trial_id, None)
        if restart is not None and life.tokens > 0:
            seconds = min(self.clock.now - life.since, self.conditions.start_up_seconds)
            restart.lost_usd += life.trial.allocations[-1].usd_per_hour * seconds / 3600

    # --- the life of a probe ----------------------------------------------------------------------

    def _after_timing(self, trial: TrialState, left: Iterator[Timing], delay: float) -> None:
        timing = next(left, None)
        if timing is None:
            self._end_probe(trial, "done")
        else:
            self._after(delay + timing.seconds, lambda: self._timed(trial, timing, left))

    def _timed(self, trial: TrialState, timing: Timing, left: Iterator[Timing]) -> None:
        if self.desk.probed(trial.trial_id, timing):
            self._end_probe(trial, "stopped")
        else:
            self._after_timing(trial, left, 0.0)

    def _end_probe(self, trial: TrialState, status: Status) -> None:
        self.probes.discard(trial.trial_id)
        self.desk.end(trial.trial_id, status)

    # --- the market -------------------------------------------------------------------------------

    def _await_market(self) -> None:
        spot = self.conditions.spot
        change = None if spot is None else spot.next_change(self.clock.now)
        if change is not None:
            self._after(change - self.clock.now, self._market_changed)

    def _market_changed(self) -> None:
        """Preempt as many trials as there are too many, those that started last first."""
        spot = self.conditions.spot
        assert spot is not None
        held = sorted(self.lives.values(), key=lambda life: -life.since)
        there = spot.at(self.clock.now)
        for life in [life for life in held if life.trial.run.system.market == "spot"]:
            if SpotCapacity.used(one.trial.run.system for one in self.lives.values()) > there:
                self._preempt(life)
        self._await_market()

    def _preempt(self, life: Life) -> None:
        trial_id, now = life.trial.trial_id, self.clock.now
        trained, kept, lost_seconds = self._kept(life)
        self.saved[trial_id] = kept
        if kept > life.tokens:
            self._charge_restart(life)
        else:  # what this life has cost is all lost, its start-up with it
            self.cut_short.pop(trial_id, None)
        self.fruitless[trial_id] = 0 if kept > life.tokens else self.fruitless[trial_id] + 1
        if self.fruitless[trial_id] < FRUITLESS:
            self._take(life)
            self.desk.preempt(trial_id)
        else:
            reason = f"preempted {FRUITLESS} times in a row before it wrote a checkpoint"
            self._end(life, "failed", reason)
        lost = life.trial.allocations[-1].usd_per_hour * lost_seconds / 3600
        spent = self.desk.state.spent_usd(now)
        found = Preemption(spent, now / 3600, self.runs.ids[life.run], trained, kept, lost)
        self.preemptions.append(found)
        self.cut_short[trial_id] = found
        self._note(life.run, int(kept))

    def _kept(self, life: Life) -> tuple[float, float, float]:
        """Tokens trained by now, those in the last checkpoint, and the seconds between them.

        Where this allocation wrote no checkpoint, all of its seconds are lost.
        """
        now, before = self.clock.now, self._tokens_before(life)
        share = max(0.0, now - life.begun) / max(life.due - life.begun, 1e-9)
        trained = before + share * float(self.runs.tokens[life.at] - before)
        every = life.trial.run.checkpoint_every_tokens
        kept = trained // every * every if every else 0.0
        if kept <= life.tokens:
            return trained, life.tokens, now - life.since
        return trained, kept, (trained - kept) / self.runs.speed(life.run)

    # --- what is known ----------------------------------------------------------------------------

    def _note(self, run: int, tokens: int) -> None:
        best, worth = None, None
        if self.incumbent is not None:
            best = self.runs.ids[self.incumbent]
            worth = self.worth(self.incumbent)
        spent = self.desk.state.spent_usd(self.clock.now)
        self.trace.append((spent, self.runs.ids[run], tokens, best, worth))

    def worth(self, run: int) -> float | None:
        """True loss at the training budget of the recipe of a run."""
        worth = float(self.truth.loss[self.runs.recipe[run]])
        return worth if np.isfinite(worth) else None

    def system_regret(self, run: int) -> float | None:
        """As of `SimulatedSearch`, of a recorded run that is the answer."""
        runs, state = self.runs, self.desk.state
        same = np.flatnonzero(runs.recipe == runs.recipe[run]).tolist()
        alike = [one for one in same if runs.speed(one) > 0]
        leader = self.desk.leader()
        if leader is None or not alike:
            return None
        found = best_systems(state)[state.trials[leader].shape]
        best = min(runs.price(one) / (3600 * runs.speed(one)) for one in alike)
        return found.usd_per_token / best - 1

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
