"""Memory, throughput and dollars of training a model on a system, before anything is rented."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from thriftlm import prices
from thriftlm.planning.cases import Case, from_cases
from thriftlm.planning.constants import Calibration, shipped
from thriftlm.planning.intervals import CLASSES, interval_classes, log_sd_of
from thriftlm.planning.machine import Machine
from thriftlm.planning.memory import Memory, memory
from thriftlm.planning.seconds import Seconds, seconds
from thriftlm.planning.systems import (
    FP8_CAPABILITY,
    Cells,
    Floats,
    Systems,
    distinct,
    from_table,
)
from thriftlm.spec import RunSpec, SystemSpec
from thriftlm_models.config import ModelSpec
from thriftlm_models.counts import FLOP_FORMULA

Stack = Literal["eager", "fused", "compiled", "native", "thriftlm"]
Optimizer = Literal["adamw", "adamw_8bit", "muon", "sgd"]
GB = 1e9
Z_80 = 1.2816
"""Standard normal deviate of an 80% interval."""
PLACE = (
    "gpu",
    "n_gpus",
    "gpus_per_node",
    "cpus_per_worker",
    "cloud",
    "region",
    "market",
    "billing",
)
"""Columns that a price depends on."""


class Offer(NamedTuple):
    """What a system is paid for."""

    usd_per_hour: float
    """Of everything billed; NaN where the cloud has no such thing."""
    instance: str
    as_of: str
    """Date of the price."""


@dataclass(frozen=True)
class Estimate:
    """What one system is expected to do. Nothing in it is measured; what is unknown is None."""

    tokens_per_s_per_gpu: float | None
    low: float | None
    """End of the 80% interval of tokens/s."""
    high: float | None
    mfu: float | None
    """Share of the dense bf16 peak, by the formula `6N+attn`; on a CPU that is slower in bf16, of
    its fp32 peak."""
    peak_mem_gb: float | None
    """What torch allocates at most, in 1e9 bytes; on a CPU the whole process."""
    fits: bool | None
    reason: str
    """Why it does not fit or is not known; empty where it fits and its speed is known."""
    usd_per_btok: float | None
    """USD per 1e9 training tokens, idle GPUs of whole nodes included."""
    instance: str | None
    price_as_of: str | None
    """Date of the price, to the month where its source says no more."""
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
    price_as_of: NDArray[np.str_]
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
            return "this machine is not measured yet: `thriftlm doctor` does"
        if not self.fits[i]:
            return f"needs {_short(needs)} GB of {_short(has)}"
        if self.systems.fp8[i] and not self.systems.capability[i] >= FP8_CAPABILITY:
            return "this GPU has no fp8 arithmetic"
        return "no bf16 peak is known" if np.isnan(self.tokens_per_s_per_gpu[i]) else ""

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
            price_as_of=str(self.price_as_of[i]) or None,
            interval_class=str(self.interval_class[i]),
            seconds=_parts(self.seconds, i, 1.0),
            memory_gb=_parts(self.memory, i, GB),
        )


def _known(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _short(gigabytes: float) -> str:
    return f"{gigabytes:.0f}" if gigabytes >= 10 else f"{gigabytes:.1f}"


def _parts(record: Seconds | Memory, i: int, unit: float) -> dict[str, float]:
    return {field.name: float(getattr(record, field.name)[i] / unit) for field in fields(record)}


def estimate(
    model: ModelSpec,
    system: SystemSpec,
    seq_len: int,
    batch_tokens: int,
    *,
    stack: Stack = "thriftlm",
    optimizer: Optimizer = "adamw",
    machine: Machine | None = None,
    calibration: Calibration | None = None,
) -> Estimate:
    """What a system is expected to do with a model: memory, tokens/s, USD per billion tokens.

    `machine` is what `thriftlm doctor` measured; without it nothing is known of gpu `cpu`.
    """
    case = Case(model, system, seq_len, batch_tokens, optimizer)
    return estimate_cases([case], stack, machine, calibration)[0]


def estimate_runs(
    runs: Sequence[RunSpec],
    machine: Machine | None = None,
    calibration: Calibration | None = None,
) -> Estimates:
    """Estimates of runs by our own training core."""
    return estimate_cases([case_of(run) for run in runs], "thriftlm", machine, calibration)


def case_of(run: RunSpec) -> Case:
    """What of a run decides its speed and memory."""
    optim = run.optim
    return Case(run.model, run.system, run.data.seq_len, optim.batch_tokens, optim.optimizer)


def estimate_cases(
    cases: Sequence[Case],
    stack: Stack = "thriftlm",
    machine: Machine | None = None,
    calibration: Calibration | None = None,
) -> Estimates:
    """Estimates of models on systems, all trained by one stack."""
    systems = from_cases(cases, stack, machine)
    offers = {system: offer(system) for system in {case.system for case in cases}}
    listed = [offers[case.system] for case in cases]
    return _estimates(systems, listed, np.arange(len(cases)), calibration or shipped())


def memory_fractions(runs: Sequence[RunSpec], machine: Machine | None = None) -> Floats:
    """Share of a GPU's memory that each run needs (N,), by our own core; NaN where unknown."""
    systems = from_cases([case_of(run) for run in runs], "thriftlm", machine)
    return memory(systems).needed / systems.memory_bytes


def estimate_table(
    table: Mapping[str, Cells],
    calibration: Calibration | None = None,
    machine: Machine | None = None,
) -> Estimates:
    """Estimates of a table's rows, columns as in the design's section 6; `cloud` defaults to aws.

    Raises:
        InputError: unknown GPU, word, cloud or market; names it.
    """
    systems = from_table(table, machine)
    offers, which = _offers(table, len(systems))
    return _estimates(systems, offers, which, calibration or shipped())


def _estimates(
    systems: Systems, offers: Sequence[Offer], which: Any, calibration: Calibration
) -> Estimates:
    spent, held = seconds(systems, calibration.constants), memory(systems)
    speed = systems.tokens * systems.grad_accum / spent.step
    names = interval_classes(systems)
    spread = np.exp(Z_80 * log_sd_of(names, calibration.log_sd))
    usd_per_hour = np.array([offer.usd_per_hour for offer in offers])[which]
    fits = np.where(held.needed <= systems.memory_bytes, 1.0, 0.0)
    unknown = np.isnan(systems.memory_bytes) | np.isnan(held.needed)
    bf16, fp32 = systems.peak_flops, systems.fp32_peak_flops
    fastest = np.where(systems.on_cpu > 0, np.fmax(bf16, fp32), bf16)
    return Estimates(
        tokens_per_s_per_gpu=speed,
        low=speed / spread,
        high=speed * spread,
        mfu=speed * systems.flops_per_token / fastest,
        peak_mem_gb=np.where(systems.on_cpu > 0, held.needed, held.peak) / GB,
        fits=np.where(unknown, np.nan, fits),
        usd_per_btok=usd_per_hour * 1e9 / (3600 * speed * systems.n_gpus),
        instance=np.array([offer.instance for offer in offers])[which],
        price_as_of=np.array([offer.as_of for offer in offers])[which],
        interval_class=np.array(CLASSES)[names],
        systems=systems,
        seconds=spent,
        memory=held,
    )


# --- dollars ------------------------------------------------------------------------------------


def offer(system: SystemSpec) -> Offer:
    """The price of a system.

    Raises:
        InputError: unknown cloud, or a wrong file of prices.
    """
    try:
        found = prices.price(system)
    except prices.NoOfferError as error:
        if str(error).startswith("unknown"):
            raise
        return Offer(float("nan"), "", "")
    return Offer(prices.usd_per_hour(system), found.instance, found.as_of)


def _offers(table: Mapping[str, Cells], n: int) -> tuple[list[Offer], Any]:
    """Offers of the distinct places of a table's rows, and which of them each row has."""
    columns = [table[name] if name in table else [""] * n for name in PLACE]
    places, which = distinct(list(zip(*columns, strict=True)))
    return [offer(_place(*map(str, place))) for place in places], which


def _place(gpu: str, n_gpus: str, per_node: str, threads: str, *where: str) -> SystemSpec:
    count = int(float(n_gpus or 1))
    given = dict(zip(PLACE[4:], where, strict=True))
    return SystemSpec(
        gpu=gpu,
        n_gpus=count,
        gpus_per_node=int(float(per_node)) if per_node else None,
        cpus_per_worker=int(float(threads or 1)),
        strategy="ddp" if count > 1 else "single",
        **{key: value for key, value in given.items() if value},
    )
