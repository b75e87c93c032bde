"""Kernels, strategies and losses against references; every check is a row, wrong ones too."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from tests.models.test_attention import reference, with_gradients
from thriftlm.spec import RunSpec
from thriftlm.training import engine
from thriftlm.training.ranks import Ranks
from thriftlm_models.attention import KERNELS, kernel, why_not

Row = dict[str, Any]
STEPS = 20
KERNEL_LIMITS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Of the largest value: bf16 keeps 8 bits, and sums 256 products; fp32 keeps 24."""
KERNEL_SHAPES = ((37, 24, None), (37, 24, 8), (256, 64, None), (256, 64, 100))
"""Tokens, width of a head, window."""
HEADS = ((4, 4), (6, 2))
STRATEGY_LIMIT = 1e-5
"""Nats; a group of one does the single process's arithmetic, in buffers of its own."""
DEVICE_LIMIT = 1e-4
"""Nats in fp32: another order of sums, over 20 steps."""
BF16_LIMIT = 0.02
"""Nats: 8 bits in each product; test_strategies.py measured 0.002 over 5 steps."""
STRATEGIES: tuple[dict[str, Any], ...] = (
    {"strategy": "ddp"},
    {"strategy": "fsdp_full"},
    {"strategy": "fsdp_grad_op"},
    {"strategy": "hsdp"},
    {"strategy": "zero1"},
    {"strategy": "zero2"},
    {"strategy": "zero3"},
    {"strategy": "fsdp_full", "cpu_offload": True},
    {"strategy": "zero2", "cpu_offload": True},
    {"strategy": "single", "act_ckpt": "selective"},
    {"strategy": "single", "act_ckpt": "full"},
    {"strategy": "single", "compile": True},
)


def checks(device: torch.device, gpu: str) -> list[Row]:
    """All checks; what raises is a wrong one, and the next goes on."""
    return [*kernels(device), *losses(device, gpu)]


def kernels(device: torch.device) -> Iterator[Row]:
    for name in KERNELS:
        for dtype in (torch.bfloat16, torch.float32):
            reason = why_not(name, device.type, dtype, KERNEL_SHAPES[-1][1], windowed=False)
            if reason is not None:
                case = str(dtype)[6:]
                yield {"check": name, "case": case, "status": "not run", "note": reason}
                continue
            for tokens, width, window in KERNEL_SHAPES:
                case = f"{str(dtype)[6:]}, {tokens} x {width}, window {window or 'none'}"
                reason = why_not(name, device.type, dtype, width, window is not None)
                if reason is not None:
                    yield {"check": name, "case": case, "status": "not run", "note": reason}
                    continue
                yield checked(
                    name,
                    case,
                    KERNEL_LIMITS[dtype],
                    lambda n=name, d=dtype, t=tokens, w=width, win=window: max(
                        kernel_error(n, device, d, t, w, heads, win) for heads in HEADS
                    ),
                )


def kernel_error(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    width: int,
    heads: tuple[int, int],
    window: int | None,
) -> float:
    """Largest difference of output and gradients from fp64, over the largest value."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, n, tokens, width) for n in (heads[0], heads[1], heads[1])]
    given = [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]
    expected = with_gradients(reference, [tensor.cpu().double() for tensor in given], window)
    measured = with_gradients(kernel(name), given, window)
    assert len(measured) == len(expected) == 4
    return max(
        float((got.cpu().double() - want).abs().max() / want.abs().max())
        for want, got in zip(expected, measured, strict=True)
    )


def losses(device: torch.device, gpu: str) -> Iterator[Row]:
    """Strategies against the single process on this device, and that against the CPU."""
    exact = curve(run_of(gpu, {}), device)
    with group_of_one(device):  # one for all: DeepSpeed keeps what it found at first
        yield from strategies(device, gpu, exact)
    on_cpu = curve(run_of("cpu", {}), torch.device("cpu"))
    yield checked("loss, fp32 on the CPU", "fp32", DEVICE_LIMIT, lambda: far(exact, on_cpu))
    bf16 = {"precision": "amp_bf16", "attention": "flash"}
    yield checked(
        "loss, fp32 on the CPU",
        "bf16, flash",
        BF16_LIMIT,
        lambda: far(curve(run_of(gpu, bf16), device), on_cpu),
    )


def strategies(device: torch.device, gpu: str, exact: list[float]) -> Iterator[Row]:
    for system in STRATEGIES:
        case = ", ".join(key if value is True else value for key, value in system.items())
        try:
            run = run_of(gpu, system)
        except ValidationError as error:
            note = error.errors()[0]["msg"]
            yield {"check": "strategy", "case": case, "status": "not run", "note": note}
            continue
        yield checked(
            "strategy", case, STRATEGY_LIMIT, lambda r=run: far(forced_curve(r, device), exact)
        )


def checked(check: str, case: str, limit: float, difference: Callable[[], float]) -> Row:
    row: Row = {"check": check, "case": case, "limit": limit}
    try:
        found = difference()
    except Exception as error:  # any: a check that fails is a result
        return row | {"status": "wrong", "note": f"{type(error).__name__}: {first_line(error)}"}
    return row | {"difference": found, "status": "right" if found <= limit else "wrong"}


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def run_of(gpu: str, system: dict[str, Any]) -> RunSpec:
    """Twenty steps of a small model with shared blocks; each step accumulates two micro-batches."""
    return RunSpec.model_validate(
        {
            "model": {
                "n_layers": 2,
                "sharing": "immediate",
                "d_model": 64,
                "n_heads": 4,
                "n_kv_heads": 2,
                "d_ff": 128,
                "vocab": 300,
            },
            "optim": {"lr": 0.003, "batch_tokens": 512, "grad_clip": 0.3},
            "data": {"seq_len": 64, "tokenizer": "bpe:300"},
            "system": {"gpu": gpu, "micro_batch": 4, "attention": "math"} | system,
            "tokens": STEPS * 512,
        }
    )


def curve(run: RunSpec, device: torch.device, *, spread: bool = False) -> list[float]:
    """Training losses by step in nats, over tokens that the model can learn something from."""
    trained = engine.build_engine(run, Ranks(0, 1, device))
    if spread:
        assert_spread(run, trained)
    generator = torch.Generator().manual_seed(0)
    weights = 1 / torch.arange(1, run.model.vocab + 1)
    found: list[Tensor] = []
    size = run.system.micro_batch * (run.data.seq_len + 1)
    for _ in range(STEPS):
        total = torch.zeros((), device=device)
        for last in (False, True):
            tokens = torch.multinomial(weights, size, replacement=True, generator=generator)
            batch = tokens.view(run.system.micro_batch, -1).to(device)
            total += trained.accumulate(batch, last=last)
        trained.step(run.optim.lr)
        found.append(total / run.grad_accum)
    return torch.stack(found).tolist()


def forced_curve(run: RunSpec, device: torch.device) -> list[float]:
    """The curve under the run's strategy in a group of one, which trains as `single` otherwise."""
    if run.system.strategy == "single":
        return curve(run, device)
    with patch.object(engine, "needs_group", lambda *given: True):
        return curve(run, device, spread=True)


def assert_spread(run: RunSpec, trained: Any) -> None:
    """The strategy is really there, not the plain model that one process would get."""
    held = trained.engine if run.system.strategy.startswith("zero") else trained.module
    kind = type(held).__name__
    wanted = {"ddp": "DistributedDataParallel", "zero": "DeepSpeed"}.get(
        run.system.strategy[:4].rstrip("123"), "FSDP"
    )
    assert kind.startswith(wanted), f"{run.system.strategy} trains as {kind}"


@contextmanager
def group_of_one(device: torch.device) -> Iterator[None]:
    on_cpu = device.type == "cpu"
    backend = "gloo" if on_cpu else "cpu:gloo,cuda:nccl"
    if not on_cpu:
        torch.cuda.set_device(0)
    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    try:
        with patch.dict(os.environ, {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}):
            yield  # DeepSpeed reads them
    finally:
        dist.destroy_process_group()


def far(found: list[float], expected: list[float]) -> float:
    """Largest difference; the curve must have moved, or it would prove nothing."""
    assert expected[0] - expected[-1] > 0.05, f"nothing was learned: {expected}"
    return max(abs(a - b) for a, b in zip(found, expected, strict=True))
