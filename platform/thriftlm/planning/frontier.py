"""The cheapest models at a loss, and what smaller ones cost: with all the data, or with too few."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from thriftlm.planning.scaling_laws import (
    CRITICAL_OVERHEAD,
    FLOPS_PER_PARAM_TOKEN,
    INFERENCE_SHARE,
    BelowFloorError,
    LossLaw,
    Optimum,
    bisected,
    effective_tokens,
    tokens_worth,
)

CURVE = (0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 1.0)
"""Shares of the optimal size that a plan always shows."""
GOLDEN = (math.sqrt(5) - 1) / 2


class CurvePoint(NamedTuple):
    """A smaller model at the optimum's loss; None where no number of tokens reaches it."""

    k_n: float
    k_d: float | None
    overhead: float | None
    """Compute over the optimum's minus 1."""
    n_params: float
    n_tokens: float | None
    diminishing: bool
    """Whether the same loss takes over twice the optimum's compute, or cannot be reached."""


@dataclass(frozen=True)
class Frontier:
    """A law with the fresh tokens that exist; beyond them data repeat (arXiv 2305.16264).

    Where the optimum needs no repetition everything is the law's closed form; else it is minimised
    by numbers. Only data wear out here, not parameters.
    """

    law: LossLaw
    unique_tokens: float | None = None

    def loss(self, n_params: float, n_tokens: float) -> float:
        """Loss after so many tokens, repeated ones included."""
        return float(self.law.loss(n_params, effective_tokens(n_tokens, self.unique_tokens)))

    def tokens_to(self, loss: float, n_params: float) -> float:
        """Tokens to a loss; infinite where no number suffices."""
        fresh = self.law.tokens_to(loss, n_params)
        return tokens_worth(fresh, self.unique_tokens) if math.isfinite(fresh) else fresh

    def optimum(self, flops: float) -> Optimum:
        """Lowest loss at a compute `6 N D`."""
        found = self.law.optimum(flops)
        if not self._repeats(found):
            return found
        n = least(
            lambda n: self.loss(n, flops / FLOPS_PER_PARAM_TOKEN / n),
            found.n_params,
            found.n_params * 1e4,
        )
        return Optimum(n, flops / FLOPS_PER_PARAM_TOKEN / n)

    def optimum_at(self, loss: float) -> Optimum:
        """Least compute to a loss.

        Raises:
            BelowFloorError: no model reaches it, or none with the data that exist.
        """
        found = self.law.optimum_at(loss)
        if not self._repeats(found):
            return found
        n = least(lambda n: n * self.tokens_to(loss, n), found.n_params, found.n_params * 1e4)
        if not math.isfinite(self.tokens_to(loss, n)):
            raise BelowFloorError(
                f"a loss must be within reach of the data, {loss:.6g} is not with "
                f"{self.unique_tokens:.4g} unique tokens however often they repeat; ask for a "
                "higher loss or give more --unique-tokens"
            )
        return Optimum(n, self.tokens_to(loss, n))

    def optimum_of(self, n_params: float) -> Optimum:
        """The optimum whose model has so many parameters."""
        found = self.law.optimum_of(n_params)
        if not self._repeats(found):
            return found
        log_flops = bisected(
            lambda x: self.optimum(math.exp(x)).n_params - n_params,
            math.log(FLOPS_PER_PARAM_TOKEN * n_params),
            math.log(found.flops),
        )
        return Optimum(n_params, math.exp(log_flops) / FLOPS_PER_PARAM_TOKEN / n_params)

    def data_factor(self, k_n: float, best: Optimum) -> float:
        """Tokens over the optimum's, of a model `k_n` times its size that reaches its loss.

        Raises:
            BelowFloorError: no number of tokens does.
        """
        plain = self.law.data_factor(k_n)
        if self.unique_tokens is None or plain * best.n_tokens <= self.unique_tokens:
            return plain
        needed = self.tokens_to(self.loss(*best), k_n * best.n_params)
        if not math.isfinite(needed):
            raise BelowFloorError(
                f"k_n {k_n:g} is too small for {self.unique_tokens:.4g} unique tokens, however "
                "often they repeat; take a larger model or give more --unique-tokens"
            )
        return needed / best.n_tokens

    def scale_for_demand(self, served_tokens: float, best: Optimum) -> float:
        """Share of the optimal size that costs least when so many tokens are served."""
        ratio = served_tokens / best.n_tokens
        plain = self.law.scale_for_demand(ratio)
        if not self._repeats(best, self.law.data_factor(plain)):
            return plain

        def cost(k_n: float) -> float:
            try:
                return k_n * (self.data_factor(k_n, best) + ratio * INFERENCE_SHARE)
            except BelowFloorError:
                return math.inf

        return least(cost, plain, 1.0)

    def curve(self, best: Optimum, shares: Sequence[float] = CURVE) -> list[CurvePoint]:
        """What models of these shares of the optimal size cost."""
        return [self._point(k_n, best) for k_n in shares]

    def critical_k(self, best: Optimum) -> float:
        """Share of the optimal size at which the loss takes twice the optimum's compute."""

        def spare(k_n: float) -> float:
            try:
                return 1 + CRITICAL_OVERHEAD - k_n * self.data_factor(k_n, best)
            except BelowFloorError:
                return -math.inf

        return bisected(spare, self.law.k_min, 1.0)

    def _point(self, k_n: float, best: Optimum) -> CurvePoint:
        try:
            k_d = self.data_factor(k_n, best)
        except BelowFloorError:
            return CurvePoint(k_n, None, None, k_n * best.n_params, None, True)
        overhead = k_n * k_d - 1
        tokens = k_d * best.n_tokens
        small = k_n < 1 and overhead > CRITICAL_OVERHEAD
        return CurvePoint(k_n, k_d, overhead, k_n * best.n_params, tokens, small)

    def _repeats(self, best: Optimum, k_d: float = 1.0) -> bool:
        return self.unique_tokens is not None and best.n_tokens * k_d > self.unique_tokens


def least(cost: Callable[[float], float], low: float, high: float) -> float:
    """Argument of the least cost between two bounds, by golden section on its logarithm."""
    a, b = math.log(low), math.log(high)
    c, d = b - GOLDEN * (b - a), a + GOLDEN * (b - a)
    at_c, at_d = cost(math.exp(c)), cost(math.exp(d))
    for _ in range(60):
        if at_c < at_d:
            b, d, at_d = d, c, at_c
            c = b - GOLDEN * (b - a)
            at_c = cost(math.exp(c))
        else:
            a, c, at_c = c, d, at_d
            d = a + GOLDEN * (b - a)
            at_d = cost(math.exp(d))
    return math.exp((a + b) / 2)
