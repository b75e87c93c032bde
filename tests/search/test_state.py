"""What a search knows is a replay of its journal: after any event, and after any kill."""

import numpy as np
import pytest

from thriftlm.search.history.journal import (
    Allocated,
    Ended,
    Released,
    Reported,
    RunMinted,
    SearchEnded,
    SearchResumed,
    StopRequested,
    Suggested,
)
from thriftlm.search.history.state import Allocation, SearchState


def uneven(lab):
    """Trials that start and report unevenly; one in four ends in a failure."""

    def behave(run):
        own = np.random.default_rng(int(run.trial_id, 16))
        kinds, at = ["oom", "diverged", "failed"], int(own.integers(1, 9))
        failure = (str(own.choice(kinds)), at) if own.random() < 0.25 else None
        waits = own.uniform(1, 20, 20)
        return lab.Behaviour(own.uniform(2, 30), lambda k: waits[k], 0.3, 2.0, failure)

    return behave


def released_usd(events):
    return sum(event.usd for event in events if isinstance(event, Released))


def cut(events, rng):
    """What a kill at some moment after the beginning leaves."""
    return events[: int(rng.integers(1, len(events) + 1))]


def suggested(events):
    return [event.trial_id for event in events if isinstance(event, Suggested)]


@pytest.mark.parametrize("scheduler", ["asha", "none"])
def test_a_live_state_equals_the_replay_of_every_prefix(lab, scheduler):
    space = lab.space(search={"scheduler": scheduler}, search_budget={"trials": 4})
    desk = lab.desk(space)
    live = {}
    write = desk._write

    def watched(event):
        write(event)
        live[len(desk.journal.events)] = repr(vars(desk.state))

    desk._write = watched
    lab.run(desk, uneven(lab), interrupt_at=desk.clock() + 60)
    desk.interrupted = False
    desk.resume()
    lab.run(desk, uneven(lab))
    assert len(live) == len(desk.journal.events) - 1 > 30
    for length, held in live.items():
        assert repr(vars(SearchState(desk.journal.events[:length]))) == held
    assert vars(SearchState(desk.journal.events)) == vars(desk.state)


@pytest.mark.parametrize("algorithm", ["random", "grid"])
@pytest.mark.parametrize("seed", range(12))
def test_a_search_that_was_killed_anywhere_goes_on_as_if_it_had_not_been(lab, algorithm, seed):
    """Killed three times, wherever that was, at times while it was being interrupted."""
    rng = np.random.default_rng(seed)
    search = {"algorithm": algorithm, "seed": seed, "max_concurrent": int(rng.integers(1, 4))}
    lr = [1e-3, 3e-3, 1e-2] if algorithm == "grid" else {"loguniform": [1e-4, 1e-1]}
    space = lab.space(search=search, optim={"lr": lr}, search_budget={"trials": 7})
    whole = lab.searched(space, uneven(lab))
    desk = lab.desk(space)
    checkpoints = lab.run(desk, uneven(lab), interrupt_at=desk.clock() + 70).checkpoints
    for _ in range(3):
        events = cut(desk.journal.events, rng)
        ended = {event.trial_id for event in events if isinstance(event, Ended)}
        desk = lab.desk(space, desk.clock, events=events)
        desk.resume()
        lab.run(desk, uneven(lab), checkpoints=dict(checkpoints))
        since = desk.journal.events[len(events) :]
        again = {e.trial_id for e in since if isinstance(e, Allocated | Reported | Ended)}
        assert not again & ended
    events = desk.journal.events
    assert suggested(events) == suggested(whole.journal.events)
    assert len(set(suggested(events))) == len(suggested(events)) == 7
    assert [trial.number for trial in desk.state.trials.values()] == list(range(7))
    assert all(trial.has_ended for trial in desk.state.trials.values())
    spent = desk.state.spent_usd(desk.clock())
    assert released_usd(events) == pytest.approx(spent, rel=1e-12)
    assert vars(SearchState(events)) == vars(desk.state)


def test_a_killed_driver_is_billed_to_the_last_line_it_wrote(lab):
    whole = lab.searched(lab.space(optim={"lr": 1e-3}, search_budget={"trials": 1})).journal.events
    events = whole[:6]  # started, suggested, allocated, three reports
    assert isinstance(events[-1], Reported)
    clock = lab.Clock(events[-1].at + 7200)
    desk = lab.desk(lab.space(optim={"lr": 1e-3}), clock, events=events)
    (trial,) = desk.state.running
    held = events[-1].at - events[2].at
    desk.resume()
    assert not trial.is_running
    assert desk.state.spent_usd(clock()) == pytest.approx(events[2].usd_per_hour * held / 3600)
    assert desk.state.hours(clock()) == pytest.approx((events[-1].at - events[0].at) / 3600)
    clock.now += 360
    assert desk.state.hours(clock()) == pytest.approx((events[-1].at - events[0].at + 360) / 3600)


def first_trial(lab):
    events = lab.searched(lab.space(search_budget={"trials": 1})).journal.events
    return events[:3], events[1].trial_id


def reported(trial_id, at, tokens, loss=2.0, status="running"):
    progress = {"status": status, "step": 1, "tokens": tokens, "val_loss": loss}
    return Reported.model_validate({"at": at, "trial_id": trial_id, "progress": progress})


def test_what_a_resumed_trial_measures_again_replaces_what_it_had(lab):
    begin, trial_id = first_trial(lab)
    at = begin[-1].at
    reports = [reported(trial_id, at + n, n * 100, 3.0 - n / 10) for n in (1, 2, 3, 4)]
    state = SearchState([*begin, *reports, Released(at=at + 5, trial_id=trial_id, usd=1)])
    trial = state.trials[trial_id]
    assert (trial.tokens, trial.loss) == (400, 2.6)
    state.apply(SearchResumed(at=at + 100))
    state.apply(Allocated(at=at + 101, trial_id=trial_id, usd_per_hour=1, price=""))
    assert trial.reported_at == []
    state.apply(reported(trial_id, at + 110, 200, 2.9))  # its checkpoint was at 100
    assert [(p.tokens, p.val_loss) for p in trial.curve] == [(100, 2.9), (200, 2.9)]
    assert trial.reported_at == [at + 110]
    assert len(trial.allocations) == 2


def test_running_out_of_memory_leaves_the_loss_that_was_measured_before(lab):
    begin, trial_id = first_trial(lab)
    at = begin[-1].at
    state = SearchState([*begin, reported(trial_id, at + 1, 100)])
    state.apply(reported(trial_id, at + 2, 100, None, "oom"))
    assert [p.status for p in state.trials[trial_id].curve] == ["running", "oom"]
    assert state.trials[trial_id].loss == 2.0


def test_a_decision_holds_after_a_kill_and_an_interruption_does_not(lab):
    begin, trial_id = first_trial(lab)
    at = begin[-1].at + 1
    for reason, ends in [("asha: not in the top 1/3", True), ("interrupted", False)]:
        events = [*begin, StopRequested(at=at, trial_id=trial_id, reason=reason)]
        desk = lab.desk(lab.space(), lab.Clock(at + 9), events=events)
        desk.resume()
        trial = desk.state.trials[trial_id]
        assert trial.has_ended == ends
        assert (trial.status, trial.reason) == (("stopped", reason) if ends else (None, ""))
        assert trial.stop_reason == (reason if ends else None)
        assert desk.state.ended is None


def test_minted_ids_change_nothing_a_slow_tracking_server_included(lab):
    events = lab.searched(lab.space(search_budget={"trials": 1})).journal.events
    assert isinstance(events[-1], SearchEnded)
    late = RunMinted(at=events[-1].at + 900, trial_id=None, mlflow_run_id="f00")
    assert vars(SearchState([*events, late])) == vars(SearchState(events))


def test_an_allocation_costs_price_times_time():
    assert Allocation(3.6, since=0.0, until=0.0).usd(now=1000.0) == 0
    assert Allocation(3.6, since=100.0).usd(now=1100.0) == pytest.approx(1.0)
    assert Allocation(3.6, since=100.0, until=600.0).usd(now=1100.0) == pytest.approx(0.5)
    assert Allocation(3.6, since=100.0).usd(now=50.0) == 0  # the clock was set back


def test_throughput_is_the_median_over_all_gpus(lab):
    space = lab.space(system={"n_gpus": 2, "strategy": "ddp"}, search_budget={"trials": 1})
    desk = lab.searched(space, lambda run: lab.Behaviour(tokens_per_s=300.0))
    (trial,) = desk.state.trials.values()
    assert trial.tokens_per_s() == 600
    assert SearchState().trials == {}
