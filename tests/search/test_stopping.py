"""A request to end a search reaches its driver and no other one, and ends it as Ctrl-C does."""

import json
from types import SimpleNamespace

import pytest

from thriftlm.search.desk import INTERRUPTED, Finished
from thriftlm.search.history.journal import Journal, is_held
from thriftlm.search.history.stopping import (
    REQUEST_FILE,
    StopRequests,
    driver_of,
    read_request,
    request_stop,
)


def ask(folder):
    request_stop(folder, driver_of(folder))


def test_a_request_reaches_the_driver_within_a_second(tmp_path):
    clock = iter([0.0, 0.2, 0.9, 1.1, 1.2]).__next__
    stops = StopRequests(tmp_path, clock)
    assert not stops.asked()
    ask(tmp_path)
    assert [stops.asked() for _ in range(4)] == [False, False, True, True]
    assert read_request(tmp_path).token == driver_of(tmp_path).token


def test_storage_is_asked_at_most_once_a_second(tmp_path, monkeypatch):
    looks = []
    monkeypatch.setattr(
        "thriftlm.search.history.stopping.read_request", lambda folder: looks.append(1)
    )
    times = iter(index / 100 for index in range(1000))
    stops = StopRequests(tmp_path, times.__next__)
    for _ in range(1000):
        stops.asked()
    assert len(looks) == 10


def test_a_stale_request_never_stops_the_next_driver(tmp_path):
    first = StopRequests(tmp_path)
    ask(tmp_path)
    assert first.asked()
    next_one = StopRequests(tmp_path)
    assert not next_one.asked()
    ask(tmp_path)
    assert not StopRequests(tmp_path).asked()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"token": 3}'])
def test_a_request_that_cannot_be_read_stops_nothing(tmp_path, text):
    stops = StopRequests(tmp_path)
    (tmp_path / REQUEST_FILE).write_text(text)
    assert not stops.asked()


def test_who_runs_a_search_is_written_whole(tmp_path):
    stops = StopRequests(tmp_path)
    assert driver_of(tmp_path) == stops.driver
    assert {path.name for path in tmp_path.iterdir()} == {"driver.json"}
    assert json.loads((tmp_path / "driver.json").read_text())["pid"] > 0


def test_a_request_interrupts_what_is_prepared_before_the_first_trial(tmp_path):
    told = []
    stops = StopRequests(tmp_path, iter([0.0, 2.0]).__next__)
    on_stage = stops.heeded(lambda stage, fraction: told.append((stage, fraction)))
    on_stage("shards", 0.1)
    ask(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        on_stage("shards", 0.2)
    assert told == [("shards", 0.1)]


def test_a_search_that_is_asked_ends_at_the_next_reports_and_goes_on_when_resumed(lab, tmp_path):
    """The cluster of the tests asks as the driver's loop does: `asked` becomes `interrupt`."""
    space = lab.space(search_budget={"trials": 4})
    desk = lab.desk(space)
    stops = StopRequests(tmp_path, desk.clock)
    cluster = lab.run_until(desk, stops.asked, ask_at=desk.clock() + 30, ask=lambda: ask(tmp_path))
    assert cluster.reason == INTERRUPTED
    assert desk.state.ended.status == "interrupted"
    for trial in desk.state.waiting:
        assert trial.stop_reason == INTERRUPTED or not trial.allocations
    resumed = lab.desk(space, desk.clock, events=desk.journal.events)
    resumed.resume()
    later = StopRequests(tmp_path, desk.clock)
    assert not later.asked()
    again = lab.run_until(resumed, later.asked, checkpoints=cluster.checkpoints)
    assert again.reason == "search budget of 4 trials"
    assert {trial.status for trial in resumed.state.trials.values()} == {"done"}


def test_a_turn_of_the_driver_obeys_a_request(lab, tmp_path):
    """Ray's side alone is left out: the actor that the trials ask, and the gangs."""
    from thriftlm.search.cluster.driver import Turn

    desk, told = lab.desk(lab.space()), []
    actor = SimpleNamespace(stop=SimpleNamespace(remote=told.append))
    hosts = SimpleNamespace(exchange=actor, settle=lambda desk: None)
    turn = Turn(desk, hosts, StopRequests(tmp_path, iter([0.0, 2.0, 4.0]).__next__))
    trial = desk.next_trial()
    turn.take()
    assert not desk.interrupted
    ask(tmp_path)
    turn.take()
    assert desk.interrupted
    assert told == [trial.trial_id]
    assert desk.next_trial() == Finished(INTERRUPTED)


def test_the_lock_tells_who_lives(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path):
        assert is_held(path)
    assert not is_held(path)


def test_looking_whether_a_journal_is_held_keeps_no_driver_away(tmp_path):
    """A look takes the lock for a moment; a driver that comes just then tries again."""
    import fcntl
    import threading

    path = tmp_path / "journal.jsonl"
    path.touch()
    with path.open("rb") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH | fcntl.LOCK_NB)
        timer = threading.Timer(0.05, lambda: fcntl.flock(looking, fcntl.LOCK_UN))
        timer.start()
        with Journal(path):
            assert is_held(path)
        timer.join()
