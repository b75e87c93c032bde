"""Grids of systems for one model, estimated and ranked: what `--best` and `plan` choose from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from thriftlm import catalog
from thriftlm.planning.cases import model_columns
from thriftlm.planning.constants import Calibration
from thriftlm.planning.estimate import Estimates, estimate_table
from thriftlm.planning.machine import Machine
from thriftlm.planning.systems import STRATEGIES
from thriftlm.spec import InputError
from thriftlm_models import kernels
from thriftlm_models.config import ModelSpec

BEST_STRATEGIES = ("ddp", "fsdp_full", "fsdp_grad_op", "zero1", "zero2", "zero3")
BEST_MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
"""What `--best` tries where a strategy or micro batch is not given."""
Row = dict[str, Any]
Rank = tuple[int, float, float]


@dataclass(frozen=True)
class Grid:
    """Systems to estimate: every combination of the lists; an empty list takes its default."""

    gpus: Sequence[str]
    n_gpus: Sequence[int]
    strategies: Sequence[str]
    micro_batches: Sequence[int]
    attentions: Sequence[str]
    checkpointings: Sequence[str]
    stacks: Sequence[str]
    optimizer: str
    precision: str
    seq_len: int
    batch_tokens: int
    place: Mapping[str, Any]
    """What holds for all: cloud, market, billing, gpus_per_node, cpus_per_worker, compiled and
    cpu_offload, where given."""

    def systems(self, best: bool) -> list[Row]:
        """One row of columns per system.

        Raises:
            InputError: unknown GPU, or `single` asked of several GPUs.
        """
        batches = self.micro_batches or (BEST_MICRO_BATCHES if best else (8,))
        names = [catalog.gpu(name).id for name in self.gpus]
        return [
            {
                "gpu": gpu,
                "n_gpus": n,
                "strategy": strategy,
                "micro_batch": micro_batch,
                "attention": attention,
                "act_ckpt": act_ckpt,
                "stack": stack,
                "optimizer": self.optimizer,
                "precision": self.precision,
                "grad_accum": max(1, round(self.batch_tokens / (micro_batch * n * self.seq_len))),
                **self.place,
            }
            for gpu, n in product(names, self.n_gpus)
            for strategy, micro_batch in product(self._strategies(n, best), batches)
            for attention, act_ckpt, stack in product(
                self.attentions or ("flash",), self.checkpointings or ("none",), self.stacks
            )
        ]

    def _strategies(self, n_gpus: int, best: bool) -> Sequence[str]:
        if n_gpus == 1 and "cpu_offload" not in self.place:
            return ("single",)
        several = [name for name in self.strategies if name != "single"]
        if self.strategies and not several:
            raise InputError(
                f"strategy single runs on one GPU, --gpus is {n_gpus}; choose one of "
                + ", ".join(STRATEGIES[1:])
            )
        return several or (BEST_STRATEGIES if best else ("fsdp_full",))


def estimate_systems(
    model: ModelSpec,
    seq_len: int,
    systems: Sequence[Row],
    calibration: Calibration | None = None,
    machine: Machine | None = None,
) -> Estimates:
    """Estimates of one model on the systems of a grid."""
    shape = model_columns(model, seq_len)
    columns = {key: [value] * len(systems) for key, value in shape.items()}
    columns |= {key: [row[key] for row in systems] for key in systems[0]}
    return estimate_table(columns, calibration, machine)


def kernel_refusal(model: ModelSpec, row: Row, precision: str) -> str:
    """Why our own core could not run the row's attention kernel on its GPU; empty where it can."""
    name = row["attention"]
    if row["stack"] != "thriftlm" or name not in kernels.REQUIREMENTS:
        return ""
    target = catalog.attention_target(row["gpu"], precision)
    windowed = "sliding" in model.block_attention
    reason = kernels.why_not(name, target, model.head_dim, windowed)
    return f"{name}: {reason}" if reason else ""


def rank(fits: bool | None, usd_per_btok: float | None, tokens_per_s: float | None) -> Rank:
    """Order of `--best`: what fits, then USD per token, then speed; the unknown after the known."""
    place = {True: 0, None: 1, False: 2}[fits]
    never = float("inf")
    price = never if usd_per_btok is None else usd_per_btok
    return place, price, never if tokens_per_s is None else -tokens_per_s
