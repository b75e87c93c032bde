"""Times many systems one after the other in the processes of one allocation.

Each system trains the run's own batches for a few steps, by the training loop itself, so that what
is measured is what a trial would report. Running out of memory, and a kernel or compiler that is
not there, are results of a system; the next one finds the processes as good as new.

A rank that cannot go on says so in the store of the process group, where a thread of each other
rank looks, and leaves its groups, which wakes those that wait for it there: gloo notices that the
connections are closed, and NCCL's kernels are aborted by that thread. Then all make a new group.
"""

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any, Literal
from uuid import uuid4

import torch.distributed as dist
from pydantic import ValidationError
from torch.distributed import DistStoreError, PrefixStore  # type: ignore[attr-defined]

from thriftlm.spec import InputError, RunSpec, SystemSpec
from thriftlm.timings import (
    MOST_STEPS,
    REPEAT_SECONDS,
    REPEATS,
    WARM_UP_STEPS,
    Timing,
    steps_of_repeat,
)
from thriftlm.training.consecutive import between_runs, leave_groups
from thriftlm.training.loop import Decision, Run, is_out_of_memory, peak_memory_gb
from thriftlm.training.ranks import Ranks, join_again, joined, needs_group

POLL_SECONDS = 0.2
"""Between two looks of the thread that hears of other ranks' trouble."""
EXPLANATION_PATIENCE = timedelta(seconds=20)
"""From an error that a rank cannot explain to the word of the one that caused it."""
PATIENCE = timedelta(minutes=10)
"""For the slowest rank to end with a system."""
TROUBLE, ENDED = "trouble", "ended/"
"""Keys of the store."""
COMPILER_SIGNS = ("torch._dynamo.exc", "torch._inductor.exc")
"""Modules of the exceptions by which torch.compile says that it cannot."""

Report = Callable[[Timing], Decision]
"""Called on every rank after each system."""


@dataclass(frozen=True)
class Trouble:
    """Why a system could not be timed."""

    status: Literal["oom", "unsupported"]
    reason: str


def go_on(timing: Timing) -> Decision:
    """The report of who only wants the list at the end."""
    return Decision.CONTINUE


def probe(
    run: RunSpec,
    systems: Sequence[SystemSpec],
    report: Report = go_on,
    *,
    cache: Path,
    repeats: int = REPEATS,
    seconds: float = REPEAT_SECONDS,
) -> list[Timing]:
    """Time systems with a run's model, batch and optimizer; every rank calls it alike.

    The answer to a report counts when any rank says stop.

    Args:
        run: what is trained; its own system does not matter.
        systems: in this order, all with the same gpu, n_gpus and cpus_per_worker.
        report: called on every rank after each system.
        cache: folder of token shards; built when missing.
        repeats: times that each is timed.
        seconds: about how long one repeat is.

    Raises:
        InputError: the systems need different workers; wrong number of processes; no such GPU.
    """
    check_alike(systems)
    found: list[Timing] = []
    needing = (one for one in systems if needs_group(one, one.n_gpus))
    with joined(next(needing, systems[0])) as ranks:
        session = ranks.same(uuid4().hex)
        for number, system in enumerate(systems):
            name = f"probe/{session}/{number}"
            timing = _time_one(run, system, ranks, name, cache, repeats, seconds)
            found.append(timing)
            if ranks.any(report(timing) is Decision.STOP):
                break
    return found


def check_alike(systems: Sequence[SystemSpec]) -> None:
    """Nothing, where the same workers can run all of them.

    Raises:
        InputError: they cannot, or there are none.
    """
    workers = {(one.gpu, one.n_gpus, one.cpus_per_worker) for one in systems}
    if len(workers) != 1:
        raise InputError(
            "a probe times systems of one gpu, n_gpus and cpus_per_worker, got "
            + (", ".join(f"{n} x {gpu} with {cpus}" for gpu, n, cpus in sorted(workers)) or "none")
            + "; make a probe of each"
        )


def _time_one(
    run: RunSpec,
    system: SystemSpec,
    ranks: Ranks,
    name: str,
    cache: Path,
    repeats: int,
    seconds: float,
) -> Timing:
    begin = time.perf_counter()
    alarm = Alarm(ranks, name) if ranks.world_size > 1 else None
    found = _attempt(run, system, ranks, cache, repeats, seconds)
    if alarm is not None:
        found = alarm.settle(found)
    if isinstance(found, Exception):
        raise found
    if isinstance(found, Trouble):
        found = Timing(system=system, status=found.status, detail=found.reason)
    between_runs()
    return found.model_copy(update={"seconds": time.perf_counter() - begin})


def _attempt(
    run: RunSpec, system: SystemSpec, ranks: Ranks, cache: Path, repeats: int, seconds: float
) -> Timing | Trouble | Exception:
    """The timing, or why there is none; what the attempt had built is free when it returns."""
    try:
        return _timed(_placed(run, system, repeats), ranks, cache, repeats, seconds)
    except Exception as error:
        return _trouble(error, ranks.rank) or error.with_traceback(None)


def _placed(run: RunSpec, system: SystemSpec, repeats: int) -> RunSpec:
    """The run on a system, long enough to be timed."""
    steps = WARM_UP_STEPS + repeats * MOST_STEPS
    tokens = max(run.tokens, steps * run.optim.batch_tokens)
    fields = run.model_dump() | {"system": system.model_dump(), "tokens": tokens}
    return RunSpec.model_validate(fields | {"profile_steps": None})


def _trouble(error: Exception, rank: int) -> Trouble | None:
    """What an error says of the system; None where it says nothing of it."""
    first = (str(error).splitlines() or [""])[0]
    if is_out_of_memory(error):
        return Trouble("oom", f"out of memory on rank {rank}: {first}")
    is_compiler = type(error).__module__.startswith(COMPILER_SIGNS)
    if isinstance(error, ValidationError):
        return Trouble("unsupported", error.errors(include_url=False)[0]["msg"])
    if isinstance(error, InputError) or is_compiler:
        return Trouble("unsupported", first or type(error).__name__)
    return None


def _timed(spec: RunSpec, ranks: Ranks, cache: Path, repeats: int, seconds: float) -> Timing:
    training = Run(spec, lambda progress, written: Decision.CONTINUE, ranks, cache)
    try:
        training.set_up(cache)
        warm = training.measured(WARM_UP_STEPS)
        per_step = warm.seconds / warm.timed_steps
        steps = steps_of_repeat(per_step, seconds)
        rates = []
        for _ in range(repeats):
            rate = training.rate(training.measured(steps))
            assert rate is not None  # only the first step of a process is not timed
            rates.append(rate)
        return Timing(
            system=spec.system,
            status="timed",
            tokens_per_s=median(rates),
            low=min(rates),
            high=max(rates),
            repeats=repeats,
            steps=steps,
            peak_mem_gb=ranks.same(peak_memory_gb(ranks.device)),
        )
    finally:
        training.close()


class Alarm:
    """How the ranks agree on what became of a system, also while some wait in a collective.

    Args:
        ranks: several.
        name: of the system, in no other alarm of these processes.
    """

    def __init__(self, ranks: Ranks, name: str) -> None:
        self.ranks = ranks
        self.store = PrefixStore(name, dist.distributed_c10d._get_default_store())
        self.over = threading.Event()
        another: Any = self.store.clone()  # type: ignore[attr-defined]
        self.thread = threading.Thread(target=self._listen, args=(another,), daemon=True)
        self.thread.start()

    def settle(self, found: Timing | Trouble | Exception) -> Timing | Trouble | Exception:
        """What became of the system on all ranks, which are together again.

        An exception stays one where no rank's trouble explains it.
        """
        if isinstance(found, Trouble):
            self.store.set(TROUBLE, json.dumps([found.status, found.reason]))
        elif isinstance(found, Exception) and not self._is_explained():
            return found
        if not isinstance(found, Timing):
            leave_groups()
        self.store.set(f"{ENDED}{self.ranks.rank}", "")
        self.store.wait([f"{ENDED}{rank}" for rank in range(self.ranks.world_size)], PATIENCE)
        self.over.set()
        self.thread.join()
        if not self.store.check([TROUBLE]):
            return found
        if isinstance(found, Timing):
            leave_groups()
        join_again(self.ranks, PrefixStore("again", self.store))
        return Trouble(*json.loads(self.store.get(TROUBLE)))

    def _is_explained(self) -> bool:
        """Whether another rank says why this one got an error."""
        try:
            self.store.wait([TROUBLE], EXPLANATION_PATIENCE)
        except DistStoreError:
            return False
        return True

    def _listen(self, store: Any) -> None:
        while not self.over.wait(POLL_SECONDS):
            if store.check([TROUBLE]):
                if self.ranks.device.type == "cuda":
                    for group in list(dist.distributed_c10d._world.pg_map):
                        group.abort()
                return
