"""Which live gang serves the next trial, and which must go.

A gang that ended its trial keeps its workers for a while: the next trial with the same resources
then begins at once, instead of paying for processes, imports, CUDA and NCCL again. It is billed
while it waits, so it never waits long, and it makes room as soon as another trial needs it.
"""

from thriftlm.search.cluster.capacity import Capacity
from thriftlm.search.history.state import SearchState
from thriftlm.spec import SystemSpec

LONGEST_IDLE_SECONDS = 15.0
"""A start costs 8 to 20 s on two cores (`budget.FIRST_REPORT_SECONDS`): waiting longer costs more
than it can save."""
RESOURCES = (
    *("gpu", "n_gpus", "gpus_per_node", "cpus_per_worker"),
    *("cloud", "region", "market", "billing"),
)
"""Fields of a system that the same workers cannot change: what they hold and are billed for."""


def resources(system: SystemSpec) -> tuple[object, ...]:
    """What a gang holds and is billed for: two systems with the same can share one."""
    return tuple(getattr(system, field) for field in RESOURCES)


class Gangs:
    """Decides about gangs; what it decides is in the journal as trials are allocated.

    Args:
        state: of the search.
        capacity: of the cluster.
    """

    def __init__(self, state: SearchState, capacity: Capacity) -> None:
        self.state, self.capacity = state, capacity
        self.leaving: set[str] = set()
        """Asked to end, and holding resources until they have."""

    def of(self, system: SystemSpec) -> str:
        """A gang that waits with these resources, else the name of a new one."""
        return self.waiting(system) or f"gang-{self.state.gangs}"

    def has_room(self, system: SystemSpec) -> bool:
        """Whether a trial can start now; if only waiting gangs stand in its way, they must go."""
        if self.waiting(system):
            return True
        running = [trial.run.system for trial in self.state.running]
        idle = {name: gang.system for name, gang in self.state.idle.items()}
        if self.capacity.can_hold(system, [*running, *idle.values()]):
            return True
        if not self.capacity.can_hold(system, running):
            return False
        for name in list(idle):  # the one that has waited longest goes first
            idle.pop(name)
            self.leaving.add(name)
            if self.capacity.can_hold(system, [*running, *idle.values()]):
                break
        return False

    def dismiss_all(self) -> bool:
        """Let every gang that waits go; whether there is any."""
        self.leaving |= self.state.idle.keys()
        return bool(self.leaving)

    def dismissed(self, now: float) -> set[str]:
        """Gangs that must end now: those that were in the way, and those that waited too long."""
        idle = self.state.idle
        late = {name for name, g in idle.items() if now - g.held.since > LONGEST_IDLE_SECONDS}
        self.leaving = (self.leaving | late) & idle.keys()
        return self.leaving

    def waiting(self, system: SystemSpec) -> str | None:
        """A gang that waits with these resources."""
        wanted = resources(system)
        return next(
            (
                name
                for name, gang in self.state.idle.items()
                if name not in self.leaving and resources(gang.system) == wanted
            ),
            None,
        )
