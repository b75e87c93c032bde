"""Estimates on paper: a grid of systems, a table in bulk, the breakdown of one; calibrations."""

import csv
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.text import Text

from thriftlm.planning.constants import Calibration
from thriftlm.planning.estimate import Estimate, Estimates, estimate_table
from thriftlm.planning.grid import Grid, Rank, Row, estimate_systems, kernel_refusal, rank
from thriftlm.review.tables import Column, fitted, plain_console
from thriftlm.review.wording import optional, stale_prices, usd
from thriftlm.spec import InputError
from thriftlm_models.config import ModelSpec
from thriftlm_models.presets import preset

RANKED_SHOWN = 20
"""Systems that `--best` prints; JSON has them all."""
TABLE_COLUMNS = {
    "est_tokens_per_s_per_gpu": "tokens_per_s_per_gpu",
    "est_mfu": "mfu",
    "est_peak_mem_gb": "peak_mem_gb",
    "est_fits": "fits",
    "est_usd_per_btok": "usd_per_btok",
}
"""Columns that a table gains, by what they hold of an estimate."""
BAR_CHARACTERS = 40


def model_named(name: str) -> ModelSpec:
    """The model of a preset, of Apple's rule (`apple:350M`), or of a run file.

    Raises:
        InputError: no such preset or file, or it does not describe a model.
    """
    if name.endswith((".yaml", ".yml")):
        from thriftlm.config_file import ConfigFile
        from thriftlm.spec import RunSpec

        return ConfigFile.read(Path(name)).parse(RunSpec).model
    try:
        preset(name)
    except ValueError as error:
        raise InputError(f"{error} (`thriftlm models` lists them)") from error
    return ModelSpec.model_validate({"preset": name})


def estimate_grid(model: ModelSpec, grid: Grid, *, best: bool, explain: bool) -> list[Row]:
    """Estimates of a model on every system of a grid; with `best`, the cheapest per token first."""
    systems = grid.systems(best)
    found = estimate_systems(model, grid.seq_len, systems)
    rows = [as_row(system, found[i], explain) for i, system in enumerate(systems)]
    for row in rows:
        if reason := kernel_refusal(model, row, grid.precision):
            row |= {"fits": False, "reason": reason}
    return sorted(rows, key=ranked) if best else rows


def ranked(row: Row) -> Rank:
    """Place of a row in the order of `--best`."""
    return rank(row["fits"], row["usd_per_btok"], row["tokens_per_s_per_gpu"])


def as_row(system: Row, found: Estimate, explain: bool) -> Row:
    """One estimate as JSON says it."""
    shown = ("gpu", "n_gpus", "strategy", "micro_batch", "attention", "act_ckpt", "stack")
    told = asdict(found)
    parts = {key: told.pop(key) for key in ("seconds", "memory_gb")}
    place = {
        "cloud": system.get("cloud", "aws"),
        "market": system.get("market", "on_demand"),
    }
    row = {key: system[key] for key in shown} | place | told
    return row | parts if explain else row


def show_estimates(rows: list[Row], *, best: bool, explain: bool) -> None:
    """Print estimates as a table, and with `explain` where bytes and seconds go."""
    console = plain_console()
    listed = rows[:RANKED_SHOWN] if best else rows
    console.print(fitted(COLUMNS, [_cells(row) for row in listed], console.width))
    if len(listed) < len(rows):
        console.print(f"[dim]{len(rows) - len(listed)} more, all of them with --json[/]")
    out = sum(row["fits"] is False for row in rows)
    console.print(f"[dim]estimated, 80% intervals; {out} of {len(rows)} are out[/]")
    if warning := stale_prices(datetime.now(UTC).date()):
        console.print(f"[yellow]{warning}[/]")
    for row in listed[: 1 if best else None] if explain else ():
        console.print()
        console.print(Text(breakdown(row)))


COLUMNS = [
    Column("gpu"),
    Column("gpus", is_number=True),
    Column("strategy"),
    Column("mb", is_number=True),
    Column("attention", dispensable=4),
    Column("ckpt", dispensable=4),
    Column("stack", dispensable=3),
    Column("tok/s/GPU", is_number=True),
    Column("80%", is_number=True, dispensable=2),
    Column("MFU", is_number=True, dispensable=1),
    Column("GB", is_number=True),
    Column("USD/Btok", is_number=True),
    Column("instance", dispensable=5),
    Column("why not"),
]


def _cells(row: Row) -> list[str]:
    low, high = row["low"], row["high"]
    return [
        row["gpu"],
        str(row["n_gpus"]),
        row["strategy"],
        str(row["micro_batch"]),
        row["attention"],
        row["act_ckpt"],
        row["stack"],
        optional(row["tokens_per_s_per_gpu"], ",.0f"),
        "-" if low is None else f"{low:,.0f} to {high:,.0f}",
        optional(row["mfu"], ".0%"),
        optional(row["peak_mem_gb"], ".1f"),
        "-" if row["usd_per_btok"] is None else usd(row["usd_per_btok"]),
        row["instance"] or "-",
        row["reason"],
    ]


def breakdown(row: Row) -> str:
    """Where the bytes of a GPU and the seconds of a step go, as bars of text."""
    name = f"{row['gpu']} x{row['n_gpus']} {row['strategy']} mb={row['micro_batch']}"
    seconds = {k: v for k, v in row["seconds"].items() if k != "communication"}
    return "\n".join(
        [
            f"{name}: memory of one GPU",
            *_bars(row["memory_gb"], "GB", 1.0),
            f"{name}: one optimizer step",
            *_bars(seconds, "ms", 1e3),
        ]
    )


def _bars(parts: Mapping[str, float], unit: str, scale: float) -> list[str]:
    known = {key: value for key, value in parts.items() if np.isfinite(value) and value > 0}
    if not known:
        return ["  unknown"]
    total = sum(known.values())
    width = max(map(len, known))
    lines = [
        f"  {key.replace('_', ' '):<{width}} {value * scale:>9,.2f} {unit} {value / total:>4.0%} "
        + "#" * round(BAR_CHARACTERS * value / total)
        for key, value in sorted(known.items(), key=lambda part: -part[1])
    ]
    return [*lines, f"  {'sum':<{width}} {total * scale:>9,.2f} {unit}"]


# --- bulk ---------------------------------------------------------------------------------------


def estimate_file(source: Path, target: Path) -> dict[str, Any]:
    """Write a table of systems with its estimates beside them; how many rows, how many fit.

    Row order and all other columns stay. A column of estimates that is there already is replaced.

    Raises:
        InputError: the file cannot be read, or a row is malformed.
    """
    header, lines = read_csv(source)
    kept = [i for i, name in enumerate(header) if name not in TABLE_COLUMNS]
    cells = list(zip(*lines, strict=True)) or [()] * len(header)
    table = {header[i]: cells[i] for i in kept}
    if not lines:
        raise InputError(f"{source}: no rows; give one line per system below the header")
    found = estimate_table(table)
    added = [estimated_cells(found, attribute) for attribute in TABLE_COLUMNS.values()]
    try:
        with target.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*(header[i] for i in kept), *TABLE_COLUMNS])
            writer.writerows(zip(*(cells[i] for i in kept), *added, strict=True))
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror}") from error
    fits, known = int(np.nansum(found.fits)), int(np.isfinite(found.fits).sum())
    return {"rows": len(lines), "fit": fits, "do_not_fit": known - fits, "out": str(target)}


def read_csv(source: Path) -> tuple[list[str], list[list[str]]]:
    """Header and lines of a CSV file.

    Raises:
        InputError: it cannot be read, is empty, or a line has another number of cells.
    """
    try:
        with source.open(encoding="utf-8", newline="") as file:
            header, *lines = csv.reader(file)
    except OSError as error:
        raise InputError(f"cannot read {source}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{source}: empty; its first line must name the columns") from error
    for number, line in enumerate(lines, start=2):
        if len(line) != len(header):
            raise InputError(
                f"{source}:{number}: {len(line)} cells where the header names {len(header)}"
            )
    return header, lines


def estimated_cells(found: Estimates, attribute: str) -> list[str]:
    """One column of estimates as text; empty where unknown."""
    values = getattr(found, attribute)
    if attribute == "fits":
        return [{1.0: "yes", 0.0: "no"}.get(value, "") for value in values.tolist()]
    return [f"{value:.6g}" if value == value else "" for value in values.tolist()]  # noqa: PLR0124


# --- calibration --------------------------------------------------------------------------------


def calibrate_file(source: Path, target: Path | None) -> dict[str, Any]:
    """Constants fitted to the rows of a file, written where asked, with their accuracy.

    Raises:
        InputError: the file cannot be read, or has no measured rows.
    """
    from thriftlm.planning import calibration

    header, lines = read_csv(source)
    columns = zip(*lines, strict=True) if lines else ()
    table = dict(zip(header, map(list, columns), strict=False))
    needed = {"source", "gpu", "tokens_per_s_per_gpu", "mfu"} - set(table)
    if needed:
        raise InputError(f"{source}: calibration needs rows with {', '.join(sorted(needed))}")
    fitted_to = calibration.calibrate(table, f"{source.name}, {len(lines)} rows")
    if target is not None:
        calibration.write(fitted_to, target)
    report = calibration.report(table)
    accuracy = {name: [asdict(line) for line in part] for name, part in report.items()}
    return {"calibration": asdict(fitted_to), "accuracy": accuracy}


def show_calibration(found: dict[str, Any]) -> None:
    """Print constants with their error, and accuracy by group."""
    console = plain_console()
    told = Calibration(**found["calibration"])
    constants: dict[str, float] = found["calibration"]["constants"]
    columns = [Column("constant"), Column("value", is_number=True), Column("+-", is_number=True)]
    cells = [
        [name, f"{value:.4g}", f"{told.relative_sd[name]:.0%}", told.identified_by[name]]
        for name, value in constants.items()
    ]
    console.print(fitted([*columns, Column("rows that tell")], cells, console.width))
    names = ("rows", "median", "p90", "bias")
    columns = [Column("error of tokens/s"), *(Column(name, is_number=True) for name in names)]
    for title, lines in found["accuracy"].items():
        rows = [
            [
                line["group"],
                str(line["n_rows"]),
                f"{line['median']:.1%}",
                f"{line['p90']:.1%}",
                f"{line['bias']:+.1%}",
            ]
            for line in lines
        ]
        console.print(Text(f"\n{title}", style="bold"))
        console.print(fitted(columns, rows, console.width))
