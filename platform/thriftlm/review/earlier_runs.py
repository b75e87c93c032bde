"""What `search --from` means: earlier searches by name, file or MLflow experiment."""

from collections.abc import Sequence
from pathlib import Path

from thriftlm.records import Columns, read_columns
from thriftlm.search.answers.status import JOURNAL
from thriftlm.search.history.journal import read
from thriftlm.search.history.recorded import recorded_rows
from thriftlm.search.history.state import SearchState
from thriftlm.search.history.storage import Storage
from thriftlm.search.learning.known import TakenIn, columns_of, take_in
from thriftlm.search.spaces.space import Space
from thriftlm.spec import InputError

MLFLOW = "mlflow:"


def taken_in(
    space: Space, sources: Sequence[str], storage: Storage, tracking_uri: str
) -> list[TakenIn]:
    """What earlier searches know that is of use to a search of `space`, source by source.

    Raises:
        InputError: a source is nothing of the kind, cannot be read, is named twice, or teaches
            nothing.
    """
    if twice := [source for source in sources if sources.count(source) > 1]:
        raise InputError(f"--from {twice[0]} is given twice; once is enough")
    claimed: set[str] = set()
    return [
        take_in(space, source, _columns(source, storage, tracking_uri), claimed)
        for source in sources
    ]


def _columns(source: str, storage: Storage, tracking_uri: str) -> Columns:
    if source.startswith(MLFLOW):
        from thriftlm.review.mlflow_runs import experiment_rows

        return columns_of(experiment_rows(tracking_uri, source.removeprefix(MLFLOW)))
    if Path(source).is_file():
        return read_columns(Path(source))
    journal = storage.search(source) / JOURNAL
    if Path(source).suffix or not journal.exists():
        raise InputError(
            f"--from {source}: neither a file of recorded runs, nor a search in {storage.root}, "
            "nor mlflow:EXPERIMENT"
        )
    return columns_of(recorded_rows(SearchState(read(journal))))
