"""What a report says of the steps since the last one, measured without slowing them down.

Losses and norms stay on the device until the report, and the device is waited for at the ends of a
stretch of steps, never inside it.
"""

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from thriftlm.spec import RunSpec
from thriftlm.training.profiling import CommunicationSample, Trace, synchronise
from thriftlm.training.ranks import Ranks

SPIKE_WINDOW = 50
"""Steps whose losses make the level that a spike stands out from."""
SPIKE_HISTORY = 20
"""Fewest of them that make a level."""
SPIKE_DEVIATIONS = 7.0
"""Standard deviations above the level from which on a loss is a spike.

OLMo 2's "spike score" (arXiv 2501.00656) counts values seven deviations from the mean of the last
1,000. Ours takes the median of the last 50, and the deviation from the median change between
neighbouring steps, so that neither the fall of a short run nor the spikes themselves widen it.
"""
DEVIATION_PER_CHANGE = 1.4826 / math.sqrt(2)
"""Standard deviation of independent normal values over the median size of their differences."""
SPIKE_NATS = 0.05
"""Least rise of a spike in nats, for losses that hardly vary. Ours."""
SAMPLING_SHARE = 0.005
"""Largest share of the training time that goes into sampling communication."""
ASSUMED_SAMPLE_SECONDS = 0.2
"""What a sample costs before one was taken; measured 0.1 s for a step of 8,000 operators."""
LEAST_SAMPLE_SECONDS = 0.01
"""Of a sample at least: beside a step that noise made long it would seem to cost nothing."""
MOST_BLOCK_PASSES = 2000
"""Blocks run in one step above which no sample is taken: its events would fill the memory."""


class Spikes:
    """Counts losses that stand far above the running level of those before them."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=SPIKE_WINDOW)

    def count(self, losses: Iterable[float]) -> int | None:
        """How many of the next losses are spikes; None while too few steps are known to tell.

        A loss that is not finite is one, and does not enter the level.
        """
        found = None
        for loss in losses:
            if len(self._recent) >= SPIKE_HISTORY:
                found = (found or 0) + (not loss <= self._limit())
            if math.isfinite(loss):
                self._recent.append(loss)
        return found

    def _limit(self) -> float:
        level = median(self._recent)
        deviation = DEVIATION_PER_CHANGE * median(abs(b - a) for a, b in pairwise(self._recent))
        return level + max(SPIKE_DEVIATIONS * deviation, SPIKE_NATS)


@dataclass(frozen=True)
class Reading:
    """What an interval between two reports measured, the same on every rank."""

    train_loss: float | None
    """Mean loss in nats per token, over the ranks and the steps that were not skipped."""
    first_loss: float | None
    """That of the first of these steps."""
    skipped_steps: int
    """Steps whose gradients were not finite, and which changed nothing."""
    grad_norm: float | None
    """Of the last step."""
    timed_steps: int
    """Steps behind `seconds`."""
    seconds: float
    """Wall time of the timed steps, mean over ranks."""
    loss_spikes: int | None
    data_wait_fraction: float | None
    communication_fraction: float | None
    grad_norm_max: float | None
    grad_norm_median: float | None


class Telemetry:
    """What is measured over a whole process: one `Interval` per report comes out of it."""

    def __init__(self, spec: RunSpec, ranks: Ranks, folder: Path) -> None:
        self.ranks = ranks
        self.grad_accum = spec.grad_accum
        self.trace = Trace(spec.profile_steps, folder, ranks.device, ranks.rank)
        self.is_cold = True  # the first step of a process pays set-up
        self._spikes = Spikes()
        self._is_sampled = (
            ranks.world_size > 1 and spec.grad_accum * len(spec.model.schedule) <= MOST_BLOCK_PASSES
        )
        self._sample_seconds = ASSUMED_SAMPLE_SECONDS
        self._since_sample = 0.0

    @property
    def is_sample_due(self) -> bool:
        """Whether a sample now keeps to its share of the time; the same on every rank."""
        return self._is_sampled and self._sample_seconds <= SAMPLING_SHARE * self._since_sample

    def reading(self, interval: "Interval") -> Reading:
        """What the ranks measured, put together; every rank calls it.

        Waits, communication and seconds are means over the ranks: a rank that is late shows as
        communication of all the others.
        """
        sample = interval.sample
        *losses, seconds, waited, fraction, cost = self.ranks.mean(
            *(loss / self.grad_accum for loss in as_floats(interval.losses)),
            interval.seconds,
            interval.waited,
            sample.fraction or 0.0 if sample else 0.0,
            sample.seconds if sample else 0.0,
        )
        per_step = seconds / interval.steps if interval.steps else 0.0
        self._since_sample += seconds
        if sample:
            self._sample_seconds = max(LEAST_SAMPLE_SECONDS, cost - per_step)
            self._since_sample = 0.0
        all_norms = as_floats(interval.norms)
        norms = [norm for norm in all_norms if math.isfinite(norm)]
        counted = [
            loss for loss, norm in zip(losses, all_norms, strict=True) if math.isfinite(norm)
        ]
        return Reading(
            train_loss=sum(counted) / len(counted) if counted else None,
            first_loss=next(iter(counted), None),
            skipped_steps=len(losses) - len(counted),
            grad_norm=all_norms[-1] if math.isfinite(all_norms[-1]) else None,
            timed_steps=interval.steps,
            seconds=seconds,
            loss_spikes=self._spikes.count(losses),
            data_wait_fraction=waited / seconds if interval.steps else None,
            communication_fraction=fraction if sample else None,
            grad_norm_max=max(norms, default=None),
            grad_norm_median=median(norms) if norms else None,
        )


class Interval:
    """The steps between two reports on this rank.

    Timed is every step but the first of a process, those of a trace, and the one that samples
    communication.

    Args:
        telemetry: of the process.
        steps: how many steps it will have, unless it ends early.
    """

    def __init__(self, telemetry: Telemetry, steps: int) -> None:
        self.losses: list[Tensor] = []
        self.norms: list[Tensor | float] = []
        self.steps, self.seconds, self.waited = 0, 0.0, 0.0
        self.sample: CommunicationSample | None = None
        self._telemetry = telemetry
        # The second step, so that the interval keeps one for its rate.
        self._samples = telemetry.is_sample_due and steps > 1
        self._device = telemetry.ranks.device
        self._since: float | None = None  # while a stretch of timed steps runs

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """A context around the optimizer step of that number, counted from 1."""
        telemetry = self._telemetry
        is_cold, telemetry.is_cold = telemetry.is_cold, False
        if telemetry.trace.covers(number):
            self.pause()
            with telemetry.trace.recorded(number):
                yield
            telemetry.ranks.barrier()  # else the others' next step waits for the file
        elif is_cold:
            yield
        elif self._samples and len(self.losses) == 1:
            self.pause()
            with CommunicationSample(self._device) as self.sample:
                yield
            telemetry.ranks.barrier()
        else:
            if self._since is None:
                self._since = self._now()
            yield
            self.steps += 1

    def waiting_for(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """The same batches, with the time taken that the host waits for each."""
        source = iter(batches)
        while True:
            begin = time.perf_counter()
            batch = next(source, None)
            if self._since is not None:
                self.waited += time.perf_counter() - begin
            if batch is None:
                return
            yield batch

    def add(self, loss_sum: Tensor, norm: Tensor | float) -> None:
        """Keep the loss of a step, summed over its micro-batches, and its gradient norm."""
        self.losses.append(loss_sum)
        self.norms.append(norm)

    def pause(self) -> None:
        """End a stretch of timed steps: the device's work of it is waited for."""
        if self._since is not None:
            self.seconds += self._now() - self._since
        self._since = None

    def _now(self) -> float:
        synchronise(self._device)
        return time.perf_counter()


def as_floats(values: list[Tensor] | list[Tensor | float]) -> list[float]:
    """Scalars of the device or the host as numbers, fetched in one go."""
    on_device = [value for value in values if isinstance(value, Tensor)]
    fetched = iter(torch.stack(on_device).tolist() if on_device else ())
    return [float(next(fetched) if isinstance(value, Tensor) else value) for value in values]
