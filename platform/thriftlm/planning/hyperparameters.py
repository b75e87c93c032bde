"""Learning rate and batch size by published laws. Batches are in tokens per optimizer step."""

import math
from typing import NamedTuple

WEIGHT_DECAY = 0.1
"""AdamW's, of the recipes below: the default of `OptimSpec`."""

STEP_LAW_PARAMS, STEP_LAW_TOKENS = 1.1e9, 1e11
"""Largest model and horizon of Step Law's released runs: beyond them it is extrapolated."""


class Recipe(NamedTuple):
    """Peak learning rate and batch."""

    lr: float
    batch_tokens: float


def step_law(n_params: float, n_tokens: float) -> Recipe:
    """Step Law (arXiv 2503.04715): rate 1.79 N^-0.713 D^0.307, batch 0.58 D^0.571.

    N is without embeddings.
    """
    return Recipe(1.79 * n_params**-0.713 * n_tokens**0.307, 0.58 * n_tokens**0.571)


def power_lines(
    n_params: float, n_tokens: float, batch_tokens: float, weight_decay: float = WEIGHT_DECAY
) -> Recipe:
    """The learning rate at which weights forget at the best pace (arXiv 2505.13738).

    AdamW's timescale over the run, tau = B / (lr wd D), is best at 1.084 (D/N)^-0.527; solved for
    lr at a batch and weight decay.
    """
    timescale = 1.084 * (n_tokens / n_params) ** -0.527
    return Recipe(batch_tokens / (timescale * weight_decay * n_tokens), batch_tokens)


def deepseek(flops: float) -> Recipe:
    """Learning rate 0.3118 C^-0.1250, batch 0.2920 C^0.3271 (DeepSeek LLM, 2024)."""
    return Recipe(0.3118 * flops**-0.1250, 0.2920 * flops**0.3271)


def whole_batch(batch_tokens: float, n_gpus: int, seq_len: int) -> int:
    """The batch near `batch_tokens` that is a power of two of sequences on every GPU.

    At most a factor of 1.42 off; a batch within a factor of 2 wastes under 5% (Schaipp 2026, arXiv
    2607.01487: the band is 4x wide).
    """
    unit = n_gpus * seq_len
    return unit << max(0, round(math.log2(max(batch_tokens / unit, 1.0))))
