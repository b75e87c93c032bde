"""Estimates on paper: a grid of systems, a table in bulk, the breakdown of one."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich.text import Text

from thriftlm import catalog
from thriftlm.planning.constants import in_use
from thriftlm.planning.estimate import Estimate, Estimates, estimate_table
from thriftlm.planning.machine import measured_machine
from thriftlm.planning.systems import STRATEGIES, model_columns
from thriftlm.review.tables import Column, fitted, plain_console
from thriftlm.review.wording import optional, stale_prices, usd
from thriftlm.search.storage import storage
from thriftlm.spec import InputError
from thriftlm_models import kernels
from thriftlm_models.config import ModelSpec
from thriftlm_models.presets import preset

RANKED_SHOWN = 20
"""Systems that `--best` prints; JSON has them all."""
BEST_STRATEGIES = ("ddp", "fsdp_full", "fsdp_grad_op", "zero1", "zero2", "zero3")
BEST_MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
"""What `--best` tries where a strategy or micro batch is not given."""
TABLE_COLUMNS = {
    "est_tokens_per_s_per_gpu": "tokens_per_s_per_gpu",
    "est_mfu": "mfu",
    "est_peak_mem_gb": "peak_mem_gb",
    "est_fits": "fits",
    "est_usd_per_btok": "usd_per_btok",
}
"""Columns that a table gains, by what they hold of an estimate."""
BAR_CHARACTERS = 40
Row = dict[str, Any]


@dataclass(frozen=True)
class Grid:
    """Systems to estimate: every combination of the lists; an empty list takes its default."""

    gpus: Sequence[str]
    n_gpus: Sequence[int]
    strategies: Sequence[str]
    micro_batches: Sequence[int]
    attentions: Sequence[str]
    checkpointings: Sequence[str]
    stacks: Sequence[str]
    optimizer: str
    precision: str
    seq_len: int
    batch_tokens: int
    place: Mapping[str, Any]
    """Cloud, region, market, billing, gpus_per_node and cpus_per_worker where given."""

    def systems(self, best: bool) -> list[Row]:
        """One row of columns per system.

        Raises:
            InputError: unknown GPU, or `single` asked of several GPUs.
        """
        batches = self.micro_batches or (BEST_MICRO_BATCHES if best else (8,))
        names = [catalog.gpu(name).id for name in self.gpus]
        return [
            {
                "gpu": gpu,
                "n_gpus": n,
                "strategy": strategy,
                "micro_batch": micro_batch,
                "attention": attention,
                "act_ckpt": act_ckpt,
                "stack": stack,
                "optimizer": self.optimizer,
                "precision": self.precision,
                "grad_accum": max(1, round(self.batch_tokens / (micro_batch * n * self.seq_len))),
                **self.place,
            }
            for gpu, n in product(names, self.n_gpus)
            for strategy, micro_batch in product(self._strategies(n, best), batches)
            for attention, act_ckpt, stack in product(
                self.attentions or ("flash",), self.checkpointings or ("none",), self.stacks
            )
        ]

    def _strategies(self, n_gpus: int, best: bool) -> Sequence[str]:
        if n_gpus == 1:
            return ("single",)
        several = [name for name in self.strategies if name != "single"]
        if self.strategies and not several:
            raise InputError(
                f"strategy single runs on one GPU, --gpus is {n_gpus}; choose one of "
                + ", ".join(STRATEGIES[1:])
            )
        return several or (BEST_STRATEGIES if best else ("fsdp_full",))


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
    shape = model_columns(model, grid.seq_len)
    columns = {key: [value] * len(systems) for key, value in shape.items()}
    columns |= {key: [row[key] for row in systems] for key in systems[0]}
    kept = storage(None).root
    found = estimate_table(columns, in_use(kept), measured_machine(kept))
    rows = [as_row(system, found[i], explain) for i, system in enumerate(systems)]
    for row in rows:
        if reason := kernel_refusal(model, row, grid.precision):
            row |= {"fits": False, "reason": reason}
    return sorted(rows, key=rank) if best else rows


def kernel_refusal(model: ModelSpec, row: Row, precision: str) -> str:
    """Why our own core could not run the row's attention kernel on its GPU; empty where it can."""
    name = row["attention"]
    if row["stack"] != "thriftlm" or name not in kernels.REQUIREMENTS:
        return ""
    target = catalog.attention_target(row["gpu"], precision)
    windowed = "sliding" in model.block_attention
    reason = kernels.why_not(name, target, model.head_dim, windowed)
    return f"{name}: {reason}" if reason else ""


def rank(row: Row) -> tuple[int, float, float]:
    """Order of `--best`: what fits, then USD per token, then speed; the unknown after the known."""
    place = {True: 0, None: 1, False: 2}[row["fits"]]
    price, speed = row["usd_per_btok"], row["tokens_per_s_per_gpu"]
    never = float("inf")
    return place, never if price is None else price, never if speed is None else -speed


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
