"""`search --from`: a search by name, a file, an MLflow experiment; what a dry run says of it."""

import json
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from thriftlm.records import write_rows
from thriftlm.review.earlier_runs import taken_in
from thriftlm.review.mlflow_runs import experiment_rows
from thriftlm.review.session import Sitting, answered
from thriftlm.review.tracking import MlflowWriter
from thriftlm.search.history.journal import (
    Allocated,
    Ended,
    Event,
    Journal,
    Known,
    Released,
    Reported,
    SearchEnded,
    SearchStarted,
    Suggested,
)
from thriftlm.search.history.recorded import recorded_rows
from thriftlm.search.history.state import SearchState
from thriftlm.search.history.storage import Storage
from thriftlm.search.spaces.space import Space, load_space
from thriftlm.spec import InputError, Progress, RunSpec

CHANGES = (
    "search.algorithm=random",
    "search.scheduler=asha",
    "search.fidelity={min_tokens: 20000, max_tokens: 180000}",
)
T0 = 1_700_000_000.0


@pytest.fixture(scope="module")
def space() -> Space:
    return load_space("quickstart", CHANGES)


@pytest.fixture(scope="module")
def events(space: Space) -> list[Event]:
    """Two trials that reported three times, and one that ran out of memory."""
    found: list[Event] = [
        SearchStarted(
            at=T0, search_id="first", space=space.document(), versions={}, unique_tokens={}
        )
    ]
    rng, number = np.random.default_rng(0), 0
    while number < 3:
        point = space.sample(rng)
        run = space.resolve(point, 0)
        if not isinstance(run, RunSpec):
            continue
        trial, at = run.trial_id, T0 + 100 * number
        found += [
            Suggested(at=at, trial_id=trial, number=number, point=point, run=run),
            Allocated(at=at, trial_id=trial, usd_per_hour=0.1, price="x"),
        ]
        for k in (1, 2, 3) if number < 2 else ():
            progress = Progress(
                status="running" if k < 3 else "done",
                step=k * 60_000 // run.optim.batch_tokens,
                tokens=k * 60_000 // run.optim.batch_tokens * run.optim.batch_tokens,
                val_loss=7 - k / 4,
                val_bits_per_byte=3 - k / 8,
                tokens_per_s=500.0 + k,
                decayed=k == 3,
            )
            found.append(Reported(at=at + 10 * k, trial_id=trial, progress=progress))
        found.append(Released(at=at + 40, trial_id=trial, usd=0.01))
        status = "done" if number < 2 else "oom"
        found.append(Ended(at=at + 41, trial_id=trial, status=status))  # type: ignore[arg-type]
        number += 1
    return [*found, SearchEnded(at=T0 + 400, status="finished", reason="x")]


@pytest.fixture
def storage(tmp_path: Path, events: list[Event]) -> Storage:
    """With the search `first` in it."""
    place = Storage(tmp_path / "storage")
    place.search("first").mkdir(parents=True)
    with Journal(place.search("first") / "journal.jsonl") as journal:
        for event in events:
            journal.append(event)
    return place


def tracked(uri: str, events: list[Event]) -> None:
    writer = MlflowWriter(uri, "first", lambda event: None)
    for event in events:
        writer(event)
    assert writer.close() == 0


def test_a_search_by_name_and_its_export_say_the_same(
    space: Space, storage: Storage, events: list[Event], tmp_path: Path
) -> None:
    write_rows(recorded_rows(SearchState(events)), tmp_path / "runs.parquet")
    by_name, by_file = (
        taken_in(space, [source], storage, "")[0]
        for source in ("first", str(tmp_path / "runs.parquet"))
    )
    assert by_name.points == 3
    assert by_name.known.runs == by_file.known.runs


def test_mlflow_holds_what_the_journal_does(uri: str, space: Space, events: list[Event]) -> None:
    tracked(uri, events)
    rows = {(row["run_id"], row["tokens"]): row for row in experiment_rows(uri, "thriftlm")}
    state = SearchState(events)
    assert [row["tokens"] for row in recorded_rows(state) if row["status"] == "oom"] == [0]
    for row in recorded_rows(state):
        other = rows.pop((row["run_id"], row["tokens"]))
        dropped = {"usd_per_hour", "unique_tokens"}  # prices are today's; the corpus is in the run
        dropped |= {"warming_up"} if row["tokens"] == 0 else set()
        assert {key: other[key] for key in row.keys() - dropped} == {
            key: row[key] for key in row.keys() - dropped
        }
    assert rows == {}
    (found,) = taken_in(space, ["mlflow:thriftlm/first"], Storage(Path("none")), uri)
    assert found.points == 3


def test_an_experiment_that_is_not_there_is_named(uri: str, port: int) -> None:
    with pytest.raises(InputError, match="no such experiment; there are Default"):
        experiment_rows(uri, "mine")
    MlflowClient(uri).create_experiment("with/slash")
    with pytest.raises(InputError, match=r"0 trials in .*none of which has reported"):
        experiment_rows(uri, "with/slash")
    with pytest.raises(InputError, match=rf"127\.0\.0\.1:{port} cannot be used"):
        experiment_rows(f"http://me:secret@127.0.0.1:{port}", "thriftlm")


def test_what_is_no_source_is_one_message(thriftlm, storage: Storage) -> None:
    for source, message in {
        "frist": "neither a file of recorded runs, nor a search in",
        "nowhere.parquet": "neither a file",
    }.items():
        code, out, err = thriftlm("search", "quickstart", "--from", source, "--dry-run")
        assert (code, out) == (2, "")
        assert message in err
        assert len(err.splitlines()) == 1
    code, _, err = thriftlm("search", "quickstart", "--from", "first", "--from", "first")
    assert code == 2
    assert "given twice" in err


def test_a_dry_run_says_how_much_is_known(thriftlm, storage: Storage) -> None:
    sets = [word for change in CHANGES for word in ("--set", change)]
    command = ["search", "quickstart", *sets, "--from", "first", "--dry-run"]
    code, out, err = thriftlm(*command, "--json")
    assert (code, err) == (0, "")
    (known,) = json.loads(out)["known"]
    assert (known["source"], known["runs"], known["points"]) == ("first", 3, 3)
    assert known["left_out"] == {}
    code, out, _ = thriftlm(*command)
    assert code == 0
    assert "from first: 3 runs taken in, which cover 3 points of the space" in out
    code, out, _ = thriftlm("search", "quickstart", "--dry-run", "--json")
    assert json.loads(out)["known"] == []


def test_what_a_search_begins_with_cannot_change(
    space: Space, storage: Storage, events: list[Event]
) -> None:
    known = Known(source="before", runs=())
    sitting = Sitting(space, "quickstart", storage, "first", "", known=(known,))
    with pytest.raises(InputError, match=r"was begun without --from before.*--name"):
        answered(sitting)
    again = storage.search("again")
    again.mkdir()
    with Journal(again / "journal.jsonl") as journal:
        for event in (events[0], known, *events[1:]):
            journal.append(event)
    assert answered(Sitting(space, "quickstart", storage, "again", "", known=(known,)))
