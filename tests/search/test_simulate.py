"""Searches against recorded runs: what they cost, what they know, how they end."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import recorded_world as world

from thriftlm.search.simulation.simulate import simulate
from thriftlm.search.simulation.simulated_cluster import Conditions
from thriftlm.search.simulation.truth import truth_of
from thriftlm.search.spaces.recorded_table import RecordedSpace, read_runs
from thriftlm.spec import InputError

ALGORITHMS = ("random", "optuna", "factored")


class World:
    def __init__(self, lab, folder, space=None, **changes):
        space = space or world.space(lab)
        path = world.write(folder, **changes)
        runs = read_runs(path, space)
        self.truth = truth_of(runs, space, path)
        self.space = RecordedSpace(space, runs)

    def search(self, algorithm, seed=0, **options):
        return simulate(self.space, self.truth, algorithm, seed, **options)


@pytest.fixture
def made(lab, tmp_path):
    return lambda **changes: World(lab, tmp_path, **changes)


def test_a_trial_costs_start_up_and_tokens_at_the_recorded_speed(lab, made):
    space = world.space(lab, search_budget={"trials": 1})
    found = made(space=space).search("random", conditions=Conditions(start_up_seconds=60.0))
    speed = {1000.0, 1500.0, 600.0, 900.0}
    last = found.trace[-1]
    seconds = found.spent_usd / world.USD_PER_HOUR * 3600 - 60.0
    assert any(seconds == pytest.approx(last[2] / s, rel=1e-6) for s in speed)
    assert last[2] == world.TOKENS[-2]  # the last recorded report within max_tokens


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_same_seed_same_search(made, algorithm):
    one = made()
    assert one.search(algorithm, 3) == made().search(algorithm, 3)
    assert one.search(algorithm, 3) == one.search(algorithm, 3)


def test_seeds_differ(made):
    one = made()
    assert one.search("random", 0).trace != one.search("random", 1).trace


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_budget_holds_and_the_trace_is_in_order(made, algorithm):
    found = made().search(algorithm)
    usd = [row[0] for row in found.trace]
    assert usd == sorted(usd)
    assert found.spent_usd <= 3 * world.BUDGET_USD
    assert found.regret == pytest.approx(found.best_score - found.table_best_score)
    assert found.regret >= 0


def test_factored_finds_the_best_of_a_small_table(made):
    one = made()
    assert [one.search("factored", seed).regret for seed in range(5)] == pytest.approx([0.0] * 5)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_where_nothing_fits_memory_the_search_ends_without_an_answer(made, algorithm):
    found = made(ends=lambda *_: "oom").search(algorithm)
    assert found.best_run_id is None
    assert found.regret is None
    assert found.trials > 1
    assert found.spent_usd > 0


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_where_all_diverges_the_search_ends_without_an_answer(made, algorithm):
    found = made(ends=lambda *_: "diverged").search(algorithm)
    assert found.best_score is None
    assert found.trials > 1


def test_what_diverges_is_never_the_answer(made):
    one = made(ends=lambda layers, rate, micro: "diverged" if layers == 8 else "done")
    for seed in range(3):
        found = one.search("factored", seed)
        assert found.best_score is not None
        assert np.isfinite(found.best_score)


def test_budget_below_one_trial_is_one_message(lab, made):
    space = world.space(lab, search_budget={"usd": 1e-6})
    with pytest.raises(InputError, match=r"no trial could start: .* raise search_budget"):
        made(space=space).search("factored")


def test_a_single_recorded_run_is_the_answer(lab, made, tmp_path):
    one = made()
    runs = one.space.runs
    first = [row for row in world.rows() if row["run_id"] == "run0"]
    from thriftlm.records import write_rows

    path = tmp_path / "one.parquet"
    write_rows(first, path)
    space = world.space(lab)
    runs = read_runs(path, space)
    held = RecordedSpace(space, runs)
    found = simulate(held, truth_of(runs, space, path), "factored", 0)
    assert found.best_run_id == "run0"
    assert found.regret == 0
    assert found.trials == 1


def test_unknown_algorithm_is_named(made):
    with pytest.raises(InputError, match=r"must be one of random, optuna, grid, factored, got x$"):
        made().search("x")


def test_a_population_is_refused_where_it_would_search(lab, made):
    space = world.space(lab)
    space.search = space.search.model_copy(update={"scheduler": "pbt"})
    with pytest.raises(InputError, match=r"pbt cannot be simulated.*--set search.scheduler=asha"):
        made(space=space).search("random")
    assert made(space=space).search("factored").best_run_id is not None


def test_scheduler_of_the_space_gives_way_where_it_does_not_fit(lab, made):
    space = world.space(lab)
    space.search = space.search.model_copy(update={"scheduler": "asha"})
    assert made(space=space).search("factored").best_run_id is not None
