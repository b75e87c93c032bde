"""What timing a system takes and gives, as workers report it and the journal keeps it."""

import math
from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt

from thriftlm.spec import Spec, SystemSpec

REPEATS, REPEAT_SECONDS = 3, 2.0
"""Times that a system is timed, and about how long each: whole steps, at least one."""
WARM_UP_STEPS, MOST_STEPS = 2, 50
"""Steps before the first that counts (a trial leaves out the first of a process, which pays set-up;
the second says how many make a repeat), and the most of a repeat."""
SET_UP_SECONDS = 10.0
"""To build a model and an engine and to free them, in processes that run already. On two shared
cores 1 to 3 s were measured for tiny models, 14 s with a compiler; assumed for others."""


class Timing(Spec):
    """One system, timed with a run's model, batch and optimizer. All of it is measured."""

    system: SystemSpec
    """What was timed."""
    status: Literal["timed", "oom", "unsupported"]
    """`oom`: a rank ran out of memory. `unsupported`: this machine or this run cannot do it."""
    tokens_per_s: float | None = None
    """Per GPU, as a trial reports it: median over the repeats."""
    low: float | None = None
    """Least of the repeats."""
    high: float | None = None
    """Most of the repeats."""
    repeats: NonNegativeInt = 0
    """Times that the steps were timed."""
    steps: NonNegativeInt = 0
    """Optimizer steps of one repeat."""
    peak_mem_gb: float | None = None
    """Largest memory of rank 0 in 1e9 bytes: CUDA allocations, on cpu the resident set."""
    seconds: NonNegativeFloat = 0.0
    """Wall clock of all of it, set-up included."""
    detail: str = ""
    """Why it was not timed."""

    @property
    def total_tokens_per_s(self) -> float | None:
        """Over all GPUs."""
        return None if self.tokens_per_s is None else self.tokens_per_s * self.system.n_gpus


def steps_of_repeat(seconds_per_step: float, seconds: float = REPEAT_SECONDS) -> int:
    """Optimizer steps that are timed together."""
    return min(MOST_STEPS, max(1, math.ceil(seconds / seconds_per_step)))


def expected_seconds(seconds_per_step: float) -> float:
    """What timing one system takes."""
    steps = WARM_UP_STEPS + REPEATS * steps_of_repeat(seconds_per_step)
    return SET_UP_SECONDS + steps * seconds_per_step
