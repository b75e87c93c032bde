"""The hard cap of a search: what running trials may still cost is reserved before it is spent.

Stops are cooperative: a trial polls for one as it hands a report in, before that report has been
handled. So a trial that is asked to stop at one report ends at the next, and one that goes on runs
at least to the report after that. Both are reserved, and booked spend passes the cap only where a
trial turns out slower than it had been.
"""

from collections.abc import Callable
from dataclasses import dataclass

from thriftlm.search.cluster.gangs import LONGEST_IDLE_SECONDS
from thriftlm.search.history.state import SearchState, TrialState

STOP_SECONDS = 5.0
"""From the last report of a trial to the release of its resources: a small checkpoint and the end
of the workers. Measured 1 to 4 s on two cores with Ray 2.60."""
FIRST_REPORT_SECONDS = 60.0
"""From allocation to the first report, before any trial has shown it: 8 to 20 s of start-up
measured on two cores, and training."""

MOST_KEPT, KEPT_MARGIN = 0.25, 1.3
"""Share of the search budget that is kept for repeats at most, since a search that cannot look
around has nothing worth repeating; and how much more than the first run a repeat may take."""

FirstReport = Callable[[TrialState], float]
"""Seconds from allocation to the first report to expect of a trial."""


@dataclass(frozen=True)
class Budget:
    """Bounds of a search; None is no bound."""

    usd: float | None = None
    hours: float | None = None
    trials: int | None = None
    first_report: FirstReport | None = None
    """Who knows it better than that the longest of all trials so far bounds it."""
    repeats: int = 1
    """Seeds of winner and runner-up for which dollars and hours are kept."""

    def refusal(
        self,
        state: SearchState,
        now: float,
        *,
        usd_per_hour: float,
        trial: TrialState | None = None,
        gang: str | None = None,
    ) -> str | None:
        """Why a new trial at this price cannot start now, None when it can.

        `gang` would serve it: what is reserved for its waiting falls away.
        """
        seconds = self.needed_seconds(state, trial)
        needed_usd = usd_per_hour * seconds / 3600 - self._reserved_idle(state, now, gang)
        return self._usd_passed(state, now, needed_usd) or self._hours_passed(state, now, seconds)

    def needed_seconds(self, state: SearchState, trial: TrialState | None) -> float:
        """Seconds that a new trial runs at least: to be stopped at its first report, and obey."""
        return 2 * self._to_first_report(state, trial) + STOP_SECONDS

    def stop_reason(self, state: SearchState, trial: TrialState, now: float) -> str | None:
        """Why a running trial must end at its next report, None when it may go on."""
        seconds = self.reserve_seconds(state, trial, now)
        return self._usd_passed(state, now, 0.0) or self._hours_passed(state, now, seconds)

    def _to_first_report(self, state: SearchState, trial: TrialState | None) -> float:
        if self.first_report is None or trial is None:
            return state.longest_start or FIRST_REPORT_SECONDS
        return self.first_report(trial)

    def _usd_passed(self, state: SearchState, now: float, more_usd: float) -> str | None:
        if self.usd is None:
            return None
        reserved = sum(
            trial.allocations[-1].usd_per_hour * self.reserve_seconds(state, trial, now) / 3600
            for trial in state.running
        )
        reserved += sum(self._reserved_idle(state, now, gang) for gang in state.idle)
        kept = self.kept(self.usd, state, lambda trial: trial.usd(now))
        if state.spent_usd(now) + reserved + more_usd <= self.usd - kept:
            return None
        return f"search budget of {self.usd:g} USD{_less(kept)}"

    def _reserved_idle(self, state: SearchState, now: float, gang: str | None) -> float:
        """Dollars that a waiting gang may still cost until it is dismissed and has ended."""
        if gang not in state.idle:
            return 0.0
        held = state.idle[gang].held
        seconds = max(0.0, held.since + LONGEST_IDLE_SECONDS - now) + STOP_SECONDS
        return held.usd_per_hour * seconds / 3600

    def _hours_passed(self, state: SearchState, now: float, seconds: float) -> str | None:
        if self.hours is None:
            return None
        kept = self.kept(self.hours, state, lambda trial: trial.held_seconds(now) / 3600)
        if state.hours(now) + seconds / 3600 <= self.hours - kept:
            return None
        return f"search budget of {self.hours:g} hours{_less(kept)}"

    def kept(
        self, limit: float, state: SearchState, of_trial: Callable[[TrialState], float]
    ) -> float:
        """Of a limit, what is kept for repeats: those of the dearest trial, at most a quarter."""
        if self.repeats == 1:
            return 0.0
        dearest = max(map(of_trial, state.trials.values()), default=0.0)
        return min(MOST_KEPT * limit, KEPT_MARGIN * 2 * (self.repeats - 1) * dearest)

    def reserve_seconds(self, state: SearchState, trial: TrialState, now: float) -> float:
        """Seconds from now until a running trial has ended when it is stopped as late as can be."""
        last = _last_sign(trial)
        if trial.is_finishing:
            return max(0.0, last + STOP_SECONDS - now)
        interval = self.longest_interval(state, trial)
        to_next_report = max(0.0, last + interval - now)
        one_more = 0.0 if trial.stop_reason else max(interval, now - last)
        return to_next_report + one_more + STOP_SECONDS

    def late_seconds(self, state: SearchState, trial: TrialState, now: float) -> float:
        """Seconds since the report of a running trial was due; negative while it is not."""
        return now - _last_sign(trial) - self.longest_interval(state, trial)

    def longest_interval(self, state: SearchState, trial: TrialState) -> float:
        """Seconds to expect at most between two reports of a running trial.

        Its longest so far; that to its first report, which has the start-up in it, before it has
        shown another; and what first reports of other trials took before it has made one.
        """
        if trial.longest_interval is not None:
            return trial.longest_interval
        if trial.reported_at:
            return trial.reported_at[0] - trial.allocations[-1].since
        return self._to_first_report(state, trial)


def _less(kept: float) -> str:
    return f" less {kept:.3g} for repeats" if kept else ""


def _last_sign(trial: TrialState) -> float:
    return trial.reported_at[-1] if trial.reported_at else trial.allocations[-1].since
