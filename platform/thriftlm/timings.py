"""What timing a system gave, as workers report it and the journal keeps it."""

from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt

from thriftlm.spec import Spec, SystemSpec


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
