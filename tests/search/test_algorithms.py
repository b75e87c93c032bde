"""What each algorithm proposes: from space and history alone, each point once."""

import itertools
import warnings

import numpy as np
import optuna
import pytest

from thriftlm.search import algorithms
from thriftlm.search.algorithms import ALGORITHMS
from thriftlm.search.desk import Finished
from thriftlm.search.history.journal import Ended, Suggested
from thriftlm.search.history.state import SearchState
from thriftlm.search.spaces.space import Rejected

SMALL = {"model": {"n_layers": [2, 4, 8]}, "optim": {"lr": [1e-3, 1e-2]}}


def ids(desk):
    return list(desk.state.trials)


def proposed(space, state, n):
    return list(itertools.islice(ALGORITHMS[space.search.algorithm](space, state), n))


def tpe_space(lab, trials=12, seed=0, **changes):
    search = {"algorithm": "optuna", "scheduler": "none", "seed": seed}
    return lab.space(search=search, search_budget={"trials": trials}, **changes)


# --- random -------------------------------------------------------------------------------------


def test_random_is_reproducible_and_follows_the_seed(lab):
    found = [ids(lab.searched(lab.space(search={"seed": seed}))) for seed in (0, 0, 1)]
    assert found[0] == found[1]
    assert not set(found[0]) & set(found[2])
    assert len(set(found[0])) == 6


def test_random_proposes_the_same_points_in_whatever_order_trials_end(lab):
    fast = lab.searched(lab.space(search={"max_concurrent": 1}))
    uneven = lab.searched(
        lab.space(), lambda run: lab.Behaviour(intervals=1.0 + int(run.trial_id, 16) % 30)
    )
    assert ids(fast) == ids(uneven)


def test_random_exhausts_a_small_space_and_says_so(lab):
    space = lab.space(**SMALL, search_budget={"trials": 100})
    desk = lab.searched(space)
    assert len(desk.state.trials) == 6
    assert desk.state.ended.reason == "every point of the space that fits has been tried"
    assert desk.state.ended.status == "finished"


def test_points_that_are_one_run_are_proposed_once(lab):
    """One GPU makes every strategy single."""
    system = {"n_gpus": 1, "strategy": ["ddp", "fsdp_full", "zero1"]}
    desk = lab.searched(lab.space(**SMALL, system=system, search_budget={"trials": 100}))
    assert len(desk.state.trials) == 6


# --- grid ---------------------------------------------------------------------------------------


def test_grid_enumerates_everything_in_the_order_of_the_file(lab):
    desk = lab.searched(
        lab.space(**SMALL, search={"algorithm": "grid"}, search_budget={"trials": 100})
    )
    points = [tuple(trial.point.values()) for trial in desk.state.trials.values()]
    assert points == list(itertools.product([2, 4, 8], [1e-3, 1e-2]))
    assert desk.state.ended.reason == "every point of the space that fits has been tried"


def test_grid_leaves_out_invalid_points_however_many(lab):
    """More in a row than independent draws would be given."""
    lr = [float(x) for x in np.linspace(1e-3, 2e-3, 2500)]
    space = lab.space(
        model={"n_layers": [8, 2]},
        optim={"lr": lr},
        search={"algorithm": "grid"},
        constraints={"non_embedding_params": {"max": 200_000}},
    )
    assert isinstance(space.resolve({"model.n_layers": 8, "optim.lr": lr[0]}, 0), Rejected)
    (first,) = proposed(space, SearchState(), 1)
    assert dict(first.point) == {"model.n_layers": 2, "optim.lr": lr[0]}


# --- optuna -------------------------------------------------------------------------------------


def test_tpe_proposes_within_the_domains_and_each_point_once(lab):
    space = tpe_space(
        lab,
        trials=16,
        optim={"lr": {"loguniform": [1e-4, 1e-1]}, "weight_decay": {"quniform": [0.0, 0.3, 0.1]}},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        desk = lab.searched(space)
    assert len(desk.state.trials) == 16
    for trial in desk.state.trials.values():
        assert trial.point["model.n_layers"] in (2, 4, 8)
        assert 1e-4 <= trial.point["optim.lr"] <= 1e-1
        assert trial.point["optim.weight_decay"] in (0.0, 0.1, 0.2, 0.3)
        assert trial.run.optim.lr == trial.point["optim.lr"]


def test_tpe_learns_from_its_history(lab):
    """Distance to the best learning rate in e-folds, of 24 random draws and of what follows."""
    before, after = [], []
    for seed in range(5):
        random = lab.space(
            search={"seed": seed}, model={"n_layers": 4}, search_budget={"trials": 24}
        )
        desk = lab.searched(random)
        before += [abs(np.log(t.run.optim.lr / lab.BEST_LR)) for t in desk.state.trials.values()]
        guided = proposed(tpe_space(lab, model={"n_layers": 4}), desk.state, 8)
        after += [abs(np.log(p.run.optim.lr / lab.BEST_LR)) for p in guided]
    assert np.mean(after) < 0.6 * np.mean(before)


def test_tpe_is_a_function_of_space_and_history(lab):
    space = tpe_space(lab)
    desk = lab.searched(space)
    replay = SearchState(desk.journal.events)
    first, second = proposed(space, desk.state, 3), proposed(space, replay, 3)
    assert first == second
    fewer = SearchState(e for e in desk.journal.events if e.kind != "reported")
    assert proposed(space, fewer, 3) != first


def test_tpe_begins_without_a_history(lab):
    assert len({p.run.trial_id for p in proposed(tpe_space(lab), SearchState(), 5)}) == 5


@pytest.mark.parametrize("status", ["oom", "diverged", "failed"])
def test_tpe_goes_on_after_nothing_but_failures(lab, status):
    desk = lab.searched(tpe_space(lab), lambda run: lab.Behaviour(failure=(status, 1)))
    assert [trial.status for trial in desk.state.trials.values()] == [status] * 12


def test_tpe_takes_both_objectives_of_pareto(lab):
    space = tpe_space(lab, objective="pareto", system={"n_gpus": [1, 2], "strategy": "ddp"})
    desk = lab.searched(space)
    scores = desk.scores()
    history = algorithms._history(
        space, desk.state, {name: d.distribution() for name, d in space.domains.items()}
    )
    assert [trial.values for trial in history] == [
        [scores[i].loss_at_budget, scores[i].usd_per_btok] for i in ids(desk)
    ]
    assert len(proposed(space, desk.state, 3)) == 3


def test_tpe_counts_a_failure_as_such_and_leaves_out_what_it_knows_nothing_of(lab):
    space = tpe_space(lab, trials=3)
    desk = lab.searched(space, lambda run: lab.Behaviour(failure=("oom", 2)))
    space.search_budget = space.search_budget.model_copy(update={"trials": 9})
    desk = lab.desk(space, events=desk.journal.events)
    desk.resume()
    desk.next_trial()  # runs, has not reported
    history = algorithms._history(
        space, desk.state, {name: d.distribution() for name, d in space.domains.items()}
    )
    assert [trial.state for trial in history] == [optuna.trial.TrialState.FAIL] * 3


def test_tpe_exhausts_a_small_space_soon_and_says_so(lab):
    space = tpe_space(lab, trials=100, **SMALL)
    desk = lab.searched(space)
    assert len(desk.state.trials) == 6
    assert desk.state.ended.reason == "every point of the space that fits has been tried"


def test_tpe_finds_the_last_point_of_a_space_that_it_no_longer_hits(lab):
    """One of 300 is left: the estimator's own draws of one proposal miss it."""
    space = tpe_space(
        lab, trials=300, model={"n_layers": 4}, optim={"lr": [n / 1e4 for n in range(1, 301)]}
    )
    *tried, left = algorithms.grid(space, SearchState())
    state = lab.desk(space).state
    for number, (point, run) in enumerate((p.point, p.run) for p in tried):
        state.apply(Suggested(trial_id=run.trial_id, number=number, point=point, run=run))
        state.apply(Ended(trial_id=run.trial_id, status="failed"))
    assert [p.run for p in proposed(space, state, 2)] == [left.run]


def test_a_space_with_one_point_is_searched_once(lab):
    for algorithm in ALGORITHMS:
        search = {"algorithm": algorithm, "scheduler": "none"}
        space = lab.space(model={"n_layers": 2}, optim={"lr": 1e-3}, search=search)
        desk = lab.searched(space)
        assert len(desk.state.trials) == 1
        assert isinstance(desk.next_trial(), Finished)
