"""Trials compared by one law: their scores, and the joint draws behind them.

A loss curve belongs to a recipe, so all trials of a recipe share one curve and no fact is paid for
twice; throughput and price belong to the trial's own system.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from thriftlm.planning.law import Curve, LawFit, bootstrap, fit_law
from thriftlm.planning.scaling_laws import Floats, LossLaw, effective_tokens, tokens_worth
from thriftlm.search.scores.objective import (
    PESSIMISM_SDS,
    Objective,
    Observation,
    Predicted,
    Score,
    fresh_tokens,
    pareto_front,
    pooled_curves,
    tokens_at_budget,
)

INTERVAL = (0.05, 0.95)
"""Quantiles of the draws that `low` and `high` are."""
DEFAULT_WEIGHTS = {"loss": 1.0, "usd_per_btok": 1.0}
"""Of the `weighted` objective where none are given."""
SIGNS = {"loss": 1, "usd_per_btok": 1, "tokens_per_s": -1}
"""What `weighted` can weigh; -1 where more is better."""
MAX_LOG_TOKENS, UNREACHABLE = 60.0, 100.0
"""A loss that takes e^60 tokens is out of reach, and its logarithm of dollars is taken as 100."""


@dataclass(frozen=True)
class _Goal:
    """What `score_all` was asked for."""

    budget_usd: float | None
    budget_hours: float | None
    unique_tokens: float | None
    weights: Mapping[str, float]
    target_loss: float | None


@dataclass(frozen=True, eq=False)
class _Row:
    """One trial on its way to a score."""

    seen: Observation
    curve: Curve
    usd_per_token: float
    tokens_per_s: float
    tokens: float
    effective: float
    loss: float
    draws: Floats  # losses, one per sample
    spread: float

    @property
    def pessimistic(self) -> float:
        return float(self.loss * np.exp(PESSIMISM_SDS * self.spread))


@dataclass(frozen=True, eq=False)
class Comparison:
    """Trials compared with each other, and the joint draws behind it."""

    rows: Sequence[_Row]
    fit: LawFit
    goal: _Goal
    objective: Objective

    @cached_property
    def scores(self) -> dict[str, Score]:
        """Scores by trial id."""
        return _scores(self.rows, self.fit, self.goal, self.objective)

    @property
    def trial_ids(self) -> list[str]:
        """The trials (R,) that have a score."""
        return [row.seen.trial_id for row in self.rows]

    @property
    def draws(self) -> Floats:
        """Losses at budget (samples, R). One sample is one law, so what is common cancels."""
        return np.array([row.draws for row in self.rows]).T

    def values(self, losses: Floats, among: Sequence[int]) -> Floats:
        """What drives, of some of the trials, were these their losses at budget."""
        rows = [self.rows[i] for i in among]
        return np.array(_View(rows, losses, self.fit.law, self.goal).values(self.objective))

    def usd_to(self, trial_id: str, loss: float) -> float | None:
        """Training dollars at which a trial reaches a loss; None where it never does."""
        row = self.rows[self.trial_ids.index(trial_id)]
        return _usd_to_loss(self.fit.law, row, loss / row.loss, self.goal.unique_tokens)

    def slope(self, trial_id: str) -> float:
        """Loss that a trial gains per e-fold of fresh tokens at the budget."""
        row, law = self.rows[self.trial_ids.index(trial_id)], self.fit.law
        without = float(law.loss(row.curve.n_params, row.effective))
        return float(law.beta * law.B * row.effective**-law.beta * row.loss / without)


def score_all(observations: Sequence[Observation], **asked: Any) -> dict[str, Score]:
    """Scores by trial id; takes what `compare` takes."""
    found = compare(observations, **asked)
    return {} if found is None else found.scores


def compare(
    observations: Sequence[Observation],
    *,
    budget_usd: float | None,
    budget_hours: float | None,
    unique_tokens: float | None,
    objective: Objective,
    weights: Mapping[str, float] | None = None,
    target_loss: float | None = None,
    samples: int = 64,
    seed: int = 0,
    predicted: Mapping[str, Predicted] | None = None,
) -> Comparison | None:
    """Trials compared by one law fitted to the curves of all recipes together; None without any.

    No score: trials that ended in oom or diverged, that have no known throughput, or whose recipe
    has no measured point. Points of a trial that diverged stay out of the law. `unique_tokens` is
    the size of the training split; beyond it measured and bought tokens count as repeated.
    `samples` refits give the interval. What is `predicted` of a recipe replaces the law's word.

    Raises:
        ValueError: no training budget; a weight for something that cannot be weighed.
    """
    weights = DEFAULT_WEIGHTS if weights is None else weights
    unknown = sorted(set(weights) - set(SIGNS))
    if unknown:
        raise ValueError(f"weights knows {', '.join(SIGNS)}; got {', '.join(unknown)}")
    goal = _Goal(budget_usd, budget_hours, unique_tokens, weights, target_loss)
    curves = pooled_curves(observations)
    if not curves:
        return None
    fresh = [replace(c, tokens=fresh_tokens(c.tokens, unique_tokens)) for c in curves.values()]
    fit = fit_law(fresh, seed=seed)
    refits = bootstrap(fresh, fit, samples=samples, seed=seed)
    known = predicted or {}
    found = (
        _row(seen, curves.get(seen.recipe_id), goal, fit, refits, known.get(seen.recipe_id))
        for seen in observations
    )
    rows = [row for row in found if row is not None]
    return Comparison(rows, fit, goal, objective) if rows else None


def _row(
    seen: Observation,
    curve: Curve | None,
    goal: _Goal,
    fit: LawFit,
    samples: Sequence[LawFit],
    predicted: Predicted | None,
) -> _Row | None:
    """None for what gets no score."""
    price, speed = seen.usd_per_token, seen.tokens_per_s_total
    if curve is None or price is None or speed is None or seen.status in {"oom", "diverged"}:
        return None
    tokens = tokens_at_budget(goal.budget_usd, goal.budget_hours, price, speed)
    effective = effective_tokens(tokens, goal.unique_tokens)
    if predicted is not None:
        there, here = fit.law.loss(curve.n_params, np.array([predicted.tokens, effective])).tolist()
        loss, draws = predicted.loss * here / there, predicted.draws * here / there
        return _Row(seen, curve, price, speed, tokens, effective, loss, draws, predicted.spread)
    asked = (seen.recipe_id, curve.n_params, effective)
    loss, draws = fit.predict(*asked), np.array([sample.predict(*asked) for sample in samples])
    spread = float(np.log(draws).std())
    return _Row(seen, curve, price, speed, tokens, effective, loss, draws, spread)


def _scores(
    rows: Sequence[_Row], fit: LawFit, goal: _Goal, objective: Objective
) -> dict[str, Score]:
    """Scores of rows, which are compared with each other."""
    central = _View(rows, np.array([row.loss for row in rows]), fit.law, goal)
    pessimistic = replace(central, losses=np.array([row.pessimistic for row in rows]))
    front = set(pareto_front(central.points()))
    best = {row.seen.recipe_id: row for row in sorted(rows, key=lambda row: row.tokens)}
    columns = {
        "usd_to_loss": central.usd_to_loss(),
        "weighted": central.weighted().tolist(),
        "pareto": [i in front for i in range(len(rows))],
        "value": central.values(objective),
        "pessimistic_value": pessimistic.values(objective),
        "target_loss": [central.target()] * len(rows),
        "law": [asdict(fit.law)] * len(rows),
        "law_identified": [fit.identified] * len(rows),
    }
    compared = [
        dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)
    ]
    return {
        row.seen.trial_id: _score(row, best[row.seen.recipe_id], fields)
        for row, fields in zip(rows, compared, strict=True)
    }


def _score(row: _Row, best: _Row, compared: dict[str, Any]) -> Score:
    """One score; `compared` is what depends on the other rows, `best` the recipe's best system."""
    return Score(
        trial_id=row.seen.trial_id,
        loss_at_budget=row.loss,
        low=min(row.loss, float(np.quantile(row.draws, INTERVAL[0]))),
        high=max(row.loss, float(np.quantile(row.draws, INTERVAL[1]))),
        pessimistic=row.pessimistic,
        best_system=best.seen.system_key,
        best_system_loss=best.loss,
        tokens_at_budget=row.tokens,
        effective_tokens=row.effective,
        extrapolation=row.tokens / float(row.curve.tokens.max()),
        usd_per_btok=row.usd_per_token * 1e9,
        tokens_per_usd=1 / row.usd_per_token,
        tokens_per_s=row.tokens_per_s,
        basis=row.seen.basis,
        **compared,
    )


@dataclass(frozen=True, eq=False)
class _View:
    """All rows with one loss each, expected or pessimistic, and the objectives that follow."""

    rows: Sequence[_Row]
    losses: Floats
    law: LossLaw
    goal: _Goal

    def values(self, objective: Objective) -> list[float]:
        """The scalar that drives, by row."""
        match objective:
            case "loss_at_budget":
                values = self.losses
            case "tokens_per_usd":
                values = np.log([row.usd_per_token for row in self.rows])
            case "weighted":
                values = self.weighted()
            case "usd_to_loss":
                known = np.array([np.nan if x is None else x for x in self.usd_to_loss()])
                beyond = UNREACHABLE + np.log(self.losses / self.target())
                values = np.where(np.isnan(known), beyond, np.log(known))
            case "pareto":  # the loss, squeezed below 1, orders within a rank
                values = _pareto_ranks(self.points()) + self.losses / (1 + self.losses)
        return [float(value) for value in values]

    def points(self) -> list[tuple[float, float]]:
        """Loss at budget and dollars per token, by row."""
        return [(loss, row.usd_per_token) for loss, row in zip(self.losses, self.rows, strict=True)]

    def target(self) -> float:
        """Loss that `usd_to_loss` aims at."""
        given = self.goal.target_loss
        return float(self.losses.min()) if given is None else given

    def usd_to_loss(self) -> list[float | None]:
        """Dollars to the target by row, None where it is out of reach."""
        shares, unique = self.target() / self.losses, self.goal.unique_tokens
        pairs = zip(self.rows, shares.tolist(), strict=True)
        return [_usd_to_loss(self.law, row, share, unique) for row, share in pairs]

    def weighted(self) -> Floats:
        """Weighted sum of standardised logarithms, by row."""
        logs = {
            "loss": np.log(self.losses),
            "usd_per_btok": np.log([row.usd_per_token for row in self.rows]),
            "tokens_per_s": np.log([row.tokens_per_s for row in self.rows]),
        }
        weights = self.goal.weights.items()
        terms = [weight * SIGNS[name] * _standardised(logs[name]) for name, weight in weights]
        return np.asarray(np.sum([np.zeros(len(self.rows)), *terms], axis=0))


def _standardised(values: Floats) -> Floats:
    """Deviations from the mean in standard deviations; 0 where all are equal."""
    spread = values.std()
    return (values - values.mean()) / spread if spread > 1e-12 else np.zeros_like(values)


def _pareto_ranks(points: Sequence[tuple[float, float]]) -> Floats:
    """0 for the front, 1 for the front of what remains, and so on."""
    ranks = np.zeros(len(points))
    left = list(range(len(points)))
    while left:
        front = {left[i] for i in pareto_front([points[i] for i in left])}
        left = [i for i in left if i not in front]
        ranks[left] += 1
    return ranks


def _usd_to_loss(
    law: LossLaw, row: _Row, share: float, unique_tokens: float | None
) -> float | None:
    """Dollars at which a row reaches a share of its loss at budget: the law, inverted."""
    if share == 1:  # exact even where repeated data have worn out
        return row.tokens * row.usd_per_token
    target = share * float(law.loss(row.curve.n_params, row.effective))  # without the offset
    left = target - law.E - law.A * row.curve.n_params**-law.alpha
    log_tokens = np.log(law.B / left) / law.beta if left > 0 else np.inf
    if log_tokens > MAX_LOG_TOKENS:
        return None
    tokens = tokens_worth(float(np.exp(max(log_tokens, 0.0))), unique_tokens)
    return tokens * row.usd_per_token if np.isfinite(tokens) else None
