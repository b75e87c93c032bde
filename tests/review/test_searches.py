"""`searches`, `status` and `stop`: what a search's folder says while another process runs it."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from thriftlm.search.answers import result
from thriftlm.search.history.journal import (
    Allocated,
    Ended,
    Journal,
    Released,
    Reported,
    SearchEnded,
    SearchResumed,
    SearchStarted,
    StopRequested,
    Suggested,
)
from thriftlm.search.history.state import SearchState
from thriftlm.search.history.stopping import StopRequests, driver_of, request_stop
from thriftlm.search.spaces.space import load_space
from thriftlm.spec import Progress, RunSpec

CHANGES = (
    "search_budget={usd: 0.5, trials: 6}",
    "search.algorithm=random",
    "search.scheduler=none",
)
SPACE = load_space("quickstart", CHANGES)
T0 = 1_700_000_000.0
USD_PER_HOUR = 3.6


def runs():
    """Points and runs of the space, different ones."""
    rng = np.random.default_rng(0)
    while True:
        point = SPACE.sample(rng)
        run = SPACE.resolve(point, 0)
        if isinstance(run, RunSpec):
            yield point, run


def report(run, tokens, at, loss):
    progress = Progress(
        status="running", step=1, tokens=tokens, val_loss=loss, val_bits_per_byte=2.0,
        tokens_per_s=500.0,
    )  # fmt: skip
    return Reported(at=at, trial_id=run.trial_id, progress=progress)


def events(begin=T0, name="mine"):
    """A trial that ended, one that runs and one that waits; the last report at `begin` + 100."""
    drawn = runs()
    (done_at, done), (going_at, going), (queued_at, queued) = (next(drawn) for _ in range(3))
    start = SearchStarted(
        at=begin, search_id=name, space=SPACE.document(), versions={}, unique_tokens={}
    )
    return [
        start,
        Suggested(at=begin, trial_id=done.trial_id, number=0, point=done_at, run=done),
        Allocated(at=begin, trial_id=done.trial_id, usd_per_hour=USD_PER_HOUR, price="x"),
        *(report(done, k * 20_000, begin + 10 * k, 7 - k) for k in (1, 2)),
        Released(at=begin + 50, trial_id=done.trial_id, usd=0.05),
        Ended(at=begin + 50, trial_id=done.trial_id, status="done"),
        Suggested(at=begin + 51, trial_id=going.trial_id, number=1, point=going_at, run=going),
        Allocated(at=begin + 60, trial_id=going.trial_id, usd_per_hour=USD_PER_HOUR, price="x"),
        report(going, 20_000, begin + 80, 6.5),
        report(going, 40_000, begin + 100, 6.4),
        Suggested(at=begin + 100, trial_id=queued.trial_id, number=2, point=queued_at, run=queued),
    ]


@pytest.fixture
def begun(tmp_path):
    """Writes a search's journal and who drives it; leaves the journal held when asked to."""
    held = []

    def write(lines, name="mine", *, hold=False, driven_since=None):
        folder = tmp_path / "storage" / "searches" / name
        folder.mkdir(parents=True, exist_ok=True)
        journal = Journal(folder / "journal.jsonl")
        stops = StopRequests(folder)
        since = {"since": lines[0].at - 5 if driven_since is None else driven_since}
        (folder / "driver.json").write_text(stops.driver.model_copy(update=since).model_dump_json())
        for line in lines:
            journal.append(line)
        held.append(journal) if hold else journal.close()
        return folder

    write.held = held
    yield write
    for journal in held:
        journal.close()


def told(thriftlm, *arguments):
    code, out, _ = thriftlm(*arguments, "--json")
    assert code == 0
    return json.loads(out)


def test_status_of_a_search_that_runs(begun, thriftlm):
    begin = time.time() - 110
    begun(events(begin), hold=True)
    found = told(thriftlm, "status", "mine")
    assert (found["status"], found["is_held"]) == ("running", True)
    assert found["trials"] == {"done": 1, "running": 1, "waiting": 1}
    assert found["spent_usd"] == pytest.approx(0.05 + 50 * USD_PER_HOUR / 3600, abs=0.005)
    (going,) = found["running"]
    assert (going["tokens"], going["loss"], going["stop_reason"]) == (40_000, 6.4, None)
    assert going["report_due_seconds"] == pytest.approx(10, abs=4)
    leader = found["leader"]
    assert leader["low"] <= leader["loss_at_budget"] <= leader["high"]
    assert "next report of 1 trial, due in" in found["waits_for"]
    assert "for room or money" in found["waits_for"]
    code, out, err = thriftlm("status", "mine")
    assert (code, err) == (0, "")
    assert going["trial_id"] in out
    assert "of $0.50" in out
    assert "40k" in out


def test_a_killed_driver_is_told_from_one_that_lives(begun, thriftlm):
    """Its open allocation is billed to the last line that it wrote, as resuming will."""
    begun(events())
    found = told(thriftlm, "status", "mine")
    assert (found["status"], found["running"]) == ("dead", [])
    assert found["trials"] == {"done": 1, "waiting": 2}
    assert found["spent_usd"] == pytest.approx(0.05 + 40 * USD_PER_HOUR / 3600)
    assert "--name mine --resume" in found["waits_for"]


def test_status_of_searches_that_ended_or_begin_again(begun, thriftlm):
    lines = events()
    stopped = [
        Released(at=T0 + 120, trial_id=lines[-1].trial_id, usd=0.0),
        SearchEnded(at=T0 + 121, status="interrupted", reason="interrupted"),
    ]
    going = lines[7].trial_id
    stopped[0] = Released(at=T0 + 120, trial_id=going, usd=0.06)
    begun([*lines, *stopped])
    found = told(thriftlm, "status", "mine")
    assert found["status"] == "interrupted"
    assert found["hours"] == pytest.approx(121 / 3600)
    folder = begun([*lines, *stopped], "again", hold=True, driven_since=T0 + 500)
    assert told(thriftlm, "status", "again")["status"] == "starting"
    begun.held[-1].append(SearchResumed(at=T0 + 530))
    assert told(thriftlm, "status", "again")["status"] == "running"
    request_stop(folder, driver_of(folder))
    begun.held[-1].append(StopRequested(at=T0 + 540, trial_id=going, reason="interrupted"))
    found = told(thriftlm, "status", "again")
    assert found["status"] == "stopping"


def test_status_before_the_first_line(begun, thriftlm):
    folder = begun(events(), "other")
    new = folder.with_name("new")
    new.mkdir()
    with Journal(new / "journal.jsonl"):
        StopRequests(new)
        found = told(thriftlm, "status", "new")
        assert (found["status"], found["leader"]) == ("starting", None)
        assert thriftlm("status", "new")[0] == 0
    assert told(thriftlm, "status", "new")["status"] == "dead"


def test_searches_lists_them_latest_first(begun, thriftlm, tmp_path):
    assert told(thriftlm, "searches") == []
    assert "no search was begun" in thriftlm("searches")[1]
    lines = [*events(), SearchEnded(at=T0 + 130, status="finished", reason="done")]
    folder = begun(lines)
    result.write(folder, SPACE, SearchState(lines))
    best = json.loads((folder / "results.json").read_text())["best"]["loss_at_budget"]
    begun(events(T0 + 1000), "later")
    broken = begun(events(T0), "broken") / "journal.jsonl"
    broken.write_text(broken.read_text() + "nonsense\n")
    found = told(thriftlm, "searches")
    by_name = {one["name"]: one for one in found}
    assert by_name.keys() == {"mine", "later", "broken"}
    assert [one["name"] for one in found if one["name"] != "broken"] == ["later", "mine"]
    assert by_name["broken"]["status"] == "unreadable"
    assert "not a line of a journal" in by_name["broken"]["error"]
    mine = by_name["mine"]
    assert (mine["status"], mine["algorithm"], mine["trials"]) == ("finished", "random", 3)
    assert mine["best_loss_at_budget"] == best
    assert mine["budget_usd"] == 0.5
    assert by_name["later"]["best_loss_at_budget"] == pytest.approx(best, rel=0.05)
    code, out, err = thriftlm("searches")
    assert (code, err) == (0, "")
    assert all(name in out for name in by_name)


def test_an_answer_from_before_a_resume_is_not_shown(begun, thriftlm):
    lines = [*events(), SearchEnded(at=T0 + 130, status="interrupted", reason="interrupted")]
    folder = begun(lines)
    result.write(folder, SPACE, SearchState(lines))
    old = json.loads((folder / "results.json").read_text())
    old["best"]["loss_at_budget"] = 1.0
    (folder / "results.json").write_text(json.dumps(old))
    assert told(thriftlm, "searches")[0]["best_loss_at_budget"] == 1.0
    with Journal(folder / "journal.jsonl") as journal:
        journal.append(SearchResumed(at=T0 + 200))
        journal.append(report(lines[7].run, 60_000, T0 + 260, 6.3))
    assert told(thriftlm, "searches")[0]["best_loss_at_budget"] > 2


def test_stop_asks_the_driver_that_lives(begun, thriftlm):
    folder = begun(events(time.time() - 105), hold=True)
    said = told(thriftlm, "stop", "mine")
    assert (said["asked"], said["status"]) == (True, "stopping")
    assert "was asked to end: it waits for" in said["message"]
    assert json.loads((folder / "stop.json").read_text())["token"] == driver_of(folder).token
    assert told(thriftlm, "stop", "mine")["asked"]  # twice is once


def test_stop_waits_for_the_end(begun, thriftlm):
    folder = begun(events(time.time() - 105), hold=True)
    (journal,) = begun.held

    def drive():
        for _ in range(200):
            if (folder / "stop.json").exists():
                break
            time.sleep(0.02)
        journal.append(SearchEnded(status="interrupted", reason="interrupted"))
        journal.close()

    driver = threading.Thread(target=drive)
    driver.start()
    code, out, err = thriftlm("stop", "mine", "--wait", "--json")
    driver.join()
    said = json.loads(out)
    assert (code, said["status"]) == (0, "interrupted")
    assert "was ended; go on with `thriftlm search SPACE --name mine --resume`" in said["message"]
    assert "waits for" in err


def test_stop_says_when_the_driver_died_instead(begun, thriftlm):
    begun(events(time.time() - 105), hold=True)
    timer = threading.Timer(0.2, begun.held[0].close)
    timer.start()
    code, out, _ = thriftlm("stop", "mine", "--wait")
    timer.join()
    assert code == 1
    assert "lost its driver" in out


def test_stop_of_what_does_not_run_leaves_nothing_behind(begun, thriftlm):
    endings = {
        "finished": ([SearchEnded(at=T0 + 130, status="finished", reason="x")], "is finished"),
        "cut": ([SearchEnded(at=T0 + 130, status="interrupted", reason="x")], "interrupted before"),
        "killed": ([], "gone without a word"),
    }
    for name, (more, sentence) in endings.items():
        folder = begun([*events(), *more], name)
        for wait in ([], ["--wait"]):
            code, out, err = thriftlm("stop", name, *wait)
            assert (code, err) == (0, "")
            assert f"search {name} does not run" in out
            assert sentence in out
            assert len(out.splitlines()) == 1
        assert not (folder / "stop.json").exists()


@pytest.mark.parametrize("command", ["status", "stop"])
def test_an_unknown_name_is_refused_with_the_nearest(command, begun, thriftlm):
    code, _, err = thriftlm(command, "mnie")
    assert code == 2
    assert "no search was begun" in err
    begun(events())
    code, _, err = thriftlm(command, "mnie")
    assert code == 2
    assert "no search named 'mnie'" in err
    assert "mine" in err
    assert len(err.splitlines()) == 1


def test_the_three_commands_load_nothing_heavy(begun, thriftlm, tmp_path: Path):
    begun(events())
    code = (
        "import sys\n"
        "from thriftlm.cli import main\n"
        f"for words in (['searches'], ['status', 'mine'], ['stop', 'mine', '--wait']):\n"
        f"    sys.argv = ['thriftlm', *words, '--storage', {str(tmp_path / 'storage')!r}]\n"
        "    try: main()\n"
        "    except SystemExit as ended: assert not ended.code\n"
        "heavy = ('torch', 'ray', 'mlflow', 'optuna', 'pyarrow', 'matplotlib')\n"
        "print([name for name in heavy if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
