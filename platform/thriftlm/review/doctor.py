"""What this machine can run, and how fast its arithmetic and memory are when measured."""

import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import psutil
import torch
from rich.markup import escape

from thriftlm import prices
from thriftlm.planning.machine import Machine, remember
from thriftlm.planning.systems import STRATEGIES
from thriftlm.review.tables import plain_console
from thriftlm.search.history.provenance import versions
from thriftlm.search.history.storage import Storage
from thriftlm_models.attention import available_kernels

REPEATS = 5
CPU_MATRIX, CUDA_MATRIX = 1024, 8192


def examine(storage: Storage) -> dict[str, Any]:
    """Packages, devices, kernels, storage, age of prices, and measured speed of the device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    speed = measure(device)
    if device == "cpu":
        remember(speed, storage.root)
    there = next(path for path in (storage.root, *storage.root.parents) if path.exists())
    return {
        "versions": versions(),
        "machine": platform.platform(),
        "cpus": os.cpu_count(),
        "memory_gb": speed.memory_gb,
        "cuda_devices": [
            torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
        ],
        "attention": {
            f"{device} {name}": list(available_kernels(device, dtype))
            for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
        },
        "strategies": list(STRATEGIES),
        "matmul_tflops_measured": {"fp32": speed.fp32_tflops, "bf16": speed.bf16_tflops},
        "memory_gb_per_s_measured": speed.memory_gb_per_s,
        "storage": str(storage.root),
        "storage_free_gb": round(shutil.disk_usage(there).free / 1e9, 1),
        "price_age_days": prices.age_days(datetime.now(UTC).date()),
    }


def show_examination(found: dict[str, Any]) -> None:
    """Print what `examine` found."""
    console = plain_console()
    for name, value in findings(found):
        console.print(f"[bold]{name:<11}[/] {escape(value)}", soft_wrap=True)


def findings(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What `examine` found, line by line."""
    packages = dict(found["versions"])
    commit, snapshot = packages.pop("git_commit"), packages.pop("price_snapshot")
    yield "packages", ", ".join(f"{name} {version}" for name, version in packages.items())
    yield "git commit", commit or "none: not a checkout"
    yield "prices", f"{snapshot}, {found['price_age_days']} days old"
    yield "machine", found["machine"]
    yield "host", f"{found['cpus']} CPUs, {found['memory_gb']:g} GB of memory"
    yield "CUDA", ", ".join(found["cuda_devices"]) or "no device"
    for where, kernels in found["attention"].items():
        yield "attention", f"{where}: {', '.join(kernels) or 'no kernel runs'}"
    yield "strategies", ", ".join(found["strategies"])
    speeds = found["matmul_tflops_measured"]
    yield "arithmetic", f"{', '.join(f'{k} {v:g}' for k, v in speeds.items())} TFLOP/s measured"
    yield "memory", f"{found['memory_gb_per_s_measured']:g} GB/s measured"
    yield "storage", f"{found['storage']}, {found['storage_free_gb']:g} GB free"


def measure(device: str) -> Machine:
    """Speed of arithmetic and memory of a device, with this machine's name and memory.

    Without CUDA that is what `thriftlm estimate --gpu cpu` and dry runs go by, so `examine` leaves
    it in the storage folder.
    """
    return Machine(
        host=platform.node(),
        cpus=torch.get_num_threads(),
        fp32_tflops=round(matmul_tflops(device, torch.float32), 3),
        bf16_tflops=round(matmul_tflops(device, torch.bfloat16), 3),
        memory_gb_per_s=round(memory_gb_per_s(device), 1),
        memory_gb=round(psutil.virtual_memory().total / 1e9, 1),
        measured_on=str(datetime.now(UTC).date()),
    )


def matmul_tflops(device: str, dtype: torch.dtype) -> float:
    """Measured 1e12 FLOP/s of a square matrix product, 2 n^3 FLOPs; best of five."""
    n = CUDA_MATRIX if device == "cuda" else CPU_MATRIX
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / seconds(lambda: a @ b, device) / 1e12


def memory_gb_per_s(device: str) -> float:
    """Measured 1e9 bytes/s of a copy of 256 MB, read and write both counted; best of five."""
    source = torch.ones(64 * 2**20, device=device)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    return moved / seconds(lambda: target.copy_(source), device) / 1e9


def seconds(work: Callable[[], object], device: str) -> float:
    """Fewest wall-clock seconds of the work, after one warm-up.

    What a machine can do is what it did when nothing else ran on it: a median of a busy machine
    would make every later estimate too slow.
    """
    taken = []
    for _ in range(REPEATS + 1):
        begin = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begin)
    return min(taken[1:])
