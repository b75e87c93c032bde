"""Every decision of a search, in one place and without Ray.

What runs next, what stops, what it is worth: each decision is written to the journal before it
takes effect, and all of it can be replayed.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from thriftlm import prices
from thriftlm.search import algorithms, repeats
from thriftlm.search.answers import lessons
from thriftlm.search.asha import halving_reason
from thriftlm.search.budget import Budget, FirstReport
from thriftlm.search.cluster.capacity import Capacity
from thriftlm.search.cluster.gangs import Gangs
from thriftlm.search.history.journal import (
    Allocated,
    Dismissed,
    Ended,
    Event,
    Idle,
    Journal,
    Probed,
    Released,
    Reported,
    SearchEnded,
    SearchResumed,
    StopRequested,
    Suggested,
)
from thriftlm.search.history.state import SearchState, TrialState
from thriftlm.search.scores.objective import Score
from thriftlm.search.scores.scoring import score_trials
from thriftlm.search.spaces.space import Space
from thriftlm.spec import Progress, RunSpec, Status
from thriftlm.timings import Timing

INTERRUPTED = "interrupted"
MOST_TOO_DEAR = 100
"""Proposals passed over that the budget does not bear."""
REPEATED = "winner and runner-up were trained with other seeds"


@dataclass(frozen=True)
class Wait:
    """Nothing can start now; ask again."""


@dataclass(frozen=True)
class Finished:
    """Nothing will start any more, and why."""

    reason: str


def listed_price(run: RunSpec) -> tuple[float, str]:
    """The price of a run's system by the catalog, and its source."""
    return prices.usd_per_hour(run.system), str(prices.price(run.system))


class Desk:
    """Decides, and keeps the journal.

    Args:
        space: what is searched.
        journal: open, and begun with `SearchStarted`.
        capacity: what the cluster holds.
        clock: Unix seconds.
        price_of: USD per hour of everything that a run is billed for, and where that comes from.
        first_report: seconds to the first report of a run, where that is known.
        searcher: makes who proposes; the one that the space names.
        warm: whether gangs wait for another trial after theirs (`search.gangs`).
    """

    def __init__(
        self,
        space: Space,
        journal: Journal,
        capacity: Capacity,
        clock: Callable[[], float] = time.time,
        price_of: Callable[[RunSpec], tuple[float, str]] = listed_price,
        first_report: FirstReport | None = None,
        searcher: Callable[[Space], algorithms.Searcher] = algorithms.started,
        warm: bool = False,
    ) -> None:
        self.space, self.journal, self.capacity, self.clock = space, journal, capacity, clock
        self.price_of = price_of
        self.state = SearchState(journal.events)
        self.settings = space.search
        limits = space.search_budget
        self.budget = Budget(limits.usd, limits.hours, limits.trials, first_report)
        self.exploring = repeats.exploring(limits, self.settings.repeats, first_report)
        self.algorithm = searcher(space)
        found = [(start, space.resolve(start.point, space.search.seed)) for start in space.starts]
        self.starts = [
            algorithms.Proposal(start.point, run)
            for start, run in found
            if isinstance(run, RunSpec) and capacity.can_ever_hold(run.system)
        ]
        self.algorithm.restrict(capacity.can_ever_hold)
        for event in journal.events:
            self.algorithm.observe(event)
        self.interrupted = False
        self.gangs = Gangs(self.state, capacity) if warm else None

    def resume(self) -> None:
        """Close what a killed driver left open, at the last moment it is known to have lived.

        A trial that scheduler or budget had asked to end has ended; others will run on.
        """
        died_at = self.state.last_at
        for trial in self.state.running:
            self._release(trial, died_at)
        for gang in list(self.state.idle):
            self._dismissed(gang, died_at)
        for trial in self.state.waiting:
            if trial.stop_reason not in (None, INTERRUPTED):
                self._end(trial, died_at, "stopped", trial.stop_reason or "", None)
        self._write(SearchResumed(at=self.clock()))

    def next_trial(self) -> TrialState | Wait | Finished:
        """The trial to start now; its resources are held from this call on."""
        if self.interrupted:
            return Finished(INTERRUPTED)
        if self.settings.repeats == 1:
            return self._explore()
        begun = repeats.have_begun(self.state)
        found = Finished(REPEATED) if begun else self._explore()
        return self._repeat(found) if isinstance(found, Finished) else found

    def _explore(self) -> TrialState | Wait | Finished:
        waiting = self.state.waiting
        fitting = [t for t in waiting if self.capacity.can_hold(t.run.system, ())]
        trial = next((t for t in fitting if self._is_borne(t.run)), None) or self._suggest(fitting)
        later = any(self.capacity.can_ever_hold(t.run.system) for t in waiting)
        if isinstance(trial, Finished) and later:
            return self._until_market()
        return trial if isinstance(trial, Finished | Wait) else self._admitted(trial)

    def _repeat(self, explored: Finished) -> TrialState | Wait | Finished:
        """Winner or runner-up with another seed; `explored` where none is left or borne."""
        if any(trial.repeat_of is None for trial in self.state.running) or self._is_full():
            return Wait()
        begun = next((t for t in self.state.waiting if t.repeat_of is not None), None)
        if begun is not None:
            return self._admitted(begun)
        seed, wanted = self.space.search.seed, self.settings.repeats
        for left in repeats.missing(self.state, self.contenders, seed, wanted):
            firsts = [first for first, _ in left]
            if not repeats.are_borne(self.budget, self.state, self.clock(), firsts):
                break
            first, run = left[0]
            again = algorithms.Proposal(first.point, run)
            return self._admitted(self._suggested(again, first.trial_id))
        return Wait() if self.state.running else explored

    @cached_property
    def contenders(self) -> list[TrialState]:
        """Winner and runner-up before their repeats, which are the last trials."""
        names = repeats.contenders(self.space, self.journal.events)
        return [self.state.trials[name] for name in names if self.state.trials[name].allocations]

    def _budget_of(self, trial: TrialState) -> Budget:
        return self.exploring if trial.repeat_of is None else self.budget

    def _admitted(self, trial: TrialState) -> TrialState | Wait | Finished:
        """The trial with its resources held, where budget and cluster have room for it."""
        usd_per_hour, price = self.price_of(trial.run)
        refusal = self._budget_of(trial).refusal(
            self.state,
            self.clock(),
            usd_per_hour=usd_per_hour,
            trial=trial,
            gang=self._waiting_gang(trial),
        )
        if refusal and not self.state.running:
            if self.gangs is not None and self.gangs.dismiss_all():
                return Wait()  # for what is reserved for their waiting
            return Finished(f"{refusal} leaves no room for another trial")
        if refusal or not self._has_room(trial):
            return Wait()
        self._write(
            Allocated(
                at=self.clock(),
                trial_id=trial.trial_id,
                usd_per_hour=usd_per_hour,
                price=price,
                gang=None if self.gangs is None else self.gangs.of(trial.run.system),
            )
        )
        return trial

    def report(self, trial_id: str, progress: Progress, checkpoint: str | None) -> bool:
        """Take a report into account; whether the trial must end at its next one."""
        trial = self.state.trials[trial_id]
        self._write(
            Reported(at=self.clock(), trial_id=trial_id, progress=progress, checkpoint=checkpoint)
        )
        if progress.status == "running" and trial.stop_reason is None:
            reason = self._budget_of(trial).stop_reason(self.state, trial, self.clock())
            if trial.repeat_of is None:
                reason = (
                    reason
                    or halving_reason(self.space, self.state, trial)
                    or self.algorithm.pause(trial)
                )
            self._ask_to_end(trial, reason or repeats.reached(self.state, trial))
        return trial.stop_reason is not None

    def probed(self, trial_id: str, timing: Timing) -> bool:
        """Take a system that a probe timed into account; whether the probe must end now."""
        trial = self.state.trials[trial_id]
        self._write(Probed(at=self.clock(), trial_id=trial_id, timing=timing))
        if trial.systems_left and trial.stop_reason is None:
            self._ask_to_end(trial, self.exploring.stop_reason(self.state, trial, self.clock()))
        return trial.stop_reason is not None

    def check_budget(self) -> bool:
        """Whether a trial was asked to end because the budget does not bear that it is late.

        To be called between reports: a trial that is slower than reserved must be asked before its
        next report, not at it. The one that is latest goes first; while none is late, what is
        reserved does not grow.
        """
        now = self.clock()
        going = [t for t in self.state.running if t.stop_reason is None and not t.is_finishing]
        late = {t.trial_id: self.budget.late_seconds(self.state, t, now) for t in going}
        if max(late.values(), default=0.0) <= 0:
            return False
        for trial in sorted(going, key=lambda t: late[t.trial_id], reverse=True):
            self._ask_to_end(trial, self._budget_of(trial).stop_reason(self.state, trial, now))
        return any(trial.stop_reason for trial in going)

    def end(
        self,
        trial_id: str,
        status: Status | Literal["failed", "lost"],
        reason: str = "",
        checkpoint: str | None = None,
        gang_lives: bool = False,
    ) -> None:
        """Release the resources of a trial; it is over unless interrupted, paused or lost.

        Where its gang lives, that waits for another trial, and costs what it did.
        """
        trial, at = self.state.trials[trial_id], self.clock()
        self._release(trial, at)
        if gang_lives and trial.gang is not None:
            price = trial.allocations[-1].usd_per_hour
            self._write(Idle(at=at, gang=trial.gang, system=trial.run.system, usd_per_hour=price))
        if status == "lost" or (
            status == "stopped" and (trial.stop_reason == INTERRUPTED or trial.is_paused)
        ):
            return
        if status == "stopped":
            reason = trial.stop_reason or reason
        self._end(trial, self.clock(), status, reason, checkpoint)

    def preempt(self, trial_id: str) -> None:
        """The market took the resources of a trial back.

        It goes on from its last checkpoint when there are others; that says nothing of the trial.
        One that had been asked to end has ended.
        """
        trial = self.state.trials[trial_id]
        self._release(trial, self.clock(), preempted=True)
        if not trial.is_paused and trial.stop_reason not in (None, INTERRUPTED):
            self._end(trial, self.clock(), "stopped", trial.stop_reason or "", None)

    def interrupt(self) -> None:
        """Ask every running trial to end at its next report, to go on in a resumed search."""
        self.interrupted = True
        for trial in self.state.running:
            if trial.stop_reason is None:
                self._ask_to_end(trial, INTERRUPTED)

    def close(self, reason: str) -> None:
        """End the search; an interrupted one can be resumed."""
        for trial in self.state.running:
            self._release(trial, self.clock())
        for gang in list(self.state.idle):
            self._dismissed(gang, self.clock())
        status: Literal["finished", "interrupted"] = "finished"
        if self.interrupted:
            status, reason = "interrupted", INTERRUPTED
        self._write(SearchEnded(at=self.clock(), status=status, reason=reason))

    def pauses_at(self, trial: TrialState) -> int | None:
        """Tokens at which a trial that was just allocated ends by itself, to wait."""
        is_learning = trial.kind == "learn" and trial.repeat_of is None
        return self.algorithm.pauses_at(trial) if is_learning else None

    def gangs_to_dismiss(self) -> list[str]:
        """Gangs that wait and must end; they are billed until `gang_ended`."""
        return [] if self.gangs is None else sorted(self.gangs.dismissed(self.clock()))

    def let_gangs_go(self) -> None:
        """Have all gangs that wait dismissed."""
        if self.gangs is not None:
            self.gangs.dismiss_all()

    def gang_ended(self, gang: str) -> None:
        """A gang that waited holds nothing any more."""
        if gang in self.state.idle:
            self._dismissed(gang, self.clock())

    def scores(self) -> dict[str, Score]:
        """The score of every trial that measured a loss."""
        return score_trials(self.space, self.state, self.state.trials.values())

    def leader(self) -> str | None:
        """The trial that the search would answer with now, None while it has learned nothing."""
        return self.algorithm.leader(self.state)

    def learned(self) -> list[str]:
        """What the search has learned, in sentences; also where it has no answer."""
        found = lessons.learned(self.space, self.state)
        return found + lessons.needed(self.state, self.budget, self.price_of)

    def _suggest(self, too_dear: Sequence[TrialState]) -> TrialState | Wait | Finished:
        """A paused trial to go on with, or a new one; else one that the budget does not bear."""
        if self._is_full():
            return Wait()
        most = self.exploring.trials
        is_last = most is not None and self.state.n_started >= most
        left = (s for s in self.starts if s.run.trial_id not in self.state.trials)
        if not is_last and (start := next(left, None)) is not None:
            return self._suggested(start)
        probe = None if is_last else self.algorithm.probe(self.state)
        if probe is not None and self._may_start(probe.run):  # else it would be in others' way
            return self._suggested(probe)
        if (paused := self._paused(is_last)) is not None:
            return paused
        may_go_on = self.algorithm.pauses and self.state.running
        if is_last:
            why = f"search budget of {most} trials"
            return Wait() if may_go_on else Finished(why)
        is_later, dear = False, []
        for proposal in self.algorithm.propose(self.state):
            is_later = is_later or self.capacity.can_ever_hold(proposal.run.system)
            if not self.capacity.can_hold(proposal.run.system, ()):
                continue
            if self._is_borne(proposal.run):
                return self._suggested(proposal)
            dear.append(proposal)
            if len(dear) == MOST_TOO_DEAR:
                break
        if too_dear or dear:
            return too_dear[0] if too_dear else self._suggested(dear[0])
        if is_later:
            return self._until_market()
        if may_go_on:
            return Wait()
        return self._paused(is_last=True) or Finished(self.algorithm.exhausted)

    def _paused(self, is_last: bool) -> TrialState | None:
        """The trial to go on with; `is_last`: there can be no new one."""
        trial_id = self.algorithm.resume(self.state, is_last)
        trial = None if trial_id is None else self.state.trials[trial_id]
        return trial if trial and self.capacity.can_ever_hold(trial.run.system) else None

    def _until_market(self) -> Wait | Finished:
        """Whether the budget bears that something starts when the market has room again."""
        refusal = self.budget.refusal(self.state, self.clock(), usd_per_hour=0.0)
        if refusal and not self.state.running:
            return Finished(f"{refusal} leaves no room for another trial")
        return Wait()

    def _suggested(self, proposal: algorithms.Proposal, repeat_of: str | None = None) -> TrialState:
        if proposal.ends is not None:
            left, reason = proposal.ends
            self._end(self.state.trials[left], self.clock(), "stopped", reason, None)
        event = Suggested(
            at=self.clock(),
            trial_id=proposal.trial_id,
            number=self.state.n_started,
            point=dict(proposal.point),
            run=proposal.run,
            repeat_of=repeat_of,
            systems=proposal.systems,
            branch=proposal.branch,
        )
        self._write(event)
        return self.state.trials[proposal.trial_id]

    def _may_start(self, run: RunSpec) -> bool:
        """Whether cluster and budget bear it now."""
        return self.capacity.can_ever_hold(run.system) and not self._is_too_dear(run)

    def _is_borne(self, run: RunSpec) -> bool:
        """Whether the budget bears it, or may when what holds resources has ended."""
        return bool(self.state.running or self.state.idle) or not self._is_too_dear(run)

    def _is_too_dear(self, run: RunSpec) -> bool:
        usd_per_hour = self.price_of(run)[0]
        return bool(self.exploring.refusal(self.state, self.clock(), usd_per_hour=usd_per_hour))

    def _is_full(self) -> bool:
        limit = self.settings.max_concurrent
        return limit is not None and len(self.state.running) >= limit

    def _waiting_gang(self, trial: TrialState) -> str | None:
        return None if self.gangs is None else self.gangs.waiting(trial.run.system)

    def _has_room(self, trial: TrialState) -> bool:
        if self._is_full():
            return False
        if self.gangs is not None:
            return self.gangs.has_room(trial.run.system)
        running = [other.run.system for other in self.state.running]
        return self.capacity.can_hold(trial.run.system, running)

    def _ask_to_end(self, trial: TrialState, reason: str | None) -> None:
        if reason is not None:
            self._write(StopRequested(at=self.clock(), trial_id=trial.trial_id, reason=reason))

    def _release(self, trial: TrialState, at: float, preempted: bool = False) -> None:
        usd = trial.allocations[-1].usd(at)
        self._write(Released(at=at, trial_id=trial.trial_id, usd=usd, preempted=preempted))

    def _dismissed(self, gang: str, at: float) -> None:
        self._write(Dismissed(at=at, gang=gang, usd=self.state.idle[gang].held.usd(at)))

    def _end(
        self,
        trial: TrialState,
        at: float,
        status: Status | Literal["failed"],
        reason: str,
        checkpoint: str | None,
    ) -> None:
        self._write(
            Ended(
                at=at,
                trial_id=trial.trial_id,
                status=status,
                reason=reason,
                checkpoint=checkpoint,
            )
        )

    def _write(self, event: Event) -> None:
        self.journal.append(event)
        self.state.apply(event)
        self.algorithm.observe(event)
