"""Scaling laws: loss over parameters and tokens, and what follows from it in closed form.

`L(N, D) = (A / N^alpha + B / D^beta)^k + E`. With k = 1 it is the law of Hoffmann et al. (arXiv
2203.15556, approach 3); a free k is Skaling (arXiv 2608.07222), whose coefficients are not
published here: fit them, or give a file. Compute is `C = 6 N D` throughout, as in H. de Vries, "Go
smol or go home" (2023). The outer k changes no optimum and no overhead, since `x^k + E` is
monotone.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import yaml
from numpy.typing import ArrayLike, NDArray

from thriftlm.spec import InputError

Floats = NDArray[np.float64]
Counts = Literal["all", "non_embedding"]

PLANNING_LAW = "harm"
"""Default of `thriftlm plan`: reproduces every number of de Vries' analysis."""
PREDICTION_LAW = "epoch"
"""Default where a loss is predicted: the one fit of Chinchilla's data that its authors' data
support (arXiv 2404.10102). The prior of `planning.law` has its exponents."""
FLOPS_PER_PARAM_TOKEN = 6.0
"""Of training, forward and backward; 2 of them are the forward pass, which serving pays."""
INFERENCE_SHARE = 1 / 3
"""FLOPs of a served token over those of a trained one: 2 N / 6 N (arXiv 2401.00448)."""
CRITICAL_OVERHEAD = 1.0
"""Compute overhead at the critical model size: twice the compute (de Vries: about 30% of N_opt)."""
REPETITION_DECAY = 15.39
"""R of arXiv 2305.16264: how many repetitions of a data set count before they wear out."""
PRECISION_GAMMA = {"weights": 2.6745, "activations": 2.2102, "kv": 0.9578}
"""Bits at which a part has lost 1/e of its parameters' worth (arXiv 2411.04330)."""


class BelowFloorError(InputError):
    """A model that no number of tokens brings to the loss."""


class Optimum(NamedTuple):
    """A model and its tokens."""

    n_params: float
    n_tokens: float

    @property
    def flops(self) -> float:
        """`6 N D`."""
        return FLOPS_PER_PARAM_TOKEN * self.n_params * self.n_tokens


@dataclass(frozen=True)
class LossLaw:
    """Coefficients of `(A / N^alpha + B / D^beta)^k + E`; D in tokens."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    k: float = 1.0
    """Outer exponent; 1 is Chinchilla's form."""

    def loss(self, n_params: ArrayLike, n_tokens: ArrayLike) -> Floats:
        """Loss in the unit of the law, broadcast over both arguments."""
        n, d = np.asarray(n_params, np.float64), np.asarray(n_tokens, np.float64)
        reducible = self.A / n**self.alpha + self.B / d**self.beta
        return np.asarray(reducible**self.k + self.E)

    def optimum(self, flops: float) -> Optimum:
        """The model and tokens of lowest loss at a compute `6 N D`.

        N = G (C/6)^(beta/(alpha+beta)), G = (alpha A / (beta B))^(1/(alpha+beta)); D = C / (6 N).
        """
        product, total = flops / FLOPS_PER_PARAM_TOKEN, self.alpha + self.beta
        n = (self.alpha * self.A / (self.beta * self.B)) ** (1 / total)
        n *= product ** (self.beta / total)
        return Optimum(n, product / n)

    def optimum_of(self, n_params: float) -> Optimum:
        """The optimum whose model has so many parameters."""
        worth = self.beta * self.B / (self.alpha * self.A) * n_params**self.alpha
        return Optimum(n_params, worth ** (1 / self.beta))

    def optimum_at(self, loss: float) -> Optimum:
        """The optimum that reaches a loss with the least compute.

        Raises:
            BelowFloorError: the loss is not above E.
        """
        share = self._reducible(loss) / (1 + self.alpha / self.beta)
        return self.optimum_of((self.A / share) ** (1 / self.alpha))

    def tokens_to(self, loss: float, n_params: float) -> float:
        """Tokens with which a model reaches a loss; infinite where no number does.

        Raises:
            BelowFloorError: the loss is not above E.
        """
        left = self._reducible(loss) - self.A * n_params**-self.alpha
        return float((self.B / left) ** (1 / self.beta)) if left > 0 else math.inf

    def _reducible(self, loss: float) -> float:
        """`A / N^alpha + B / D^beta` at a loss."""
        if loss <= self.E:
            raise BelowFloorError(
                f"a loss must be above the law's floor E = {self.E:.6g}, got {loss:.6g}: no model "
                "and no data reach it; ask for more"
            )
        return float((loss - self.E) ** (1 / self.k))

    # --- smaller than optimal, at the optimum's loss --------------------------------------------

    @property
    def k_min(self) -> float:
        """Share of the optimal size below which no data reach its loss: (1+alpha/beta)^(-1/alpha).

        Where `data_factor` has its pole.
        """
        return float((1 + self.alpha / self.beta) ** (-1 / self.alpha))

    def data_factor(self, k_n: float) -> float:
        """Tokens over the optimum's, of a model `k_n` times its size that reaches its loss.

        `k_D = (1 - (k_N^-alpha - 1) beta / alpha)^(-1/beta)`: de Vries' formula, in which A, B and
        C cancel at the optimum.

        Raises:
            BelowFloorError: `k_n` is not above `k_min`.
        """
        left = self._left(k_n)
        if not left > 0:
            raise BelowFloorError(
                f"k_n must be above {self.k_min:.4f}, the smallest share of the optimal size that "
                f"any data bring to its loss, got {k_n:g}; take a larger model"
            )
        return float(left ** (-1 / self.beta))

    def overhead(self, k_n: float) -> float:
        """Compute over the optimum's minus 1: `k_N k_D - 1`.

        Raises:
            BelowFloorError: `k_n` is not above `k_min`.
        """
        return k_n * self.data_factor(k_n) - 1

    def _left(self, k_n: float) -> float:
        """What of the optimum's reducible loss is left to data, as a share of data's part there."""
        if k_n <= 0:
            return -math.inf
        return float(1 - (k_n**-self.alpha - 1) * self.beta / self.alpha)

    @property
    def critical_k(self) -> float:
        """Share of the optimal size at which the same loss takes twice the compute."""
        return bisected(lambda k: CRITICAL_OVERHEAD - self.overhead(k), self.k_min, 1.0)

    def demand_at(self, k_n: float) -> float:
        """Served tokens, over the optimum's training tokens, at which `k_n` costs least.

        Sardana et al. (arXiv 2401.00448) minimise `6 N D + 2 N D_inf` at a loss. With r = D_inf /
        D_opt the cost is `k_N (k_D + r/3)`, and its stationary point has the explicit inverse
        `r = 3 k_D (k_N^-alpha / u - 1)`, u = 1 - (k_N^-alpha - 1) beta / alpha.

        Raises:
            BelowFloorError: `k_n` is not above `k_min`.
        """
        return float(
            self.data_factor(k_n) * (k_n**-self.alpha / self._left(k_n) - 1) / INFERENCE_SHARE
        )

    def scale_for_demand(self, ratio: float) -> float:
        """Share of the optimal size that costs least when `ratio` times D_opt is served."""
        if ratio <= 0:
            return 1.0
        return bisected(lambda k: ratio - self.demand_at(k), self.k_min, 1.0)


def bisected(rises: Callable[[float], float], low: float, high: float) -> float:
    """Where a rising function changes sign between two bounds, whose lower one may be a pole."""
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (low, middle) if rises(middle) > 0 else (middle, high)
    return high


# --- corrections --------------------------------------------------------------------------------


def effective_tokens(n_tokens: float, unique_tokens: float | None) -> float:
    """Tokens of fresh data that `n_tokens` are worth when only `unique_tokens` exist.

    `U + U R (1 - exp(-(D/U - 1) / R))` with R = 15.39 (Muennighoff et al., arXiv 2305.16264, for
    D > U): four epochs count 93%, and no number of them counts more than 16.39 U.
    """
    if unique_tokens is None or n_tokens <= unique_tokens:
        return n_tokens
    repetitions = n_tokens / unique_tokens - 1
    worth = REPETITION_DECAY * -np.expm1(-repetitions / REPETITION_DECAY)
    return float(unique_tokens * (1 + worth))


def tokens_worth(effective: float, unique_tokens: float | None) -> float:
    """Inverse of `effective_tokens`; infinite beyond the ceiling of repetition."""
    if unique_tokens is None or effective <= unique_tokens:
        return effective
    worn = (effective / unique_tokens - 1) / REPETITION_DECAY
    return unique_tokens * (1 - REPETITION_DECAY * math.log1p(-worn)) if worn < 1 else math.inf


def effective_params(
    n_params: float, *, weights: float = 16, activations: float = 16, kv: float = 16
) -> float:
    """Parameters that a model trained at these bits is worth.

    `N prod(1 - exp(-P / gamma))` over weights, activations and KV cache (Kumar et al., arXiv
    2411.04330).
    """
    bits = {"weights": weights, "activations": activations, "kv": kv}
    return n_params * math.prod(-math.expm1(-bits[p] / g) for p, g in PRECISION_GAMMA.items())


# --- laws as data -------------------------------------------------------------------------------


class NamedLaw(NamedTuple):
    """A law with where it comes from and what it counts."""

    name: str
    law: LossLaw
    counts: Counts
    source: str

    def described(self) -> dict[str, Any]:
        """As JSON says it."""
        return {"name": self.name, **asdict(self.law), "N": self.counts, "source": self.source}


@cache
def published() -> dict[str, NamedLaw]:
    """The laws of `data/laws.yaml` by name."""
    text = files("thriftlm").joinpath("data", "laws.yaml").read_text(encoding="utf-8")
    return {name: _read(name, given) for name, given in yaml.safe_load(text).items()}


def law_named(name: str) -> NamedLaw:
    """A published law, or the one in a YAML file of your own.

    Raises:
        InputError: no such law or file, or the file holds no law.
    """
    if name.endswith((".yaml", ".yml")):
        return _from_file(Path(name))
    if name not in published():
        raise InputError(
            f"unknown law '{name}'; known: {', '.join(published())}, or a file NAME.yaml with "
            "E, A, B, alpha, beta and, for Skaling's form, k"
        )
    return published()[name]


def _from_file(path: Path) -> NamedLaw:
    from thriftlm.config_file import ConfigFile

    return _read(path.stem, ConfigFile.read(path).data)


def _read(name: str, given: Mapping[str, Any]) -> NamedLaw:
    names = [field.name for field in fields(LossLaw)]
    found = {key: given.get(key, 1.0 if key == "k" else None) for key in names}
    bad = [key for key, value in found.items() if not _is_coefficient(key, value)]
    if bad or given.get("counts", "all") not in ("all", "non_embedding"):
        said = {key: given.get(key) for key in bad or ("counts",)}
        raise InputError(
            f"law {name}: E must be at least 0 and {', '.join(names[1:])} above 0, counts all or "
            f"non_embedding, got {said}"
        )
    coefficients = {key: float(value) for key, value in found.items() if value is not None}
    return NamedLaw(
        name, LossLaw(**coefficients), given.get("counts", "all"), str(given.get("source", name))
    )


def _is_coefficient(key: str, value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and (value > 0 or (key == "E" and value == 0))
