"""The `report` command: what a search has measured, for other tools."""

import json
from pathlib import Path
from typing import Annotated

import typer

from thriftlm.review.options import Json, StorageOption


def report(
    search: Annotated[
        str, typer.Argument(metavar="SEARCH", help="Name of a search in the storage folder.")
    ],
    runs: Annotated[
        Path,
        typer.Option(
            metavar="OUT",
            help="Write its recorded runs here, as .parquet or .csv: one row per run and report.",
        ),
    ],
    storage: StorageOption = None,
    as_json: Json = False,
) -> None:
    """Write what a search has measured, also while it runs: `thriftlm plan --fit` reads it."""
    from thriftlm.records import write_rows
    from thriftlm.search.history.journal import read
    from thriftlm.search.history.recorded import recorded_rows
    from thriftlm.search.history.state import SearchState
    from thriftlm.search.history.storage import storage as storage_at
    from thriftlm.spec import InputError

    place = storage_at(storage)
    journal = place.search(search) / "journal.jsonl"
    if not journal.exists():
        raise InputError(f"no search named {search} in {place.root}; give --storage or its name")
    rows = recorded_rows(SearchState(read(journal)))
    write_rows(rows, runs)
    told = {"runs": len({row["run_id"] for row in rows}), "rows": len(rows), "out": str(runs)}
    print(json.dumps(told) if as_json else f"{runs}: {told['rows']} rows of {told['runs']} runs")
