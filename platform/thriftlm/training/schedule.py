"""Learning rate over a run."""

import math

from thriftlm.spec import OptimSpec

ROUNDING = 1e-9
"""More than floating-point error in a share of the run, less than a step."""


def lr_fraction(optim: OptimSpec, progress: float) -> float:
    """Share of the peak learning rate when `progress` (0..1) of the run's tokens is done.

    Linear warm-up over `warmup_fraction`; then `wsd` stays at the peak and falls linearly over the
    last `decay_fraction` (warm-up, stable, decay: MiniCPM, arXiv 2404.06395), `cosine` falls over
    all the rest, `constant` stays. Both falls end at `final_lr_fraction`.
    """
    if progress < optim.warmup_fraction:
        return progress / optim.warmup_fraction
    floor = optim.final_lr_fraction
    match optim.schedule:
        case "constant":
            return 1.0
        case "wsd":
            left = (1 - progress) / optim.decay_fraction if optim.decay_fraction else 1.0
            return floor + (1 - floor) * min(1.0, left)
        case "cosine":
            done = (progress - optim.warmup_fraction) / (1 - optim.warmup_fraction)
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def learning_rate(optim: OptimSpec, step: int, steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0) of a run of `steps`."""
    return optim.lr * lr_fraction(optim, (step + 1) / steps)


def is_warming_up(optim: OptimSpec, step: int, steps: int) -> bool:
    """Whether the learning rate still rises after `step` steps."""
    return step / steps < optim.warmup_fraction


def has_decayed(optim: OptimSpec, step: int, steps: int) -> bool:
    """Whether, after `step` steps, the learning rate has done at least half of its fall.

    Never where it does not fall, as with `constant`.
    """
    if is_warming_up(optim, step, steps):
        return False
    fallen = 1 - lr_fraction(optim, step / steps)
    return fallen > 0 and fallen >= 0.5 * (1 - optim.final_lr_fraction) - ROUNDING
