"""A trial starts only when its whole gang fits."""

import numpy as np
import pytest

from thriftlm.search.cluster.capacity import Capacity, needs
from thriftlm.search.desk import Finished, Wait
from thriftlm.search.history.journal import Allocated, Released
from thriftlm.spec import SystemSpec

CLUSTER = Capacity({"CPU": 8.0, "GPU:H100": 4.0, "GPU:T4": 1.0})


def system(gpu="cpu", n_gpus=1, cpus=1):
    strategy = "ddp" if n_gpus > 1 else "single"
    return SystemSpec(gpu=gpu, n_gpus=n_gpus, strategy=strategy, cpus_per_worker=cpus)


def test_needs_of_a_gang():
    assert needs(system("cpu", 3, 2)) == {"CPU": 6}
    assert needs(system("H100-80GB", 4, 2)) == {"CPU": 8, "GPU:H100": 4}


def test_a_gang_fits_whole_or_not():
    assert CLUSTER.can_ever_hold(system("H100-80GB", 4, 2))
    assert not CLUSTER.can_ever_hold(system("H100-80GB", 8))
    assert not CLUSTER.can_ever_hold(system("cpu", 3, 3))
    assert not CLUSTER.can_ever_hold(system("A100-80GB"))
    two = [system("H100-80GB", 2)]
    assert CLUSTER.can_hold(system("H100-80GB", 2, 3), two)
    assert not CLUSTER.can_hold(system("H100-80GB", 3), two)
    assert not CLUSTER.can_hold(system("cpu", 7), two)
    assert CLUSTER.can_hold(system("T4-16GB"), two)


@pytest.mark.parametrize("seed", range(3))
def test_a_search_never_holds_more_than_there_is(lab, seed):
    space = lab.space(
        search={"seed": seed},
        search_budget={"trials": 12},
        system={"gpu": ["cpu", "H100-80GB", "T4-16GB"], "n_gpus": [1, 2, 4], "strategy": "ddp"},
    )
    paces = np.random.default_rng(seed).uniform(2, 20, 64)
    desk = lab.searched(
        space, lambda run: lab.Behaviour(5, paces[int(run.trial_id, 16) % 64]), capacity=CLUSTER
    )
    held, most = [], 0
    for event in desk.journal.events:
        if isinstance(event, Allocated):
            held.append(desk.state.trials[event.trial_id].run.system)
        elif isinstance(event, Released):
            held.remove(desk.state.trials[event.trial_id].run.system)
        for name, total in CLUSTER.total.items():
            assert sum(needs(s).get(name, 0) for s in held) <= total
        most = max(most, len(held))
    assert most > 1
    assert all(trial.status == "done" for trial in desk.state.trials.values())


def test_trials_start_in_the_order_they_were_proposed(lab):
    space = lab.space(
        search={"algorithm": "grid"},
        model={"n_layers": 2},
        optim={"lr": [1e-3, 2e-3]},
        system={"n_gpus": [1, 4], "strategy": "ddp"},
    )
    desk = lab.desk(space, capacity=Capacity({"CPU": 4.0}))
    first = desk.next_trial()
    assert first.run.system.n_gpus == 1
    assert isinstance(desk.next_trial(), Wait)  # the gang of four; the next single would fit
    assert isinstance(desk.next_trial(), Wait)
    assert len(desk.state.trials) == 2
    desk.end(first.trial_id, "done")
    assert desk.next_trial().run.system.n_gpus == 4


def test_no_more_at_a_time_than_asked_for(lab):
    desk = lab.desk(lab.space(search={"max_concurrent": 2}), capacity=Capacity({"CPU": 64.0}))
    assert desk.next_trial().is_running
    assert desk.next_trial().is_running
    assert isinstance(desk.next_trial(), Wait)
    assert len(desk.state.running) == 2


def test_points_that_never_fit_are_not_proposed(lab):
    space = lab.space(system={"n_gpus": [1, 4], "strategy": "ddp"}, search_budget={"trials": 8})
    desk = lab.searched(space, capacity=Capacity({"CPU": 2.0}))
    assert {trial.run.system.n_gpus for trial in desk.state.trials.values()} == {1}
    assert len(desk.state.trials) == 8


def test_a_space_of_which_nothing_fits_ends_at_once(lab):
    space = lab.space(optim={"lr": 1e-3}, system={"gpu": "H100-80GB"})
    desk = lab.desk(space, capacity=Capacity({"CPU": 2.0}))
    assert desk.next_trial() == Finished("every point of the space that fits has been tried")
    assert not desk.state.trials


def test_a_resumed_search_on_a_smaller_cluster_leaves_out_what_no_longer_fits(lab):
    space = lab.space(
        search={"algorithm": "grid"},
        model={"n_layers": 2},
        optim={"lr": [1e-3, 2e-3]},
        system={"n_gpus": [4, 1], "strategy": "ddp"},
    )
    desk = lab.desk(space, capacity=Capacity({"CPU": 4.0}))
    assert desk.next_trial().run.system.n_gpus == 4
    smaller = lab.desk(space, events=desk.journal.events, capacity=Capacity({"CPU": 2.0}))
    smaller.resume()
    lab.run(smaller)  # does not wait for ever
    statuses = [(t.run.system.n_gpus, t.status) for t in smaller.state.trials.values()]
    assert sorted(statuses, key=str) == [(1, "done"), (1, "done"), (4, None)]
