"""What a cluster can hold, so that a trial starts only when its whole gang fits."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from thriftlm import catalog
from thriftlm.spec import SystemSpec


@dataclass(frozen=True)
class Capacity:
    """CPUs and GPUs of a cluster by Ray's resource names, such as `CPU` or `GPU:H100`."""

    total: dict[str, float]

    def can_ever_hold(self, system: SystemSpec) -> bool:
        """Whether the empty cluster holds the gang."""
        return self.can_hold(system, ())

    def can_hold(self, system: SystemSpec, running: Iterable[SystemSpec]) -> bool:
        """Whether the gang fits beside those that run."""
        used: Counter[str] = Counter()
        for other in running:
            used.update(needs(other))
        return all(
            used[name] + amount <= self.total.get(name, 0.0)
            for name, amount in needs(system).items()
        )


def needs(system: SystemSpec) -> dict[str, float]:
    """Resources of the whole gang."""
    cpus = float(system.n_gpus * system.cpus_per_worker)
    if system.gpu == "cpu":
        return {"CPU": cpus}
    return {"CPU": cpus, f"GPU:{catalog.gpu(system.gpu).ray_accelerator_type}": system.n_gpus}
