"""What calibration may change, and what it may not.

`Constants` are fitted to published rows (`calibration.py`) and stored as data with their error.
Everything else that is a number in `seconds.py` and `memory.py` is arithmetic of kernels, or stands
here with its source.
"""

import json
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from thriftlm.spec import InputError

FILE = "calibration.json"
"""Its name in the package's data and in a storage folder."""


@dataclass(frozen=True)
class Constants:
    """Fitted, dimensionless unless the name has a unit. The defaults are the priors of the fit."""

    matmul_fraction_ampere: float = 0.82
    """Of the bf16 peak in large products, before operand traffic. Ceiling: 271 of 312 TFLOP/s."""
    matmul_fraction_hopper: float = 0.70
    """The same of Hopper and Blackwell. Ceiling: 794 of 989 TFLOP/s (H100 SXM)."""
    matmul_fraction_cpu: float = 0.80
    """Of what `thriftlm doctor` measures in square products, in those of training on a CPU."""
    operand_traffic: float = 1.0
    """Operands and results of products through memory, over reading and writing each once."""
    memory_fraction: float = 0.80
    """Of memory bandwidth that elementwise kernels and operands reach."""
    attention_fraction: float = 0.60
    """Of the bf16 peak in FlashAttention-2 on Ampere, forward and backward, head of 128."""
    attention_fraction_cpu: float = 0.35
    """The same of torch's CPU kernel, of the measured fp32 peak whatever the precision."""
    older_attention: float = 0.65
    """Speed of the first FlashAttention over the second."""
    eager_traffic: float = 1.0
    """Elementwise traffic of an eager stack over the count of its kernels."""
    overlap_fraction: float = 0.90
    """Of communication that hides behind computation where there is enough of it."""
    internode_fraction: float = 0.75
    """Of a node's network that collectives over several nodes reach."""
    hop_seconds: float = 12e-6
    """Added per rank of a ring and collective over several nodes: latency and congestion."""


@dataclass(frozen=True)
class Calibration:
    """Constants with where they come from and how far they can be trusted."""

    constants: Constants
    relative_sd: dict[str, float]
    """Of each constant, from the fit's curvature; that of the prior where rows do not tell."""
    identified_by: dict[str, str]
    """Rows that move each constant."""
    log_sd: dict[str, float]
    """Scale of log(estimate / measured) by class of estimate, which makes the interval."""
    source: str


def from_json(found: dict[str, Any]) -> Calibration:
    """The calibration of what `to_json` gave."""
    return Calibration(**(found | {"constants": Constants(**found["constants"])}))


def to_json(calibration: Calibration) -> dict[str, Any]:
    """The calibration as plain data."""
    return asdict(calibration)


@cache
def shipped() -> Calibration:
    """The calibration in `data/calibration.json`."""
    text = files("thriftlm").joinpath("data", "calibration.json").read_text(encoding="utf-8")
    return from_json(json.loads(text))


def in_use(folder: Path) -> Calibration:
    """The calibration that `thriftlm calibrate --keep` left in a storage folder, else the shipped.

    Raises:
        InputError: the file there cannot be read.
    """
    path = folder / FILE
    if not path.exists():
        return shipped()
    try:
        return from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{path}: not a calibration of this version; remove it or run `thriftlm calibrate`"
        ) from error
