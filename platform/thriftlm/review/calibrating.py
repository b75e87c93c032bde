"""Calibrations on paper: constants from published rows, or moved to what one cluster measured."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.text import Text

from thriftlm.planning import calibration
from thriftlm.planning.cases import from_cases
from thriftlm.planning.constants import FILE, Calibration, shipped
from thriftlm.planning.estimate import case_of
from thriftlm.planning.machine import measured_machine
from thriftlm.planning.systems import Floats, Systems, from_table
from thriftlm.review.estimates import read_csv
from thriftlm.review.tables import Column, fitted, plain_console
from thriftlm.search.history.journal import read
from thriftlm.search.history.state import SearchState
from thriftlm.search.history.storage import Storage
from thriftlm.spec import InputError, RunSpec

NEEDED = ("source", "gpu", "tokens_per_s_per_gpu")


def calibrate_rows(sources: Sequence[Path], target: Path | None) -> dict[str, Any]:
    """Constants fitted to the rows of files, written where asked, with their accuracy.

    Raises:
        InputError: a file cannot be read, or has no measured rows.
    """
    table = rows_of(sources)
    names = ", ".join(source.name for source in sources)
    fitted_to = calibration.calibrate(table, f"{names}: {len(table['gpu'])} rows")
    keep(fitted_to, target)
    accuracy = {
        name: [asdict(line) for line in part] for name, part in calibration.report(table).items()
    }
    return {"calibration": asdict(fitted_to), "accuracy": accuracy}


def rows_of(sources: Sequence[Path]) -> dict[str, list[str]]:
    """Columns of throughput rows, one file below the other.

    Raises:
        InputError: a file cannot be read, or lacks a column.
    """
    for source in sources:
        header, lines = read_csv(source)
        if missing := [name for name in NEEDED if name not in header]:
            raise InputError(f"{source}: calibration needs rows with {', '.join(missing)}")
        if not lines:
            raise InputError(f"{source}: no rows; give one line per measured system")
    return calibration.read_rows(*sources)


def refine_by_rows(
    sources: Sequence[Path], storage: Storage, target: Path | None
) -> dict[str, Any]:
    """The shipped calibration moved to the probes of one cluster that files hold.

    Raises:
        InputError: a file cannot be read, or nothing was measured.
    """
    table = rows_of(sources)
    systems = from_table(table, measured_machine(storage.root))
    measured = calibration.measured_tokens_per_s(table, systems)
    return refine(systems, measured, ", ".join(s.name for s in sources), target)


def refine_by_searches(
    names: Sequence[str], storage: Storage, target: Path | None
) -> dict[str, Any]:
    """The shipped calibration moved to the throughput that searches measured, or measure now.

    Raises:
        InputError: no such search, or none of their trials has been timed.
    """
    trials = [trial for name in names for trial in timed_trials(name, storage)]
    source = f"search {', '.join(names)}"
    if not trials:
        raise InputError(f"no trial of {source} has been timed yet; wait for its reports")
    cases = [case_of(run) for run, _ in trials]
    systems = from_cases(cases, "thriftlm", measured_machine(storage.root))
    per_gpu = np.array([total for _, total in trials]) / systems.n_gpus
    return refine(systems, per_gpu, source, target)


def timed_trials(name: str, storage: Storage) -> list[tuple[RunSpec, float]]:
    """Runs of a search with their tokens per second over all GPUs, where those were measured.

    Raises:
        InputError: no such search.
    """
    path = storage.search(name) / "journal.jsonl"
    if not path.exists():
        raise InputError(f"no search '{name}' in {storage.root}; give its --storage, or its name")
    trials = SearchState(read(path)).trials.values()
    measured = [(trial.run, trial.tokens_per_s()) for trial in trials]
    for trial in trials:  # what a probe timed has no run of its own
        measured += [
            (trial.run.model_copy(update={"system": timing.system}), timing.total_tokens_per_s)
            for timing in trial.timings
        ]
    return [(run, total) for run, total in measured if total is not None]


def refine(systems: Systems, measured: Floats, source: str, target: Path | None) -> dict[str, Any]:
    """A refined calibration with the error on its own probes before and after.

    It starts from the shipped one, so that the same probes given twice count once.

    Raises:
        InputError: nothing was measured, or nothing is known of the machine that did it.
    """
    before = shipped()
    measured = np.where(
        np.isfinite(calibration.tokens_per_s(systems, before.constants)), measured, np.nan
    )
    try:
        after = calibration.refined(before, systems, measured, source)
    except ValueError as error:
        hint = "on a cpu, `thriftlm doctor` must have measured the machine first"
        raise InputError(f"{source}: no system with a known speed; {hint}") from error
    keep(after, target)
    errors = {
        name: np.log(calibration.tokens_per_s(systems, told.constants) / measured)
        for name, told in (("before", before), ("after, in sample", after))
    }
    accuracy = {
        name: [asdict(calibration.accuracy(error, source))] for name, error in errors.items()
    }
    return {"calibration": asdict(after), "accuracy": accuracy}


def keep(found: Calibration, target: Path | None) -> None:
    """Write a calibration where asked.

    Raises:
        InputError: it cannot be written there.
    """
    if target is None:
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        calibration.write(found, target)
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror}") from error


def place_to_keep(storage: Storage) -> Path:
    """Where estimates and dry runs look for a calibration before they take the shipped one."""
    return storage.root / FILE


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
