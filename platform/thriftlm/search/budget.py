"""The hard cap of a search: what running trials may still cost is reserved before it is spent.

Stops are cooperative and are seen at a report: a trial that is asked to stop ends at its next
report, one that is not asked runs at least to the report after that. Both are reserved, so that
booked spend passes the cap only where a trial ran slower than it had so far.
"""

from dataclasses import dataclass
from itertools import pairwise

from thriftlm.search.state import SearchState, TrialState

STOP_SECONDS = 5.0
"""From the last report of a trial to the release of its resources: a small checkpoint and the end
of the workers. Measured 1 to 4 s on two cores with Ray 2.60."""
FIRST_REPORT_SECONDS = 60.0
"""From allocation to the first report, before any trial has shown it: 8 to 20 s of start-up
measured on two cores, and training."""
INTERVAL_SECONDS = 30.0
"""Between two reports, before any trial has shown it."""


@dataclass(frozen=True)
class Budget:
    """Bounds of a search; None is no bound."""

    usd: float | None = None
    hours: float | None = None
    trials: int | None = None

    def refusal(self, state: SearchState, now: float, *, usd_per_hour: float) -> str | None:
        """Why a new trial at this price cannot start now, None when it can."""
        seconds = expected_first_report(state) + expected_interval(state) + STOP_SECONDS
        return self._refusal(state, now, seconds, usd_per_hour)

    def stop_reason(self, state: SearchState, now: float) -> str | None:
        """Why the trial that just reported must end at its next report, None when it may go on."""
        return self._refusal(state, now, 0.0, 0.0)

    def _refusal(
        self, state: SearchState, now: float, seconds: float, usd_per_hour: float
    ) -> str | None:
        reserves = {t.trial_id: reserve_seconds(state, t, now) for t in state.running}
        if self.usd is not None:
            booked = state.spent_usd(now) + usd_per_hour * seconds / 3600
            booked += sum(
                t.allocations[-1].usd_per_hour * reserves[t.trial_id] / 3600 for t in state.running
            )
            if booked > self.usd:
                return f"search budget of {self.usd:g} USD"
        if self.hours is not None:
            left = max([seconds, *reserves.values()])
            if state.hours(now) + left / 3600 > self.hours:
                return f"search budget of {self.hours:g} hours"
        return None


def reserve_seconds(state: SearchState, trial: TrialState, now: float) -> float:
    """Seconds from now until a running trial can have ended, at its pace so far."""
    interval = slowest_interval(trial) or expected_interval(state)
    if trial.reported_at:
        due = trial.reported_at[-1] + interval
    else:
        due = trial.allocations[-1].since + expected_first_report(state)
    to_next_report = max(0.0, due - now)
    one_more = 0.0 if trial.stop_reason else interval
    return to_next_report + one_more + STOP_SECONDS


def slowest_interval(trial: TrialState) -> float | None:
    """The longest seconds between two reports of a trial, None before its second."""
    at = trial.reported_at
    return max((b - a for a, b in pairwise(at)), default=None)


def expected_interval(state: SearchState) -> float:
    """Seconds between reports to expect of a trial that has not shown any."""
    seen = [i for t in state.trials.values() if (i := slowest_interval(t)) is not None]
    return max(seen, default=INTERVAL_SECONDS)


def expected_first_report(state: SearchState) -> float:
    """Seconds from allocation to the first report to expect of a new trial."""
    seen = [
        t.reported_at[0] - t.allocations[-1].since for t in state.trials.values() if t.reported_at
    ]
    return max(seen, default=FIRST_REPORT_SECONDS)
