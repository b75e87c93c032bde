"""The states of a process's random number generators: torch, CUDA, numpy, Python."""

import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """All of them, in types that `torch.load` reads without running code."""
    name, keys, position, has_normal, normal = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [name, torch.from_numpy(np.asarray(keys, np.int64)), position, has_normal, normal],
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Go on where `random_state` was taken; CUDA's only where there is CUDA."""
    name, keys, position, has_normal, normal = state["numpy"]
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_normal, normal))
    random.setstate(state["python"])
