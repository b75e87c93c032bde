"""The runs of a search space, estimated: what each would do, and nothing is rented."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from thriftlm.planning.cases import model_columns, system_columns
from thriftlm.planning.constants import Calibration
from thriftlm.planning.estimate import Estimates, estimate_table
from thriftlm.planning.grid import Row
from thriftlm.price_tables import NORMALISED
from thriftlm.review.estimates import (
    COLUMNS,
    RANKED_SHOWN,
    as_row,
    ranked,
    table_cells,
    write_csv,
)
from thriftlm.review.tables import Column, fitted, plain_console
from thriftlm.review.wording import stale_prices, word
from thriftlm.search.spaces.domains import Uniform
from thriftlm.search.spaces.space import MAX_ENUMERATED, Space
from thriftlm.spec import RunSpec
from thriftlm_models.config import ModelSpec

PLACE = ("cloud", "region", "market", "billing")
"""Fields of a system that prices depend on and its other columns do not tell."""
Table = dict[str, list[Any]]


@dataclass(frozen=True)
class SpaceEstimates:
    """Estimates of the runs of a space, stack by stack: N = runs x stacks entries."""

    runs: tuple[RunSpec, ...]
    """Runs that differ in what an estimate depends on: model, system, sequence length, batch."""
    sampled: bool
    """Whether they come from points drawn at random, not from all."""
    table: Table
    """Columns of length N, named like throughput rows (design, section 6), with the prices' own."""
    found: Estimates
    """Of length N."""

    def rows(self) -> list[Row]:
        """One row an entry as `estimate --json` says it, with its model and batch; best first."""
        about = ("model", "stored_params", "seq_len", "global_batch_tokens")
        systems = (
            dict(zip(self.table, cells, strict=True))
            for cells in zip(*self.table.values(), strict=True)
        )
        rows = [
            {name: system[name] for name in about} | as_row(system, self.found[i], False)
            for i, system in enumerate(systems)
        ]
        return sorted(rows, key=ranked)


def estimate_space(
    space: Space, stacks: Sequence[str], calibration: Calibration | None = None
) -> SpaceEstimates:
    """Estimates of all different runs of a space on each of the stacks.

    Raises:
        InputError: unknown stack.
    """
    runs, sampled = distinct_runs(space)
    varied = [path.removeprefix("model.") for path in space.domains if path.startswith("model.")]
    table = columns(space.name, runs, varied)
    stacks = list(dict.fromkeys(stacks))
    table = {name: cells * len(stacks) for name, cells in table.items()}
    table["stack"] = [stack for stack in stacks for _ in runs]
    return SpaceEstimates(runs, sampled, table, estimate_table(table, calibration, space.machine))


def distinct_runs(space: Space) -> tuple[tuple[RunSpec, ...], bool]:
    """The runs of a space that differ in throughput, and whether they were drawn at random.

    Runs that differ in learning rate, corpus or seed alone are one. Fractions, as a learning rate,
    never matter: of a continuous field one value stands for all, so that the rest can be listed.
    """
    rng = np.random.default_rng(space.search.seed)
    listed = {
        path: (domain.sample(rng),) if isinstance(domain, Uniform) else domain.values or ()
        for path, domain in space.domains.items()
    }
    rows = product(*listed.values())
    found = (space.resolve(dict(zip(listed, row, strict=True)), space.search.seed) for row in rows)
    few = 0 < prod(map(len, listed.values())) <= MAX_ENUMERATED
    every = [run for run in found if isinstance(run, RunSpec)] if few else []
    runs: dict[tuple[Any, ...], RunSpec] = {}
    for run in every or space.count().runs:
        facts = (run.model, run.system, run.data.seq_len, run.optim.batch_tokens)
        runs.setdefault(facts, run)
    return tuple(runs.values()), not every


def columns(source: str, runs: Sequence[RunSpec], varied: Sequence[str]) -> Table:
    """Runs as columns of throughput rows; `estimate --table` reads them as they are."""
    shapes = cache(model_columns)
    labels = cache(lambda model: model_label(model, varied))
    rows = []
    for run in runs:
        shape = shapes(run.model, run.data.seq_len)
        rows.append(
            {"source": source, "model": labels(run.model), "params_m": shape["stored_params"] / 1e6}
            | shape
            | system_columns(run.system)
            | {"grad_accum": run.grad_accum, "global_batch_tokens": run.optim.batch_tokens}
            | {name: given(getattr(run.system, name)) for name in PLACE}
        )
    return {name: [row[name] for row in rows] for name in rows[0]}


def given(value: Any) -> Any:
    """A value as a cell of a table, where nothing is an empty one."""
    return "" if value is None else value


def model_label(model: ModelSpec, varied: Sequence[str]) -> str:
    """A model in a few words: its preset, and what the space varies of it."""
    words = [word(name, getattr(model, name)) for name in varied]
    if model.preset and "preset" not in varied:
        words.insert(0, model.preset)
    return " ".join(words) or f"n_layers={model.n_layers} d_model={model.d_model}"


def write_space(estimated: SpaceEstimates, target: Path) -> None:
    """All entries as CSV.

    Raises:
        InputError: the file cannot be written.
    """
    table = estimated.table
    write_csv(target, list(table), list(table.values()), estimated.found)


def show_space_estimates(estimated: SpaceEstimates, rows: Sequence[Row]) -> None:
    """Print the cheapest systems of each model, and how many runs are out.

    Args:
        estimated: where the rows come from.
        rows: `estimated.rows()`.
    """
    models = list(dict.fromkeys(estimated.table["model"]))
    each = max(1, RANKED_SHOWN // len(models))
    listed = [row for name in models for row in _of_model(rows, name)[:each]]
    console = plain_console()
    cells = [[row["model"], f"{row['global_batch_tokens']:,}", *table_cells(row)] for row in listed]
    about = [Column("model"), Column("batch", is_number=True, dispensable=3)]
    console.print(fitted([*about, *COLUMNS], cells, console.width))
    if len(listed) < len(rows):
        console.print(f"[dim]{len(rows) - len(listed):,} more, all of them with --json or --out[/]")
    out = sum(row["fits"] is False for row in rows)
    drawn = ", of points drawn at random" if estimated.sampled else ""
    console.print(f"[dim]estimated, 80% intervals; {out:,} of {len(rows):,} are out{drawn}[/]")
    is_normalised = NORMALISED in estimated.table["cloud"]
    if is_normalised:
        console.print(f"[dim]$ of {NORMALISED}: A100-40GB hours, not dollars[/]")
    dates = [] if is_normalised else [row["price_as_of"] for row in rows]
    if warning := stale_prices(dates, datetime.now(UTC).date()):
        console.print(f"[yellow]{warning}[/]")


def _of_model(rows: Sequence[Row], name: str) -> list[Row]:
    return [row for row in rows if row["model"] == name]
