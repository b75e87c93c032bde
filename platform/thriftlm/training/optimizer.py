"""The optimizers: which parameters learn how fast, and which decay."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from thriftlm.spec import RunSpec
from thriftlm_models.initial import is_hidden, lr_factor

LR_FACTOR = "lr_factor"
"""Key of an optimizer's groups: what the learning rate is multiplied by there."""


def optimizers(module: nn.Module, spec: RunSpec) -> list[torch.optim.Optimizer]:
    """AdamW over all parameters, or Muon over the blocks' matrices and AdamW over the rest."""
    if spec.optim.optimizer == "adamw":
        return [adamw(module, spec)]
    return [muon(module, spec), adamw(module, spec, lambda name, held: not is_hidden(name, held))]


def adamw(
    module: nn.Module,
    spec: RunSpec,
    takes: Callable[[str, nn.Parameter], bool] = lambda name, held: True,
) -> torch.optim.AdamW:
    """Fused AdamW over the parameters it `takes`; matrices decay, vectors do not.

    Under muP the blocks' matrices learn at their own rate. Where the rate is divided, decay is
    multiplied: what a step takes off the weights, the rate times the decay, does not depend on the
    width either.
    """
    return torch.optim.AdamW(
        _groups(module, spec, takes),
        lr=spec.optim.lr,
        betas=spec.optim.betas,
        eps=spec.optim.eps,
        fused=True,
    )


def muon(module: nn.Module, spec: RunSpec) -> torch.optim.Muon:
    """Muon (kellerjordan.github.io/posts/muon) over the blocks' matrices.

    Updates are scaled to the root mean square of AdamW's (arXiv 2502.16982, 2.2), so that one
    learning rate serves both. Queries, keys and values are one matrix here, and so are gate and up:
    each such matrix is orthogonalised as a whole.
    """
    return torch.optim.Muon(
        _groups(module, spec, is_hidden),
        lr=spec.optim.lr,
        momentum=spec.optim.momentum,
        adjust_lr_fn="match_rms_adamw",
    )


def set_lr(held: Iterable[torch.optim.Optimizer], lr: float) -> None:
    """Give each group of parameters its share of the learning rate."""
    for optimizer in held:
        for group in optimizer.param_groups:
            group["lr"] = lr * group[LR_FACTOR]


def _groups(
    module: nn.Module, spec: RunSpec, takes: Callable[[str, nn.Parameter], bool]
) -> list[dict[str, Any]]:
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if takes(name, parameter):
            factor = lr_factor(name, parameter, spec.model)
            decay = spec.optim.weight_decay / factor if parameter.ndim >= 2 else 0.0
            found.setdefault((factor, decay), []).append(parameter)
    return [
        {"params": held, "weight_decay": decay, LR_FACTOR: factor}
        for (factor, decay), held in found.items()
    ]
