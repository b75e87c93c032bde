"""What a factored search has measured of its recipes, and where that puts each of them."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass
class Record:
    """What is known of one recipe."""

    tokens: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    diverged: bool = False
    others: dict[str, dict[float, float]] = field(default_factory=dict)
    """Losses by tokens of each repeat with another seed."""

    @property
    def last_tokens(self) -> float:
        """Where it ends; 0 before it has begun."""
        return self.tokens[-1] if self.tokens else 0.0

    def add(self, tokens: float, loss: float) -> None:
        """One more point; what a resumed run measures again replaces the old."""
        while self.last_tokens >= tokens:
            self.tokens.pop(), self.loss.pop()
        self.tokens.append(tokens)
        self.loss.append(loss)

    def mean(self, tokens: float, loss: float) -> float:
        """A loss with those that other seeds have at the same tokens."""
        seeds = [loss, *(other[tokens] for other in self.others.values() if tokens in other)]
        return sum(seeds) / len(seeds)

    def copy(self) -> "Record":
        """One that grows apart; of a known run, which has no repeats yet."""
        return Record(self.tokens[:], self.loss[:], self.diverged)


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
