"""Runs one after the other in the same processes: what one leaves, the next does not find."""

import ctypes
import gc
import importlib
import platform
import sys
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist

TORCH_SEED = 67280421310721
"""What torch seeds its generators with in a new process (c10's `default_rng_seed_val`)."""
RESET_PEAK = "5"
"""Written to /proc/self/clear_refs, sets the largest resident set to the present one (proc(5))."""

ADDED_TO_PARAMETERS = frozenset({"_hp_mapping", "ds_id"})
"""By which of its attributes a parameter is known that DeepSpeed has wired up."""

CACHE = type(lru_cache(lambda: None))


def before_runs() -> None:
    """Take what this process has imported out of what is collected after each run.

    Once, before the first run. Modules are for ever, and looking through them took 0.2 s of every
    `between_runs`, measured on two cores. DeepSpeed must not be imported yet: what it keeps between
    runs could not be found any more (`gc.get_objects` does not see what is frozen).
    """
    importlib.import_module("thriftlm.training.probe")  # with all that a run needs, and this module
    gc.collect()
    gc.freeze()


def between_runs() -> None:
    """Make this process as good as new for another run.

    Every rank calls it, after a run has returned or raised and its exception is handled: what a
    traceback holds is not freed. The default process group stays, and with it NCCL's connections;
    groups that the run made are destroyed. Compiled code, cached layouts, DeepSpeed's state, memory
    that allocators kept and memory peaks are forgotten, and torch's random numbers begin anew. So
    the next run gives the losses of a new process, bit for bit, and its peak memory is its own.
    """
    _forget()
    if dist.is_available() and dist.is_initialized():
        _destroy_subgroups()
    torch.manual_seed(TORCH_SEED)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    _give_back_host_memory()


def leave_groups() -> None:
    """Leave all process groups at once, the default one too, though others may wait in them."""
    _forget()
    dist.distributed_c10d._abort_process_group()
    gc.collect()  # gloo closes its connections when nothing holds a group any more


def _forget() -> None:
    """What Python and libraries keep of a run."""
    _forget_deepspeed()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor.debug import _clear_sharding_prop_cache

        # What it knows names groups that will be gone.
        _clear_sharding_prop_cache()  # type: ignore[no-untyped-call]
    gc.collect()


def _forget_deepspeed() -> None:
    """Unhook DeepSpeed's engines, also half-built ones, and empty what it keeps in modules.

    Its hooks hold an engine's memory from C++, where no garbage collector sees the cycle, and its
    modules would go on with groups that are destroyed. Read in DeepSpeed 0.19.8.
    """
    if "deepspeed.runtime.engine" not in sys.modules:
        return
    from deepspeed.comm import comm
    from deepspeed.runtime.zero import parameter_offload, partition_parameters
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.utils import groups

    # Their own `destroy` asks the process group, which may be gone, and wants a whole engine.
    for one in gc.get_objects():
        if type(one) in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3):
            for hook in getattr(one, "_grad_acc_hooks", ()):
                hook.remove()
        elif type(one) is torch.nn.Parameter and not ADDED_TO_PARAMETERS.isdisjoint(vars(one)):
            vars(one).clear()
        elif type(one) is CACHE and str(one.__module__).startswith("deepspeed."):
            one.cache_clear()
    parameter_offload.FWD_MODULE_STACK.clear()
    partition_parameters.empty_buffers.clear()
    groups._release_process_group_references(None)
    comm.cdb = None


def _destroy_subgroups() -> None:
    """All groups but the default one, in the order in which every rank made them."""
    if dist.get_world_size() > 1:
        dist.barrier()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def _give_back_host_memory() -> None:
    """Freed memory to the kernel (`ranks.keep_freed_memory` holds it), and a new peak."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):  # another system than Linux, or one that does not allow it
        Path("/proc/self/clear_refs").write_text(RESET_PEAK)
