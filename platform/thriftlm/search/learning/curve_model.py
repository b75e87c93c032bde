"""A surrogate of loss over recipes and tokens: a scaling law, and what differs from it.

The logarithm of the loss of recipe x after D tokens is modelled as

    log law(N, D) + bowl(u, v) + f(x) + t g(x) + a + t b + noise,   t = log(D / D_B),

where u and v are the logs of learning rate and batch over those of Step Law (arXiv 2503.04715): the
search is for the residual. The law is fitted to all curves and then linearised, so that its five
coefficients are Gaussian, with a share of the prior of `planning.law`; the bowl's coefficients are
Gaussian too; f and g are Gaussian processes over the raw fields, u, v and log N; a and b belong to
one recipe and its nearest neighbours. Everything is one Gaussian process, whose posterior at t = 0
is the score (freeze-thaw of Swersky et al., arXiv 1406.3896, with the law as its mean). Its scales
are fixed: learning them by marginal likelihood earned nothing in simulated worlds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, solve_triangular

from thriftlm.planning.law import PRIOR_LAW, PRIOR_SD, Curve, fit_law
from thriftlm.planning.scaling_laws import LossLaw

Floats = NDArray[np.float64]

BOWL_MEAN = np.array([0.0, 0.006, 0.0, 0.002, 0.0])
BOWL_SD = np.array([0.012, 0.006, 0.004, 0.003, 0.006])
"""Of u, u^2, v, v^2 and u t: twice the best rate costs about .3%, as in Step Law's own runs; the
middle may lie a factor of e elsewhere, and move with the horizon."""
FITTED_SD = 0.3
"""Share of their prior's scales that a fitted law's coefficients keep: what the curves said of them
is in the law already. With all of it, curves that still fell steeply were continued in a straight
line, to losses that no law allows."""
LEVEL_SD, SLOPE_SD, OWN_SD, OWN_SLOPE_SD, NOISE_SD = 0.02, 0.006, 0.004, 0.004, 0.002
"""Scales of f, g, a, b and noise, in log loss and per e-fold of tokens."""
LENGTHS = {"u": 0.6, "v": 1.0, "n": 0.75, "raw": 0.5}
"""Distances at which recipes stop being alike: in logs, and in shares of a field's domain; words
that differ count like the whole domain."""
OWN_REACH = 0.2
"""Share of those distances over which a and b reach: grids are wider, and where rates are drawn
from an interval a twin of the leader is no second chance."""
EARLIEST, EARLY_SD = 27.0, np.array([0.1, 0.03])
"""Runs begin above any law, and warm-up is counted in tokens: a term exp(-D / D_0), of that scale
in log loss, and how it changes per e-fold of size. D_0 is a 27th of a middling run's tokens."""
EARLY = 2.0
"""From e^-2 of the budget down, the law is a rough description: noise grows in proportion."""
JITTER = 1e-10


@dataclass(frozen=True, eq=False)
class Features:
    """What of recipes the model sees (R, ...)."""

    raw: Floats
    """Numbers from 0 to 1 over their domain (R, K)."""
    words: NDArray[np.intp]
    """Codes of words (R, W)."""
    log_n: Floats
    """Stored parameters without embeddings."""
    log_d: Floats
    """Tokens that the training budget buys."""
    log_early: Floats
    """Tokens in which a run begins, the same for all."""
    u: Floats
    """Log of the learning rate over Step Law's at the budget."""
    v: Floats
    """The same of the batch."""

    def take(self, rows: Sequence[int] | NDArray[np.intp]) -> "Features":
        """Some of the recipes."""
        return Features(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


@dataclass(frozen=True, eq=False)
class Points:
    """Measured losses (P,), each of one of the recipes."""

    recipe: NDArray[np.intp]
    log_tokens: Floats
    log_loss: Floats


@dataclass(frozen=True, eq=False)
class Posterior:
    """Scores of recipes (R,): log loss at the training budget, and how they vary together."""

    mean: Floats
    covariance: Floats

    def sd_of_difference(self, other: int) -> Floats:
        """Of each score minus that of one recipe."""
        own = np.diag(self.covariance)
        variance = own + own[other] - 2 * self.covariance[:, other]
        return np.asarray(np.sqrt(np.maximum(variance, 0.0)))

    def draws(self, count: int, seed: int) -> Floats:
        """Scores drawn together (count, R)."""
        rng = np.random.default_rng(seed)
        return rng.multivariate_normal(self.mean, self.covariance, count, method="eigh")

    def sd_within(self, group: NDArray[np.intp]) -> Floats:
        """Of the scores of a group against the group's mean: what all share decides nothing."""
        inside = self.covariance[np.ix_(group, group)]
        rows = inside.mean(axis=1)
        variance = np.diag(inside) - 2 * rows + rows.mean()
        return np.asarray(np.sqrt(np.maximum(variance, 0.0)))


class CurveModel:
    """Fitted to points of curves; asked for scores."""

    def __init__(self) -> None:
        self.law, self.law_sd = PRIOR_LAW, PRIOR_SD[:5]

    def fit_law(self, curves: Sequence[Curve]) -> None:
        """Move the middle of the law to the curves."""
        if curves:
            self.law = fit_law(curves, starts=0).law
            self.law_sd = FITTED_SD * PRIOR_SD[:5]

    def posterior(self, features: Features, points: Points) -> Posterior:
        """Scores of all recipes of `features` given the points of some."""
        recipes = np.arange(len(features.log_n))
        basis = self._basis(features, recipes, features.log_d)
        mean = self._mean(features, recipes, features.log_d)
        there = Points(recipes, features.log_d, mean)
        prior = self._between(features, there, there, basis, basis)
        if not len(points.recipe):
            return Posterior(mean, prior)
        known = self._basis(features, points.recipe, points.log_tokens)
        factor = np.linalg.cholesky(self._own(features, points, known))
        cross = self._between(features, points, there, known, basis)
        residual = points.log_loss - self._mean(features, points.recipe, points.log_tokens)
        white = solve_triangular(factor, cross, lower=True, check_finite=False)
        moved = cross.T @ cho_solve((factor, True), residual, check_finite=False)
        return Posterior(mean + moved, prior - white.T @ white)

    def _mean(self, features: Features, recipe: NDArray[np.intp], log_tokens: Floats) -> Floats:
        """Prior mean of log loss: the law with its coefficients at their prior, and the bowl."""
        n, d = np.exp(features.log_n[recipe]), np.exp(log_tokens)
        basis = self._basis(features, recipe, log_tokens)
        return np.asarray(np.log(self.law.loss(n, d)) + basis[:, 5:10] @ BOWL_MEAN)

    def _basis(self, features: Features, recipe: NDArray[np.intp], log_tokens: Floats) -> Floats:
        """Slopes of log loss in the law's coefficients, the bowl's and the beginning's (P, 12)."""
        log_n = features.log_n[recipe]
        u, v, t = features.u[recipe], features.v[recipe], log_tokens - features.log_d[recipe]
        early = np.exp(-np.exp(np.minimum(log_tokens - features.log_early[recipe], 9.0)))
        size = log_n - np.log(3e8)
        bowl = (u, u**2, v, v**2, u * t)
        slopes = law_slopes(self.law, log_n, log_tokens)
        return np.column_stack([slopes, *bowl, early, early * size])

    def _own(self, features: Features, points: Points, basis: Floats) -> Floats:
        """Covariance of what was measured."""
        noise = NOISE_SD * self._roughness(features, points)
        covariance = self._between(features, points, points, basis, basis)
        return covariance + np.diag(noise**2 + JITTER)

    def _roughness(self, features: Features, points: Points) -> Floats:
        early = np.maximum(0.0, features.log_d[points.recipe] - points.log_tokens)
        return np.asarray(1.0 + (early / EARLY) ** 2)

    def _between(
        self,
        features: Features,
        one: Points,
        other: Points,
        basis_one: Floats,
        basis_other: Floats,
    ) -> Floats:
        """Covariance of log losses without noise (P, Q)."""
        sds = np.concatenate([self.law_sd, BOWL_SD, EARLY_SD])
        shared = (basis_one * sds**2) @ basis_other.T
        t_one = one.log_tokens - features.log_d[one.recipe]
        t_other = other.log_tokens - features.log_d[other.recipe]
        slopes = np.outer(t_one, t_other)
        distance = _distance(features.take(one.recipe), features.take(other.recipe))
        alike, own = _matern(distance), _matern(distance / OWN_REACH)
        found = shared + alike * (LEVEL_SD**2 + SLOPE_SD**2 * slopes)
        return np.asarray(found + own * (OWN_SD**2 + OWN_SLOPE_SD**2 * slopes))


def law_slopes(law: LossLaw, log_n: Floats, log_d: Floats) -> Floats:
    """Derivatives of log loss by log E, log A, log B, log alpha and log beta (P, 5).

    Those by the exponents are at fixed terms at 3e8 parameters and 1e10 tokens, where small runs
    lie, so that the five are nearly independent.
    """
    a = law.A * np.exp(-law.alpha * log_n)
    b = law.B * np.exp(-law.beta * log_d)
    total = law.E + a + b
    share = np.column_stack([np.full_like(a, law.E), a, b]) / total[:, None]
    x, y = log_n - np.log(3e8), log_d - np.log(1e10)
    exponents = [-law.alpha * x * share[:, 1], -law.beta * y * share[:, 2]]
    return np.column_stack([share, *exponents])


def nearness(one: Features, other: Features) -> Floats:
    """Weights (P, Q) by which recipes tell of each other's divergence: 1 for equal ones."""
    distance = (one.u[:, None] - other.u[None, :]) ** 2
    distance += (0.5 * (one.log_n[:, None] - other.log_n[None, :])) ** 2
    distance += (one.words[:, None, :] != other.words[None, :, :]).sum(axis=2)
    return np.asarray(np.exp(-2 * distance))


def _distance(one: Features, other: Features) -> Floats:
    """How far apart recipes are, in `LENGTHS` (P, Q)."""
    square = np.zeros((len(one.u), len(other.u)))
    for name, scale in (("u", LENGTHS["u"]), ("v", LENGTHS["v"]), ("log_n", LENGTHS["n"])):
        gap = getattr(one, name)[:, None] - getattr(other, name)[None, :]
        square += (gap / scale) ** 2
    for k in range(one.raw.shape[1]):
        square += ((one.raw[:, k, None] - other.raw[None, :, k]) / LENGTHS["raw"]) ** 2
    for k in range(one.words.shape[1]):
        square += (one.words[:, k, None] != other.words[None, :, k]) / LENGTHS["raw"] ** 2
    return np.asarray(np.sqrt(square))


def _matern(distance: Floats) -> Floats:
    """Matern 5/2 of unit length."""
    scaled = np.sqrt(5) * distance
    return np.asarray((1 + scaled + scaled**2 / 3) * np.exp(-scaled))
