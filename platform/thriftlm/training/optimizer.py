"""The optimizer: which parameters learn how fast, and which decay."""

import torch
from torch import nn

from thriftlm.spec import RunSpec
from thriftlm_models.initial import lr_factor

LR_FACTOR = "lr_factor"
"""Key of an optimizer's groups: what the learning rate is multiplied by there."""


def adamw(module: nn.Module, spec: RunSpec) -> torch.optim.AdamW:
    """AdamW that decays matrices only; under muP the blocks' matrices learn at their own rate.

    Where the rate is divided, decay is multiplied: what a step takes off the weights, the rate
    times the decay, does not depend on the width either.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        factor = lr_factor(name, parameter, spec.model)
        decay = spec.optim.weight_decay / factor if parameter.ndim >= 2 else 0.0
        groups.setdefault((factor, decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": held, "weight_decay": decay, LR_FACTOR: factor}
            for (factor, decay), held in groups.items()
        ],
        lr=spec.optim.lr,
        betas=spec.optim.betas,
        eps=spec.optim.eps,
        fused=True,
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give each group of parameters its share of the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group[LR_FACTOR]
