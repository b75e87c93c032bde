"""Interruption, resuming, endings: what the desk writes and what it does not."""

import pytest

from thriftlm.search.desk import INTERRUPTED, Finished
from thriftlm.search.history.journal import (
    Allocated,
    Ended,
    Event,
    Journal,
    Released,
    SearchEnded,
    SearchResumed,
    StopRequested,
)


def kinds(desk, trial_id=None):
    events = desk.journal.events
    return [e.kind for e in events if trial_id is None or getattr(e, "trial_id", None) == trial_id]


def test_the_life_of_a_trial_in_the_journal(lab):
    desk = lab.searched(lab.space(search_budget={"trials": 1}))
    reports = ["reported"] * lab.REPORTS
    assert kinds(desk) == [
        *("search_started", "suggested", "allocated"),
        *reports,
        "released",
        "ended",
        "search_ended",
    ]
    allocated, ended = desk.journal.events[2], desk.journal.events[-2]
    assert allocated.usd_per_hour > 0
    assert "aws" in allocated.price
    assert "USD/vCPU-hour" in allocated.price
    assert (ended.status, ended.checkpoint) == ("done", f"ckpt-{8192 * lab.REPORTS}")
    assert desk.state.ended.status == "finished"
    assert desk.state.ended.reason == "search budget of 1 trials"


def test_an_interrupted_search_keeps_what_was_measured_and_goes_on(lab):
    space = lab.space(search_budget={"trials": 5})
    desk = lab.desk(space)
    first = lab.run(desk, interrupt_at=desk.clock() + 80)
    assert first.reason == INTERRUPTED
    assert desk.state.ended.status == desk.state.ended.reason == "interrupted"
    *cut_short, waiting = desk.state.waiting
    assert len(cut_short) == 2
    assert not waiting.allocations  # proposed, not yet started
    for trial in cut_short:
        assert kinds(desk, trial.trial_id)[-2:] != ["released", "ended"]
        assert kinds(desk, trial.trial_id)[-1] == "released"
        assert trial.stop_reason == INTERRUPTED
        assert 0 < len(trial.curve) < lab.REPORTS
    tokens = {t.trial_id: t.tokens for t in cut_short}
    resumed = lab.desk(space, desk.clock, events=desk.journal.events)
    resumed.clock.now += 3600
    resumed.resume()
    assert isinstance(resumed.journal.events[-1], SearchResumed)
    assert all(t.stop_reason is None for t in resumed.state.trials.values() if not t.has_ended)
    lab.run(resumed, checkpoints=first.checkpoints)
    since = resumed.journal.events[len(desk.journal.events) :]
    started = [event.trial_id for event in since if isinstance(event, Allocated)]
    assert started[:2] == list(tokens)  # those that wait go first
    assert len(resumed.state.trials) == 5
    for trial in resumed.state.trials.values():
        assert trial.status == "done"
        assert [p.tokens for p in trial.curve] == [8192 * n for n in range(1, 10)]
    again = [
        e.progress.tokens
        for e in since
        if getattr(e, "trial_id", "") in tokens and e.kind == "reported"
    ]
    assert min(again) == min(tokens.values()) + 8192  # from the checkpoint, not from the beginning
    assert resumed.state.ended.status == "finished"
    assert resumed.state.hours(resumed.clock()) < 0.2  # the hour between the two does not count


def test_an_interruption_asks_each_running_trial_once_and_starts_no_other(lab):
    desk = lab.desk(lab.space())
    desk.next_trial(), desk.next_trial()
    desk.interrupt()
    desk.interrupt()
    asked = [e for e in desk.journal.events if isinstance(e, StopRequested)]
    assert [e.trial_id for e in asked] == list(desk.state.trials)
    assert desk.next_trial() == Finished(INTERRUPTED)


def test_a_trial_that_ends_by_itself_while_interrupted_has_ended(lab):
    desk = lab.desk(lab.space(search_budget={"trials": 1}))
    lab.run(desk, interrupt_at=desk.clock() + 10 + 5 * 8 - 1)  # its last report is on its way
    (trial,) = desk.state.trials.values()
    assert (trial.status, trial.stop_reason) == ("done", INTERRUPTED)


def test_a_scheduler_s_stop_stands_when_an_interruption_follows(lab):
    desk = lab.desk(lab.space())
    trial = desk.next_trial()
    desk._ask_to_end(trial, "asha: not in the top 1/3")
    desk.interrupt()
    desk.end(trial.trial_id, "stopped")
    assert (trial.status, trial.reason) == ("stopped", "asha: not in the top 1/3")


@pytest.mark.parametrize("status", ["oom", "diverged", "failed"])
def test_a_trial_that_breaks_is_billed_ends_and_never_starts_again(lab, status):
    space = lab.space(search_budget={"trials": 3})
    desk = lab.searched(space, lambda run: lab.Behaviour(failure=(status, 3)))
    for trial in desk.state.trials.values():
        assert trial.status == status
        assert len(trial.allocations) == 1
        assert trial.usd(0) > 0
    assert [p.status for p in trial.curve][:2] == ["running"] * 2
    assert desk.state.ended.status == "finished"


def test_what_the_tune_loop_leaves_running_is_released_when_the_search_closes(lab):
    desk = lab.desk(lab.space())
    trial = desk.next_trial()
    desk.clock.now += 36
    desk.close("gone")
    assert kinds(desk)[-2:] == ["released", "search_ended"]
    assert not trial.is_running
    assert desk.journal.events[-2].usd == pytest.approx(trial.allocations[0].usd_per_hour / 100)


def test_a_finished_search_that_goes_on_has_nothing_to_do(lab):
    done = lab.searched(lab.space(search_budget={"trials": 2}))
    again = lab.desk(lab.space(search_budget={"trials": 2}), done.clock, events=done.journal.events)
    again.resume()
    assert again.next_trial() == Finished("search budget of 2 trials")


def test_what_could_not_be_written_did_not_happen(lab):
    """A full disk: the decision is neither in the journal nor in what the desk knows."""
    desk = lab.desk(lab.space())
    desk.next_trial()
    before = repr(vars(desk.state))
    desk.journal.close()
    with pytest.raises(ValueError, match="closed file"):
        desk.next_trial()
    assert repr(vars(desk.state)) == before


def test_every_event_is_told_to_listeners_in_the_order_of_the_journal(lab):
    told: list[Event] = []
    desk = lab.desk(lab.space(search_budget={"trials": 2}))
    desk.journal.listeners = (told.append,)
    lab.run(desk)
    assert told == desk.journal.events[1:]
    assert {type(e) for e in told} >= {Allocated, Released, Ended, SearchEnded}
    desk.journal.close()
    with Journal(desk.journal.path) as journal:
        assert journal.events == desk.journal.events
