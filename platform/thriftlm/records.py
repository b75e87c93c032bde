"""Recorded runs: what searches have measured, one row per run and report, Parquet or CSV.

Columns: `run_id`; one for each varied field, named by its path in the space (`model.n_layers`);
`params` (stored, all), `tokens`, `loss` (nats per token), `tokens_per_s` (of all GPUs together),
`usd_per_hour` (of everything billed), `status`. Ours have more, which other tables may lack:
`non_embedding_params`, `decayed` and `warming_up` (of the learning rate at that report),
`bits_per_byte`, `unique_tokens` of the corpus, and `run`, the whole RunSpec as JSON.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from thriftlm.spec import InputError

Row = Mapping[str, Any]
Columns = dict[str, list[Any]]


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Write rows as Parquet, or as CSV where the path ends so; columns in order of appearance.

    Raises:
        InputError: no rows, or the file cannot be written.
    """
    import pyarrow as pa
    from pyarrow import csv, parquet

    if not rows:
        raise InputError(f"{path}: no reports to record yet")
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: plain([row.get(name) for row in rows]) for name in names}
    table = pa.table(columns)
    try:
        if path.suffix == ".csv":
            csv.write_csv(table, path)
        else:
            parquet.write_table(table, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error}") from error


def plain(values: list[Any]) -> list[Any]:
    """A column of one type: numbers, truth values or texts; lists and mixtures become texts."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float}:
        return [None if v is None else float(v) for v in values] if float in kinds else values
    if kinds in ({bool}, {str}):
        return values
    return [None if value is None else str(value) for value in values]


def read_columns(path: Path, required: Sequence[str] = ()) -> Columns:
    """Columns of a Parquet or CSV file by name; an empty cell is None.

    Raises:
        InputError: it cannot be read, or lacks a column.
    """
    import pyarrow as pa
    from pyarrow import csv, parquet

    try:
        table = csv.read_csv(path) if path.suffix == ".csv" else parquet.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: cannot be read as recorded runs: {reason}") from error
    missing = [name for name in required if name not in table.column_names]
    if missing:
        raise InputError(
            f"{path}: recorded runs need the columns {', '.join(required)}; missing: "
            f"{', '.join(missing)}"
        )
    found: Columns = table.to_pydict()
    return found
