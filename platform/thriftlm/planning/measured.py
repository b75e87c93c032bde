"""What smaller models did cost: the overhead curve as runs measured it."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from thriftlm.planning.fitting import Points
from thriftlm.planning.scaling_laws import Floats, LossLaw

LEVELS = 4
"""Losses at which sizes are compared."""


class MeasuredOverhead(NamedTuple):
    """One size at one loss. Only the optimum that it is held against comes from the law."""

    loss: float
    k_n: float
    """Size over the law's optimum at that loss."""
    overhead: float
    """Compute `6 N D` that the size took, over the law's optimum's, minus 1."""
    n_params: float
    n_tokens: float
    """Read between two measured losses."""


def measured_overhead(points: Points, law: LossLaw, levels: int = LEVELS) -> list[MeasuredOverhead]:
    """Sizes against the optimum, at losses that at least three of them reached."""
    curves = {n: _falling(points, n) for n in np.unique(points.n_params).tolist()}
    ends = [(loss.min(), loss.max()) for loss, _ in curves.values() if len(loss) > 1]
    if len(ends) < 3:
        return []
    low, high = sorted(end for end, _ in ends)[2], sorted(start for _, start in ends)[-3]
    if low >= high:
        return []
    shares = (np.arange(levels) + 0.5) / levels
    targets = [float(t) for t in low + (high - low) * shares if t > law.E]
    return [found for loss in targets for found in _at(loss, curves, law)]


def _at(
    loss: float, curves: dict[float, tuple[Floats, Floats]], law: LossLaw
) -> Iterator[MeasuredOverhead]:
    best = law.optimum_at(loss)
    for n, (losses, log_tokens) in curves.items():
        if losses[0] >= loss >= losses[-1] and len(losses) > 1:
            tokens = float(np.exp(np.interp(loss, losses[::-1], log_tokens[::-1])))
            overhead = 6 * n * tokens / best.flops - 1
            yield MeasuredOverhead(loss, n / best.n_params, overhead, n, tokens)


def _falling(points: Points, n_params: float) -> tuple[Floats, Floats]:
    """Losses of one size that no shorter run or report had reached, and their log tokens."""
    own = points.take(points.n_params == n_params)
    order = np.argsort(own.n_tokens, kind="stable")
    loss, log_tokens = own.loss[order], np.log(own.n_tokens[order])
    new = loss < np.concatenate([[np.inf], np.minimum.accumulate(loss)[:-1]])
    return loss[new], log_tokens[new]
