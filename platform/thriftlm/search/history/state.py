"""What a search knows, as a replay of its journal."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property, singledispatchmethod
from typing import Any, Literal

from thriftlm.search.history.journal import (
    Allocated,
    Branch,
    Dismissed,
    Ended,
    Event,
    Idle,
    Known,
    KnownRun,
    Probed,
    Released,
    Reported,
    RunMinted,
    SearchEnded,
    SearchResumed,
    SearchStarted,
    StopRequested,
    Suggested,
)
from thriftlm.spec import Progress, RunSpec, SystemSpec, digest, identity
from thriftlm.timings import Timing

PAUSED = "paused"
"""How the reason of a stop begins after which a trial may go on."""


@dataclass
class Allocation:
    """An interval in which resources were held and billed. Instants are Unix seconds."""

    usd_per_hour: float
    since: float
    until: float | None = None

    def usd(self, now: float) -> float:
        """Dollars from the beginning to the end, or to `now` while it is open."""
        until = now if self.until is None else self.until
        return self.usd_per_hour * max(0.0, until - self.since) / 3600  # clocks can be set back


@dataclass(frozen=True)
class IdleGang:
    """A gang that waits for its next trial."""

    gang: str
    system: SystemSpec
    held: Allocation


@dataclass
class TrialState:
    """One trial as the journal tells it."""

    trial_id: str
    number: int
    point: dict[str, Any]
    run: RunSpec
    curve: list[Progress] = field(default_factory=list)
    reported_at: list[float] = field(default_factory=list)  # within the last allocation
    longest_interval: float | None = None  # seconds between two of those reports
    allocations: list[Allocation] = field(default_factory=list)
    gang: str | None = None
    stop_reason: str | None = None
    status: str | None = None
    reason: str = ""
    checkpoint: str | None = None
    repeat_of: str | None = None
    """The trial that it trains again with another seed."""
    branch: Branch | None = None
    systems: tuple[SystemSpec, ...] = ()
    timings: list[Timing] = field(default_factory=list)
    source: str | None = None
    """Where a run that was known before this search came from."""
    known_usd_per_hour: float | None = None

    @property
    def kind(self) -> Literal["learn", "probe"]:
        """Whether it measures loss or times systems."""
        return "probe" if self.systems else "learn"

    @cached_property
    def shape(self) -> str:
        """What throughput depends on beside the system: corpus, learning rate and seed do not."""
        run = self.run
        parts = {"model": identity(run.model), "seq_len": run.data.seq_len}
        more = {"batch": run.optim.batch_tokens, "optimizer": run.optim.optimizer}
        return digest(parts | more)

    @property
    def systems_left(self) -> list[SystemSpec]:
        """What a probe has yet to time."""
        timed = [timing.system for timing in self.timings]
        return [system for system in self.systems if system not in timed]

    @property
    def is_only_known(self) -> bool:
        """Whether an earlier search measured it, and this one has not run it."""
        return self.source is not None and not self.allocations

    @property
    def usd_per_hour(self) -> float | None:
        """Price of everything billed for it, None before it was ever allocated."""
        return self.allocations[-1].usd_per_hour if self.allocations else self.known_usd_per_hour

    @property
    def is_running(self) -> bool:
        """Whether it holds resources now."""
        return bool(self.allocations) and self.allocations[-1].until is None

    @property
    def has_ended(self) -> bool:
        """Whether it is over for good."""
        return self.status is not None

    @property
    def is_paused(self) -> bool:
        """Whether it was stopped to go on later, or never."""
        reason = self.stop_reason or ""
        return not self.is_running and not self.has_ended and reason.startswith(PAUSED)

    @property
    def is_finishing(self) -> bool:
        """Whether it holds resources but has made its last report."""
        if not self.is_running or not self.reported_at:
            return False
        return not self.systems_left if self.systems else self.curve[-1].status != "running"

    @property
    def stage(self) -> str:
        """How it ended, else `running`, `paused`, `waiting`; `known` where it was not run here."""
        if self.is_only_known:
            return "known"
        if self.status is not None:
            return self.status
        return "running" if self.is_running else "paused" if self.is_paused else "waiting"

    @property
    def taken_over(self) -> int:
        """Tokens of its run that another trial had trained."""
        return 0 if self.branch is None else self.branch.tokens

    @property
    def tokens(self) -> int:
        """Tokens trained so far, those taken over included."""
        return self.curve[-1].tokens if self.curve else self.taken_over

    @property
    def loss(self) -> float | None:
        """Validation loss of the last report that has one, in nats per token."""
        return next((p.val_loss for p in reversed(self.curve) if p.val_loss is not None), None)

    def usd(self, now: float) -> float:
        """Dollars of all its allocations."""
        return sum(allocation.usd(now) for allocation in self.allocations)

    def held_seconds(self, now: float) -> float:
        """Seconds of all its allocations."""
        return sum((now if a.until is None else a.until) - a.since for a in self.allocations)

    def tokens_per_s(self) -> float | None:
        """Median measured tokens per second over all its GPUs."""
        rates = sorted(p.tokens_per_s for p in self.curve if p.tokens_per_s is not None)
        return rates[len(rates) // 2] * self.run.system.n_gpus if rates else None


class SearchState:
    """The whole search: feed it the events of a journal in order.

    A journal that ends without a word (the driver was killed) leaves allocations open; the next
    driver closes them at the last line, the last moment at which the search is known to have lived.
    """

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self.events: list[Event] = []
        self.trials: dict[str, TrialState] = {}
        self.idle: dict[str, IdleGang] = {}
        self.idle_before_usd = 0.0
        self.gangs = 0
        self.started: SearchStarted | None = None
        self.ended: SearchEnded | None = None
        self.hours_before = 0.0
        self.session_since = 0.0
        self.last_at = 0.0
        self.longest_start = 0.0
        """Seconds from allocation to first report, the longest of all trials."""
        # What every decision asks for is kept rather than counted again over thousands of trials.
        self._running: dict[str, TrialState] = {}
        self._waiting: dict[str, TrialState] = {}
        self._paused: dict[str, TrialState] = {}
        self._released_usd = 0.0
        self.known: list[KnownRun] = []
        """What earlier searches have measured; those that stand for a trial are in `trials` too."""
        self.n_started = 0
        """Trials that are this search's own."""
        for event in events:
            self.apply(event)

    def apply(self, event: Event) -> None:
        """Take one event into account."""
        self._apply(event)
        if not isinstance(event, RunMinted):  # a slow tracking server does not prolong a search
            self.last_at = event.at
            self.events.append(event)

    def spent_usd(self, now: float) -> float:
        """Dollars of all allocations so far, and of gangs while they had no trial."""
        running = sum(trial.allocations[-1].usd(now) for trial in self._running.values())
        return self._released_usd + running + self.idle_usd(now)

    def idle_usd(self, now: float) -> float:
        """Dollars that gangs cost while they waited."""
        return self.idle_before_usd + sum(gang.held.usd(now) for gang in self.idle.values())

    def hours(self, now: float) -> float:
        """Wall-clock hours that drivers of this search have run."""
        return self.hours_before + (now - self.session_since) / 3600

    @property
    def running(self) -> list[TrialState]:
        """Trials that hold resources, oldest first."""
        return _by_number(self._running)

    @property
    def waiting(self) -> list[TrialState]:
        """Trials to start as soon as they can, proposed or cut short; oldest first."""
        return _by_number(self._waiting)

    @property
    def paused(self) -> list[TrialState]:
        """Trials that were stopped to go on later, or never; first those that were first."""
        return list(self._paused.values())

    def _place(self, trial: TrialState) -> None:
        """Enter a trial where it stands now."""
        where = None
        if trial.is_running:
            where = self._running
        elif not trial.has_ended:
            where = self._paused if trial.is_paused else self._waiting
        for held in (self._running, self._waiting, self._paused):
            if held is where:
                held[trial.trial_id] = trial
            else:
                held.pop(trial.trial_id, None)

    @singledispatchmethod
    def _apply(self, event: Event) -> None:
        """Events that change nothing here, such as minted run ids."""

    @_apply.register
    def _(self, event: SearchStarted) -> None:
        self.started, self.session_since = event, event.at

    @_apply.register
    def _(self, event: Known) -> None:
        for one in event.runs:
            self.known.append(one)
            trial_id, run = one.trial_id, one.run
            if trial_id is None or run is None or trial_id in self.trials:
                continue
            trial = TrialState(trial_id, -len(self.known), one.point, run, list(one.reports))
            trial.source, trial.known_usd_per_hour = event.source, one.usd_per_hour
            trial.status = one.status if one.status in ("oom", "diverged") else "done"
            self.trials[trial_id] = trial

    @_apply.register
    def _(self, event: SearchResumed) -> None:
        self.hours_before += (self.last_at - self.session_since) / 3600
        self.session_since, self.ended = event.at, None
        for trial in self.waiting:
            trial.stop_reason = None

    @_apply.register
    def _(self, event: Suggested) -> None:
        trial = TrialState(
            event.trial_id,
            event.number,
            event.point,
            event.run,
            repeat_of=event.repeat_of,
            systems=event.systems,
            branch=event.branch,
        )
        self.trials[event.trial_id] = trial
        self.n_started += 1
        self._place(trial)

    @_apply.register
    def _(self, event: Allocated) -> None:
        trial = self.trials[event.trial_id]
        if trial.is_only_known:  # it is trained beyond what is known, from its beginning
            trial.status, trial.curve = None, []
            self.n_started += 1
        trial.allocations.append(Allocation(event.usd_per_hour, event.at))
        trial.reported_at, trial.longest_interval, trial.gang = [], None, event.gang
        trial.stop_reason = None
        self._place(trial)
        if event.gang is not None:
            self.gangs += event.gang not in self.idle
            self._end_idle(event.gang, event.at)

    @_apply.register
    def _(self, event: Idle) -> None:
        held = Allocation(event.usd_per_hour, event.at)
        self.idle[event.gang] = IdleGang(event.gang, event.system, held)

    @_apply.register
    def _(self, event: Dismissed) -> None:
        self._end_idle(event.gang, event.at)

    def _end_idle(self, gang: str, at: float) -> None:
        if (waited := self.idle.pop(gang, None)) is not None:
            self.idle_before_usd += waited.held.usd(at)

    @_apply.register
    def _(self, event: Reported) -> None:
        trial = self.trials[event.trial_id]
        # A resumed trial goes on from its checkpoint: what it measures again replaces the old. A
        # report without a loss, such as that memory ran out, leaves a loss at its tokens.
        tokens = event.progress.tokens + (event.progress.val_loss is None)
        while trial.curve and trial.curve[-1].tokens >= tokens:
            trial.curve.pop()
        trial.curve.append(event.progress)
        if trial.reported_at:
            took = event.at - trial.reported_at[-1]
            trial.longest_interval = max(trial.longest_interval or took, took)
        else:
            took = event.at - trial.allocations[-1].since
            self.longest_start = max(self.longest_start, took)
        trial.reported_at.append(event.at)
        trial.checkpoint = event.checkpoint or trial.checkpoint

    @_apply.register
    def _(self, event: Probed) -> None:
        trial = self.trials[event.trial_id]
        trial.timings.append(event.timing)
        trial.reported_at.append(event.at)

    @_apply.register
    def _(self, event: StopRequested) -> None:
        self.trials[event.trial_id].stop_reason = event.reason

    @_apply.register
    def _(self, event: Released) -> None:
        trial = self.trials[event.trial_id]
        trial.allocations[-1].until = event.at
        self._released_usd += trial.allocations[-1].usd(event.at)
        self._place(trial)

    @_apply.register
    def _(self, event: Ended) -> None:
        trial = self.trials[event.trial_id]
        trial.status, trial.reason = event.status, event.reason
        trial.checkpoint = event.checkpoint or trial.checkpoint
        self._place(trial)

    @_apply.register
    def _(self, event: SearchEnded) -> None:
        self.ended = event


def _by_number(trials: dict[str, TrialState]) -> list[TrialState]:
    return sorted(trials.values(), key=lambda trial: trial.number)
