"""From recorded runs to the points that a law is fitted to."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from thriftlm.planning.fitting import Points
from thriftlm.planning.scaling_laws import Counts, effective_tokens
from thriftlm.records import Columns, read_columns
from thriftlm.spec import InputError

Which = Literal["auto", "last", "all"]
BROKEN = ("oom", "diverged", "failed")


def read_points(paths: Sequence[Path], which: Which = "auto") -> Points:
    """Points of recorded runs; those of several files count together.

    `last` takes the last report of each run, whose learning rate has decayed as far as it will.
    `all` takes every report after warm-up. `auto` takes all where the table says that no learning
    rate decays (a constant one), else the last. N is without embeddings where the table has that
    count, else all; repeated tokens count what they are worth. Runs that broke are left out.

    Raises:
        InputError: a file cannot be read or has no usable rows, or they count N differently.
    """
    tables = [_points(path, which) for path in paths]
    counts = {table.counts for table in tables}
    if len(counts) > 1:
        raise InputError(
            "recorded runs must all have non_embedding_params or none of them: N would mean two "
            "things in one law"
        )
    offsets = np.cumsum([0, *(int(table.run.max()) + 1 for table in tables)])
    return Points(
        run=np.concatenate([t.run + o for t, o in zip(tables, offsets[:-1], strict=True)]),
        n_params=np.concatenate([table.n_params for table in tables]),
        n_tokens=np.concatenate([table.n_tokens for table in tables]),
        loss=np.concatenate([table.loss for table in tables]),
        counts=counts.pop(),
    )


def _points(path: Path, which: Which) -> Points:
    columns = read_columns(path, ("run_id", "tokens", "loss"))
    counts: Counts = "non_embedding" if "non_embedding_params" in columns else "all"
    if counts == "all" and "params" not in columns:
        raise InputError(f"{path}: recorded runs need params or non_embedding_params")
    n_params = _numbers(columns, "params" if counts == "all" else "non_embedding_params", path)
    tokens, loss = (_numbers(columns, name, path) for name in ("tokens", "loss"))
    names, run = np.unique(np.array(columns["run_id"], str), return_inverse=True)
    usable = _usable(columns, run, len(names)) & (np.stack([n_params, tokens, loss]) > 0).all(0)
    usable &= np.isfinite(loss)
    if which == "last" or (which == "auto" and not _constant(columns)):
        usable &= _last(run, np.where(usable, tokens, -1.0), len(names))
    else:
        usable &= ~_flags(columns, "warming_up", len(run))
    if not usable.any():
        raise InputError(f"{path}: no run in it has a finite loss and ended well")
    unique = columns.get("unique_tokens") or [None] * len(run)
    worth = [effective_tokens(float(t), u) for t, u in zip(tokens, unique, strict=True)]
    points = Points(run.astype(np.intp), n_params, np.array(worth), loss, counts)
    return points.take(usable)


def _usable(columns: Columns, run: NDArray[Any], n_runs: int) -> NDArray[np.bool_]:
    """Rows of runs that did not break."""
    status = columns.get("status") or [""] * len(run)
    broken = np.zeros(n_runs, bool)
    broken[run[np.isin(np.array(status, str), BROKEN)]] = True
    return np.asarray(~broken[run])


def _last(run: NDArray[Any], tokens: NDArray[np.float64], n_runs: int) -> NDArray[np.bool_]:
    most = np.full(n_runs, -np.inf)
    np.maximum.at(most, run, tokens)
    return np.asarray(tokens == most[run])


def _constant(columns: Columns) -> bool:
    """Whether the table says that no learning rate decays."""
    return "decayed" in columns and not any(columns["decayed"])


def _flags(columns: Columns, name: str, length: int) -> NDArray[np.bool_]:
    return np.array([bool(value) for value in columns.get(name) or [False] * length])


def _numbers(columns: Columns, name: str, path: Path) -> NDArray[np.float64]:
    try:
        return np.array([np.nan if v is None else float(v) for v in columns[name]], np.float64)
    except ValueError as error:
        raise InputError(f"{path}: {name} must hold numbers: {error}") from error
