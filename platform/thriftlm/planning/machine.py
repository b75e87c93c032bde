"""How fast one machine without GPUs is: measured by `thriftlm doctor`, since no catalog knows."""

import platform
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import PositiveFloat, PositiveInt, ValidationError

from thriftlm.spec import InputError, Spec

Floats = NDArray[np.float64]

FILE = "machine.json"
"""Its name in the storage folder."""


class Machine(Spec):
    """What `thriftlm doctor` measured of this machine's CPUs, all of them together."""

    host: str
    """Network name; another machine that shares the folder is not this one."""
    cpus: PositiveInt
    """Threads that measured."""
    bf16_tflops: PositiveFloat
    """1e12 FLOP/s of large matrix products in bf16."""
    fp32_tflops: PositiveFloat
    """The same in fp32."""
    memory_gb_per_s: PositiveFloat
    """1e9 bytes per second of a large copy, read and written bytes added."""
    memory_gb: PositiveFloat
    """Memory in 1e9 bytes."""
    measured_on: str
    """Date."""

    def of_worker(self, n_workers: Floats, threads: Floats) -> dict[str, Floats]:
        """What one worker has, under the names of a table's columns.

        Args:
            n_workers: workers of each system (N,).
            threads: CPUs of one worker (N,).
        """
        here = np.minimum(n_workers, np.maximum(1, self.cpus // threads))
        share = np.minimum(1.0, threads / self.cpus)
        return {
            "gpus_per_node": here,
            "peak_bf16_tflops": self.bf16_tflops * share,
            "peak_fp32_tflops": self.fp32_tflops * share,
            "memory_gb_per_s": self.memory_gb_per_s * share,
            "memory_gb": self.memory_gb / here,
        }


def measured_machine(folder: Path) -> Machine | None:
    """What a storage folder holds of this machine; None where nothing was measured on it.

    Raises:
        InputError: the file there cannot be read.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        found = Machine.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        raise InputError(f"{path}: not readable; `thriftlm doctor` measures it anew") from error
    return found if found.host == platform.node() else None


def remember(machine: Machine, folder: Path) -> None:
    """Write what was measured into the storage folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(machine.model_dump_json(indent=2) + "\n", encoding="utf-8")
