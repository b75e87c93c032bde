"""A scaling law fitted to finished runs, with what the data leave open, or a refusal.

As Besiroglu et al. do it (arXiv 2404.10102): Huber loss on the logarithm of the loss, delta 1e-3,
summed, from many starts, and a bootstrap over runs. What differs: starts are a grid over the shares
of the law's terms instead of Hoffmann's grid over their logs (which has most of its 4,500 starts
where no loss is), and all starts and all bootstrap samples descend together, in one batch.

`planning.law` is the other fit: for the few, short, undecayed curves of a search it needs a prior,
offsets of recipes and a wider delta. Here nothing but the data speak.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from thriftlm.planning.scaling_laws import (
    FLOPS_PER_PARAM_TOKEN,
    Counts,
    Floats,
    LossLaw,
    NamedLaw,
    Optimum,
)
from thriftlm.spec import InputError

Form = Literal["chinchilla", "skaling"]
COEFFICIENTS = {"chinchilla": 5, "skaling": 6}
"""Free ones of each form; Skaling adds the outer exponent."""

DELTA = 1e-3
"""Of the Huber loss, in log loss (Hoffmann et al.)."""
DELTAS = (0.03, 0.01, 0.003, DELTA)
"""From a smooth problem to the one that counts."""
STEPS, REFINING_STEPS = 30, 120
"""Of descent at each delta, and at the last one."""
SHARES, SPLITS, EXPONENTS = (0.15, 0.45, 0.75), (0.2, 0.5, 0.8), (0.15, 0.35, 0.75)
"""Starts: E's share of the loss at the middle of the data, the size's share of the rest, alpha and
beta; divided by k in Skaling's form, whose k starts at each of `OUTER`."""
OUTER = (0.35, 0.7, 1.0)
LOWEST = np.array([-15.0, -15.0, -15.0, math.log(0.01), math.log(0.01), math.log(0.05)])
HIGHEST = np.array([15.0, 15.0, 1.0, math.log(4.0), math.log(4.0), math.log(2.0)])
"""Bounds of the solver's parameters: see `_Problem`."""
SAMPLES = 200
"""Of the bootstrap."""
INTERVAL = (0.05, 0.95)
BATCH_VALUES = 4_000_000
"""Residuals that descend together, at most: bounds memory."""

MIN_SIZES, MIN_HORIZONS, MIN_N_RATIO, MIN_D_RATIO = 3, 3, 1.5, 4.0
MAX_CORRELATION = 0.98
"""Of log N and log D: where all runs have about the same tokens per parameter, one law cannot be
told from another."""
LEAST_SHARE = 1e-3
"""Of the loss at the middle of the data that size, or data, must explain."""
MAX_OPTIMUM_RATIO = 30.0
"""Between the ends of the interval of N_opt inside the data."""


class UnidentifiedError(InputError):
    """Data that do not determine a law."""


class Interval(NamedTuple):
    """A value with its 90% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Points:
    """Losses of finished runs: arrays of equal length (P,)."""

    run: NDArray[np.intp]
    """Index of each point's run: what the bootstrap draws."""
    n_params: Floats
    n_tokens: Floats
    """Fresh ones, or what repeated ones are worth."""
    loss: Floats
    counts: Counts
    """What `n_params` are."""

    def __len__(self) -> int:
        return len(self.loss)

    def take(self, keep: Any) -> "Points":
        """The points of an index or mask."""
        return Points(
            self.run[keep], self.n_params[keep], self.n_tokens[keep], self.loss[keep], self.counts
        )

    @property
    def flops(self) -> Floats:
        """`6 N D`."""
        return FLOPS_PER_PARAM_TOKEN * self.n_params * self.n_tokens


@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted law, the laws of the bootstrap, and the data behind them."""

    law: LossLaw
    samples: tuple[LossLaw, ...]
    """One law per bootstrap sample."""
    points: Points
    form: Form
    starts: int
    objective: float
    """Summed Huber loss."""

    @cached_property
    def residuals(self) -> Floats:
        """Measured over predicted loss, as logarithms."""
        predicted = self.law.loss(self.points.n_params, self.points.n_tokens)
        return np.asarray(np.log(self.points.loss / predicted))

    def named(self, name: str) -> NamedLaw:
        """The law as a plan takes it."""
        runs = len(np.unique(self.points.run))
        source = f"fitted to {len(self.points)} points of {runs} runs"
        return NamedLaw(name, self.law, self.points.counts, source)

    def predict(self, n_params: float, n_tokens: float, seed: int = 0) -> Interval:
        """Loss that one more run would measure: its interval has the law's error and the runs'."""
        draws = np.array([law.loss(n_params, n_tokens) for law in self.samples])
        noise = np.random.default_rng(seed).choice(self.residuals, len(draws))
        low, high = np.quantile(draws * np.exp(noise), INTERVAL)
        return Interval(float(self.law.loss(n_params, n_tokens)), float(low), float(high))

    def optimal_params(self, flops: float) -> Interval:
        """N of the compute optimum."""
        draws = [law.optimum(flops).n_params for law in self.samples]
        low, high = np.quantile(draws, INTERVAL)
        return Interval(self.law.optimum(flops).n_params, float(low), float(high))

    def overhead(self, k_n: float) -> Interval | None:
        """Compute overhead of a smaller model; None below the floor, infinite in samples' ends."""
        if k_n <= self.law.k_min:
            return None
        draws = [law.overhead(k_n) if k_n > law.k_min else math.inf for law in self.samples]
        low, high = np.quantile(draws, INTERVAL, method="nearest")
        return Interval(self.law.overhead(k_n), float(low), float(high))

    def extrapolation(self, best: Optimum) -> dict[str, float]:
        """How far a model and its tokens lie beyond the data: 1 is within, 10 a decade outside."""
        ratio = self.points.n_tokens / self.points.n_params
        wanted = {
            "flops": (best.flops, self.points.flops),
            "n_params": (best.n_params, self.points.n_params),
            "n_tokens": (best.n_tokens, self.points.n_tokens),
            "tokens_per_param": (best.n_tokens / best.n_params, ratio),
        }
        return {
            name: float(max(1.0, value / known.max(), known.min() / value))
            for name, (value, known) in wanted.items()
        }


def fit_points(
    points: Points, form: Form = "chinchilla", *, samples: int = SAMPLES, seed: int = 0
) -> Fit:
    """The law that fits, with a bootstrap over runs.

    Raises:
        UnidentifiedError: the data do not determine it; says why.
    """
    _refuse_poor_data(points, form)
    problem = _Problem.of(points, form)
    starts = problem.starts()
    everything = np.ones((1, len(points)))
    found = _descended(problem, starts, everything.repeat(len(starts), 0))
    best = found[np.argmin(problem.costs(found, everything, DELTA))]
    weights = _resampled(points.run, samples, seed)
    redrawn = _descended(problem, best[None].repeat(samples, 0), weights, DELTAS[1:])
    fit = Fit(
        law=problem.law(best),
        samples=tuple(problem.law(theta) for theta in redrawn),
        points=points,
        form=form,
        starts=len(starts),
        objective=float(problem.costs(best[None], everything, DELTA)[0]),
    )
    _refuse_open_law(fit, problem, best)
    return fit


def _resampled(run: NDArray[np.intp], samples: int, seed: int) -> Floats:
    """How often each point counts in each sample (S, P): runs are drawn with replacement."""
    names, which = np.unique(run, return_inverse=True)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=samples)
    return np.asarray(counts[:, which], np.float64)


# --- the solver ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Problem:
    """The law in coordinates in which all its parameters are of order one.

    theta is (a, b, e, log alpha, log beta, log k): with x, y and the log loss taken from their
    means, `log L = logaddexp(e, k logaddexp(a - alpha x, b - beta y))`.
    """

    x: Floats
    y: Floats
    log_loss: Floats
    middle: tuple[float, float, float]
    form: Form

    @classmethod
    def of(cls, points: Points, form: Form) -> "_Problem":
        logs = [np.log(v) for v in (points.n_params, points.n_tokens, points.loss)]
        n, d, loss = (float(v.mean()) for v in logs)
        return cls(logs[0] - n, logs[1] - d, logs[2] - loss, (n, d, loss), form)

    @property
    def free(self) -> int:
        return COEFFICIENTS[self.form]

    def starts(self) -> Floats:
        """Grid of starts (S, 6)."""
        outer = OUTER if self.form == "skaling" else (1.0,)
        rows = [
            [
                math.log((1 - share) * split) / k,
                math.log((1 - share) * (1 - split)) / k,
                math.log(share),
                math.log(alpha / k),
                math.log(beta / k),
                math.log(k),
            ]
            for share, split, alpha, beta, k in product(SHARES, SPLITS, EXPONENTS, EXPONENTS, outer)
        ]
        return np.array(rows)

    def residuals(self, theta: Floats) -> tuple[Floats, Floats]:
        """Measured minus predicted log loss (S, P), and the prediction's gradient (S, P, free)."""
        a, b, e, log_alpha, log_beta, log_k = theta.T[:, :, None]
        alpha, beta, k = np.exp(log_alpha), np.exp(log_beta), np.exp(log_k)
        size, data = a - alpha * self.x, b - beta * self.y
        inner = np.logaddexp(size, data)
        total = np.logaddexp(e, k * inner)
        reducible = np.exp(k * inner - total)
        by_size = reducible * k * np.exp(size - inner)
        by_data = reducible * k * np.exp(data - inner)
        slopes = [by_size, by_data, 1 - reducible]
        slopes += [-alpha * self.x * by_size, -beta * self.y * by_data, reducible * k * inner]
        return self.log_loss - total, np.stack(slopes[: self.free], axis=-1)

    def costs(self, theta: Floats, weights: Floats, delta: float) -> Floats:
        """Summed Huber loss of each (S,), in units of delta squared."""
        return _huber(self.residuals(theta)[0], weights, delta)

    def law(self, theta: Floats) -> LossLaw:
        """Coefficients in parameters, tokens and the loss's unit."""
        n, d, loss = self.middle
        a, b, e = theta[:3]
        alpha, beta, k = np.exp(theta[3:])
        scaled = [e + loss, a + alpha * n + loss / k, b + beta * d + loss / k]
        return LossLaw(*map(float, [*np.exp(scaled), alpha, beta, k]))


def _huber(residuals: Floats, weights: Floats, delta: float) -> Floats:
    size = np.abs(residuals) / delta
    return np.asarray((weights * np.where(size <= 1, size**2 / 2, size - 0.5)).sum(axis=1))


def _descended(
    problem: _Problem, theta: Floats, weights: Floats, deltas: Sequence[float] = DELTAS
) -> Floats:
    """Parameters after descent from each row (S, 6), chunk by chunk."""
    rows = max(1, BATCH_VALUES // max(1, weights.shape[1] * problem.free))
    done = []
    for first in range(0, len(theta), rows):
        part, own = theta[first : first + rows], weights[first : first + rows]
        for delta in deltas:
            part = _descent(problem, part, own, delta, STEPS if delta > DELTA else REFINING_STEPS)
        done.append(part)
    return np.concatenate(done)


def _descent(problem: _Problem, theta: Floats, weights: Floats, delta: float, steps: int) -> Floats:
    """Levenberg-Marquardt with Huber weights (iteratively reweighted), all rows at once."""
    theta, free = theta.copy(), problem.free
    damping = np.full(len(theta), 1e-2)
    residuals, slopes = problem.residuals(theta)
    cost = _huber(residuals, weights, delta)
    for _ in range(steps):
        share = weights * np.minimum(1.0, delta / np.maximum(np.abs(residuals), 1e-12))
        weighted = slopes * share[:, :, None]
        normal = np.swapaxes(weighted, 1, 2) @ slopes
        pull = (weighted * residuals[:, :, None]).sum(axis=1)
        scale = np.einsum("sii->si", normal)
        ridge = damping[:, None] * scale + 1e-9 * scale.max(axis=1, keepdims=True) + 1e-30
        normal[:, np.arange(free), np.arange(free)] += ridge
        tried = theta.copy()
        tried[:, :free] += np.linalg.solve(normal, pull[:, :, None])[:, :, 0]
        tried = np.clip(tried, LOWEST, HIGHEST)
        new_residuals, new_slopes = problem.residuals(tried)
        new_cost = _huber(new_residuals, weights, delta)
        better = new_cost < cost
        theta[better], cost[better] = tried[better], new_cost[better]
        residuals[better], slopes[better] = new_residuals[better], new_slopes[better]
        damping = np.clip(np.where(better, damping / 3, damping * 4), 1e-8, 1e8)
        if (damping >= 1e6).all():
            break
    return theta


# --- what data cannot tell ----------------------------------------------------------------------


def _refuse_poor_data(points: Points, form: Form) -> None:
    needed = COEFFICIENTS[form] + 1
    if len(points) < needed:
        raise UnidentifiedError(
            f"a law of {needed - 1} coefficients needs at least {needed} points, the runs have "
            f"{len(points)}; record more"
        )
    for what, values, least, ratio in (
        ("model sizes", points.n_params, MIN_SIZES, MIN_N_RATIO),
        ("horizons", points.n_tokens, MIN_HORIZONS, MIN_D_RATIO),
    ):
        number, span = len(np.unique(np.round(np.log(values), 2))), values.max() / values.min()
        if number < least or span < ratio:
            raise UnidentifiedError(
                f"a law needs at least {least} {what} over a factor of {ratio:g}, the runs have "
                f"{number} over {span:.3g}; vary them more"
            )
    correlation = np.corrcoef(np.log(points.n_params), np.log(points.n_tokens))[0, 1]
    if abs(correlation) > MAX_CORRELATION:
        raise UnidentifiedError(
            "a law needs sizes and tokens that vary apart, in these runs they go together "
            f"(correlation {correlation:.3f}); train some sizes shorter and longer"
        )


def _refuse_open_law(fit: Fit, problem: _Problem, theta: Floats) -> None:
    n, d, _ = np.exp(problem.middle)
    law = fit.law
    effects = {
        "model size": float(law.loss(n, d) - law.loss(np.inf, d)),
        "tokens": float(law.loss(n, d) - law.loss(n, np.inf)),
    }
    for what, effect in effects.items():
        if effect / float(law.loss(n, d)) < LEAST_SHARE:
            raise UnidentifiedError(
                f"a law needs losses that {what} explain, in these runs it explains "
                f"{effect:.2g} of {float(law.loss(n, d)):.3g}; vary {what} more"
            )
    if ((theta[3:5] <= LOWEST[3:5]) | (theta[3:5] >= HIGHEST[3:5])).any():
        raise UnidentifiedError(
            f"a law needs exponents that the runs determine, the best ones are alpha "
            f"{law.alpha:.3g} and beta {law.beta:.3g} at the edge of what is tried; vary sizes and "
            "tokens more"
        )
    flops = float(np.exp(np.median(np.log(fit.points.flops))))
    _, low, high = fit.optimal_params(flops)
    if not high / low < MAX_OPTIMUM_RATIO:
        raise UnidentifiedError(
            f"a law needs runs that tell its optimum, these leave the model for {flops:.3g} FLOPs "
            f"open between {low:.3g} and {high:.3g} parameters; record more sizes and horizons"
        )


def described(fit: Fit, best: Optimum) -> dict[str, Any]:
    """The fit as JSON says it, with what it leaves open at a plan's optimum."""
    points = fit.points
    return {
        "form": fit.form,
        "coefficients": asdict(fit.law),
        "N": points.counts,
        "points": len(points),
        "runs": len(np.unique(points.run)),
        "starts": fit.starts,
        "objective": fit.objective,
        "median_error": float(np.median(np.abs(fit.residuals))),
        "ranges": {
            "n_params": [float(points.n_params.min()), float(points.n_params.max())],
            "n_tokens": [float(points.n_tokens.min()), float(points.n_tokens.max())],
            "flops": [float(points.flops.min()), float(points.flops.max())],
        },
        "loss": fit.predict(*best)._asdict(),
        "n_params": fit.optimal_params(best.flops)._asdict(),
        "extrapolation": fit.extrapolation(best),
    }
