"""A hidden truth of throughput and memory for worlds, unlike the estimator's in structure.

Where thriftlm's estimate adds roofline times with constants per GPU generation, this truth has a
matmul efficiency that saturates in width and in tokens per pass with scales of each card, a penalty
of each pair of card and strategy, stragglers that grow with the gang, collectives whose bandwidth
falls with the number of nodes, and an allocator that fragments. None of it comes from thriftlm's
planning package. What it does not claim is to be right: it is a world to be learned.
"""

from itertools import product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from thriftlm import catalog, prices
from thriftlm.spec import SystemSpec
from thriftlm_models.config import ModelSpec
from thriftlm_models.counts import flops_per_token, stored_params

Floats = NDArray[np.float64]
GPUS = ("A100-40GB", "A100-80GB", "H100-80GB", "A10G-24GB", "L4-24GB")
N_GPUS = (1, 2, 4, 8, 16, 32)
STRATEGIES = ("ddp", "fsdp_full", "fsdp_grad_op", "zero1", "zero2", "zero3")
MICRO_BATCHES = (4, 8, 16, 32)
ATTENTIONS = ("flash", "math")
SEQ_LEN = 2048
NOISE_SD = 0.015
"""Of the logarithm of a measured throughput."""
CARDS = {  # best matmul fraction, width and tokens per pass of half of it, bus GB/s, kernel factor
    "A100-40GB": (0.62, 420, 900, 170, 1.9),
    "A100-80GB": (0.60, 420, 900, 190, 1.9),
    "H100-80GB": (0.46, 900, 2600, 260, 2.6),
    "A10G-24GB": (0.52, 200, 500, 9, 2.2),
    "L4-24GB": (0.40, 180, 400, 7, 2.4),
}
STEP_TRAFFIC = {
    "ddp": 1.0,
    "fsdp_full": 1.9,
    "fsdp_grad_op": 1.35,
    "zero1": 1.2,
    "zero2": 1.45,
    "zero3": 2.3,
}
"""Volume of a step's collectives in units of an all-reduce of the gradients in bf16."""
HIDDEN = {
    "ddp": 0.75,
    "fsdp_full": 0.55,
    "fsdp_grad_op": 0.65,
    "zero1": 0.5,
    "zero2": 0.3,
    "zero3": 0.4,
}
"""Share of compute that collectives hide behind."""
STATE_BYTES = {
    "ddp": (16, 0),
    "fsdp_full": (1, 15),
    "fsdp_grad_op": (5, 11),
    "zero1": (9, 8),
    "zero2": (6, 10),
    "zero3": (2, 15),
}
"""Bytes per parameter on every GPU, and those that are sharded."""
FRAGMENTATION, BASE_GB = 1.09, 1.6


class Truth(NamedTuple):
    """Of each system (S,); speed is of all GPUs together, NaN where memory does not suffice."""

    tokens_per_s: Floats
    usd_per_hour: Floats


def systems() -> list[dict[str, Any]]:
    """Every system as fields of a space; one GPU is listed once, without a choice of strategy."""
    fields = ("gpu", "n_gpus", "strategy", "micro_batch", "attention")
    listed = product(GPUS, N_GPUS, STRATEGIES, MICRO_BATCHES, ATTENTIONS)
    every = (dict(zip(fields, values, strict=True)) for values in listed)
    return [one for one in every if one["n_gpus"] > 1 or one["strategy"] == STRATEGIES[0]]


def usd_per_hour(listed: list[dict[str, Any]]) -> Floats:
    """List prices (S,)."""
    place = {"cloud": "aws", "precision": "amp_bf16"}
    specs = [SystemSpec(**{**one, **place, "strategy": _strategy(one)}) for one in listed]
    return np.array([prices.usd_per_hour(spec) for spec in specs])


def _strategy(one: dict[str, Any]) -> str:
    return "single" if one["n_gpus"] == 1 else str(one["strategy"])


def truth(model: ModelSpec, listed: list[dict[str, Any]], world: int) -> Floats:
    """Tokens per second of all GPUs (S,); NaN where memory runs out."""
    quirks = np.random.default_rng(world)
    pair = {key: quirks.normal(0, 0.09) for key in product(GPUS, STRATEGIES)}
    card_quirk = {gpu: quirks.normal(0, 0.12) for gpu in GPUS}
    noise = np.random.default_rng([world, model.d_model, model.n_layers])
    found = np.array([_speed(model, one) for one in listed])
    shift = np.array([pair[one["gpu"], one["strategy"]] + card_quirk[one["gpu"]] for one in listed])
    return np.asarray(found * np.exp(shift + noise.normal(0, NOISE_SD, len(listed))))


def _speed(model: ModelSpec, one: dict[str, Any]) -> float:
    if not _fits(model, one):
        return float("nan")
    card, (best, width, tokens, bus, slow) = catalog.gpu(one["gpu"]), CARDS[one["gpu"]]
    n, per_pass = one["n_gpus"], one["micro_batch"] * SEQ_LEN
    peak = (card.bf16_tflops or 0) * 1e12
    fraction = best * model.d_model / (model.d_model + width) * per_pass / (per_pass + tokens)
    attention = 12 * len(model.schedule) * model.d_model * SEQ_LEN
    dense = flops_per_token(model, SEQ_LEN) - attention
    factor = 1.0 if one["attention"] == "flash" else slow
    flops = dense + attention * factor * 1.4
    compute = per_pass * flops / (peak * fraction) + 4e-4 * len(model.schedule)
    sharing = 0.0
    if n > 1:
        nodes = -(-n // (card.gpus_per_node or 8))
        bandwidth = bus * 1e9 / (1 if nodes == 1 else 3.5 * nodes**0.4)
        volume = 4.0 * stored_params(model) * STEP_TRAFFIC[one["strategy"]] * (n - 1) / n
        latency = (
            6e-5 * np.log2(n) * len(model.schedule) * (1 + (STEP_TRAFFIC[one["strategy"]] > 1.3))
        )
        sharing = max(0.0, volume / bandwidth - HIDDEN[one["strategy"]] * compute) + latency
    return float(n * per_pass / ((compute + sharing) * n**0.025))


def _fits(model: ModelSpec, one: dict[str, Any]) -> bool:
    params, n = stored_params(model), one["n_gpus"]
    whole, sharded = STATE_BYTES[one["strategy"]] if n > 1 else (16, 0)
    per_token = model.d_model * 24.0
    if one["attention"] == "math":
        per_token += 5 * model.n_heads * SEQ_LEN
    activations = one["micro_batch"] * SEQ_LEN * len(model.schedule) * per_token
    logits = one["micro_batch"] * SEQ_LEN * model.vocab * 8
    needed = params * (whole + sharded / n) + activations + logits
    has = catalog.gpu(one["gpu"]).usable_memory_gib or 0
    return bool(needed * FRAGMENTATION + BASE_GB * 1e9 <= has * 2**30)
