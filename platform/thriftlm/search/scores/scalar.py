"""The objective of a factored search as a line: a share of log loss, and what is known beside it.

Price and speed of a recipe on its best system are believed, its loss is uncertain. So every
objective is `slope x log loss + known`, and expected improvement stays in closed form.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr

from thriftlm.planning.scaling_laws import Floats
from thriftlm.search.learning.curve_model import Posterior
from thriftlm.search.scores.comparison import DEFAULT_WEIGHTS, SIGNS
from thriftlm.search.scores.objective import Objective, Predicted

DRAWS = 256
"""Of all scores together, behind an answer."""
FALL_SD = 0.25
"""Of how far losses fall from here to the budget, in log loss, as a share of what is predicted:
the law's form is wrong by something that all recipes share. Without it 90% intervals of leaders
held the truth of 21 simulated worlds in 73% of searches, with it in 87%
(`tests/benchmarks/interval_coverage.py`)."""


class Line(NamedTuple):
    """Value of recipes (R,): `slope x log loss + known`; less is better."""

    slope: float
    known: Floats

    def of(self, scores: Posterior) -> Posterior:
        """Values of recipes whose scores are uncertain."""
        return Posterior(self.slope * scores.mean + self.known, self.slope**2 * scores.covariance)


def line(
    objective: Objective,
    weights: Mapping[str, float] | None,
    log_loss: Floats,
    log_usd: Floats,
    log_speed: Floats,
    tried: int,
    share: float = 0.5,
) -> Line:
    """The objective of recipes with these losses, prices and speeds (R,), all in logs.

    Logs are standardised by their scatter over the first `tried` recipes.

    The least loss at the budget is also the least money to a loss, but for repeated data, so
    `usd_to_loss` searches for it. `pareto` is the weighted sum of standardised logs with `share` on
    the loss: drawn anew for each proposal it covers the front (ParEGO, Knowles 2006, there with
    Chebyshev's norm).
    """
    nothing = np.zeros(len(log_usd))
    match objective:
        case "loss_at_budget" | "usd_to_loss":
            return Line(1.0, nothing)
        case "tokens_per_usd":
            return Line(0.0, log_usd)
        case "pareto":
            wanted: Mapping[str, float] = {"loss": share, "usd_per_btok": 1 - share}
        case "weighted":
            wanted = DEFAULT_WEIGHTS if weights is None else weights
    known = nothing
    for name, values in (("usd_per_btok", log_usd), ("tokens_per_s", log_speed)):
        known = known + wanted.get(name, 0.0) * SIGNS[name] * values / _spread(values[:tried])
    return Line(wanted.get("loss", 0.0) / _spread(log_loss[:tried]), known)


def predictions(
    names: Sequence[str], tokens: Floats, scores: Posterior, log_loss: Floats, seed: int
) -> dict[str, Predicted]:
    """Scores of recipes (R,) at these tokens as losses by name, drawn for all together.

    `log_loss` is what was measured last of each.
    """
    spread = scores.sd_within(np.arange(len(names)))
    fall = np.maximum(0.0, log_loss - scores.mean)
    shared = np.random.default_rng([seed, 1]).normal(0, FALL_SD, DRAWS)
    drawn = np.exp(scores.draws(DRAWS, seed) + shared[:, None] * fall).T
    rows = zip(tokens.tolist(), np.exp(scores.mean).tolist(), spread.tolist(), drawn, strict=True)
    return {name: Predicted(*row) for name, row in zip(names, rows, strict=True)}


def expected_improvement(gain: Floats, sd: Floats) -> Floats:
    """Mean of max(0, X) for X normal with that mean and standard deviation."""
    z = gain / sd
    return np.asarray(gain * ndtr(z) + sd * np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi))


def _spread(values: Floats) -> float:
    """Standard deviation; 1 where there is none to divide by."""
    spread = float(np.std(values)) if len(values) > 1 else 0.0
    return spread if spread > 1e-6 else 1.0
