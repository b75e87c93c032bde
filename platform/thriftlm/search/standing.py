"""What a factored search has measured of its recipes, and where that puts each of them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass
class Record:
    """What is known of one recipe."""

    tokens: list[float]
    loss: list[float]
    diverged: bool = False


@dataclass(frozen=True, eq=False)
class Standing:
    """Where each recipe stands (R,), kept as its record grows: there can be many thousands."""

    trials: NDArray[np.intp]
    """Trials of it that have not failed."""
    tokens: Floats
    """That its curve reaches."""
    loss: Floats
    """There; NaN where none was measured."""
    is_known: NDArray[np.bool_]
    """Whether a loss, or that it diverges, was measured."""
    may_win: NDArray[np.bool_]
    may_go_on: NDArray[np.bool_]
    """Whether it is short of its last rung."""
    level: NDArray[np.intp]
    """Rungs that it has reached."""

    @classmethod
    def of(cls, recipes: int) -> "Standing":
        """Of recipes that nobody has tried."""
        count, number, no = np.zeros(recipes, np.intp), np.zeros(recipes), np.zeros(recipes, bool)
        return cls(count, number, number + np.nan, no, no.copy(), ~no, count.copy())
