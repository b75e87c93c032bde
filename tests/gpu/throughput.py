"""Tokens per second, MFU and peak memory of our training step, beside the estimator's."""

import gc
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from pydantic import ValidationError

from thriftlm import catalog
from thriftlm.planning.estimate import estimate
from thriftlm.spec import InputError, RunSpec
from thriftlm.training.engine import build_engine, check_attention
from thriftlm.training.loop import flops_utilisation, is_out_of_memory, peak_memory_gb
from thriftlm.training.profiling import synchronise
from thriftlm.training.ranks import Ranks
from thriftlm_models.counts import stored_params
from thriftlm_models.decoder import Decoder

WARM_UP, TIMED = 2, 5
STEP_TOKENS = 65_536
"""Tokens of a timed optimizer step, at least one pass."""
PASS_TOKENS = 65_536
"""Most tokens of one forward pass."""
MEMORY_SHARE = 0.75
"""Of the GPU's memory that the estimator may fill with a micro batch."""
RESERVE_SECONDS = 20.0


@dataclass(frozen=True)
class Point:
    """One measurement; `model` is a preset's name or the fields of a shape."""

    name: str
    attention: str
    compile: bool = False
    fields: dict[str, Any] = field(default_factory=dict)
    seq_len: int = 2048


MODELS = (
    "tinyllama-1.1b",
    "mobilellm-125m",
    "apple-100m",
    "apple-2b",
    "apple-500m",
    "apple-1b",
    "mobilellm-350m",
)
"""In the order of what is asked first; the last ones go where time is short."""
WAYS = (("flash", False), ("math", False), ("flash", True))
POINTS = tuple(Point(m, a, c) for m in MODELS for a, c in WAYS) + tuple(
    Point(m, "math", True) for m in MODELS
)
TINY = {"n_layers": 2, "d_model": 64, "n_heads": 4, "d_ff": 128, "vocab": 512}
TINY_POINTS = tuple(
    Point("tiny", attention, compiled, TINY, 64)
    for attention, compiled in (("flash", False), ("math", False), ("flash", True))
)


def measured(
    points: Iterable[Point], device: torch.device, gpu: str, deadline: float
) -> list[dict[str, Any]]:
    """Every point in order; those for which no time is left say so."""
    found = []
    longest = RESERVE_SECONDS
    for point in points:
        row = {"model": point.name, "attention": point.attention, "compile": point.compile}
        begin = time.perf_counter()
        if begin + longest > deadline:
            found.append(row | {"status": "no time left"})
            continue
        found.append(row | measurement(point, device, gpu))
        longest = max(longest, time.perf_counter() - begin)
        print(found[-1], flush=True)
    return found


def measurement(point: Point, device: torch.device, gpu: str) -> dict[str, Any]:
    try:
        run = run_of(point, gpu)
        row = expected(run)
        check_attention(run, device)
        return row | timed(run, device)
    except (InputError, ValidationError) as error:
        return {"status": f"refused: {str(error).splitlines()[-1]}"}
    except Exception as error:  # any: one point that breaks is not the end of the others
        if is_out_of_memory(error):
            return row | {"status": "out of memory"}
        return {"status": f"failed: {type(error).__name__}: {str(error).strip()[:200]}"}
    finally:
        gc.collect()
        torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def run_of(point: Point, gpu: str) -> RunSpec:
    """The run with the largest micro batch that the estimator sees room for."""
    sizes: Iterator[int] = (2**k for k in range(PASS_TOKENS.bit_length(), 0, -1))
    memory = catalog.gpu(gpu).usable_memory_gib
    fitting = [n for n in sizes if n * point.seq_len <= PASS_TOKENS] + [1]
    for size in fitting:
        run = with_micro_batch(point, gpu, size)
        peak = expected(run)["est_peak_mem_gb"]
        if memory is None or peak is None or peak <= MEMORY_SHARE * memory * 2**30 / 1e9:
            return run
    return run


def with_micro_batch(point: Point, gpu: str, size: int) -> RunSpec:
    model = point.fields or {"preset": point.name}
    passes = max(1, STEP_TOKENS // (size * point.seq_len))
    on_cpu = gpu == "cpu"
    if on_cpu:
        size, passes = 2, 2
    return RunSpec.model_validate(
        {
            "model": model,
            "data": {"seq_len": point.seq_len, "tokenizer": "none.json"},
            "optim": {"batch_tokens": passes * size * point.seq_len},
            "system": {
                "gpu": gpu,
                "micro_batch": size,
                "attention": point.attention,
                "compile": point.compile,
                "precision": "amp_bf16",
            },
            "tokens": 10**9,
        }
    )


def expected(run: RunSpec) -> dict[str, Any]:
    """What the estimator says of a run."""
    found = estimate(run.model, run.system, run.data.seq_len, run.optim.batch_tokens)
    return {
        "micro_batch": run.system.micro_batch,
        "grad_accum": run.grad_accum,
        "params": stored_params(run.model),
        "est_tokens_per_s": found.tokens_per_s_per_gpu,
        "est_low": found.low,
        "est_high": found.high,
        "est_mfu": found.mfu,
        "est_peak_mem_gb": rounded(found.peak_mem_gb),
    }


def timed(run: RunSpec, device: torch.device) -> dict[str, Any]:
    """Steps after warm-up, each between two waits for the device."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    # On the device at once: filling 2B parameters on the host would take longer than the steps.
    with patch.object(Decoder, "init_weights", filled), torch.device(device):
        engine = build_engine(run, Ranks(0, 1, device))
    shape = (run.system.micro_batch, run.data.seq_len + 1)
    batch = torch.randint(run.model.vocab, shape, device=device)
    seconds = []
    for number in range(WARM_UP + TIMED):
        synchronise(device)
        begin = time.perf_counter()
        for micro in range(run.grad_accum):
            engine.accumulate(batch, last=micro + 1 == run.grad_accum)
        engine.step(1e-4)
        synchronise(device)
        if number >= WARM_UP:
            seconds.append(time.perf_counter() - begin)
    tokens = run.optim.batch_tokens
    rate = tokens / median(seconds)
    return {
        "status": "measured",
        "tokens_per_s": rate,
        "slowest": tokens / max(seconds),
        "fastest": tokens / min(seconds),
        "mfu": flops_utilisation(run, rate),
        "peak_mem_gb": rounded(peak_memory_gb(device)),
    }


def filled(decoder: Decoder, seed: int) -> None:
    """Weights of a usual size, made where they are."""
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.fill_(1.0) if parameter.ndim == 1 else parameter.normal_(std=0.02)


def rounded(gigabytes: float | None) -> float | None:
    return None if gigabytes is None else round(gigabytes, 2)
