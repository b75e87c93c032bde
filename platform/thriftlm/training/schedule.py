"""Learning rate over a run.

A branch is a run that takes its first steps over from another one, its trunk. For that the two must
have had the same learning rates so far. Their warm-ups agree when the branch names the trunk's
horizon (`optim.trunk_tokens`): its own `warmup_fraction` counts of that. The rest follows, as long
as neither had begun to fall: the end of wsd depends on a run's own horizon alone. A branch over its
trunk's own tokens may begin anywhere, with other peaks from there on (`optim.lr_changes`).
"""

import math

from thriftlm.spec import OptimSpec, RunSpec

ROUNDING = 1e-9
"""More than floating-point error in a share of the run, less than a step."""


def lr_fraction(optim: OptimSpec, progress: float, of_warmup: float | None = None) -> float:
    """Share of the peak learning rate when `progress` (0..1) of the run's tokens is done.

    Linear warm-up over `warmup_fraction`; then `wsd` stays at the peak and falls linearly over the
    last `decay_fraction` (warm-up, stable, decay: MiniCPM, arXiv 2404.06395), `cosine` falls over
    all the rest, `constant` stays. Both falls end at `final_lr_fraction`. `of_warmup` is the share
    of the tokens that the warm-up counts of, the run's own when not given.
    """
    warmed = progress if of_warmup is None else of_warmup
    if warmed < optim.warmup_fraction:
        return warmed / optim.warmup_fraction
    floor = optim.final_lr_fraction
    match optim.schedule:
        case "constant":
            return 1.0
        case "wsd":
            left = (1 - progress) / optim.decay_fraction if optim.decay_fraction else 1.0
            # The stable part is exactly at the peak, its last step too: branches begin there.
            return floor + (1 - floor) * left if left < 1 - ROUNDING else 1.0
        case "cosine":
            done = (progress - optim.warmup_fraction) / (1 - optim.warmup_fraction)
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def peak(optim: OptimSpec, tokens: int) -> float:
    """Peak learning rate in force after so many tokens."""
    return next((lr for at, lr in reversed(optim.lr_changes) if at <= tokens), optim.lr)


def learning_rate(optim: OptimSpec, step: int, steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0) of a run of `steps`."""
    fraction = lr_fraction(optim, (step + 1) / steps, _of_warmup(optim, step + 1, steps))
    return peak(optim, step * optim.batch_tokens) * fraction


def is_warming_up(optim: OptimSpec, step: int, steps: int) -> bool:
    """Whether the learning rate still rises after `step` steps."""
    return _of_warmup(optim, step, steps) < optim.warmup_fraction


def has_decayed(optim: OptimSpec, step: int, steps: int) -> bool:
    """Whether, after `step` steps, the learning rate has done at least half of its fall.

    Never where it does not fall, as with `constant`.
    """
    if is_warming_up(optim, step, steps):
        return False
    fallen = 1 - lr_fraction(optim, step / steps, _of_warmup(optim, step, steps))
    return fallen > 0 and fallen >= 0.5 * (1 - optim.final_lr_fraction) - ROUNDING


def _of_warmup(optim: OptimSpec, step: int, steps: int) -> float:
    """Share of the horizon that the warm-up counts of: the trunk's, else the run's own."""
    if optim.trunk_tokens is not None:
        steps = -(-optim.trunk_tokens // optim.batch_tokens)
    return step / steps


def first_difference(trunk: RunSpec, branch: RunSpec, steps: int) -> str | None:
    """Why a run's first steps are not those of another, with the way out; None where they are.

    Raises nothing: the answer is for a message.
    """
    fields = {"schedule", "warmup_fraction", "decay_fraction", "final_lr_fraction", "trunk_tokens"}
    fields.add("lr_changes")
    ours, theirs = (run.optim.model_dump(exclude=fields) for run in (branch, trunk))
    for name, value in ours.items():
        if value != theirs[name]:
            return (
                f"optim.{name} is {value} here and {theirs[name]} there; "
                "only tokens, the end of the schedule and later lr_changes may differ"
            )
    if steps > branch.steps:
        return (
            f"it is at step {steps:,}, after this run's last, {branch.steps:,}; "
            "raise tokens or branch from an earlier checkpoint"
        )
    for step in range(steps):
        rates = [learning_rate(run.optim, step, run.steps) for run in (trunk, branch)]
        if rates[0] != rates[1]:
            return _why_rates_differ(trunk, branch, step, steps)
    return None


def _why_rates_differ(trunk: RunSpec, branch: RunSpec, step: int, steps: int) -> str:
    theirs, ours = (peak(run.optim, step * run.optim.batch_tokens) for run in (trunk, branch))
    if theirs != ours:
        return (
            f"it is at step {steps:,}, and by optim.lr_changes the peak learning rate of step "
            f"{step + 1:,} is {ours:.3g} here and {theirs:.3g} there; change it later, or branch "
            "from an earlier checkpoint"
        )
    highest = ours
    theirs, ours = (learning_rate(run.optim, step, run.steps) for run in (trunk, branch))
    if is_warming_up(trunk.optim, step, trunk.steps) or is_warming_up(
        branch.optim, step, branch.steps
    ):
        return (
            f"the warm-ups differ at step {step + 1:,}; set optim.trunk_tokens to {trunk.tokens} "
            f"and optim.warmup_fraction to {trunk.optim.warmup_fraction}"
        )
    if theirs < highest:
        return (
            f"it is at step {steps:,} and the learning rate there falls from step {step + 1:,} on; "
            "branch from an earlier checkpoint, or give the trunk schedule: constant"
        )
    return (
        f"it is at step {steps:,}, and this run's learning rate, {ours:.3g} of {highest:.3g}, "
        f"falls from step {step + 1:,} on; raise tokens, lower optim.decay_fraction, or branch "
        "from an earlier checkpoint"
    )
