"""What DeepSpeed's ZeRO holds, put together parameter by parameter, and spread again.

DeepSpeed keeps master weights and moments in flat pieces whose cut depends on stage and number of
ranks. Its own checkpoints keep that cut; here each parameter is made whole through its functions
for that (`safe_get_full_...`), so that any strategy reads it. Read in DeepSpeed 0.19.8.
"""

from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from thriftlm.training.engine_state import State, read
from thriftlm.training.ranks import Ranks

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state beside the number of steps."""


def zero_state(engine: Any, ranks: Ranks) -> State:
    """What this rank writes: parameter number i on rank i modulo their number, on the CPU.

    All ranks call it. Each holds one whole parameter at a time, and keeps its share.
    """
    link_moments(engine)
    steps = steps_done(engine)
    model: dict[str, Tensor] = {}
    state: dict[str, dict[str, Tensor]] = {}
    for number, (name, parameter) in enumerate(engine.module.named_parameters()):
        weights = safe_get_full_fp32_param(parameter)
        moments = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
        if number % ranks.world_size == ranks.rank:
            model[name] = weights.cpu()
            state[name] = {key: held.cpu() for key, held in moments.items()}
            state[name]["step"] = torch.tensor(steps)
    return {"model": model, "optimizer": {"state": state}}


def load_zero_state(engine: Any, ranks: Ranks, folder: Path) -> None:
    """Read a checkpoint into the present stage and number of ranks; all ranks call it."""
    make_moments(engine)
    steps = 0.0
    for name, parameter in engine.module.named_parameters():
        found = read_parameter(folder, name, getattr(parameter, "ds_shape", parameter.shape))
        steps = float(found.pop("step"))
        if is_stage_3(engine):
            set_partitioned(parameter, found, ranks)
        else:
            set_whole(parameter, found)
    for held in engine.optimizer.optimizer.state.values():
        held["step"].fill_(steps)


def read_parameter(folder: Path, name: str, shape: torch.Size) -> dict[str, Tensor]:
    """A whole parameter under "weights", its moments and its number of steps."""
    weights = torch.empty(shape)
    state = {key: torch.empty(shape) for key in MOMENTS} | {"step": torch.tensor(0.0)}
    read(folder, {"model": {name: weights}, "optimizer": {"state": {name: state}}})
    return {"weights": weights} | state


def set_whole(parameter: nn.Parameter, found: dict[str, Tensor]) -> None:
    """Stages 1 and 2: this rank's piece of the master weights, and the parameter itself."""
    safe_set_full_fp32_param(parameter, found["weights"])
    for key in MOMENTS:
        safe_set_full_optimizer_state(parameter, found[key], key)
    parameter.data.copy_(found["weights"])  # DeepSpeed itself does it with the next step only


def set_partitioned(parameter: nn.Parameter, found: dict[str, Tensor], ranks: Ranks) -> None:
    """Stage 3. DeepSpeed's setters of whole values fail where the ranks do not divide it."""
    pieces = {key: piece(held, parameter, ranks.rank) for key, held in found.items()}
    safe_set_local_fp32_param(parameter, pieces["weights"])
    for key in MOMENTS:
        safe_set_local_optimizer_state(parameter, pieces[key], key)
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(found["weights"])


def piece(whole: Tensor, parameter: Any, rank: int) -> Tensor:
    """A rank's piece of a flattened value, padded with zeros at the end as DeepSpeed pads."""
    size = parameter.ds_tensor.numel()
    mine = whole.flatten()[rank * size : (rank + 1) * size]
    return nn.functional.pad(mine, (0, size - mine.numel()))


def make_moments(engine: Any) -> None:
    """Moments of zero for each flat piece of master weights, as AdamW's first step makes them."""
    optimizer = engine.optimizer.optimizer
    for flat in flat_pieces(engine):
        optimizer.state[flat] = {key: torch.zeros_like(flat) for key in MOMENTS} | {
            "step": torch.zeros((), device=flat.device)
        }
    link_moments(engine)


def link_moments(engine: Any) -> None:
    """Let DeepSpeed find each parameter's moments, in stages 1 and 2.

    It links them by itself after the first group of parameters has made its first step; the other
    groups have no moments yet at that moment, and theirs are never found.
    """
    optimizer = engine.optimizer
    if not is_stage_3(engine):
        for parameters, flat in zip(
            optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True
        ):
            lazy_init_hp_params_optimizer_state(parameters, flat, optimizer.optimizer.state)


def flat_pieces(engine: Any) -> list[Tensor]:
    """This rank's flat master weights, which the optimizer updates."""
    optimizer = engine.optimizer
    found: list[Tensor] = (
        optimizer.fp32_partitioned_groups_flat
        if is_stage_3(engine)
        else optimizer.single_partition_of_fp32_groups
    )
    return found


def is_stage_3(engine: Any) -> bool:
    """Whether parameters themselves are spread."""
    return hasattr(engine.optimizer, "fp32_partitioned_groups_flat")


def steps_done(engine: Any) -> float:
    """Updates that the optimizer has made, those that were skipped left out."""
    return float(next(iter(engine.optimizer.optimizer.state.values()))["step"])
