"""The processes of one run and their device."""

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store

from thriftlm import catalog
from thriftlm.spec import InputError, SystemSpec

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Parameters of glibc's mallopt, from its malloc.h."""


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of the run."""

    rank: int
    world_size: int
    device: torch.device

    def mean(self, *values: float) -> list[float]:
        """Each value averaged over the ranks, in float64."""
        return [total / self.world_size for total in self.sum(*values)]

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the ranks, in float64."""
        held = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(held)
        return [float(value) for value in held.tolist()]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; the same answer everywhere."""
        return self.sum(float(flag))[0] > 0

    def same(self, value: Any) -> Any:
        """The first rank's value, on every rank."""
        held = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(held)
        return held[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()


@contextmanager
def joined(system: SystemSpec) -> Iterator[Ranks]:
    """The ranks of this run, with a process group when there are several.

    A group that a launcher (Ray Train) already made is used and left alone; under `torchrun` one is
    made and destroyed.

    Raises:
        InputError: the number of processes is not `n_gpus`, no such GPU in the catalog, or none in
            this machine.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != system.n_gpus:
        raise InputError(
            f"system.n_gpus is {system.n_gpus} but {started} process(es) were started; run "
            f"`torchrun --nproc-per-node {system.n_gpus} -m thriftlm train ...`"
        )
    device = _device(system)
    made = needs_group(system, started) and not dist.is_initialized()
    if made:
        _init_group(device, started)
    try:
        rank = dist.get_rank() if started > 1 else 0
        yield Ranks(rank, started, device)
    finally:
        if made:
            dist.destroy_process_group()


def needs_group(system: SystemSpec, world_size: int) -> bool:
    """Whether the strategy spreads anything: over other ranks, or into host memory."""
    return world_size > 1 or system.cpu_offload


def _init_group(device: torch.device, started: int) -> None:
    """Join the processes that `torchrun` started; a process alone makes a group of one."""
    if started > 1:
        dist.init_process_group(backend_of(device), device_id=_bound(device))
    else:
        join_again(Ranks(0, 1, device), HashStore())


def join_again(ranks: Ranks, store: Store) -> None:
    """Make the process group of known ranks; the store has held none before."""
    dist.init_process_group(
        backend_of(ranks.device),
        store=store,
        rank=ranks.rank,
        world_size=ranks.world_size,
        device_id=_bound(ranks.device),
    )


def backend_of(device: torch.device) -> str:
    """On CUDA gloo serves beside NCCL: offloaded state is reduced in host memory."""
    return "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"


def _bound(device: torch.device) -> torch.device | None:
    return None if device.type == "cpu" else device


def _device(system: SystemSpec) -> torch.device:
    if catalog.gpu(system.gpu).id == "cpu":
        torch.set_num_threads(system.cpus_per_worker)
        keep_freed_memory()
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError(f"system.gpu is {system.gpu} but this machine has no CUDA; use gpu: cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def keep_freed_memory() -> None:
    """Let the C library keep the memory that a step frees, for the next one.

    glibc returns blocks of 32 MB and more to the kernel at once, which then hands out and zeroes
    every page again in the next step: a quarter of the time of a step with a large vocabulary
    (measured, tests/benchmarks). It costs 2 to 5% more resident memory, and holds for the main
    thread; Ray's workers, which train in another, get it from their environment (`search.gang`).
    Does nothing with another C library.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(M_TOP_PAD, 2**26)
