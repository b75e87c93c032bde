"""What a trial is worth: its predicted loss for the training budget, and the dollars beside it.

Lower is better, always. A loss curve belongs to a recipe, so all trials of a recipe share one curve
and no fact is paid for twice; throughput and price belong to the trial's own system.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from thriftlm.planning.law import Curve, LawFit, bootstrap, fit_law
from thriftlm.planning.scaling_laws import Floats, LossLaw, effective_tokens, tokens_worth
from thriftlm.spec import Progress, Spec, Status

Objective = Literal["loss_at_budget", "usd_to_loss", "tokens_per_usd", "weighted", "pareto"]
Basis = Literal["measured", "estimated"]
LossUnit = Literal["nats_per_token", "bits_per_byte"]

INTERVAL, PESSIMISM_SDS = (0.05, 0.95), 1.5
"""Quantiles of the bootstrap that `low` and `high` are; standard deviations of `pessimistic`."""
DEFAULT_WEIGHTS = {"loss": 1.0, "usd_per_btok": 1.0}
"""Of the `weighted` objective where none are given."""
SIGNS = {"loss": 1, "usd_per_btok": 1, "tokens_per_s": -1}
"""What `weighted` can weigh; -1 where more is better."""
MAX_LOG_TOKENS, UNREACHABLE = 60.0, 100.0
"""A loss that takes e^60 tokens is out of reach, and its logarithm of dollars is taken as 100."""


@dataclass(frozen=True, eq=False)
class Observation:
    """What is known of one trial: its points of the recipe's curve, and its system's speed."""

    trial_id: str
    recipe_id: str
    curve: Curve
    """This trial's own points, none where it has not reported."""
    usd_per_token: float | None
    """Price of everything billed over total throughput; None while unknown."""
    tokens_per_s_total: float | None
    """Of all GPUs together; None while unknown."""
    basis: Basis
    """Where the two numbers before come from."""
    status: Status
    system_key: str
    """Names the system, for messages and tables."""


class Score(Spec):
    """All objectives of one trial; losses are in the unit of the curves."""

    trial_id: str
    """The trial."""
    loss_at_budget: float
    """Predicted loss after the tokens that the training budget buys on the trial's system."""
    low: float
    """5% quantile of that loss over the bootstrap; wide while the law is not identified."""
    high: float
    """95% quantile."""
    pessimistic: float
    """The loss 1.5 standard deviations (of its logarithm) above: what incumbents are chosen by."""
    best_system: str
    """Known system on which the recipe gets the most tokens."""
    best_system_loss: float
    """Loss at budget of the recipe there."""
    tokens_at_budget: float
    """D_B: tokens that the training budget buys."""
    effective_tokens: float
    """Fresh tokens that D_B is worth when the corpus has to be repeated."""
    extrapolation: float
    """D_B over the most tokens that the recipe has been measured at."""
    usd_per_btok: float
    """Dollars per 1e9 tokens."""
    tokens_per_usd: float
    """Tokens per dollar, the metric of arXiv 2410.19456 in real currency."""
    tokens_per_s: float
    """Of all GPUs together."""
    usd_to_loss: float | None
    """Dollars to the target loss; None where this recipe never gets there."""
    target_loss: float
    """The target: given, or the best loss at budget of all trials."""
    weighted: float
    """Weighted sum of standardised logarithms, over the trials scored together."""
    pareto: bool
    """Whether no trial is better in both loss at budget and dollars per token."""
    basis: Basis
    """Where throughput and price come from."""
    law: dict[str, float]
    """Coefficients of the fitted law."""
    law_identified: bool
    """Whether the data, rather than the prior, determine the law."""
    value: float
    """The scalar of the objective that drives; comparable only within one call."""
    pessimistic_value: float
    """The same from the pessimistic loss: what trials are ranked by."""


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
    draws: Floats  # bootstrap losses, one per sample

    @property
    def pessimistic(self) -> float:
        return float(self.loss * np.exp(PESSIMISM_SDS * np.log(self.draws).std()))


def curve_of(
    recipe_id: str, n_params: float, reports: Sequence[Progress], unit: LossUnit = "nats_per_token"
) -> Curve:
    """The validation curve in a run's reports, those without a validation loss left out.

    `n_params` are stored, without embeddings. `bits_per_byte` compares across tokenizers.
    """
    field = "val_loss" if unit == "nats_per_token" else "val_bits_per_byte"
    points = [(report, getattr(report, field)) for report in reports if report.tokens > 0]
    points = [(report, loss) for report, loss in points if loss is not None and np.isfinite(loss)]
    return Curve(
        name=recipe_id,
        n_params=n_params,
        tokens=np.array([report.tokens for report, _ in points], float),
        loss=np.array([loss for _, loss in points], float),
        decayed=np.array([report.decayed for report, _ in points], bool),
        warming_up=np.array([report.warming_up for report, _ in points], bool),
    )


def tokens_at_budget(
    usd: float | None, hours: float | None, usd_per_token: float, tokens_per_s_total: float
) -> float:
    """Tokens that a training budget buys: the smaller of what dollars and hours allow.

    Raises:
        ValueError: neither dollars nor hours are given; a price or throughput not above 0.
    """
    if usd is None and hours is None:
        raise ValueError("a training budget needs usd or hours, both are missing")
    if usd_per_token <= 0 or tokens_per_s_total <= 0:
        given = f"{usd_per_token} and {tokens_per_s_total}"
        raise ValueError(f"usd_per_token and tokens_per_s_total must be above 0, got {given}")
    by_usd = np.inf if usd is None else usd / usd_per_token
    by_hours = np.inf if hours is None else hours * 3600 * tokens_per_s_total
    return float(min(by_usd, by_hours))


def score_all(
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
) -> dict[str, Score]:
    """Scores by trial id, from one law fitted to the curves of all recipes together.

    No score: trials that ended in oom or diverged, that have no known throughput, or whose recipe
    has no measured point. Points of a trial that diverged stay out of the law. `unique_tokens` is
    the size of the training split; beyond it measured and bought tokens count as repeated.
    `samples` refits give the interval.

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
        return {}
    fresh = [
        replace(curve, tokens=np.array([effective_tokens(n, unique_tokens) for n in curve.tokens]))
        for curve in curves.values()
    ]
    fit = fit_law(fresh, seed=seed)
    refits = bootstrap(fresh, fit, samples=samples, seed=seed)
    found = (_row(seen, curves.get(seen.recipe_id), goal, fit, refits) for seen in observations)
    rows = [row for row in found if row is not None]
    return _scores(rows, fit, goal, objective) if rows else {}


def rank(scores: Mapping[str, Score]) -> list[str]:
    """Trial ids, best first by the pessimistic value; equal ones by the pessimistic loss."""
    return sorted(scores, key=lambda i: (scores[i].pessimistic_value, scores[i].pessimistic, i))


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats in both; less is better, equal points stay."""
    front: list[int] = []
    for i in sorted(range(len(points)), key=points.__getitem__):
        if not front or points[i][1] < points[front[-1]][1] or points[i] == points[front[-1]]:
            front.append(i)
    return sorted(front)


def pooled_curves(observations: Sequence[Observation]) -> dict[str, Curve]:
    """One curve per recipe from all its trials; none of a trial that diverged."""
    by_recipe: dict[str, list[Curve]] = defaultdict(list)
    for seen in observations:
        if seen.status != "diverged" and len(seen.curve.tokens):
            by_recipe[seen.recipe_id].append(seen.curve)
    return {name: _joined(name, curves) for name, curves in by_recipe.items()}


def _joined(name: str, curves: Sequence[Curve]) -> Curve:
    order = np.argsort(np.concatenate([curve.tokens for curve in curves]), kind="stable")
    arrays: dict[str, Any] = {
        field: np.concatenate([getattr(curve, field) for curve in curves])[order]
        for field in ("tokens", "loss", "decayed", "warming_up")
    }
    return Curve(name, curves[0].n_params, **arrays)


def _row(
    seen: Observation, curve: Curve | None, goal: _Goal, fit: LawFit, samples: Sequence[LawFit]
) -> _Row | None:
    """None for what gets no score."""
    price, speed = seen.usd_per_token, seen.tokens_per_s_total
    if curve is None or price is None or speed is None or seen.status in {"oom", "diverged"}:
        return None
    tokens = tokens_at_budget(goal.budget_usd, goal.budget_hours, price, speed)
    effective = effective_tokens(tokens, goal.unique_tokens)
    asked = (seen.recipe_id, curve.n_params, effective)
    draws = np.array([sample.predict(*asked) for sample in samples])
    return _Row(seen, curve, price, speed, tokens, effective, fit.predict(*asked), draws)


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
