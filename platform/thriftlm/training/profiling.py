"""One step under torch's profiler: what communication took of it, or a trace to look at."""

import os
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it prints when it starts and when it stops

Span = tuple[int, int]
"""Begin and end of an event in nanoseconds."""
COLLECTIVES_ON_CPU = ("gloo:", "mpi:", "ucc:")
"""How torch's process groups name a collective on the host, from its issue to its end."""
COMPUTATION_ON_CPU = ("aten::", "## Call CompiledFxGraph")
"""Torch's operators, and the code that torch.compile makes of them."""


class CommunicationSample:
    """A context that profiles one training step of this rank.

    `fraction` is the share of the step's wall time in which a collective was running and no
    computation was: communication that nothing hid. A collective runs from when this rank calls it
    until it ends, so that waiting for a rank that is late counts as well; so does what another
    collective of the same moment takes, once. On CUDA the spans are kernels of NCCL against all
    other kernels and copies, on the CPU what gloo reports against torch's operators.

    Attributes:
        fraction: None until the step is over, and where it raised.
        seconds: of the whole context, the profiler's own work included.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.fraction: float | None = None
        self.seconds = 0.0

    def __enter__(self) -> "CommunicationSample":
        self._entered = time.perf_counter()
        on_cuda = self.device.type == "cuda"
        self._profile = profile(
            activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]
        )
        self._profile.start()
        self._begun = time.perf_counter()
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        synchronise(self.device)
        wall_ns = (time.perf_counter() - self._begun) * 1e9
        self._profile.stop()
        if kind is None:
            self.fraction = min(1.0, exposed_ns(*self._spans()) / wall_ns)
        self.seconds = time.perf_counter() - self._entered

    def _spans(self) -> tuple[list[Span], list[Span]]:
        profiler = self._profile.profiler
        assert profiler is not None
        assert profiler.kineto_results is not None
        # The raw events: torch's own table of them takes longer than the step.
        return sorted_out(profiler.kineto_results.events())


def sorted_out(events: Iterable[Any]) -> tuple[list[Span], list[Span]]:
    """The spans of collectives and those of computation among kineto's events."""
    collectives: list[Span] = []
    computation: list[Span] = []
    for event in events:
        name = event.name()
        span = (event.start_ns(), event.end_ns())
        if event.device_type() == DeviceType.CPU:
            if name.startswith(COLLECTIVES_ON_CPU):
                collectives.append(span)
            elif name.startswith(COMPUTATION_ON_CPU):
                computation.append(span)
        elif event.activity_type() in {"kernel", "gpu_memcpy", "gpu_memset"}:
            (collectives if "nccl" in name.lower() else computation).append(span)
    return collectives, computation


def exposed_ns(collectives: Iterable[Span], computation: Iterable[Span]) -> int:
    """Nanoseconds in which at least one of the first runs and none of the second does."""
    both = merged([*collectives, *computation])
    return covered(both) - covered(merged(computation))


def merged(spans: Iterable[Span]) -> list[Span]:
    """Their union, as spans that do not touch."""
    found: list[Span] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((begin, end))
    return found


def covered(spans: Iterable[Span]) -> int:
    """Nanoseconds of spans that do not overlap."""
    return sum(end - begin for begin, end in spans)


class Trace:
    """A chrome trace of the steps that `RunSpec.profile_steps` names, of the first rank alone.

    It opens in chrome://tracing or Perfetto. What happens between the steps (a validation, a
    checkpoint) is in it too.

    Args:
        steps: first and last step, counted from 1; None records nothing.
        folder: where the file goes.
        device: whose kernels are recorded beside the host's operators.
        rank: this rank.
    """

    def __init__(
        self, steps: tuple[int, int] | None, folder: Path, device: torch.device, rank: int
    ) -> None:
        self.steps = steps
        self._device = device
        self._is_mine = rank == 0
        self.path = folder / "trace_{}_{}.json.gz".format(*(steps or (0, 0)))
        self._profile: profile | None = None
        self._written: str | None = None

    def covers(self, step: int) -> bool:
        """Whether a step is recorded: on every rank the same, since its time is everybody's."""
        return self.steps is not None and self.steps[0] <= step <= self.steps[1]

    @contextmanager
    def recorded(self, step: int) -> Iterator[None]:
        """A context around a step that `covers` names; the last one writes the file."""
        if self._is_mine and self._profile is None:
            activities = [ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities)
            self._profile.start()
        yield
        if self._profile is not None and self.steps is not None and step == self.steps[1]:
            synchronise(self._device)
            self._profile.stop()
            self._write(self._profile)
            self._profile = None

    def _write(self, recorded: profile) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            recorded.export_chrome_trace(str(self.path))
        except OSError as error:  # a full disk does not end a run
            warnings.warn(f"the trace {self.path} was not written: {error}", stacklevel=2)
        else:
            self._written = str(self.path)

    def take(self) -> str | None:
        """Path of a file that was written since this was last asked."""
        written, self._written = self._written, None
        return written

    def abandon(self) -> None:
        """Stop recording, where a run ends before the last of its steps; nothing is written."""
        if self._profile is not None:
            self._profile.stop()
        self._profile = None


def synchronise(device: torch.device) -> None:
    """Wait for the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
