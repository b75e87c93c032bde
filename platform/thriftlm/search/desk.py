"""Every decision of a search, in one place and without Ray.

What runs next, what stops, what it is worth: each decision is written to the journal before it
takes effect, and all of it can be replayed.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from thriftlm import prices
from thriftlm.search import algorithms, lessons
from thriftlm.search.asha import rung_reached, rungs_of, survives
from thriftlm.search.budget import Budget, FirstReport
from thriftlm.search.capacity import Capacity
from thriftlm.search.gangs import Gangs
from thriftlm.search.journal import (
    Allocated,
    Dismissed,
    Ended,
    Event,
    Idle,
    Journal,
    Released,
    Reported,
    SearchEnded,
    SearchResumed,
    StopRequested,
    Suggested,
)
from thriftlm.search.objective import Score
from thriftlm.search.scoring import FEW_SAMPLES, score_trials
from thriftlm.search.space import Space
from thriftlm.search.state import SearchState, TrialState
from thriftlm.spec import Progress, RunSpec, Status

INTERRUPTED = "interrupted"


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
        self.algorithm = searcher(space)
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
        waiting = self.state.waiting
        fitting = (t for t in waiting if self.capacity.can_hold(t.run.system, ()))
        trial = next(fitting, None) or self._suggest()
        later = any(self.capacity.can_ever_hold(t.run.system) for t in waiting)
        if isinstance(trial, Finished) and later:
            return self._until_market()
        if isinstance(trial, Finished | Wait):
            return trial
        usd_per_hour, price = self.price_of(trial.run)
        refusal = self.budget.refusal(
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
            reason = self.budget.stop_reason(self.state, trial, self.clock())
            reason = reason or self._halving_reason(trial) or self.algorithm.pause(trial)
            self._ask_to_end(trial, reason)
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
            self._ask_to_end(trial, self.budget.stop_reason(self.state, trial, now))
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
        return self.algorithm.pauses_at(trial)

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
        return lessons.learned(self.space, self.state) + self._needed()

    def _needed(self) -> list[str]:
        """What the first trial would have needed, where the budget did not bear any."""
        if not self.state.waiting or any(trial.allocations for trial in self.state.trials.values()):
            return []
        trial = self.state.waiting[0]
        hours = self.budget.needed_seconds(self.state, trial) / 3600
        usd = hours * self.price_of(trial.run)[0]
        system = f"{trial.run.system.n_gpus} x {trial.run.system.gpu}"
        return [f"a trial needs at least {usd:.3g} USD and {hours:.3g} hours (on {system})"]

    def _suggest(self) -> TrialState | Wait | Finished:
        """A paused trial to go on with, or a new one."""
        if self._is_full():
            return Wait()
        number = len(self.state.trials)
        is_last = self.budget.trials is not None and number >= self.budget.trials
        paused = self.algorithm.resume(self.state, is_last)
        if paused is not None:
            return self.state.trials[paused]
        may_go_on = self.algorithm.pauses and self.state.running
        if is_last:
            why = f"search budget of {self.budget.trials} trials"
            return Wait() if may_go_on else Finished(why)
        is_later = False
        for proposal in self.algorithm.propose(self.state):
            is_later = is_later or self.capacity.can_ever_hold(proposal.run.system)
            if self.capacity.can_hold(proposal.run.system, ()):
                run = proposal.run
                event = Suggested(
                    at=self.clock(),
                    trial_id=run.trial_id,
                    number=number,
                    point=dict(proposal.point),
                    run=run,
                )
                self._write(event)
                return self.state.trials[run.trial_id]
        if is_later:
            return self._until_market()
        if may_go_on:
            return Wait()
        return Finished("every point of the space that fits has been tried")

    def _until_market(self) -> Wait | Finished:
        """Whether the budget bears that something starts when the market has room again."""
        refusal = self.budget.refusal(self.state, self.clock(), usd_per_hour=0.0)
        if refusal and not self.state.running:
            return Finished(f"{refusal} leaves no room for another trial")
        return Wait()

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

    def _halving_reason(self, trial: TrialState) -> str | None:
        rungs = self._rungs(trial)
        before = trial.curve[-2].tokens if len(trial.curve) > 1 else 0
        rung = rung_reached(rungs, before, trial.tokens)
        if rung is None:
            return None
        reached = (t for t in self.state.trials.values() if t.tokens >= rung)
        values = self._values_at(rung, [t for t in reached if self._rungs(t) == rungs])
        factor = self.settings.fidelity.factor
        if trial.trial_id in values and not survives(trial.trial_id, values, factor):
            place = f"not in the top 1/{factor} of {len(values)} at {rung} tokens"
            return f"{self.space.scheduler}: {place}"
        return None

    def _rungs(self, trial: TrialState) -> Sequence[int]:
        fidelity = self.settings.fidelity
        return rungs_of(self.space.scheduler, trial.number, fidelity.rungs, fidelity.factor)

    def _values_at(self, rung: int, reached: Sequence[TrialState]) -> Mapping[str, float]:
        scores = score_trials(
            self.space, self.state, reached, until_tokens=rung, samples=FEW_SAMPLES
        )
        return {trial_id: score.value for trial_id, score in scores.items()}

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
