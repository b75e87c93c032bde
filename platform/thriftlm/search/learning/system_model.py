"""What every system of a space would cost a token, calibrated by what trials measured.

The estimate of `thriftlm plan` is the prior. What measured throughput differs by is learned per
card, strategy, gang size, micro batch and kernel, and how it changes with the size of micro batch,
gang and model, by Bayesian regression. A verdict on memory, either way, moves the correction of the
memory estimate, since nobody knows beforehand how far an allocator fragments.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from thriftlm.planning.calibration import tokens_per_s
from thriftlm.planning.cases import Case, from_cases
from thriftlm.planning.constants import shipped
from thriftlm.planning.machine import Machine
from thriftlm.planning.memory import memory
from thriftlm.spec import SystemSpec
from thriftlm_models.counts import flops_per_token

Floats = NDArray[np.float64]

FIELD_SD: dict[tuple[str, ...], float] = {
    ("gpu",): 0.15,
    ("strategy",): 0.08,
    ("n_gpus",): 0.08,
    ("attention",): 0.08,
    ("micro_batch",): 0.05,
    ("act_ckpt",): 0.05,
    ("gpu", "strategy"): 0.08,
    ("gpu", "n_gpus"): 0.05,
}
"""Scales of log(measured / estimated) that fields, or pairs of them, have in common."""
COMMON_SD = 0.15
"""Of what all systems have in common."""
MICRO_BATCH_SD: dict[tuple[str, ...], float] = {(): 0.05, ("gpu",): 0.05, ("attention",): 0.05}
GANG_SD: dict[tuple[str, ...], float] = {("gpu",): 0.05, ("strategy",): 0.03}
SIZE_SD: dict[tuple[str, ...], float] = {(): 0.05, ("gpu",): 0.05}
"""Of how it changes per doubling of the micro batch, of the workers, and of the FLOPs of a token,
for all systems and for those that have a field in common."""
OWN_SD, NOISE_SD = 0.04, 0.03
"""Of a system alone, and of a measurement."""
MEMORY_MEAN, MEMORY_SD, MEMORY_WIDTH = 0.05, 0.15, 0.03
"""Log of true over estimated memory, and how blurred the cliff is."""
UNKNOWN_SD = 10.0


class Fact(NamedTuple):
    """What one system did with one shape."""

    shape: int
    system: int


@dataclass(frozen=True, eq=False)
class Costs:
    """Of one shape on every system (S,)."""

    log_tokens_per_s: Floats
    """Expected, of all GPUs together; -inf where the system cannot run the shape."""
    sd: Floats
    p_oom: Floats

    def usd_per_token(self, usd_per_hour: Floats) -> Floats:
        """Expected; infinite where the system cannot run the shape."""
        with np.errstate(over="ignore"):
            return np.asarray(usd_per_hour / 3600 * np.exp(-self.log_tokens_per_s))


class SystemModel:
    """Costs of shapes (model, batch, optimizer) on the systems of a space, learned over a prior."""

    def __init__(self, prior: "Prior") -> None:
        self.prior = prior
        self.measured: dict[Fact, float] = {}
        self.verdicts: dict[Fact, bool] = {}
        self._settle()

    def observe(self, fact: Fact, tokens_per_s_total: float | None, oom: bool) -> bool:
        """Take a measured throughput, or that memory ran out, into account; whether it is news."""
        news = self.verdicts.get(fact) != oom
        self.verdicts[fact] = oom
        if tokens_per_s_total is not None:
            news = news or fact not in self.measured
            self.measured[fact] = float(np.log(tokens_per_s_total))
        if not news:
            return False
        self._settle()
        return True

    @property
    def knows_speed(self) -> bool:
        """Whether anything is known of throughput here, measured or estimated."""
        return self.prior.is_known or bool(self.measured)

    def tokens_per_s(self) -> Floats:
        """Log of those expected of every shape on every system (K, S); see `Costs`."""
        log_speed = self.prior.log_speed + self.shift
        for fact, value in self.measured.items():
            log_speed[fact] = value
        return log_speed

    def all_p_oom(self) -> Floats:
        """Chances that memory runs out (K, S)."""
        p_oom = self.p_oom.copy()
        for fact, oom in self.verdicts.items():
            p_oom[fact] = float(oom)
        return p_oom

    def costs(self, shape: int) -> Costs:
        """Of one shape, by what is known."""
        log_speed, sd = self.prior.log_speed[shape] + self.shift[shape], self._sd(shape).copy()
        p_oom = self.p_oom[shape].copy()
        for fact, value in self.measured.items():
            if fact.shape == shape:
                log_speed[fact.system], sd[fact.system] = value, 0.0
        for fact, oom in self.verdicts.items():
            if fact.shape == shape:
                p_oom[fact.system] = float(oom)
        return Costs(log_speed, sd, p_oom)

    def _settle(self) -> None:
        self._learn_shift()
        self._learn_memory()

    def _learn_shift(self) -> None:
        """Posterior of what systems have in common beyond the estimate: Bayesian regression."""
        facts = [f for f in self.measured if np.isfinite(self.prior.log_speed[f])]
        gaps = np.array([self.measured[f] - self.prior.log_speed[f] for f in facts])
        rows, noise = self.prior.rows(facts), NOISE_SD**2 + OWN_SD**2
        precision = np.diag(1 / self.prior.variance) + rows.T @ rows / noise
        self.covariance = np.linalg.inv(precision)
        self.shift = self.prior.shift(self.covariance @ rows.T @ gaps / noise)
        self.spreads: dict[int, Floats] = {}

    def _sd(self, shape: int) -> Floats:
        if shape not in self.spreads:
            rows = self.prior.rows_of(shape)
            variance = ((rows @ self.covariance) * rows).sum(axis=1)
            self.spreads[shape] = np.sqrt(variance + OWN_SD**2)
        return self.spreads[shape]

    def _learn_memory(self) -> None:
        grid = MEMORY_MEAN + MEMORY_SD * np.linspace(-3, 3, 61)
        log_weight = -0.5 * np.linspace(-3, 3, 61) ** 2
        for fact, oom in self.verdicts.items():
            over = (self.prior.log_fill[fact.shape, fact.system] + grid) / MEMORY_WIDTH
            if np.isfinite(over).all():
                log_weight += np.log(expit(over if oom else -over) * 0.98 + 0.01)
        weight = np.exp(log_weight - log_weight.max())
        weight /= weight.sum()
        fill = self.prior.log_fill
        p_at = np.array([expit((edge + grid) / MEMORY_WIDTH) @ weight for edge in EDGES])
        self.p_oom = np.where(np.isnan(fill), 0.0, np.interp(fill, EDGES, p_at))


EDGES = np.linspace(-1.5, 1.5, 301)


@dataclass(frozen=True, eq=False)
class Prior:
    """What the shipped estimate says of every shape on every system."""

    log_speed: Floats
    """Of all GPUs together (shapes, systems); -inf where it cannot run."""
    log_fill: Floats
    """Log of estimated memory over what there is (shapes, systems); NaN where unknown."""
    design: Floats
    """Features of each system (systems, F1)."""
    by_size: Floats
    """Those that act in proportion to the size of a shape (systems, F2)."""
    size: Floats
    """Doublings of the FLOPs of a token over the middle of all shapes (shapes,)."""
    variance: Floats
    """Of what both kinds contribute (F1 + F2,)."""
    is_known: bool
    """Whether there is an estimate at all: not on a machine that nobody has measured."""

    @classmethod
    def of(
        cls,
        shapes: Sequence[Case],
        systems: Sequence[SystemSpec],
        runs_on: NDArray[np.bool_],
        machine: Machine | None,
    ) -> "Prior":
        """Estimates of all pairs.

        Args:
            shapes: a case of each shape, on any system.
            systems: all systems.
            runs_on: whether a shape can run on a system (shapes, systems).
            machine: what workers on a CPU run on.
        """
        pairs = np.argwhere(runs_on)
        cases = [shapes[i]._replace(system=systems[j]) for i, j in pairs.tolist()]
        rows = from_cases(cases, "thriftlm", machine)
        at = np.full(runs_on.shape, -1)
        at[tuple(pairs.T)] = np.arange(len(pairs))
        fill = np.full(runs_on.shape, np.nan)
        with np.errstate(invalid="ignore", divide="ignore"):
            fill[tuple(pairs.T)] = np.log(memory(rows).needed / rows.memory_bytes)
        design, variance = _features(systems, _plain(systems))
        by_size, more = _features(systems, [(np.ones(len(systems)), SIZE_SD)])
        speed = tokens_per_s(rows, shipped().constants) * rows.n_gpus
        is_known = bool(np.isfinite(speed).any())
        if not is_known:
            variance[0] = UNKNOWN_SD**2
        usual = float(np.median(speed[np.isfinite(speed)])) if is_known else 1.0
        by_row = np.log(np.where(np.isfinite(speed), speed, usual))
        log_speed = np.where(at >= 0, by_row[at], -np.inf)
        flops = [flops_per_token(shape.model, shape.seq_len) for shape in shapes]
        size = np.log2(flops) - np.median(np.log2(flops))
        variance = np.concatenate([variance, more])
        return cls(log_speed, fill, design, by_size, size, variance, is_known)

    def rows_of(self, shape: int) -> Floats:
        """Features of a shape on every system (S, F1 + F2)."""
        return np.column_stack([self.design, self.size[shape] * self.by_size])

    def rows(self, facts: Sequence[Fact]) -> Floats:
        """Features of some pairs (P, F1 + F2)."""
        shapes, systems = np.array(facts, np.intp).reshape(-1, 2).T
        return np.column_stack(
            [self.design[systems], self.size[shapes, None] * self.by_size[systems]]
        )

    def shift(self, weights: Floats) -> Floats:
        """What features contribute to every pair (K, S)."""
        plain, slopes = np.split(weights, [self.design.shape[1]])
        return np.asarray(self.design @ plain + np.outer(self.size, self.by_size @ slopes))


Feature = tuple[Floats, Mapping[tuple[str, ...], float]]
"""Values (systems,), and by which fields systems share their effect, with its scale."""


def _plain(systems: Sequence[SystemSpec]) -> list[Feature]:
    micro_batches, workers = (
        np.log2([getattr(one, name) for one in systems]) for name in ("micro_batch", "n_gpus")
    )
    common = {(): COMMON_SD} | FIELD_SD
    return [
        (np.ones(len(systems)), common),
        (micro_batches - micro_batches.mean(), MICRO_BATCH_SD),
        (workers - workers.mean(), GANG_SD),
    ]


def _features(systems: Sequence[SystemSpec], given: Sequence[Feature]) -> tuple[Floats, Floats]:
    """Columns (systems, F), the first of the first feature first, and their variances (F,)."""
    columns, variance = [], []
    for values, shared in given:
        for fields, sd in shared.items():
            keys = [tuple(getattr(one, field) for field in fields) for one in systems]
            for key in dict.fromkeys(keys):
                columns.append(values * np.array([float(other == key) for other in keys]))
                variance.append(sd**2)
    return np.column_stack(columns), np.array(variance)
