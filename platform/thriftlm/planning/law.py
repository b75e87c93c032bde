"""The law of loss over parameters and tokens, fitted to the loss curves of a search.

`L(N, D) = E + A / N^alpha + B / D^beta` (Hoffmann et al. 2022, arXiv 2203.15556, approach 3). The
fit follows Besiroglu et al. (arXiv 2404.10102): Huber loss on the logarithm of the loss, summed and
not averaged, from many starts. What differs, because a search has few, short, noisy curves:

- The Huber delta is 1.345 learned residual scales. Their 1e-3 suits runs that have converged and
  takes nearly every point of a short run for an outlier.
- E, A and B are free but for a wide prior, and the exponents have one of their own, so that one
  point gives a finite answer. The exponents are never fixed.
- Every curve has an offset of learned scale tau: what differs between recipes beyond N and D stays
  out of the law. The scale at which curves drift from the law is learned too; it widens what is
  said about tokens beyond a curve's last.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares
from scipy.special import huber

from thriftlm.planning.scaling_laws import PREDICTION_LAW, Floats, LossLaw, law_named

HUBER_DELTA = 1.345
"""In residual scales: 95% efficient on normal residuals."""
WARM_UP_WEIGHT = 1e-3
"""Of a point in warm-up, which no law describes; in the tail of Huber loss its root counts."""
MAX_CURVE_WEIGHT = 16.0
"""Sum of one curve's weights: reports close in time repeat each other."""
PRIOR_LAW = law_named(PREDICTION_LAW).law
PRIOR_MEAN = np.array([*np.log([1 / 3, 1 / 3, 1 / 3, PRIOR_LAW.alpha, PRIOR_LAW.beta]), 0.03])
PRIOR_SD = np.array([1.5, 1.5, 1.5, 0.4, 0.4, 0.03])
"""Of the logs of the law's terms as shares of the loss at the middle of the data; of log alpha and
log beta (Besiroglu et al.; one real table has a beta of 0.73); of the log offset of undecayed
points (a decay gains about 3%). Huber loss holds here too: data may pull far from the prior."""
SIGMA_PRIOR, TAU_PRIOR, DRIFT_PRIOR = 0.01, 0.03, 0.02
"""Scales that a fit starts from: residuals and offsets in log loss, drift per e-fold of tokens."""
PRIOR_POINTS, PRIOR_CURVES = 4.0, 2.0
"""How many points and curves those scales are worth."""
SCALE_FLOOR = 1e-3
MIN_CURVES, MIN_POINTS, MIN_N_RATIO, MIN_D_RATIO = 3, 6, 2.0, 4.0
"""Below one of these the data do not identify the law."""


@dataclass(frozen=True, eq=False)
class Curve:
    """One training run, or several of the same recipe: losses by tokens seen.

    Raises:
        ValueError: arrays of different length; a token count or loss that is not above 0.
    """

    name: str
    """Recipe id."""
    n_params: float
    """Stored parameters without embeddings."""
    tokens: Floats
    loss: Floats
    decayed: NDArray[np.bool_]
    """Points at which the learning rate had decayed."""
    warming_up: NDArray[np.bool_]
    """Points at which the learning rate was still warming up."""

    def __post_init__(self) -> None:
        kinds = {"tokens": float, "loss": float, "decayed": bool, "warming_up": bool}
        for field, kind in kinds.items():
            object.__setattr__(self, field, np.atleast_1d(np.asarray(getattr(self, field), kind)))
        lengths = {field: len(getattr(self, field)) for field in kinds}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"curve {self.name}: arrays must have one length, got {lengths}")
        values = np.concatenate([[self.n_params], self.tokens, self.loss])
        if not (np.isfinite(values) & (values > 0)).all():
            raise ValueError(
                f"curve {self.name}: n_params, tokens, loss must be finite and above 0"
            )


@dataclass(frozen=True)
class Effect:
    """How one curve differs from the law, in log loss."""

    offset: float
    """Its weighted mean residual times tau^2 / (tau^2 + sigma^2 / weight)."""
    offset_sd: float
    """Posterior standard deviation of the offset."""
    last_tokens: float
    """Where its measurements end."""
    drift: float = 0.0
    """Change of the offset per e-fold of tokens beyond; 0 but in a bootstrap sample."""

    def at(self, n_tokens: float) -> float:
        """Offset at a token count."""
        return self.offset + self.drift * max(0.0, float(np.log(n_tokens / self.last_tokens)))


@dataclass(frozen=True)
class LawFit:
    """A law with what the fit learned beside it. Offsets and scales are of log loss."""

    law: LossLaw
    decay_offset: float
    """Of undecayed points relative to decayed ones."""
    effects: dict[str, Effect]
    """By curve name."""
    sigma: float
    """Scale of the residuals within a curve."""
    tau: float
    """Scale of the offsets between curves."""
    drift: float
    """Scale of the curves' drift from the law per e-fold of tokens."""
    theta: tuple[float, ...]
    """Where the solver ended, in its own parameters."""
    n_points: int
    """Points after warm-up."""
    n_params_range: tuple[float, float]
    """Smallest and largest model seen."""
    n_tokens_range: tuple[float, float]
    """Smallest and largest token count seen."""
    reasons: tuple[str, ...]
    """Why the data do not identify the law; empty when they do."""

    @property
    def identified(self) -> bool:
        """Whether the data, rather than the prior, determine the law."""
        return not self.reasons

    def predict(
        self, curve_name: str, n_params: float, n_tokens: float, decayed: bool = True
    ) -> float:
        """Predicted loss of one curve; of an unknown one, that of a typical recipe."""
        effect = self.effects.get(curve_name)
        offset = (effect.at(n_tokens) if effect else 0.0) + (0.0 if decayed else self.decay_offset)
        return float(self.law.loss(n_params, n_tokens) * np.exp(offset))


@dataclass(frozen=True, eq=False)
class _Problem:
    """Curves flattened to points, with everything that a least-squares solve needs.

    theta is (e, a, b, log alpha, log beta, decay offset); exp(e), exp(a) and exp(b) are the law's
    terms at the geometric middle of the data, as shares of the loss there.
    """

    names: tuple[str, ...]
    log_n: Floats
    log_d: Floats
    log_loss: Floats
    undecayed: Floats
    counted: NDArray[np.bool_]  # after warm-up
    weight: Floats
    curve: NDArray[np.intp]  # index of each point's curve
    first: NDArray[np.intp]  # index of each curve's first point
    middle: Floats  # log N, log D, log loss at the middle
    curve_weight: Floats
    prior_mean: Floats
    sigma: float = SIGMA_PRIOR
    tau: float = TAU_PRIOR

    def model(self, theta: Floats) -> tuple[Floats, Floats]:
        """Log loss of each point without curve offsets (P,), and its gradient (P, 6)."""
        e, a, b, log_alpha, log_beta, decay = theta
        alpha, beta = np.exp(log_alpha), np.exp(log_beta)
        x, y = self.log_n - self.middle[0], self.log_d - self.middle[1]
        terms = np.stack([np.full_like(x, e), a - alpha * x, b - beta * y], axis=1)
        log_sum = np.logaddexp.reduce(terms, axis=1)
        share = np.exp(terms - log_sum[:, None])
        slopes = [-alpha * x * share[:, 1], -beta * y * share[:, 2], self.undecayed]
        log_loss = self.middle[2] + log_sum + decay * self.undecayed
        return log_loss, np.column_stack([share, *slopes])

    def by_curve(self, values: Floats) -> Floats:
        """Weighted sums over each curve's points of values (P,) or gradients (P, 6)."""
        return np.asarray(np.add.reduceat(values.T * self.weight, self.first, axis=-1).T)

    def precisions(self) -> Floats:
        """Of the curves' offsets: 1 / posterior variance."""
        return self.by_curve(np.ones_like(self.weight)) / self.sigma**2 + 1 / self.tau**2

    def offsets(self, values: Floats) -> Floats:
        """Shrunk weighted mean per curve of residuals (P,) or gradients (P, 6): exactly linear."""
        return np.asarray((self.by_curve(values).T / self.sigma**2 / self.precisions()).T)

    def raw(self, theta: Floats) -> Floats:
        """Residuals in log loss, the curves' offsets left in."""
        return self.log_loss - self.model(theta)[0]

    def residuals(self, theta: Floats) -> Floats:
        """Of points, curve offsets and prior, each in its own standard deviations."""
        return self._standardised(self.raw(theta), (theta - self.prior_mean) / PRIOR_SD)

    def jacobian(self, theta: Floats) -> Floats:
        """Derivative of `residuals`; offsets are linear in the residuals, so they project out."""
        return self._standardised(-self.model(theta)[1], np.diag(1 / PRIOR_SD))

    def _standardised(self, values: Floats, prior: Floats) -> Floats:
        offset = self.offsets(values)
        scale = np.sqrt(self.weight * self.curve_weight[self.curve]) / self.sigma
        points = ((values - offset[self.curve]).T * scale).T
        return np.concatenate([points, (offset.T * np.sqrt(self.curve_weight) / self.tau).T, prior])

    def cost(self, theta: Floats) -> float:
        """What `solve` minimises."""
        return float(huber(HUBER_DELTA, self.residuals(theta)).sum())

    def solve(self, start: Floats, tolerance: float) -> Floats:
        """Parameters of the nearest minimum."""
        found = least_squares(
            self.residuals, start, self.jacobian, loss="huber", f_scale=HUBER_DELTA, ftol=tolerance
        )
        return np.asarray(found.x)

    def law(self, theta: Floats) -> LossLaw:
        """Coefficients in units of parameters and tokens."""
        log_n, log_d, log_loss = self.middle
        (e, a, b), (alpha, beta) = theta[:3] + log_loss, np.exp(theta[3:5])
        terms = np.exp([e, a + alpha * log_n, b + beta * log_d])
        return LossLaw(*map(float, [*terms, alpha, beta]))


def fit_law(curves: Sequence[Curve], *, starts: int = 64, seed: int = 0) -> LawFit:
    """The law that fits the curves, with a finite answer from one point on.

    `starts` draws from the prior are compared and the best eight are followed to their minimum.
    Residual scale and offset scale are learned in turns with the law (empirical Bayes).

    Raises:
        ValueError: no curve has a point.
    """
    problem = _problem(curves)
    draws = np.random.default_rng(seed).standard_normal((starts, len(PRIOR_SD)))
    points = [problem.prior_mean, *(problem.prior_mean + draws * PRIOR_SD)]
    best = sorted(points, key=problem.cost)[:8]
    theta = min((problem.solve(point, 1e-6) for point in best), key=problem.cost)
    for _ in range(3):
        problem = _with_learned_scales(problem, theta)
        theta = problem.solve(theta, 1e-8)
    return _fit(problem, theta)


def bootstrap(
    curves: Sequence[Curve], fit: LawFit, *, samples: int = 64, seed: int = 0
) -> list[LawFit]:
    """Fits that show what the data leave open: one per sample, warm-started from `fit`.

    Bayesian bootstrap over curves (Rubin 1981: exponential weights instead of counts), with
    measurements and prior means redrawn as well (randomised maximum a posteriori), since few curves
    show no spread by resampling alone. Offsets and drifts are draws. Errs on the wide side.
    """
    rng = np.random.default_rng(seed)
    problem = replace(_problem(curves), sigma=fit.sigma, tau=fit.tau)
    return [_sample(problem, fit, rng) for _ in range(samples)]


def _problem(curves: Sequence[Curve]) -> _Problem:
    """Points of all curves that have any."""
    held = [curve for curve in curves if len(curve.tokens)]
    names = tuple(curve.name for curve in held)
    if not held or len(set(names)) < len(names):
        raise ValueError(f"a loss law needs a measured point and one curve per name, got {names}")
    lengths = [len(curve.tokens) for curve in held]
    log_n = np.repeat(np.log([curve.n_params for curve in held]), lengths)
    log_d = np.log(np.concatenate([curve.tokens for curve in held]))
    log_loss = np.log(np.concatenate([curve.loss for curve in held]))
    weight = np.concatenate([_weights(curve) for curve in held])
    return _Problem(
        names=names,
        log_n=log_n,
        log_d=log_d,
        log_loss=log_loss,
        undecayed=np.concatenate([~curve.decayed for curve in held]).astype(float),
        counted=~np.concatenate([curve.warming_up for curve in held]),
        weight=weight,
        curve=np.repeat(np.arange(len(held)), lengths),
        first=np.cumsum([0, *lengths[:-1]]),
        middle=np.average(np.stack([log_n, log_d, log_loss]), axis=1, weights=weight),
        curve_weight=np.ones(len(held)),
        prior_mean=PRIOR_MEAN,
    )


def _weights(curve: Curve) -> Floats:
    weight = np.where(curve.warming_up, WARM_UP_WEIGHT, 1.0)
    return np.asarray(weight * min(1.0, MAX_CURVE_WEIGHT / weight.sum()))


def _with_learned_scales(problem: _Problem, theta: Floats) -> _Problem:
    """The problem with sigma from the residuals' median and tau by expectation-maximisation."""
    raw, n_free = problem.raw(theta), len(theta) + len(problem.names)
    used = problem.counted if problem.counted.any() else np.ones_like(problem.counted)
    n_points = int(used.sum())
    for _ in range(10):
        offset = problem.offsets(raw)
        inside = np.median(np.abs(raw - offset[problem.curve])[used]) * 1.4826
        variance = PRIOR_POINTS * SIGMA_PRIOR**2 + n_points * inside**2
        sigma = max(SCALE_FLOOR, np.sqrt(variance / (PRIOR_POINTS + max(n_points - n_free, 0))))
        tau = _scale(offset, problem.precisions(), TAU_PRIOR)
        problem = replace(problem, sigma=float(sigma), tau=tau)
    return problem


def _drift(problem: _Problem, theta: Floats) -> float:
    """Scale of the slopes of the curves' residuals over log tokens."""
    total = problem.by_curve(np.ones_like(problem.weight))
    x = problem.log_d - (problem.by_curve(problem.log_d) / total)[problem.curve]
    moment = problem.by_curve(x * problem.raw(theta)) / problem.sigma**2
    information, drift = problem.by_curve(x**2) / problem.sigma**2, DRIFT_PRIOR
    for _ in range(10):
        precision = information + drift**-2
        drift = _scale(moment / precision, precision, DRIFT_PRIOR)
    return drift


def _scale(means: Floats, precisions: Floats, prior: float) -> float:
    """One expectation-maximisation step: standard deviation of what has these posteriors."""
    total = PRIOR_CURVES * prior**2 + np.sum(means**2 + 1 / precisions)
    return max(SCALE_FLOOR, float(np.sqrt(total / (PRIOR_CURVES + len(means)))))


def _sample(problem: _Problem, start: LawFit, rng: np.random.Generator) -> LawFit:
    """One bootstrap fit; its offsets are drawn given the curves as they were measured."""
    weights = rng.exponential(size=len(problem.names))
    levels = problem.tau * rng.standard_normal(len(problem.names))
    noise = problem.sigma * rng.standard_normal(len(problem.log_loss)) / np.sqrt(problem.weight)
    redrawn = replace(
        problem,
        curve_weight=weights / weights.mean(),
        log_loss=problem.log_loss + levels[problem.curve] + noise,
        prior_mean=problem.prior_mean + PRIOR_SD * rng.standard_normal(len(PRIOR_SD)),
    )
    fit = _fit(problem, redrawn.solve(np.array(start.theta), 1e-4))
    effects = {
        name: replace(
            effect,
            offset=effect.offset + effect.offset_sd * float(rng.standard_normal()),
            drift=start.drift * float(rng.standard_normal()),
        )
        for name, effect in fit.effects.items()
    }
    return replace(fit, effects=effects)


def _fit(problem: _Problem, theta: Floats) -> LawFit:
    ends = [f(log) for log in (problem.log_n, problem.log_d) for f in (np.min, np.max)]
    n_low, n_high, d_low, d_high = np.exp(ends).tolist()
    n_curves, n_points = len(problem.names), int(problem.counted.sum())
    checks = [
        (n_curves < MIN_CURVES, f"{n_curves} curves, {MIN_CURVES} needed"),
        (n_points < MIN_POINTS, f"{n_points} points after warm-up, {MIN_POINTS} needed"),
        (n_high < n_low * MIN_N_RATIO, f"sizes span less than {MIN_N_RATIO:g}x"),
        (d_high < d_low * MIN_D_RATIO, f"tokens span less than {MIN_D_RATIO:g}x"),
    ]
    offsets, sds = problem.offsets(problem.raw(theta)), 1 / np.sqrt(problem.precisions())
    last = np.exp(np.maximum.reduceat(problem.log_d, problem.first))
    rows = zip(offsets.tolist(), sds.tolist(), last.tolist(), strict=True)
    return LawFit(
        law=problem.law(theta),
        decay_offset=float(theta[5]),
        effects=dict(zip(problem.names, (Effect(*row) for row in rows), strict=True)),
        sigma=problem.sigma,
        tau=problem.tau,
        drift=_drift(problem, theta),
        theta=tuple(theta.tolist()),
        n_points=n_points,
        n_params_range=(n_low, n_high),
        n_tokens_range=(d_low, d_high),
        reasons=tuple(reason for failed, reason in checks if failed),
    )
