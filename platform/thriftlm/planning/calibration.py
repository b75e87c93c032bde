"""Constants fitted to published throughput rows, and how well they carry over to a new source."""

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from thriftlm.planning.constants import Calibration, Constants, to_json
from thriftlm.planning.intervals import CLASSES, interval_classes
from thriftlm.planning.seconds import seconds
from thriftlm.planning.systems import Cells, Floats, Systems, from_table

Mask = NDArray[np.bool_]

PRIOR_RELATIVE_SD = {
    "matmul_fraction_ampere": 0.08,
    "matmul_fraction_hopper": 0.12,
    "matmul_fraction_cpu": 0.15,
    "operand_traffic": 0.5,
    "memory_fraction": 0.15,
    "attention_fraction": 0.2,
    "attention_fraction_cpu": 0.5,
    "older_attention": 0.25,
    "eager_traffic": 0.5,
    "overlap_fraction": 0.1,
    "internode_fraction": 0.25,
    "hop_seconds": 0.7,
}
"""How far each constant may lie from its prior where rows do not tell: a source that is left out
may be the only one that identifies it."""
LARGEST = {
    "matmul_fraction_ampere": 0.95,
    "matmul_fraction_hopper": 0.95,
    "matmul_fraction_cpu": 1.0,
    "operand_traffic": 5.0,
    "memory_fraction": 0.98,
    "attention_fraction": 0.9,
    "attention_fraction_cpu": 1.0,
    "older_attention": 1.5,
    "eager_traffic": 5.0,
    "overlap_fraction": 0.999,
    "internode_fraction": 1.0,
    "hop_seconds": 1e-3,
}
ROW_SD = 0.05
"""Scale of log(estimate / measured) within a source: repeated rows of one differ by 2 to 5%."""
OUTLIER_SDS = 1.5
"""Residuals beyond this many scales count linearly: single rows of a cluster in trouble."""
PROBE_SPREAD = 0.5
"""Of the prior's width, by which probes may move constants: clusters differ less from the fit than
sources did from the first guess. 0.3 and 1.0 gained less with five probes."""
ENOUGH_PROBES = 5
"""From which the error of one probe by the others says how far estimates can be trusted."""
NAMES = tuple(field.name for field in fields(Constants))
CPU_NAMES = ("matmul_fraction_cpu", "attention_fraction_cpu")
SHIPPED = ("throughput.csv", "own_throughput.csv")
"""Published rows, and those of our own core that `tests/benchmarks/own_throughput.py` measured."""
CLASS_LOG_SD = {
    "calibrated_source": 0.1,
    "new_source": 0.25,
    "own_cpu": 0.25,
    "consumer_card": 0.30,
    "plain_eager": 0.85,
    "unmeasured_stack": 0.25,
    "optimistic_fp8": 0.30,
}
"""Where rows do not tell. Of consumer cards from one published row, of plain eager stacks from
Apple's study, where the model was 24% and up to 2x off; in fp8 all errors are to one side."""


@dataclass(frozen=True)
class Accuracy:
    """Relative errors of tokens/s over a group of rows."""

    group: str
    n_rows: int
    median: float
    p90: float
    bias: float
    """Median of the signed error: above 0, estimates are too fast."""


def read_rows(*paths: Path) -> dict[str, list[str]]:
    """Columns of throughput tables, one below the other; of the shipped ones where none is given.

    A column that one table lacks is empty there.
    """
    rows = [row for text in _texts(paths) for row in csv.DictReader(text.splitlines())]
    return {name: [row.get(name, "") for row in rows] for name in dict.fromkeys(chain(*rows))}


def _texts(paths: Sequence[Path]) -> Iterator[str]:
    shipped = [files("thriftlm").joinpath("data", name) for name in SHIPPED]
    return (path.read_text(encoding="utf-8") for path in paths or shipped)


def measured_tokens_per_s(table: Mapping[str, Cells], systems: Systems) -> Floats:
    """Published tokens/s per GPU; from the MFU by `6N+attn` where only that is published."""
    direct, mfu = (
        np.array([float(cell or "nan") for cell in table.get(name, [""] * len(systems))])
        for name in ("tokens_per_s_per_gpu", "mfu")
    )
    return np.where(np.isnan(direct), mfu * systems.peak_flops / systems.flops_per_token, direct)


def tokens_per_s(systems: Systems, constants: Constants) -> Floats:
    """Estimated tokens per second and GPU."""
    step = seconds(systems, constants).step
    return np.asarray(systems.tokens * systems.grad_accum / step)


def fit_constants(
    systems: Systems, measured: Floats, around: Constants | None = None, spread: float = 1.0
) -> tuple[Constants, Floats]:
    """Constants that fit best, and the Jacobian of the standardised residuals (rows, constants).

    The prior lies `around` the defaults of `Constants`, or those given, as wide as
    `PRIOR_RELATIVE_SD` times `spread`. Rows of CPUs move the constants of CPUs and no others, so
    that a laptop says nothing of a cluster.
    """
    start = around or Constants()
    on_cpu = systems.on_cpu > 0
    jacobian = np.zeros((len(measured) + len(NAMES), len(NAMES)))
    found = start
    for rows, own in ((~on_cpu, False), (on_cpu, True)):
        free = np.array([i for i, name in enumerate(NAMES) if (name in CPU_NAMES) is own])
        found = _fit_free(systems, measured, rows, _Prior(found, start, spread, free), jacobian)
    return found, jacobian


class _Prior(NamedTuple):
    """Where a fit starts, and what it may move."""

    held: Constants
    """Of the constants that stay."""
    mean: Constants
    spread: float
    free: NDArray[np.intp]
    """Positions in `NAMES`."""


def _fit_free(
    systems: Systems, measured: Floats, rows: Mask, prior: _Prior, jacobian: Floats
) -> Constants:
    """The constants with the free ones fitted to some rows; writes their part of the Jacobian."""
    free = prior.free
    known = rows & np.isfinite(measured) & np.isfinite(tokens_per_s(systems, Constants()))
    held, target = systems.take(known), np.log(measured[known])
    mean, fixed = (np.log([asdict(c)[name] for name in NAMES]) for c in (prior.mean, prior.held))
    upper = np.log([LARGEST[name] for name in NAMES])[free]
    prior_sd = prior.spread * np.array([PRIOR_RELATIVE_SD[name] for name in NAMES])[free]

    def whole(theta: Floats) -> Constants:
        every = fixed.copy()
        every[free] = theta
        return _constants(every)

    def residuals(theta: Floats) -> Floats:
        errors = (np.log(tokens_per_s(held, whole(theta))) - target) / ROW_SD
        return np.concatenate([errors, (theta - mean[free]) / prior_sd])

    start = np.minimum(mean[free], upper - 1e-3)
    found = least_squares(
        residuals, start, loss="soft_l1", f_scale=OUTLIER_SDS, bounds=(-np.inf, upper)
    )
    places = np.append(np.flatnonzero(known), len(measured) + free)
    jacobian[np.ix_(places, free)] = np.asarray(found.jac)
    return whole(found.x)


def _constants(theta: Floats) -> Constants:
    return Constants(**dict(zip(NAMES, map(float, np.exp(theta)), strict=True)))


def calibrate(table: Mapping[str, Cells], source: str = "") -> Calibration:
    """Constants fitted to rows with the columns of the design's section 6, and their error."""
    systems = from_table(table)
    measured = measured_tokens_per_s(table, systems)
    constants, jacobian = fit_constants(systems, measured)
    errors = {
        "calibrated_source": in_sample(published(table)),
        "new_source": leave_one_out(published(table), "source"),
        "own_cpu": leave_one_out(own(table), "model"),
    }
    scales = {name: _scale(error) for name, error in errors.items()}
    return Calibration(
        constants=constants,
        relative_sd=_relative_sd(jacobian),
        identified_by=_identified_by(jacobian, np.asarray(table["source"], dtype=str)),
        log_sd=CLASS_LOG_SD | {name: sd for name, sd in scales.items() if np.isfinite(sd)},
        source=source,
    )


def _scale(log_error: Floats) -> float:
    """Robust standard deviation: 1.4826 median absolute errors; NaN without a known one."""
    known = log_error[np.isfinite(log_error)]
    return float(np.median(np.abs(known)) * 1.4826) if len(known) else float("nan")


def refined(
    calibration: Calibration, systems: Systems, measured: Floats, source: str
) -> Calibration:
    """The calibration moved to what probes of one cluster and stack measured.

    One probe gains nothing; from three on, of systems that differ, the error on the cluster's other
    systems falls (see the tests). Beyond what was probed, at many more nodes say, it does not. From
    `ENOUGH_PROBES` on intervals are as wide as the error of each probe by the others.

    Args:
        calibration: where to start from.
        systems: what was probed (N,).
        measured: tokens per second and GPU of each (N,), NaN where it was not measured.
        source: what the probes are called.

    Raises:
        ValueError: no probe was measured.
    """
    known = np.isfinite(measured)
    if not known.any():
        raise ValueError("refining needs a probe with tokens_per_s_per_gpu or mfu, got none")
    probes, speeds = systems.take(known), measured[known]
    moved, _ = fit_constants(probes, speeds, calibration.constants, PROBE_SPREAD)
    told = replace(calibration, constants=moved, source=f"{calibration.source}; {source}")
    if len(speeds) < ENOUGH_PROBES:
        return told
    error = np.full(len(speeds), np.nan)
    for i in range(len(speeds)):
        rest = np.arange(len(speeds)) != i
        others, _ = fit_constants(
            probes.take(rest), speeds[rest], calibration.constants, PROBE_SPREAD
        )
        error[i] = np.log(tokens_per_s(probes.take([i]), others) / speeds[i])[0]
    return replace(told, log_sd=calibration.log_sd | _narrowed(probes, error))


def _narrowed(probes: Systems, error: Floats) -> dict[str, float]:
    """Scale of the error of each class that was probed."""
    classes = np.array(CLASSES)[interval_classes(probes)]
    return {str(name): max(ROW_SD, _scale(error[classes == name])) for name in np.unique(classes)}


def _relative_sd(jacobian: Floats) -> dict[str, float]:
    covariance = np.linalg.inv(jacobian.T @ jacobian)
    spread = np.sqrt(np.diag(covariance))
    return dict(zip(NAMES, map(float, spread), strict=True))


def _identified_by(jacobian: Floats, sources: NDArray[np.str_]) -> dict[str, str]:
    """For each constant, the share of its curvature that each source gives, and the prior's."""
    told = {}
    for i, name in enumerate(NAMES):
        squares = jacobian[:, i] ** 2
        by_source = {s: squares[: len(sources)][sources == s].sum() for s in np.unique(sources)}
        by_source["prior"] = squares[len(sources) :].sum()
        parts = sorted(by_source.items(), key=lambda part: -part[1])
        total = squares.sum()
        told[name] = ", ".join(f"{s} {v / total:.0%}" for s, v in parts if v / total > 0.05)
    return told


def published(table: Mapping[str, Cells]) -> dict[str, Cells]:
    """The rows of GPUs."""
    return _rows_where(table, "cpu", equal=False)


def own(table: Mapping[str, Cells]) -> dict[str, Cells]:
    """The rows of CPUs: our own core on the machine that measured it."""
    return _rows_where(table, "cpu", equal=True)


def _rows_where(table: Mapping[str, Cells], gpu: str, *, equal: bool) -> dict[str, Cells]:
    kept = [i for i, cell in enumerate(table["gpu"]) if (cell == gpu) is equal]
    return {name: [cells[i] for i in kept] for name, cells in table.items()}


def in_sample(table: Mapping[str, Cells]) -> Floats:
    """Log of estimate over measured of each row, by constants fitted to all of them."""
    systems = from_table(table)
    measured = measured_tokens_per_s(table, systems)
    constants, _ = fit_constants(systems, measured)
    return np.asarray(np.log(tokens_per_s(systems, constants) / measured))


def by_fitted_constants(systems: Systems, measured: Floats, held: Mask) -> Floats:
    """Tokens/s of every row by constants fitted to the rows `held`."""
    constants, _ = fit_constants(systems.take(held), measured[held])
    return tokens_per_s(systems, constants)


def leave_one_out(
    table: Mapping[str, Cells],
    column: str,
    predict: Callable[[Systems, Floats, Mask], Floats] = by_fitted_constants,
) -> Floats:
    """Log of estimate over measured of each row, by what is fitted without its group.

    Args:
        table: columns of throughput rows.
        column: what groups them: `source`, or `model` where there is one source.
        predict: tokens/s of every row from the rows that a mask holds.
    """
    systems = from_table(table)
    measured = measured_tokens_per_s(table, systems)
    groups = np.asarray(table[column], dtype=str)
    found = np.full(len(systems), np.nan)
    for group in np.unique(groups):
        out = groups == group
        found[out] = predict(systems, measured, ~out)[out]
    return np.asarray(np.log(found / measured))


def flat_utilisation(systems: Systems, fraction: float | Floats = 0.5) -> Floats:
    """Baseline: tokens/s of `6 N D / (peak x fraction)`, N all stored parameters."""
    return np.asarray(systems.peak_flops * fraction / (6 * systems.stored_params))


def utilisation_per_architecture(systems: Systems, measured: Floats, held: Mask) -> Floats:
    """Baseline: tokens/s by the median MFU of each compute capability among the rows `held`."""
    mfu = measured * systems.flops_per_token / systems.peak_flops
    found = np.full(len(systems), float(np.nanmedian(mfu[held])))
    for capability in np.unique(systems.capability):
        same = systems.capability == capability
        if (same & held).any():
            found[same] = np.nanmedian(mfu[same & held])
    return np.asarray(found * systems.peak_flops / systems.flops_per_token)


def accuracy(log_error: Floats, group: str = "all") -> Accuracy:
    """Median and 90th percentile of the relative error of tokens/s, unknown rows left out."""
    error = np.expm1(log_error[np.isfinite(log_error)])
    size = np.abs(error)
    return Accuracy(
        group,
        len(error),
        float(np.median(size)),
        float(np.quantile(size, 0.9)),
        float(np.median(error)),
    )


def accuracy_by(log_error: Floats, groups: Cells) -> list[Accuracy]:
    """One line for all rows and one per group, most rows first."""
    names = np.asarray(groups, dtype=str)
    lines = [accuracy(log_error[names == name], str(name)) for name in np.unique(names)]
    return [accuracy(log_error), *sorted(lines, key=lambda line: -line.n_rows)]


def report(table: Mapping[str, Cells]) -> dict[str, Sequence[Accuracy]]:
    """Accuracy in sample, with one source left out, and of the baselines, by what groups rows.

    Rows of CPUs have one source, so what is left out there is one model at a time.
    """
    rows, ours = published(table), own(table)
    found: dict[str, Sequence[Accuracy]] = {}
    if rows["gpu"]:
        errors, several = {"in sample": in_sample(rows)}, len(set(rows["source"])) > 1
        if several:
            errors["source left out"] = leave_one_out(rows, "source")
        for kind, error in errors.items():
            for column in ("source", "gpu", "strategy"):
                found[f"{kind} by {column}"] = accuracy_by(error, rows[column])
        systems = from_table(rows)
        flat = np.log(flat_utilisation(systems) / measured_tokens_per_s(rows, systems))
        found["6ND/(peak x 0.5)"] = [accuracy(flat)]
        if several:
            rival = leave_one_out(rows, "source", utilisation_per_architecture)
            found["utilisation per architecture, source left out"] = [accuracy(rival)]
    if ours["gpu"]:
        error = leave_one_out(ours, "model")
        for column in ("model", "strategy"):
            found[f"our core on a CPU, model left out by {column}"] = accuracy_by(
                error, ours[column]
            )
    return found


def write(calibration: Calibration, path: Path) -> None:
    """Store a calibration as JSON, numbers to four digits."""

    def rounded(value: object) -> object:
        if isinstance(value, dict):
            return {key: rounded(part) for key, part in value.items()}
        return float(f"{value:.4g}") if isinstance(value, float) else value

    path.write_text(json.dumps(rounded(to_json(calibration)), indent=2) + "\n", encoding="utf-8")
