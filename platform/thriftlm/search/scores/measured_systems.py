"""What trials and probes measured of systems, and which of them is the best for a model."""

from collections.abc import Iterator
from typing import NamedTuple

from thriftlm.search.history.state import SearchState, TrialState
from thriftlm.spec import RunSpec, SystemSpec


class Measured(NamedTuple):
    """A system that was measured with a shape."""

    system: SystemSpec
    tokens_per_s: float
    """Of all its GPUs together."""
    usd_per_hour: float

    @property
    def usd_per_token(self) -> float:
        """Dollars per training token."""
        return self.usd_per_hour / 3600 / self.tokens_per_s


def best_systems(state: SearchState) -> dict[str, Measured]:
    """By shape: the cheapest per token of all systems that trials and probes measured with it."""
    found: dict[str, Measured] = {}
    for trial in state.trials.values():
        for measured in _measured(trial):
            best = found.setdefault(trial.shape, measured)
            if measured.usd_per_token < best.usd_per_token:
                found[trial.shape] = measured
    return found


def on_best_system(state: SearchState, trial: TrialState) -> RunSpec:
    """The run of a trial on the cheapest system that was measured with its shape."""
    best = best_systems(state).get(trial.shape)
    fields = trial.run.model_dump()
    if best is not None:
        fields["system"] = best.system.model_dump()
    return RunSpec.model_validate(fields)


def _measured(trial: TrialState) -> Iterator[Measured]:
    usd_per_hour = trial.usd_per_hour  # of the gang, whatever runs on it
    if usd_per_hour is None:
        return
    rate = trial.tokens_per_s()
    if rate is not None and trial.status not in ("oom", "failed"):
        yield Measured(trial.run.system, rate, usd_per_hour)
    for timing in trial.timings:
        if timing.total_tokens_per_s is not None:
            yield Measured(timing.system, timing.total_tokens_per_s, usd_per_hour)
