"""What a trial is worth: its predicted loss for the training budget, and the dollars beside it.

Lower is better, always. A loss curve belongs to a recipe, so all trials of a recipe share one curve
and no fact is paid for twice; throughput and price belong to the trial's own system.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from thriftlm.planning.law import Curve
from thriftlm.planning.scaling_laws import Floats, effective_tokens
from thriftlm.spec import Progress, Spec, Status

Objective = Literal["loss_at_budget", "usd_to_loss", "tokens_per_usd", "weighted", "pareto"]
Basis = Literal["measured", "estimated"]
LossUnit = Literal["nats_per_token", "bits_per_byte"]

PESSIMISM_SDS = 1.5
"""Standard deviations of log loss that `pessimistic` lies above."""


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


@dataclass(frozen=True, eq=False)
class Predicted:
    """What a searcher's own surrogate says of one recipe; it replaces what the law says."""

    tokens: float
    """Effective tokens that it speaks of; the law carries it to those of a trial's system."""
    loss: float
    spread: float
    """Standard deviation of log loss, what all recipes have in common left out."""
    draws: Floats
    """Losses (samples,), drawn for all recipes together."""


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


def curve_of(
    recipe_id: str, n_params: float, reports: Sequence[Progress], unit: LossUnit = "nats_per_token"
) -> Curve:
    """The validation curve in a run's reports, those without a validation loss left out.

    `n_params` are stored, without embeddings. `bits_per_byte` compares across tokenizers.
    """
    points = [(report, loss_of(report, unit)) for report in reports if report.tokens > 0]
    points = [(report, loss) for report, loss in points if loss is not None and np.isfinite(loss)]
    return Curve(
        name=recipe_id,
        n_params=n_params,
        tokens=np.array([report.tokens for report, _ in points], float),
        loss=np.array([loss for _, loss in points], float),
        decayed=np.array([report.decayed for report, _ in points], bool),
        warming_up=np.array([report.warming_up for report, _ in points], bool),
    )


def loss_of(report: Progress, unit: LossUnit) -> float | None:
    """The validation loss of a report in a unit."""
    return report.val_loss if unit == "nats_per_token" else report.val_bits_per_byte


def fresh_tokens(tokens: Floats, unique_tokens: float | None) -> Floats:
    """Tokens of a corpus without end that are worth as much as these of ours."""
    if unique_tokens is None:
        return tokens
    return np.array([effective_tokens(n, unique_tokens) for n in tokens.tolist()])


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
