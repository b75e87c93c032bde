"""A model and its optimizer under one strategy: the only place that knows how they are spread.

The order of `build_engine` is the lesson: build, initialise, spread, then make the optimizer over
what each rank holds. Every strategy starts from the same weights, so that all of them give the
losses of the single process.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from thriftlm.spec import InputError, RunSpec
from thriftlm.training.engine_state import State, load_torch_state, torch_state
from thriftlm.training.optimizer import optimizers, set_lr
from thriftlm.training.ranks import Ranks, needs_group
from thriftlm.training.sharding import spread
from thriftlm_models.attention import check_kernel
from thriftlm_models.decoder import Decoder
from thriftlm_models.documents import Packing


class Engine(Protocol):
    """What the training loop asks of a strategy."""

    def loss(self, batch: Tensor) -> Tensor:
        """Mean loss of sequences (B, T+1): the first T tokens predict the last T."""

    def accumulate(self, batch: Tensor, *, last: bool) -> Tensor:
        """The loss of one micro-batch of a step, its gradient added; `last` closes the step."""

    def step(self, lr: float) -> float:
        """Clip, update, clear the gradients; the global gradient norm before clipping.

        Where the norm is not finite, weights and optimizer state stay as they are.
        """

    def evaluating(self) -> AbstractContextManager[None]:
        """A context without gradients."""

    def state(self) -> State:
        """This rank's part of parameters and optimizer, to write; all ranks call it."""

    def load(self, folder: Path) -> None:
        """Read a checkpoint, whatever strategy wrote it; all ranks call it."""


def check_attention(spec: RunSpec, device: torch.device) -> None:
    """Nothing, once the run's attention kernel ran on this device.

    Raises:
        InputError: it cannot run; lists those that can.
    """
    dtype = torch.float32 if spec.system.precision == "fp32" else torch.bfloat16
    try:
        check_kernel(spec.system.attention, device.type, dtype, spec.model, spec.data.document_mask)
    except ValueError as error:
        raise InputError(f"system.attention: {error}") from error


def build_engine(spec: RunSpec, ranks: Ranks, packing: Packing | None = None) -> Engine:
    """The engine of the run's strategy, with freshly initialised weights.

    One worker has nobody to share with: whatever its strategy is called, it trains as `single`,
    unless the strategy is to keep what it shards in host memory.
    """
    model = Decoder(spec.model, spec.system.attention, packing)
    model.init_weights(spec.seed)
    if spec.system.precision == "bf16_true":
        model.bfloat16()
    model.to(ranks.device)
    model.set_execution(spec.system.act_ckpt, spec.system.compile)
    if not needs_group(spec.system, ranks.world_size):
        return TorchEngine(model, spec, ranks)
    if spec.system.strategy.startswith("zero"):
        from thriftlm.training.zero import ZeroEngine  # imports deepspeed: seconds

        return ZeroEngine(model, spec, ranks)
    return TorchEngine(spread(model, spec, ranks), spec, ranks)


class TorchEngine:
    """`single`, DDP and FSDP2, with torch's own optimizers."""

    def __init__(self, module: nn.Module, spec: RunSpec, ranks: Ranks) -> None:
        self.spec = spec
        self.device = ranks.device
        self.ranks = ranks
        self.module = module
        self.optimizers = optimizers(module, spec)
        # FSDP2 casts by its own policy; elsewhere autocast does.
        self.autocast = spec.system.precision == "amp_bf16" and not isinstance(
            self.module, FSDPModule
        )

    def loss(self, batch: Tensor) -> Tensor:
        """Mean loss of sequences (B, T+1)."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            loss: Tensor = self.module(batch[:, :-1], batch[:, 1:])
        return loss

    def accumulate(self, batch: Tensor, *, last: bool) -> Tensor:
        """The loss, its gradient added; DDP reduces once, with the last of a step."""
        module = self.module
        ddp = module if isinstance(module, DistributedDataParallel) and not last else None
        # Around the forward pass too: there DDP decides whether the backward pass reduces.
        with ddp.no_sync() if ddp is not None else nullcontext():
            loss = self.loss(batch)
            torch.autograd.backward(loss / self.spec.grad_accum)
        return loss.detach()

    def step(self, lr: float) -> float:
        """Clip, update, clear; returns the norm before clipping."""
        limit = self.spec.optim.grad_clip or float("inf")
        gradient_norm = nn.utils.clip_grad_norm_(self.module.parameters(), limit)
        if isinstance(gradient_norm, DTensor):
            gradient_norm = gradient_norm.full_tensor()
        norm = float(gradient_norm)
        set_lr(self.optimizers, lr)
        for optimizer in self.optimizers:
            if math.isfinite(norm):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return norm

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """No gradients."""
        with torch.no_grad():
            yield

    def state(self) -> State:
        """This rank's part, the live tensors."""
        return torch_state(self.module, self.optimizers, self.ranks)

    def load(self, folder: Path) -> None:
        """Read into the present layout, whatever layout wrote it."""
        load_torch_state(self.module, self.optimizers, folder)
