"""Apple's study of bottlenecks (arXiv 2410.19456) as data: its figures, published and estimated.

A figure plots tokens/s per GPU over the normalised price (A100-40GB = 1), the best over all that it
does not show; what ran out of memory is 0. The published points were read from the paper's vector
paths. Figure 3 is of A100-80GB: each of its points is one of, or below, that GPU's in Figure 2.
"""

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from thriftlm.planning.estimate import Estimates
from thriftlm.review.space_estimates import SpaceEstimates, Table, distinct_runs
from thriftlm.search.spaces.space import load_space
from thriftlm.spec import InputError, RunSpec

SPACE = "apple_bottlenecks"
MODELS = ("apple-100m", "apple-500m", "apple-1b", "apple-2b")
GPUS = ("A100-40GB", "A100-80GB", "H100-80GB")
STRATEGIES = ("ddp", "fsdp_full", "fsdp_grad_op")
COUNTS = (1, 2, 4, 8, 16, 32, 64)
GPUS_PER_NODE = 8
SHOWN = ("model", "gpu", "n_gpus", "strategy", "micro_batch", "attention")


@dataclass(frozen=True)
class Figure:
    """What one figure of the paper shows."""

    number: int
    x: str
    """Field of `Point` on the horizontal axis."""
    series: str
    """Field of `Point` that tells its lines apart."""
    names: tuple[str, ...]
    """Values of that field."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields that one value is picked of."""


FIGURES = (
    Figure(1, "batch", "attention", ("math", "flash")),
    Figure(2, "n_gpus", "gpu", GPUS),
    Figure(3, "nodes", "strategy", STRATEGIES, {"gpu": "A100-80GB"}),
    Figure(4, "batch", "strategy", STRATEGIES),
)


@dataclass(frozen=True)
class Mark:
    """One point of a figure."""

    x: int
    value: float
    """Tokens/s per GPU over the normalised price; 0 where nothing fits."""
    low: float
    """End of the published error bar, or of the 80% interval of the estimate."""
    high: float
    is_outlier: bool = False
    """Whether a published point contradicts its neighbours."""


Series = dict[tuple[str, str], list[Mark]]
"""Marks in the order of x, by model and name of the series."""


@dataclass(frozen=True)
class Point:
    """One run of the study with its estimate."""

    model: str
    gpu: str
    n_gpus: int
    strategy: str
    micro_batch: int
    attention: str
    speed: float
    """Tokens/s per GPU, whether it fits or not."""
    value: float
    """As `Mark.value`."""
    low: float
    high: float

    @property
    def batch(self) -> int:
        """Sequences of one optimizer step."""
        return self.micro_batch * self.n_gpus


class Study:
    """Every run of the study with its estimate; `best` is what a figure plots.

    Args:
        table: columns of the runs, as `SpaceEstimates.table`.
        found: their estimates.
        stack: entries of the table on other stacks are left out.
    """

    def __init__(self, table: Table, found: Estimates, stack: str) -> None:
        chosen = np.array([name == stack for name in table["stack"]])
        # Billed pro rata, a cost per token is the price per GPU over its speed.
        value = 1e9 / 3600 / found.usd_per_btok * (found.fits == 1)
        self.stack = stack
        self._fields = {name: np.asarray(table[name])[chosen] for name in SHOWN}
        self._fields["batch"] = self._fields["micro_batch"] * self._fields["n_gpus"]
        self._fields["nodes"] = -(-self._fields["n_gpus"] // GPUS_PER_NODE)
        spread = found.high / found.tokens_per_s_per_gpu
        self._numbers = {
            "speed": found.tokens_per_s_per_gpu[chosen],
            "value": value[chosen],
            "low": (value / spread)[chosen],
            "high": (value * spread)[chosen],
        }

    def __len__(self) -> int:
        return len(self._numbers["value"])

    def best(self, **fixed: Any) -> Point:
        """The run of the highest value among those whose fields are as given.

        Raises:
            ValueError: there is none.
        """
        chosen = np.ones(len(self), dtype=bool)
        for name, given in fixed.items():
            chosen &= self._fields[name] == given
        if not chosen.any():
            raise ValueError(f"no run of the study has {fixed}")
        i = int(np.argmax(np.where(chosen, self._numbers["value"], -1.0)))
        shown: dict[str, Any] = {name: self._fields[name][i].item() for name in SHOWN}
        numbers: dict[str, Any] = {name: float(c[i]) for name, c in self._numbers.items()}
        return Point(**shown, **numbers)

    def runs(self, **fixed: Any) -> bool:
        """Whether any run whose fields are as given fits into memory."""
        return self.best(**fixed).value > 0

    def figure(self, figure: Figure) -> Series:
        """The estimated marks at every x that the paper plots."""
        return {
            (model, name): [self._mark(figure, model, name, mark.x) for mark in marks]
            for (model, name), marks in published(figure.number).items()
        }

    def _mark(self, figure: Figure, model: str, name: str, x: int) -> Mark:
        shown = {"model": model, figure.series: name, figure.x: x}
        found = self.best(**shown, **figure.fixed)
        return Mark(x, found.value, found.low, found.high)


def studies(estimated: SpaceEstimates) -> list[Study]:
    """The study on each stack that was estimated.

    Raises:
        InputError: the runs are not those of the study.
    """
    theirs, _ = distinct_runs(load_space(SPACE))
    missing = len(set(map(_conditions, theirs)) - set(map(_conditions, estimated.runs)))
    if missing or len(estimated.runs) != len(theirs):
        raise InputError(
            f"--figures draws Apple's study, the {len(theirs):,} runs of {SPACE}, of which this "
            f"space lacks {missing:,}; give --space {SPACE}, whose prices and batches are its"
        )
    table = estimated.table
    return [Study(table, estimated.found, stack) for stack in dict.fromkeys(table["stack"])]


def _conditions(run: RunSpec) -> tuple[Any, ...]:
    return run.model, run.system, run.data.seq_len, run.grad_accum


@cache
def published(number: int) -> Series:
    """The points of one figure of the paper."""
    text = files("thriftlm").joinpath("data", "apple_figures.csv").read_text(encoding="utf-8")
    found: Series = {}
    for row in csv.DictReader(text.splitlines()):
        if int(row["figure"]) == number:
            value, low, high = (float(row[name]) for name in ("value", "low", "high"))
            mark = Mark(int(row["x"]), value, low, high, is_outlier=row["note"] == "outlier")
            found.setdefault((row["model"], row["series"]), []).append(mark)
    return found
