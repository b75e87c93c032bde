"""What a search has learned, in sentences, also where it has no answer."""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from thriftlm.planning.cases import from_cases
from thriftlm.planning.estimate import case_of
from thriftlm.planning.memory import memory
from thriftlm.search.budget import Budget
from thriftlm.search.history.state import SearchState, TrialState
from thriftlm.search.scores.scoring import outcome
from thriftlm.search.spaces.space import Space
from thriftlm.spec import RunSpec, SystemSpec

WORDS = {
    "done": "finished",
    "stopped": "stopped early",
    "oom": "out of memory",
    "diverged": "diverged",
    "failed": "failed",
    "open": "not ended",
}
"""How trials ended, in the order in which that is told."""


def learned(space: Space, state: SearchState) -> list[str]:
    """How the trials ended; where half of them or more broke, what that says and what to try."""
    begun = [trial for trial in state.trials.values() if trial.allocations]
    if not begun:
        return ["no trial has started: nothing was learned"]
    ends = Counter(trial.status or "open" for trial in begun)
    told = [f"{ends[status]} {words}" for status, words in WORDS.items() if ends[status]]
    found = [f"{_trials(len(begun))}: {', '.join(told)}"]
    usable = [t for t in begun if t.loss is not None and outcome(t) in ("running", "done")]
    if len(usable) > len(begun) / 2:
        return found
    by_end = {status: [t for t in begun if outcome(t) == status] for status in ("oom", "diverged")}
    out_of_memory = [trial for trial in by_end["oom"] if trial.status != "failed"]
    if out_of_memory:
        found.append(_of_memory(space, out_of_memory))
    if by_end["diverged"]:
        found.append(_of_divergence(by_end["diverged"]))
    reasons = Counter(trial.reason for trial in begun if trial.status == "failed" and trial.reason)
    found += [f"{count} failed: {reason}" for reason, count in reasons.most_common(3)]
    return found


def needed(
    state: SearchState, budget: Budget, price_of: Callable[[RunSpec], tuple[float, str]]
) -> list[str]:
    """What the first trial would have needed, where the budget did not bear any."""
    if not state.waiting or any(trial.allocations for trial in state.trials.values()):
        return []
    trial = state.waiting[0]
    hours = budget.needed_seconds(state, trial) / 3600
    usd = hours * price_of(trial.run)[0]
    system = f"{trial.run.system.n_gpus} x {trial.run.system.gpu}"
    return [f"a trial needs at least {usd:.3g} USD and {hours:.3g} hours (on {system})"]


def _trials(count: int) -> str:
    return "1 trial" if count == 1 else f"{count} trials"


def _of_memory(space: Space, trials: Sequence[TrialState]) -> str:
    """The smallest estimated need of those that did not fit, and the ways out that it leaves."""
    rows = from_cases([case_of(trial.run) for trial in trials], "thriftlm", space.machine)
    needed = memory(rows).needed
    least = int(np.nanargmin(needed)) if np.isfinite(needed).any() else 0
    system = trials[least].run.system
    where = f"{system.n_gpus} x {system.gpu}, {system.strategy}, micro_batch {system.micro_batch}"
    need, room = needed[least] / 1e9, rows.memory_bytes[least] / 1e9
    said = f"out of memory: no estimate of the need is known; tried was {where}"
    if np.isfinite(need):
        said = f"out of memory: the smallest need, by estimate, was {need:.3g} GB per GPU ({where})"
    if np.isfinite(room):
        said += f", which has {room:.3g} GB"
        said += "; it needs more than estimated" if need <= room else ""
    return f"{said}; try {', '.join(_ways_to_fit(system))} or a smaller model"


def _ways_to_fit(system: SystemSpec) -> list[str]:
    ways = ["micro_batch 1"] if system.micro_batch > 1 else []
    if system.act_ckpt != "full":
        ways.append("act_ckpt full")
    if system.strategy in ("single", "ddp"):
        ways.append("more GPUs with strategy fsdp_full")
    else:
        ways.append("more GPUs")
    return [*ways, "a GPU with more memory"]


def _of_divergence(trials: Sequence[TrialState]) -> str:
    lowest = min(trials, key=lambda trial: trial.run.optim.lr)
    latest = max(trial.tokens for trial in trials)
    return (
        f"diverged: the lowest learning rate that did was {lowest.run.optim.lr:.3g} (after "
        f"{lowest.tokens:,} tokens; the latest after {latest:,}); try learning rates below it, a "
        "longer warm-up (optim.warmup_fraction) or optim.grad_clip"
    )
