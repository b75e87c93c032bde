"""Memory, throughput and dollars of training a model on a system, before anything is rented."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from thriftlm import prices
from thriftlm.planning.constants import Calibration, shipped
from thriftlm.planning.memory import Memory, memory
from thriftlm.planning.seconds import Seconds, is_hopper, seconds
from thriftlm.planning.systems import (
    FLOP_FORMULA,
    KERNELS,
    STACKS,
    Cells,
    Floats,
    Systems,
    distinct,
    from_specs,
    from_table,
)
from thriftlm.spec import SystemSpec
from thriftlm_models.config import ModelSpec

Stack = Literal["eager", "fused", "compiled", "native", "thriftlm"]
GB = 1e9
Z_80 = 1.2816
"""Standard normal deviate of an 80% interval."""
PLACE = ("gpu", "n_gpus", "gpus_per_node", "cloud", "region", "market", "billing")
"""Columns that a price depends on."""


@dataclass(frozen=True)
class Estimate:
    """What one system is expected to do. Nothing in it is measured; what is unknown is None."""

    tokens_per_s_per_gpu: float | None
    low: float | None
    """End of the 80% interval of tokens/s."""
    high: float | None
    mfu: float | None
    """Share of the dense bf16 peak, by the formula `6N+attn`."""
    peak_mem_gb: float | None
    """What torch allocates at most, in 1e9 bytes."""
    fits: bool | None
    reason: str
    """Why it does not fit or is not known; empty where it fits and its speed is known."""
    usd_per_btok: float | None
    """USD per 1e9 training tokens, idle GPUs of whole nodes included."""
    instance: str | None
    interval_class: str
    """Which error the interval has: see `Calibration.log_sd`."""
    seconds: Mapping[str, float]
    """Of one optimizer step, by part."""
    memory_gb: Mapping[str, float]
    """By part, with what torch does not see."""
    mfu_formula: str = FLOP_FORMULA
    basis: Literal["estimated"] = "estimated"


@dataclass(frozen=True, eq=False)
class Estimates:
    """Estimates of many systems: arrays of equal length (N,), NaN where unknown."""

    tokens_per_s_per_gpu: Floats
    low: Floats
    high: Floats
    mfu: Floats
    peak_mem_gb: Floats
    fits: Floats
    """1, 0, or NaN where the GPU's memory is unknown."""
    usd_per_btok: Floats
    instance: NDArray[np.str_]
    interval_class: NDArray[np.str_]
    systems: Systems
    seconds: Seconds
    memory: Memory

    def __len__(self) -> int:
        return len(self.fits)

    def reason(self, i: int) -> str:
        """Why entry i does not fit or is not known; empty where it fits and its speed is known."""
        needs, has = self.memory.needed[i] / GB, self.systems.memory_bytes[i] / GB
        if np.isnan(needs):
            return "the model's shape is not known"
        if np.isnan(has):
            return "the machine's memory is not known"
        if not self.fits[i]:
            return f"needs {needs:.0f} GB of {has:.0f}"
        return "no bf16 peak is known" if np.isnan(self.systems.peak_flops[i]) else ""

    def __getitem__(self, i: int) -> Estimate:
        return Estimate(
            tokens_per_s_per_gpu=_known(self.tokens_per_s_per_gpu[i]),
            low=_known(self.low[i]),
            high=_known(self.high[i]),
            mfu=_known(self.mfu[i]),
            peak_mem_gb=_known(self.peak_mem_gb[i]),
            fits=None if np.isnan(self.fits[i]) else bool(self.fits[i]),
            reason=self.reason(i),
            usd_per_btok=_known(self.usd_per_btok[i]),
            instance=str(self.instance[i]) or None,
            interval_class=str(self.interval_class[i]),
            seconds=_parts(self.seconds, i, 1.0),
            memory_gb=_parts(self.memory, i, GB),
        )


def _known(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _parts(record: Seconds | Memory, i: int, unit: float) -> dict[str, float]:
    return {field.name: float(getattr(record, field.name)[i] / unit) for field in fields(record)}


def estimate(
    model: ModelSpec,
    system: SystemSpec,
    seq_len: int,
    batch_tokens: int,
    *,
    stack: Stack = "thriftlm",
    calibration: Calibration | None = None,
) -> Estimate:
    """What a system is expected to do with a model: memory, tokens/s, USD per billion tokens."""
    return estimate_specs(
        [(model, system)], seq_len, batch_tokens, stack=stack, calibration=calibration
    )[0]


def estimate_specs(
    pairs: Sequence[tuple[ModelSpec, SystemSpec]],
    seq_len: int,
    batch_tokens: int,
    *,
    stack: Stack = "thriftlm",
    calibration: Calibration | None = None,
) -> Estimates:
    """Estimates of models on systems that share sequence length, batch and software."""
    systems = from_specs(pairs, seq_len, batch_tokens, stack)
    offers = [offer(system) for _, system in pairs]
    return _estimates(systems, offers, np.arange(len(pairs)), calibration or shipped())


def estimate_table(table: Mapping[str, Cells], calibration: Calibration | None = None) -> Estimates:
    """Estimates of a table's rows, columns as in the design's section 6; `cloud` defaults to aws.

    Raises:
        InputError: unknown GPU, word, cloud or market; names it.
    """
    systems = from_table(table)
    offers, which = _offers(table, len(systems))
    return _estimates(systems, offers, which, calibration or shipped())


def _estimates(
    systems: Systems, offers: Sequence[tuple[float, str]], which: Any, calibration: Calibration
) -> Estimates:
    spent, held = seconds(systems, calibration.constants), memory(systems)
    speed = systems.tokens * systems.grad_accum / spent.step
    names = interval_classes(systems)
    spread = np.exp(Z_80 * _look_up(names, calibration.log_sd))
    usd_per_hour = np.array([usd for usd, _ in offers])[which]
    fits = np.where(held.needed <= systems.memory_bytes, 1.0, 0.0)
    unknown = np.isnan(systems.memory_bytes) | np.isnan(held.needed)
    return Estimates(
        tokens_per_s_per_gpu=speed,
        low=speed / spread,
        high=speed * spread,
        mfu=speed * systems.flops_per_token / systems.peak_flops,
        peak_mem_gb=held.peak / GB,
        fits=np.where(unknown, np.nan, fits),
        usd_per_btok=usd_per_hour * 1e9 / (3600 * speed * systems.n_gpus),
        instance=np.array([instance for _, instance in offers])[which],
        interval_class=np.array(CLASSES)[names],
        systems=systems,
        seconds=spent,
        memory=held,
    )


CLASSES = ("new_source", "unmeasured_stack", "consumer_card", "plain_eager")
"""Classes of estimates by how wrong they tend to be, the worst last."""


def interval_classes(s: Systems) -> NDArray[np.int64]:
    """Positions in `CLASSES`: the worst that applies to each system."""
    eager = s.stack == STACKS.index("eager")
    math = s.kernel == KERNELS.index("math")
    loose = (s.has_nvlink == 0) | ((s.capability != 8.0) & (is_hopper(s) == 0))
    found = np.where(s.stack >= STACKS.index("native"), 1, 0)
    found = np.where(loose, 2, found)
    return np.where(eager & ((s.gated > 0) | math), 3, found)


def _look_up(names: NDArray[np.int64], log_sd: Mapping[str, float]) -> Floats:
    return np.array([log_sd[name] for name in CLASSES])[names]


# --- dollars ------------------------------------------------------------------------------------


def offer(system: SystemSpec) -> tuple[float, str]:
    """USD per hour of everything billed and the instance; NaN where that cloud has none.

    Raises:
        InputError: unknown cloud, or a wrong file of prices.
    """
    try:
        return prices.usd_per_hour(system), prices.price(system).instance
    except prices.NoOfferError as error:
        if str(error).startswith("unknown"):
            raise
        return float("nan"), ""


def _offers(table: Mapping[str, Cells], n: int) -> tuple[list[tuple[float, str]], Any]:
    """Offers of the distinct places of a table's rows, and which of them each row has."""
    columns = [table[name] if name in table else [""] * n for name in PLACE]
    places, which = distinct(list(zip(*columns, strict=True)))
    return [offer(_place(*map(str, place))) for place in places], which


def _place(
    gpu: str, n_gpus: str, per_node: str, cloud: str, region: str, market: str, billing: str
) -> SystemSpec:
    count = int(float(n_gpus or 1))
    given = {"cloud": cloud, "region": region, "market": market, "billing": billing}
    return SystemSpec(
        gpu=gpu,
        n_gpus=count,
        gpus_per_node=int(float(per_node)) if per_node else None,
        strategy="ddp" if count > 1 else "single",
        **{key: value for key, value in given.items() if value},
    )
