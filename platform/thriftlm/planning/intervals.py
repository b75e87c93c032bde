"""How far an estimate can be trusted: the class of each system, whose error the calibration has."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from thriftlm.planning.seconds import is_hopper
from thriftlm.planning.systems import KERNELS, STACKS, Floats, Systems

CLASSES = (
    "new_source",
    "own_cpu",
    "unmeasured_stack",
    "consumer_card",
    "optimistic_fp8",
    "plain_eager",
)
"""Classes of estimates by how wrong they tend to be, the worst last."""


def interval_classes(s: Systems) -> NDArray[np.int64]:
    """Positions in `CLASSES`: the worst that applies to each system."""
    eager = s.stack == STACKS.index("eager")
    math = s.kernel == KERNELS.index("math")
    loose = (s.has_nvlink == 0) | ((s.capability != 8.0) & (is_hopper(s) == 0))
    own_cpu = (s.on_cpu > 0) & (s.stack == STACKS.index("thriftlm"))
    applies = {
        "unmeasured_stack": (s.stack >= STACKS.index("native")) | (s.offloads > 0),
        "consumer_card": loose,
        "own_cpu": own_cpu,
        "optimistic_fp8": s.fp8 > 0,
        "plain_eager": eager & ((s.gated > 0) | math),
    }
    found = np.zeros(len(s), np.int64)
    for name, where in applies.items():
        found = np.where(where, CLASSES.index(name), found)
    return found


def log_sd_of(classes: NDArray[np.int64], log_sd: Mapping[str, float]) -> Floats:
    """Scale of log(estimate / measured) of each system, by its position in `CLASSES`."""
    return np.array([log_sd[name] for name in CLASSES])[classes]
