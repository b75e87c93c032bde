"""A model and its optimizer under one strategy: the only place that knows how they are spread.

The order of `build_engine` is the lesson: build, initialise, spread, then make the optimizer over
what each rank holds. Every strategy starts from the same weights, so that all of them give the
losses of the single process.
"""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_checkpoint
from torch.distributed.checkpoint.state_dict_saver import save as save_checkpoint
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from thriftlm.spec import InputError, RunSpec
from thriftlm.training.optimizer import adamw, set_lr
from thriftlm.training.ranks import Ranks
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
        """Clip, update, clear the gradients; the global gradient norm before clipping."""

    def evaluating(self) -> AbstractContextManager[None]:
        """A context without gradients."""

    def save(self, folder: Path) -> None:
        """Write parameters and optimizer state; all ranks call it."""

    def load(self, folder: Path) -> None:
        """Read what `save` wrote; all ranks call it."""


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

    One worker has nobody to share with: whatever its strategy is called, it trains as `single`.
    """
    model = Decoder(spec.model, spec.system.attention, packing)
    model.init_weights(spec.seed)
    model.to(ranks.device)
    if ranks.world_size > 1 and spec.system.strategy.startswith("zero"):
        from thriftlm.training.zero import ZeroEngine  # imports deepspeed: seconds

        return ZeroEngine(model, spec, ranks)
    return TorchEngine(model, spec, ranks)


class TorchEngine:
    """`single`, DDP and FSDP2, with torch's own AdamW."""

    def __init__(self, model: Decoder, spec: RunSpec, ranks: Ranks) -> None:
        self.spec = spec
        self.device = ranks.device
        self.module = spread(model, spec) if ranks.world_size > 1 else model
        self.optimizer = adamw(self.module, spec)
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
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), limit)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """No gradients."""
        with torch.no_grad():
            yield

    def save(self, folder: Path) -> None:
        """Write with torch's distributed checkpoint: readable at any world size."""
        model, optimizer = get_state_dict(self.module, self.optimizer)
        with without_group_warning():
            save_checkpoint(
                {"model": model, "optimizer": optimizer},
                checkpoint_id=folder,
                no_dist=not dist.is_initialized(),
            )

    def load(self, folder: Path) -> None:
        """Read into the present layout, whatever layout wrote it."""
        model, optimizer = get_state_dict(self.module, self.optimizer)
        with without_group_warning():
            load_checkpoint(
                {"model": model, "optimizer": optimizer},
                checkpoint_id=folder,
                no_dist=not dist.is_initialized(),
            )
        set_state_dict(
            self.module, self.optimizer, model_state_dict=model, optim_state_dict=optimizer
        )


def load_weights(decoder: Decoder, folder: Path, *, by_deepspeed: bool) -> None:
    """Fill a model that is whole in this process with the weights an engine saved."""
    if by_deepspeed:
        from thriftlm.training.zero import whole_weights

        decoder.load_state_dict(whole_weights(folder))
        return
    weights = decoder.state_dict()
    with without_group_warning():
        load_checkpoint({"model": weights}, checkpoint_id=folder, no_dist=True)
    decoder.load_state_dict(weights)


@contextmanager
def without_group_warning() -> Iterator[None]:
    """A context without torch's warning that a single process writes a checkpoint alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def spread(model: Decoder, spec: RunSpec) -> nn.Module:
    """The model laid out over several ranks; the root shard holds embedding, head, last norm."""
    if spec.system.strategy == "ddp":
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    reshard = spec.system.strategy == "fsdp_full"  # grad_op keeps the weights whole until backward
    policy = MixedPrecisionPolicy()
    if spec.system.precision == "amp_bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, reshard_after_forward=reshard, mp_policy=policy)
    fully_shard(model, reshard_after_forward=reshard, mp_policy=policy)
    return model
