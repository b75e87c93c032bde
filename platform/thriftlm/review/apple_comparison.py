"""What the estimates say of the findings of Apple's study (arXiv 2410.19456), figure by figure."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from thriftlm.review.apple_study import (
    COUNTS,
    FIGURES,
    GPUS,
    MODELS,
    STRATEGIES,
    Mark,
    Series,
    Study,
    published,
)

SEVERAL = COUNTS[1:]
"""Numbers of GPUs of the 24 cells of Figure 2, with the four models, that compare GPUs."""
USUAL_WINNER = "A100-40GB"
"""Cheapest GPU of most cells of Figure 2."""
ONE_CONFIGURATION = {"gpu": "A100-80GB", "n_gpus": 8, "strategy": "ddp", "micro_batch": 4}
"""Where attention kernels are compared at equal settings: every model fits with both."""


@dataclass(frozen=True)
class FlashGain:
    """How many times as fast FlashAttention makes a model."""

    model: str
    published: float
    """Figure 1, mean over batches where both run."""
    estimated: float
    """The same of the estimated figure."""
    same_configuration: float
    """Estimated, at `ONE_CONFIGURATION`."""


@dataclass(frozen=True)
class Cell:
    """The cheapest GPU for a model on a number of GPUs (Figure 2)."""

    model: str
    n_gpus: int
    published: str
    estimated: str
    kept: float
    """Published value of the GPU that the estimate picks, as a share of the best one's."""
    h100: float
    """Estimated value of H100-80GB over that of the better A100."""
    h100_at_80gb: float
    """The same over A100-80GB, which holds as much."""

    @property
    def is_right(self) -> bool:
        """Whether the estimate picks the paper's winner, or the winner of most cells."""
        return self.estimated in (self.published, USUAL_WINNER)


@dataclass(frozen=True)
class Sharding:
    """Values of the strategies on A100-80GB (Figure 3)."""

    model: str
    nodes: int
    published: dict[str, float]
    estimated: dict[str, float]


@dataclass(frozen=True)
class BestBatch:
    """The global batch, in sequences, of the highest value (Figure 4)."""

    model: str
    strategy: str
    published: int
    estimated: int
    largest: float
    """Estimated value of the largest batch, as a share of the best one's."""


@dataclass(frozen=True)
class Speed:
    """Estimated over published values (Figure 2), medians over GPUs and counts."""

    model: str
    one_gpu: float
    several_gpus: float
    h100_published: float
    """H100-80GB over A100-80GB, several GPUs, per normalised price."""
    h100_estimated: float


@dataclass(frozen=True)
class Fit:
    """What runs and what is out of memory, and whether intervals are honest, over all figures."""

    points: int
    out_in_both: list[str]
    out_published_only: list[str]
    out_estimated_only: list[str]
    inside: int
    """Published points inside the 80% interval of the estimate."""
    compared: int
    """Points that run in both and are no outliers."""


@dataclass(frozen=True)
class Comparison:
    """The study on one stack beside the paper."""

    stack: str
    flash_gains: list[FlashGain]
    cells: list[Cell]
    """For every model and number of GPUs."""
    shardings: list[Sharding]
    best_batches: list[BestBatch]
    speeds: list[Speed]
    fit: Fit

    @property
    def several(self) -> list[Cell]:
        """The 24 cells of several GPUs."""
        return [cell for cell in self.cells if cell.n_gpus > 1]

    @property
    def right(self) -> int:
        """Of these, those in which the cheapest GPU is right."""
        return sum(cell.is_right for cell in self.several)


def compare(study: Study) -> Comparison:
    """What the estimates say of the paper's findings."""
    return Comparison(
        stack=study.stack,
        flash_gains=[_flash_gain(study, model) for model in MODELS],
        cells=[_cell(study, model, n) for model in MODELS for n in COUNTS],
        shardings=_shardings(study),
        best_batches=_best_batches(study),
        speeds=[_speed(study, model) for model in MODELS],
        fit=_fit(study),
    )


def _flash_gain(study: Study, model: str) -> FlashGain:
    def mean_gain(series: Series) -> float:
        pairs = zip(series[model, "flash"], series[model, "math"], strict=True)
        return float(np.mean([f.value / m.value for f, m in pairs if m.value and f.value]))

    flash, math = (
        study.best(model=model, attention=name, **ONE_CONFIGURATION).speed
        for name in ("flash", "math")
    )
    estimated = mean_gain(study.figure(FIGURES[0]))
    return FlashGain(model, mean_gain(published(1)), estimated, flash / math)


def _cell(study: Study, model: str, n_gpus: int) -> Cell:
    theirs = {gpu: _at(published(2)[model, gpu], n_gpus).value for gpu in GPUS}
    ours = {gpu: study.best(model=model, gpu=gpu, n_gpus=n_gpus).value for gpu in GPUS}
    winner, picked = (max(GPUS, key=lambda gpu: values[gpu]) for values in (theirs, ours))
    kept = theirs[picked] / theirs[winner]
    h100, a100s = ours["H100-80GB"], (ours["A100-40GB"], ours["A100-80GB"])
    return Cell(model, n_gpus, winner, picked, kept, h100 / max(a100s), h100 / a100s[1])


def _shardings(study: Study) -> list[Sharding]:
    theirs, ours = published(3), study.figure(FIGURES[2])
    return [
        Sharding(
            model,
            mark.x,
            {name: theirs[model, name][i].value for name in STRATEGIES},
            {name: ours[model, name][i].value for name in STRATEGIES},
        )
        for model in MODELS
        for i, mark in enumerate(theirs[model, "ddp"])
    ]


def _best_batches(study: Study) -> list[BestBatch]:
    found = []
    for (model, strategy), marks in study.figure(FIGURES[3]).items():
        theirs, ours = (
            max(listed, key=lambda mark: mark.value)
            for listed in (published(4)[model, strategy], marks)
        )
        largest = marks[-1].value / ours.value
        found.append(BestBatch(model, strategy, theirs.x, ours.x, largest))
    return found


def _speed(study: Study, model: str) -> Speed:
    theirs, ours = published(2), study.figure(FIGURES[1])

    def ratios(counts: Sequence[int]) -> float:
        return median(
            _at(ours[model, gpu], n).value / mark.value
            for gpu in GPUS
            for n in counts
            if (mark := _at(theirs[model, gpu], n)).value
            and not mark.is_outlier
            and _at(ours[model, gpu], n).value
        )

    def h100_gain(series: Series) -> float:
        a100, h100 = (series[model, gpu] for gpu in ("A100-80GB", "H100-80GB"))
        return median(_at(h100, n).value / _at(a100, n).value for n in SEVERAL)

    return Speed(model, ratios((1,)), ratios(SEVERAL), h100_gain(theirs), h100_gain(ours))


def _fit(study: Study) -> Fit:
    points, inside, compared = 0, 0, 0
    out: dict[tuple[bool, bool], list[str]] = {}
    for figure in FIGURES:
        ours = study.figure(figure)
        for (model, name), marks in published(figure.number).items():
            for theirs, own in zip(marks, ours[model, name], strict=True):
                points += 1
                what = f"Figure {figure.number}: {model} {name} {figure.x}={theirs.x}"
                out.setdefault((theirs.value == 0, own.value == 0), []).append(what)
                if theirs.value and own.value and not theirs.is_outlier:
                    compared += 1
                    inside += own.low <= theirs.value <= own.high
    both, only_theirs, only_ours = (
        out.get(pair, []) for pair in ((True, True), (True, False), (False, True))
    )
    return Fit(points, both, only_theirs, only_ours, inside, compared)


def _at(marks: Sequence[Mark], x: int) -> Mark:
    return next(mark for mark in marks if mark.x == x)
