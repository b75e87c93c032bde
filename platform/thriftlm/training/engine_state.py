"""The one form of a checkpoint: whole-model state by parameter name, whatever strategy wrote it.

`{"model": {NAME: tensor}, "optimizer": {"state": {NAME: {"exp_avg": tensor, "step": ...}}}}`, in
the precision of the master weights, without the prefixes of any wrapper. An optimizer's groups are
not in it: the recipe gives them, and the step their learning rate.
"""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn, optim
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_checkpoint
from torch.distributed.tensor import DTensor

from thriftlm.training.ranks import Ranks

State = dict[str, Any]

warnings.filterwarnings("ignore", message="torch.distributed is disabled")
"""What torch says of a process that reads or writes a checkpoint alone; here it is meant."""


def torch_state(module: nn.Module, optimizers: Iterable[optim.Optimizer], ranks: Ranks) -> State:
    """What this rank writes of a model that torch spreads; the tensors are the live ones.

    Shards are each rank's own. What every rank holds whole is written by one of them: parameter
    number i by rank i modulo the number of ranks.
    """
    model, optimizer = get_state_dict(module, optimizers)
    state: dict[str, Any] = dict(optimizer)["state"]  # type: ignore[assignment]
    mine = set(list(model)[ranks.rank :: ranks.world_size])
    return {
        "model": {name: held for name, held in model.items() if name in mine or sharded(held)},
        "optimizer": {
            "state": {
                name: {key: held for key, held in found.items() if name in mine or sharded(held)}
                for name, found in state.items()
            }
        },
    }


def load_torch_state(
    module: nn.Module, optimizers: Iterable[optim.Optimizer], folder: Path
) -> None:
    """Read a checkpoint into the present layout."""
    optimizers = list(optimizers)
    model, optimizer = get_state_dict(module, optimizers)
    read(folder, {"model": model, "optimizer": {"state": optimizer["state"]}})
    set_state_dict(module, optimizers, model_state_dict=model, optim_state_dict=optimizer)


def sharded(held: Any) -> bool:
    """Whether this is one rank's part of something."""
    return isinstance(held, DTensor)


def read(folder: Path, state: State) -> None:
    """Fill the tensors of a state from a checkpoint; each rank reads what it needs by itself."""
    load_checkpoint(state, checkpoint_id=folder, no_dist=True)


def load_weights(module: nn.Module, folder: Path) -> None:
    """Fill a model that is whole in this process."""
    weights: dict[str, Tensor] = module.state_dict()
    read(folder, {"model": weights})
    module.load_state_dict(weights)
