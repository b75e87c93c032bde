"""Spot capacity replayed from a trace: when instances are there, and when they are taken back."""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from thriftlm import catalog
from thriftlm.search.cluster.capacity import Capacity
from thriftlm.spec import InputError, SystemSpec


@dataclass(frozen=True)
class SpotTrace:
    """Instances that a spot market had at each tick; it begins again when it is over."""

    seconds: float
    """Between two ticks."""
    instances: tuple[int, ...]
    offset: int = 0
    """Tick at which a replay begins."""

    def at(self, now: float) -> int:
        """Instances there are so many seconds after the beginning."""
        return self.instances[(self._tick(now) + self.offset) % len(self.instances)]

    def next_change(self, now: float) -> float | None:
        """Seconds after the beginning at which there are more or fewer; None where never."""
        tick, here = self._tick(now), self.at(now)
        for later in range(tick + 1, tick + len(self.instances)):
            if self.instances[(later + self.offset) % len(self.instances)] != here:
                return later * self.seconds
        return None

    def _tick(self, now: float) -> int:
        return int(now / self.seconds + 1e-6)  # at a tick, whatever its product was rounded to

    def begun_at(self, seed: int) -> "SpotTrace":
        """The trace from its beginning for seed 0, from a tick drawn by the seed for others."""
        drawn = int(np.random.default_rng(seed).integers(len(self.instances))) if seed else 0
        return SpotTrace(self.seconds, self.instances, drawn)


def read_trace(path: Path, speedup: float = 1.0) -> SpotTrace:
    """A trace as SkyPilot publishes them: `{"metadata": {"gap_seconds": S}, "data": [N, ...]}`.

    Args:
        path: JSON file.
        speedup: how many times as fast the trace is played.

    Raises:
        InputError: it cannot be read, or is no such trace.
    """
    try:
        document = json.loads(path.read_text())
        seconds, data = document["metadata"]["gap_seconds"], document["data"]
        found = SpotTrace(float(seconds) / speedup, tuple(int(count) for count in data))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give --spot-trace a readable file") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f'{path}: not a spot trace; it must hold {{"metadata": {{"gap_seconds": S}}, '
            f'"data": [instances at each tick]}}: {error!r}'
        ) from error
    if not found.instances or found.seconds <= 0 or min(found.instances) < 0:
        raise InputError(
            f"{path}: a spot trace needs gap_seconds above 0 and at least one tick, none of them "
            "below 0 instances"
        )
    return found


@dataclass(frozen=True)
class SpotCapacity(Capacity):
    """All on-demand systems that are wanted, and spot ones as far as a trace has instances.

    The trace is one pool, whatever instances the systems of the space ask for.
    """

    trace: SpotTrace | None
    """None where spot has room for everything."""
    clock: Callable[[], float]
    """Seconds after the beginning of the trace."""

    def can_ever_hold(self, system: SystemSpec) -> bool:
        """Whether the trace ever has the instances."""
        if self.trace is None or system.market != "spot":
            return True
        return instances(system) <= max(self.trace.instances)

    def can_hold(self, system: SystemSpec, running: Iterable[SystemSpec]) -> bool:
        """Whether the instances are there now, beside those that run."""
        if self.trace is None or system.market != "spot":
            return True
        return self.used(running) + instances(system) <= self.trace.at(self.clock())

    @staticmethod
    def used(running: Iterable[SystemSpec]) -> int:
        """Spot instances that trials hold."""
        return sum(instances(system) for system in running if system.market == "spot")


def instances(system: SystemSpec) -> int:
    """Instances of a system: its nodes, by `gpus_per_node` or else the catalog's."""
    per_node = system.gpus_per_node or catalog.gpu(system.gpu).gpus_per_node or system.n_gpus
    return math.ceil(system.n_gpus / per_node)
