"""The journal survives kills, full disks, two drivers and newer versions, or says what is wrong."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from thriftlm.search.history.journal import (
    JOURNAL_VERSION,
    Allocated,
    Dismissed,
    Ended,
    Idle,
    Journal,
    Known,
    KnownRun,
    Probed,
    Released,
    Reported,
    RunMinted,
    SearchEnded,
    SearchResumed,
    SearchStarted,
    StopRequested,
    Suggested,
    read,
)
from thriftlm.spec import InputError, Progress, RunSpec
from thriftlm.timings import Timing

STARTED = SearchStarted(
    search_id="s",
    space={"name": "s", "lr": [1e-3, None]},
    versions={"ray": "2"},
    unique_tokens={"a": 9},
)
RUN = RunSpec(
    model={"n_layers": 2, "d_model": 64, "n_heads": 2, "vocab": 512},
    data={"tokenizer": "bpe:512", "seq_len": 128},
    tokens=65_536,
    report_every_tokens=8192,
)
EVERY_KIND = [
    STARTED,
    Known(
        source="ü.parquet",
        runs=(
            KnownRun(
                run_id="1",
                recipe_id="r",
                n_params=3.0,
                point={"optim.lr": 0.1 + 0.2},
                trial_id="t0",
                run=None,
                usd_per_hour=1 / 3,
                status="stopped",
                reports=(),
            ),
        ),
    ),
    SearchResumed(at=2.5),
    Suggested(
        trial_id="t", number=0, point={"optim.lr": 0.1 + 0.2, "system.compile": False}, run=RUN
    ),
    Allocated(trial_id="t", usd_per_hour=1 / 3, price="aws c7i", gang="g"),
    Idle(gang="g", system=RUN.system, usd_per_hour=1 / 3),
    Dismissed(gang="g", usd=2e-9),
    Reported(
        trial_id="t",
        progress=Progress(status="running", step=1, tokens=8, val_loss=1e-17, detail="ü\n\u2028"),
        checkpoint="/ckpt",
    ),
    Probed(trial_id="t", timing=Timing(system=RUN.system, status="oom", detail="no")),
    StopRequested(trial_id="t", reason="asha"),
    Released(trial_id="t", usd=2e-9),
    Ended(trial_id="t", status="failed", reason="broke"),
    RunMinted(trial_id=None, mlflow_run_id="f00"),
    SearchEnded(status="interrupted", reason="interrupted"),
]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal.jsonl"


def write(path, events):
    with Journal(path) as journal:
        for event in events:
            journal.append(event)


def refused(path):
    with pytest.raises(InputError) as error:
        list(read(path))
    with pytest.raises(InputError, match=r"not a line of|newer thriftlm"):
        Journal(path)
    return str(error.value)


def python(code, *arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )


def test_every_kind_of_event_is_read_as_it_was_written(path):
    assert {type(e).__name__ for e in EVERY_KIND} == {
        cls.__name__ for cls in type(STARTED).__mro__[1].__subclasses__()
    }
    write(path, EVERY_KIND)
    assert list(read(path)) == EVERY_KIND
    assert all(json.loads(line)["kind"] for line in path.read_bytes().splitlines())
    with Journal(path) as journal:
        assert journal.events == EVERY_KIND
        journal.append(SearchResumed(at=3))
    assert list(read(path)) == [*EVERY_KIND, SearchResumed(at=3)]


def test_listeners_hear_of_an_event_once_it_is_on_disk(path):
    heard = []
    with Journal(path, (lambda event: heard.append((event, list(read(path))[-1])),)) as journal:
        for event in EVERY_KIND:
            journal.append(event)
    assert heard == [(event, event) for event in EVERY_KIND]


def test_threads_do_not_mix_their_lines(path):
    def mint(name):
        for number in range(50):
            journal.append(RunMinted(trial_id=name, mlflow_run_id=str(number)))

    with Journal(path) as journal:
        threads = [threading.Thread(target=mint, args=(name,)) for name in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert list(read(path)) == journal.events
        assert len(journal.events) == 200


@pytest.mark.parametrize("torn", [b'{"kind":"released","tri', b"\x00\x00", b'{"a"', b"\xff"])
def test_a_torn_last_line_is_left_out_and_cut_when_opened(path, torn):
    write(path, EVERY_KIND)
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert list(read(path)) == EVERY_KIND
    with Journal(path) as journal:
        assert path.read_bytes() == whole
        journal.append(SearchResumed(at=3))
    assert list(read(path)) == [*EVERY_KIND, SearchResumed(at=3)]


def test_every_cut_of_a_journal_can_be_opened(path):
    write(path, EVERY_KIND[:4])
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with Journal(path) as journal:
            assert journal.events == EVERY_KIND[: whole[:size].count(b"\n")]


@pytest.mark.parametrize(
    ("garbage", "says"),
    [
        (b"not json", "Invalid JSON"),
        (b"", "Invalid JSON"),
        (b"\xff\xfe", "Invalid JSON"),
        (b'{"kind":"vanished"}', "does not match any of the expected tags"),
        (b'{"kind":"released","trial_id":"t"}', "released.usd: Field required"),
        (b'{"kind":"released","trial_id":"t","usd":1,"eur":2}', "released.eur: Extra inputs"),
    ],
)
def test_garbage_in_the_middle_names_file_and_line(path, garbage, says):
    write(path, EVERY_KIND)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], garbage + b"\n", *lines[3:]]))
    message = refused(path)
    assert message.startswith(f"{path}:4: not a line of a journal: ")
    assert says in message
    assert "\n" not in message
    assert path.read_bytes().splitlines(keepends=True)[4:] == lines[3:]  # nothing was cut


@pytest.mark.parametrize("change", [{}, {"cluster": "new in version 2"}])
def test_a_newer_version_is_refused_before_its_fields_are(path, change):
    newer = STARTED.model_dump() | {"version": JOURNAL_VERSION + 1} | change
    path.write_text(json.dumps(newer) + "\n")
    assert "newer thriftlm (journal version 2, this one reads 1); update" in refused(path)


HOLD = """
import sys, time
from pathlib import Path
from thriftlm.search.history.journal import Journal
journal = Journal(Path(sys.argv[1]))
print("open", flush=True)
time.sleep(60)
"""


def test_a_second_driver_is_refused_until_the_first_is_gone(path):
    with Journal(path) as first:
        first.append(STARTED)
        with pytest.raises(InputError, match="another driver is running this search"):
            Journal(path)
        first.append(SearchResumed())  # the refused one did not harm it
    Journal(path).close()


def test_a_killed_driver_lets_go_of_its_journal(path):
    write(path, EVERY_KIND)
    driver = python(HOLD, path)
    try:
        assert driver.stdout.readline() == "open\n"
        with pytest.raises(InputError, match="another driver is running this search"):
            Journal(path)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        with Journal(path) as journal:
            assert journal.events == EVERY_KIND
    finally:
        driver.kill()
        driver.communicate()


FILL = """
import resource, sys
from pathlib import Path
from thriftlm.search.history.journal import Journal, RunMinted
heard = []
with Journal(Path(sys.argv[1]), (heard.append,)) as journal:
    journal.append(RunMinted(trial_id="a", mlflow_run_id="1"))
    full = journal.path.stat().st_size + 30
    resource.setrlimit(resource.RLIMIT_FSIZE, (full, resource.RLIM_INFINITY))
    try:
        journal.append(RunMinted(trial_id="b", mlflow_run_id="2"))
    except OSError as error:
        print(error)
    print(len(journal.events), len(heard), flush=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    journal.append(RunMinted(trial_id="c", mlflow_run_id="3"))
"""


def test_an_append_that_does_not_fit_the_disk_leaves_the_journal_whole(path):
    """The limit lets 30 bytes of the line through, as a disk that fills up does."""
    said, _ = python(FILL, path).communicate(timeout=60)
    assert "make room, go on with --resume" in said
    assert said.splitlines()[-1] == "1 1"
    assert [event.trial_id for event in read(path)] == ["a", "c"]


def test_a_folder_in_place_of_the_journal_is_an_error_of_the_system(tmp_path):
    with pytest.raises(IsADirectoryError):
        Journal(tmp_path)
    assert os.listdir(tmp_path) == []
