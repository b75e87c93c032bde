"""Estimates on paper: a grid of systems, a table in bulk, the breakdown of one."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.text import Text

from thriftlm.planning.constants import in_use
from thriftlm.planning.estimate import Estimate, Estimates, estimate_table
from thriftlm.planning.grid import Grid, Rank, Row, estimate_systems, kernel_refusal, rank
from thriftlm.planning.machine import measured_machine
from thriftlm.review.tables import Column, fitted, plain_console
from thriftlm.review.wording import optional, stale_prices, usd
from thriftlm.search.history.storage import storage
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
    kept = storage(None).root
    found = estimate_systems(model, grid.seq_len, systems, in_use(kept), measured_machine(kept))
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
    console.print(fitted(COLUMNS, [table_cells(row) for row in listed], console.width))
    if len(listed) < len(rows):
        console.print(f"[dim]{len(rows) - len(listed)} more, all of them with --json[/]")
    out = sum(row["fits"] is False for row in rows)
    console.print(f"[dim]estimated, 80% intervals; {out} of {len(rows)} are out[/]")
    if any(row["interval_class"] == "optimistic_fp8" for row in rows):
        console.print("[yellow]fp8 is optimistic: twice the bf16 rate, nothing for casts[/]")
    dates = [row["price_as_of"] for row in listed]
    if warning := stale_prices(dates, datetime.now(UTC).date()):
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


def table_cells(row: Row) -> list[str]:
    """One estimate as a line of a table under `COLUMNS`."""
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
    write_csv(target, [header[i] for i in kept], [cells[i] for i in kept], found)
    fits, known = int(np.nansum(found.fits)), int(np.isfinite(found.fits).sum())
    return {"rows": len(lines), "fit": fits, "do_not_fit": known - fits, "out": str(target)}


def write_csv(
    target: Path, header: Sequence[str], columns: Sequence[Sequence[Any]], found: Estimates
) -> None:
    """Write columns of systems with their estimates beside them.

    Raises:
        InputError: the file cannot be written.
    """
    added = [estimated_cells(found, attribute) for attribute in TABLE_COLUMNS.values()]
    try:
        with target.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*header, *TABLE_COLUMNS])
            writer.writerows(zip(*columns, *added, strict=True))
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror}") from error


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
