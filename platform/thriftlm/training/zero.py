"""DeepSpeed ZeRO 1-3 behind the engine interface.

DeepSpeed fills every setting that is not given, and some of its defaults change the result: in 0.19
gradient clipping defaults to 1.0. So each one that touches the numbers is set here.
"""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
import deepspeed
from deepspeed.utils import set_z3_leaf_modules

from thriftlm.spec import RunSpec
from thriftlm.training.engine_state import State
from thriftlm.training.optimizer import adamw, set_lr
from thriftlm.training.ranks import Ranks
from thriftlm.training.zero_state import load_zero_state, zero_state
from thriftlm_models.decoder import Block, Decoder

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
if os.environ["DS_ACCELERATOR"] == "cpu":
    # Else DeepSpeed compiles a shared-memory op first, minutes with a compiler and an error without
    # one, that only inference uses; training goes through gloo.
    deepspeed.ops.__compatible_ops__ = {}

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}


class ZeroEngine:
    """ZeRO stage 1 (optimizer state), 2 (and gradients) or 3 (and parameters)."""

    def __init__(self, model: Decoder, spec: RunSpec, ranks: Ranks) -> None:
        self.ranks = ranks
        deepspeed.init_distributed(
            dist_backend="gloo" if ranks.device.type == "cpu" else "nccl", verbose=False
        )
        if spec.system.compile and runs_blocks_once(spec) and STAGES[spec.system.strategy] == 3:
            # Whole blocks are gathered: hooks within would break what is compiled into pieces.
            # Stage 3 reduces such a block once a pass, so a shared one, which runs twice, cannot.
            set_z3_leaf_modules(model, [Block])
        self.engine, self.optimizer, *_ = deepspeed.initialize(
            model=model, optimizer=adamw(model, spec), config=settings(spec, ranks)
        )

    def loss(self, batch: Tensor) -> Tensor:
        """Mean loss of sequences (B, T+1)."""
        loss: Tensor = self.engine(batch[:, :-1], batch[:, 1:])
        return loss

    def accumulate(self, batch: Tensor, *, last: bool) -> Tensor:
        """The loss, its gradient added; DeepSpeed divides by the number of micro-batches itself."""
        loss = self.loss(batch)
        self.engine.backward(loss)
        if not last:
            self.engine.step()  # moves its micro-batch counter, updates nothing
        return loss.detach()

    def step(self, lr: float) -> float:
        """Clip, update, clear; returns the norm before clipping."""
        set_lr([self.optimizer], lr)
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """No gradients; ZeRO-3 releases gathered weights by the mode."""
        self.engine.eval()
        with torch.no_grad():
            yield
        self.engine.train()

    def state(self) -> State:
        """This rank's share of the whole parameters and moments."""
        return zero_state(self.engine, self.ranks)

    def load(self, folder: Path) -> None:
        """Read into the present stage and number of ranks, whatever wrote it."""
        load_zero_state(self.engine, self.ranks, folder)


def runs_blocks_once(spec: RunSpec) -> bool:
    """Whether no block is shared."""
    return len(spec.model.schedule) == spec.model.n_layers


def autocast(spec: RunSpec) -> dict[str, Any]:
    """DeepSpeed's configuration of bf16 arithmetic.

    Gradients of "safe modules" (by default linear layers) are reduced in bf16, whatever
    `communication_data_type` says. Stages 1 and 2 have none, and reduce in fp32 as DDP does. Stage
    3 keeps the default, because its weights are gathered in that dtype too.
    """
    chosen: dict[str, Any] = {
        "enabled": spec.system.precision == "amp_bf16",
        "dtype": "bfloat16",
    }
    if STAGES[spec.system.strategy] < 3:
        chosen["lower_precision_safe_modules"] = []
    return chosen


def pure_bf16(spec: RunSpec) -> dict[str, Any]:
    """DeepSpeed's configuration of training without fp32 masters: state in bf16 too."""
    if spec.system.precision != "bf16_true":
        return {"enabled": False}
    return {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}


def offload(spec: RunSpec, ranks: Ranks) -> dict[str, Any]:
    """What goes to host memory: optimizer state with the masters, in stage 3 weights too."""
    if not spec.system.cpu_offload:
        return {}
    place = {"device": "cpu", "pin_memory": ranks.device.type == "cuda"}
    is_last = STAGES[spec.system.strategy] == 3
    return {"offload_optimizer": place} | ({"offload_param": place} if is_last else {})


def settings(spec: RunSpec, ranks: Ranks) -> dict[str, Any]:
    """DeepSpeed's configuration of the run, every default that matters written out."""
    return {
        "train_micro_batch_size_per_gpu": spec.system.micro_batch,
        "gradient_accumulation_steps": spec.grad_accum,
        "gradient_clipping": spec.optim.grad_clip,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": "fp32",
        "fp16": {"enabled": False},
        "bf16": pure_bf16(spec),
        "torch_autocast": autocast(spec),
        "zero_optimization": {
            "stage": STAGES[spec.system.strategy],
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "overlap_comm": ranks.device.type != "cpu",
            "round_robin_gradients": False,
            **offload(spec, ranks),
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
