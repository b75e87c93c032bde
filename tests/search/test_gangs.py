"""Gangs that outlive their trials: who gets them, what they cost, and when they must go."""

from itertools import pairwise

import pytest

from thriftlm.search.cluster.capacity import Capacity
from thriftlm.search.cluster.gangs import LONGEST_IDLE_SECONDS
from thriftlm.search.history.journal import Allocated, Dismissed, Idle, Released
from thriftlm.search.history.state import SearchState


def allocations(desk):
    return [event for event in desk.journal.events if isinstance(event, Allocated)]


def only(desk, kind):
    return [event for event in desk.journal.events if isinstance(event, kind)]


def alone(lab, trials=4, **changes):
    search = {"max_concurrent": 1} | changes.pop("search", {})
    return lab.space(search=search, search_budget={"trials": trials}, **changes)


def test_one_gang_serves_all_trials_with_its_resources_one_after_the_other(lab):
    system = {"n_gpus": 2, "strategy": ["ddp", "fsdp_full", "zero1"]}
    desk = lab.desk(alone(lab, system=system), warm=True)
    lab.run(desk)
    assert {event.gang for event in allocations(desk)} == {"gang-0"}
    assert len({t.run.system.strategy for t in desk.state.trials.values()}) > 1
    assert len(only(desk, Idle)) == 4
    assert len(only(desk, Dismissed)) == 1


def test_without_it_no_gang_is_named(lab):
    desk = lab.desk(alone(lab))
    lab.run(desk)
    assert {event.gang for event in allocations(desk)} == {None}
    assert not only(desk, Idle)


def test_what_it_costs_while_it_waits_is_spent(lab):
    desk = lab.desk(alone(lab), warm=True)
    lab.run(desk)
    state = desk.state
    trials = sum(event.usd for event in only(desk, Released))
    assert state.spent_usd(state.last_at) == pytest.approx(trials + state.idle_usd(state.last_at))
    price = allocations(desk)[0].usd_per_hour
    (gone,) = only(desk, Dismissed)
    waited = gone.at - only(desk, Idle)[-1].at
    assert gone.usd == pytest.approx(price * waited / 3600)
    assert state.idle_usd(state.last_at) >= gone.usd > 0


def test_a_gang_that_waits_in_the_way_of_another_makes_room(lab):
    system = {"n_gpus": [1, 2], "strategy": "ddp"}
    desk = lab.desk(alone(lab, trials=8, system=system), warm=True)
    lab.run(desk)
    sizes = [t.run.system.n_gpus for t in desk.state.trials.values()]
    assert set(sizes) == {1, 2}
    assert len(desk.state.trials) == 8
    held = {}
    for event in desk.journal.events:  # never more than the two CPUs, waiting ones included
        match event:
            case Allocated(gang=gang, trial_id=trial_id):
                held[gang] = desk.state.trials[trial_id].run.system.n_gpus
            case Dismissed(gang=gang):
                del held[gang]
        assert sum(held.values()) <= 2


def test_a_gang_that_broke_serves_nobody_else(lab):
    def behave(run):
        failure = ("oom", 2) if run.model.n_layers == 4 else None
        return lab.Behaviour(failure=failure)

    desk = lab.desk(alone(lab, trials=8), warm=True)
    lab.run(desk, behave)
    broken = [t for t in desk.state.trials.values() if t.status == "oom"]
    assert 0 < len(broken) < 8
    for trial in broken:
        served = [event.trial_id for event in allocations(desk) if event.gang == trial.gang]
        assert served[-1] == trial.trial_id


def test_it_waits_no_longer_than_a_start_would_take(lab):
    desk = lab.desk(alone(lab, trials=1), warm=True)
    trial = desk.next_trial()
    desk.end(trial.trial_id, "done", gang_lives=True)
    assert desk.gangs_to_dismiss() == []
    desk.clock.now += LONGEST_IDLE_SECONDS + 1
    assert desk.gangs_to_dismiss() == [trial.gang]
    assert trial.gang in desk.state.idle  # and is billed until it has ended
    desk.gang_ended(trial.gang)
    assert not desk.state.idle
    assert desk.gangs_to_dismiss() == []


@pytest.mark.parametrize("usd", [0.0008, 0.0012, 0.002, 0.003])
def test_the_cap_holds_with_gangs_that_wait(lab, usd):
    system = {"n_gpus": [1, 2], "strategy": "ddp"}
    space = lab.space(search_budget={"usd": usd}, system=system)
    desk = lab.desk(space, warm=True)
    lab.run(desk)
    assert desk.state.spent_usd(desk.state.last_at) <= usd
    cold = lab.desk(space)
    lab.run(cold)
    assert len(desk.state.trials) >= len(cold.state.trials)


def test_a_killed_driver_leaves_no_gang_behind(lab):
    desk = lab.desk(alone(lab), warm=True)
    trial = desk.next_trial()
    desk.clock.now += 20
    desk.end(trial.trial_id, "done", gang_lives=True)
    events, died_at = list(desk.journal.events), desk.clock()
    resumed = lab.desk(desk.space, desk.clock, events=events, warm=True)
    resumed.clock.now += 3600
    resumed.resume()
    (gone,) = only(resumed, Dismissed)
    assert (gone.at, gone.usd) == (died_at, 0.0)
    again = resumed.next_trial()
    assert again.gang != trial.gang


def test_replaying_the_journal_gives_the_same_state(lab):
    desk = lab.desk(lab.space(system={"n_gpus": [1, 2], "strategy": "ddp"}), warm=True)
    lab.run(desk)
    replayed = SearchState(desk.journal.events)
    assert vars(replayed) == vars(desk.state)


def test_gangs_on_a_larger_cluster_live_side_by_side(lab):
    space = lab.space(system={"n_gpus": [1, 2], "strategy": "ddp"}, search_budget={"trials": 12})
    desk = lab.desk(space, capacity=Capacity({"CPU": 8.0}), warm=True)
    lab.run(desk)
    gangs = {event.gang for event in allocations(desk)}
    assert 2 <= len(gangs) < 12


def test_the_factored_search_prefers_systems_whose_gang_lives(lab):
    """Where both cost about the same a token, the one that need not start is cheaper."""
    system = {"n_gpus": [1, 2], "strategy": "ddp"}
    space = lab.space(system=system, search={"algorithm": "factored"}, search_budget={"trials": 8})

    def behave(run):
        return lab.Behaviour(tokens_per_s=1000.0 / run.system.n_gpus)  # of each worker

    def sizes(warm):
        desk = lab.desk(space, warm=warm, capacity=Capacity({"CPU": 2.0}))
        lab.run(desk, behave)
        return [t.run.system.n_gpus for t in desk.state.trials.values()]

    changes = {warm: sum(a != b for a, b in pairwise(sizes(warm))) for warm in (False, True)}
    assert changes[True] <= changes[False]
    desk = lab.desk(space, warm=True)
    trial = desk.next_trial()
    desk.end(trial.trial_id, "done", gang_lives=True)
    searcher = desk.algorithm
    warm = searcher._warm(desk.state)
    assert warm.any()
    assert not warm.all()
    assert {
        one.n_gpus for one, is_warm in zip(searcher.menu.specs, warm, strict=True) if is_warm
    } == {trial.run.system.n_gpus}
