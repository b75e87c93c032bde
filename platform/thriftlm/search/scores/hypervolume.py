"""How the Pareto set of a search grew: the area that it dominates, over the dollars spent.

The plane is loss at budget against the natural logarithm of USD per 1e9 tokens, both less is
better. The reference point lies a tenth of each range beyond the worst that any trial of the search
has, so that the ends of the front count too (Ishibuchi et al., GECCO 2017, on where to put it).
Every trial enters where it ended, at what it is worth by all that is known at the end.
"""

from collections.abc import Sequence

import numpy as np

from thriftlm.search.history.state import SearchState
from thriftlm.search.scores.objective import pareto_front
from thriftlm.search.scores.ranking import Ranking

BEYOND = 0.1
"""Share of the range that the reference point lies beyond the worst."""


def hypervolume(points: Sequence[tuple[float, float]], reference: tuple[float, float]) -> float:
    """Area that points dominate below a reference point; less is better in both coordinates.

    A sweep over the front from left to right: each point adds the rectangle below the last one.
    """
    inside = [p for p in points if p[0] < reference[0] and p[1] < reference[1]]
    area, ceiling = 0.0, reference[1]
    for x, y in sorted({inside[i] for i in pareto_front(inside)}):
        area += (reference[0] - x) * (ceiling - y)
        ceiling = y
    return area


def over_time(ranking: Ranking) -> list[tuple[float, float]]:
    """Dollars spent and dominated area at the end of each scored trial, in that order."""
    state, scores = ranking.state, ranking.scores
    points = {t: (scores[t].loss_at_budget, np.log(scores[t].usd_per_btok)) for t in ranking.order}
    if not points:
        return []
    worst, best = (f(list(points.values()), axis=0) for f in (np.max, np.min))
    reference = tuple((worst + BEYOND * (worst - best)).tolist())
    ended = sorted((_ended_at(state, t), t) for t in points)
    found = []
    for i, (at, _) in enumerate(ended):
        so_far = [points[trial_id] for _, trial_id in ended[: i + 1]]
        found.append((spent_by(state, at), hypervolume(so_far, (reference[0], reference[1]))))
    return found


def _ended_at(state: SearchState, trial_id: str) -> float:
    until = [a.until for a in state.trials[trial_id].allocations]
    return state.last_at if not until or until[-1] is None else until[-1]


def spent_by(state: SearchState, at: float) -> float:
    """Dollars that all allocations had cost at an instant in Unix seconds."""
    held = (a for trial in state.trials.values() for a in trial.allocations if a.since < at)
    return sum(a.usd_per_hour * (min(a.until or at, at) - a.since) / 3600 for a in held)
