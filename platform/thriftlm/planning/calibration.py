"""Constants fitted to published throughput rows, and how well they carry over to a new source."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from thriftlm.planning.constants import Calibration, Constants, to_json
from thriftlm.planning.seconds import seconds
from thriftlm.planning.systems import Cells, Floats, Systems, from_table

Mask = NDArray[np.bool_]

PRIOR_RELATIVE_SD = {
    "matmul_fraction_ampere": 0.08,
    "matmul_fraction_hopper": 0.12,
    "operand_traffic": 0.5,
    "memory_fraction": 0.15,
    "attention_fraction": 0.2,
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
    "operand_traffic": 5.0,
    "memory_fraction": 0.98,
    "attention_fraction": 0.9,
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
NAMES = tuple(field.name for field in fields(Constants))
CLASS_LOG_SD = {"consumer_card": 0.30, "plain_eager": 0.45, "unmeasured_stack": 0.25}
"""Classes without enough rows to measure; the first two from one published row and Apple's study,
where the model was 24% and up to 2x off."""


@dataclass(frozen=True)
class Accuracy:
    """Relative errors of tokens/s over a group of rows."""

    group: str
    n_rows: int
    median: float
    p90: float
    bias: float
    """Median of the signed error: above 0, estimates are too fast."""


def read_rows(path: Path | None = None) -> dict[str, list[str]]:
    """Columns of a throughput table; of the shipped one when no path is given."""
    if path is None:
        text = files("thriftlm").joinpath("data", "throughput.csv").read_text(encoding="utf-8")
    else:
        text = path.read_text(encoding="utf-8")
    header, *lines = csv.reader(text.splitlines())
    return {name: list(cells) for name, cells in zip(header, zip(*lines, strict=True), strict=True)}


def measured_tokens_per_s(table: Mapping[str, Cells], systems: Systems) -> Floats:
    """Published tokens/s per GPU; from the MFU by `6N+attn` where only that is published."""
    direct, mfu = (
        np.array([float(cell or "nan") for cell in table[name]])
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
    `PRIOR_RELATIVE_SD` times `spread`.
    """
    known = np.isfinite(measured) & np.isfinite(tokens_per_s(systems, Constants()))
    held, target = systems.take(known), np.log(measured[known])
    upper = np.log([LARGEST[name] for name in NAMES])
    prior = np.log([asdict(around or Constants())[name] for name in NAMES])
    prior_sd = spread * np.array([PRIOR_RELATIVE_SD[name] for name in NAMES])

    def residuals(theta: Floats) -> Floats:
        rows = (np.log(tokens_per_s(held, _constants(theta))) - target) / ROW_SD
        return np.concatenate([rows, (theta - prior) / prior_sd])

    start = np.minimum(prior, upper - 1e-3)
    found = least_squares(
        residuals, start, loss="soft_l1", f_scale=OUTLIER_SDS, bounds=(-np.inf, upper)
    )
    jacobian = np.zeros((len(measured) + len(NAMES), len(NAMES)))
    kept = np.append(np.flatnonzero(known), len(measured) + np.arange(len(NAMES)))
    jacobian[kept] = np.asarray(found.jac)
    return _constants(found.x), jacobian


def _constants(theta: Floats) -> Constants:
    return Constants(**dict(zip(NAMES, map(float, np.exp(theta)), strict=True)))


def calibrate(table: Mapping[str, Cells], source: str = "") -> Calibration:
    """Constants fitted to rows with the columns of the design's section 6, and their error."""
    systems = from_table(table)
    measured = measured_tokens_per_s(table, systems)
    constants, jacobian = fit_constants(systems, measured)
    error = leave_one_source_out(table)
    new_source = float(np.nanmedian(np.abs(error)) * 1.4826)
    within = np.log(tokens_per_s(systems, constants) / measured)
    calibrated = float(np.nanmedian(np.abs(within)) * 1.4826)
    sources = np.asarray(table["source"], dtype=str)
    return Calibration(
        constants=constants,
        relative_sd=_relative_sd(jacobian),
        identified_by=_identified_by(jacobian, sources),
        log_sd={"calibrated_source": calibrated, "new_source": new_source} | CLASS_LOG_SD,
        source=source,
    )


def refined(calibration: Calibration, probes: Mapping[str, Cells]) -> Calibration:
    """The calibration moved to what probes of one cluster and stack measured.

    One probe gains nothing; from three on, of systems that differ, the error on the cluster's other
    systems falls (see the tests). Beyond what was probed, at many more nodes say, it does not.

    Raises:
        ValueError: no probe has a measured throughput.
    """
    systems = from_table(probes)
    measured = measured_tokens_per_s(probes, systems)
    if not np.isfinite(measured).any():
        raise ValueError("refining needs a probe with tokens_per_s_per_gpu or mfu, got none")
    constants, _ = fit_constants(systems, measured, calibration.constants, PROBE_SPREAD)
    names = ", ".join(sorted(set(map(str, probes["source"]))))
    return replace(calibration, constants=constants, source=f"{calibration.source}; {names}")


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


def leave_one_source_out(table: Mapping[str, Cells]) -> Floats:
    """Log of estimate over measured of each row, by constants fitted to all other sources."""
    systems = from_table(table)
    measured = measured_tokens_per_s(table, systems)
    sources = np.asarray(table["source"], dtype=str)
    found = np.full(len(systems), np.nan)
    for source in np.unique(sources):
        out = sources == source
        constants, _ = fit_constants(systems.take(~out), measured[~out])
        found[out] = np.log(tokens_per_s(systems.take(out), constants) / measured[out])
    return found


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


def leave_one_out_utilisation(table: Mapping[str, Cells]) -> Floats:
    """Log of estimate over measured of each row by the second baseline, one source left out."""
    systems = from_table(table)
    measured = measured_tokens_per_s(table, systems)
    sources = np.asarray(table["source"], dtype=str)
    found = np.full(len(systems), np.nan)
    for source in np.unique(sources):
        out = sources == source
        found[out] = utilisation_per_architecture(systems, measured, ~out)[out]
    return np.asarray(np.log(found / measured))


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
    """Accuracy in sample, with one source left out, and of the baselines, by what groups rows."""
    systems = from_table(table)
    measured = measured_tokens_per_s(table, systems)
    constants, _ = fit_constants(systems, measured)
    inside, outside = (
        np.log(tokens_per_s(systems, constants) / measured),
        leave_one_source_out(table),
    )
    flat = np.log(flat_utilisation(systems) / measured)
    found: dict[str, Sequence[Accuracy]] = {
        f"{kind} by {column}": accuracy_by(error, table[column])
        for kind, error in (("in sample", inside), ("source left out", outside))
        for column in ("source", "gpu", "strategy")
    }
    return found | {
        "6ND/(peak x 0.5)": [accuracy(flat)],
        "utilisation per architecture, source left out": [
            accuracy(leave_one_out_utilisation(table))
        ],
    }


def write(calibration: Calibration, path: Path) -> None:
    """Store a calibration as JSON, numbers to four digits."""

    def rounded(value: object) -> object:
        if isinstance(value, dict):
            return {key: rounded(part) for key, part in value.items()}
        return float(f"{value:.4g}") if isinstance(value, float) else value

    path.write_text(json.dumps(rounded(to_json(calibration)), indent=2) + "\n", encoding="utf-8")
