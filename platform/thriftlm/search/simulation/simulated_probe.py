"""A probe in a simulated search: what it finds is recorded, what it takes is that of a real one."""

from collections.abc import Iterator

from thriftlm.search.history.state import TrialState
from thriftlm.search.spaces.recorded_table import BROKEN, RecordedSpace
from thriftlm.timings import REPEATS, SET_UP_SECONDS, Timing, expected_seconds


def timings(space: RecordedSpace, trial: TrialState) -> Iterator[Timing]:
    """What the systems that a probe has left are recorded with, each with the seconds it takes."""
    runs = space.runs
    for system in trial.systems_left:
        run = space.run_of.get(trial.run.model_copy(update={"system": system}).trial_id)
        speed = float("nan") if run is None else runs.speed(run)
        if run is None or not speed > 0:
            status = "oom" if run is not None and runs.status[run] in BROKEN else "unsupported"
            yield Timing.model_validate(
                {"system": system, "status": status, "seconds": SET_UP_SECONDS}
            )
            continue
        rate = speed / system.n_gpus
        yield Timing(
            system=system,
            status="timed",
            tokens_per_s=rate,
            low=rate,
            high=rate,
            repeats=REPEATS,
            seconds=expected_seconds(trial.run.optim.batch_tokens / speed),
        )


def first_timing_seconds(space: RecordedSpace, trial: TrialState) -> float:
    """Seconds from the start of a probe to what its next system did."""
    return next((timing.seconds for timing in timings(space, trial)), 0.0)
