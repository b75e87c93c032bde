"""Telling a step that went wrong from a run that is lost."""

import math
from collections.abc import Iterable

DIVERGED_NATS = 1.0
"""A training loss this far above the best report of its run, in nats, counts as divergence.

Until there is a report, the loss of the untrained model stands in. Loss spikes that recover stay
well under it; a run that passes it does not come back within the horizon of a trial. Ours, from
runs of this package; not a published constant.
"""
SKIPS_IN_A_ROW = 3
"""Steps in a row with gradients that are not finite, from which on a run is lost.

Such a step changes no weight, so the next one gives the same model other text: one that is bad ends
there, weights that are do not. Ours.
"""


class Divergence:
    """What speaks for a lost run, told step by step and at each report.

    All that it is told is the same on every rank, so that all of them come to the same answer.
    """

    def __init__(self) -> None:
        self._skipped_in_a_row = 0

    def after_step(self, norm: float) -> None:
        """Note the gradient norm of a step; where it is not finite, the step was skipped."""
        self._skipped_in_a_row = 0 if math.isfinite(norm) else self._skipped_in_a_row + 1

    @property
    def is_lost(self) -> bool:
        """Whether too many steps in a row were skipped."""
        return self._skipped_in_a_row >= SKIPS_IN_A_ROW

    def reason(self, loss: float | None, before: Iterable[float | None]) -> str:
        """Why the run is lost at a report, empty where it is not.

        Args:
            loss: mean training loss since the last report, None where every step was skipped.
            before: those of earlier reports; the first step's where there is no report.
        """
        if self.is_lost:
            return f"{SKIPS_IN_A_ROW} steps in a row had gradients that are not finite"
        if loss is None:
            return ""
        best = min((value for value in before if value is not None), default=loss)
        if not loss <= best + DIVERGED_NATS:  # true of NaN
            return (
                f"training loss {loss:.4g} is over {DIVERGED_NATS} nats above the best, {best:.4g}"
            )
        return ""
