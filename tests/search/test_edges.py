"""Spaces and tables at the edge: each search ends with a message, and says what was learned."""

import json
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
import recorded_world as world

from thriftlm.records import write_rows
from thriftlm.search.cluster.capacity import Capacity
from thriftlm.search.history.recorded import recorded_rows
from thriftlm.search.simulation.simulate import simulate
from thriftlm.search.simulation.truth import truth_of
from thriftlm.search.spaces.recorded_table import RecordedSpace, read_runs
from thriftlm.spec import InputError

ALGORITHMS = ("random", "optuna", "grid", "factored")
all_algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS)


@pytest.fixture
def command(lab, thriftlm, tmp_path):
    """`thriftlm simulate` on rows of a table: exit code, searches, what it printed and said."""

    def run(rows, algorithm, *more, as_json=True, space=None):
        write_rows(rows, tmp_path / "runs.parquet")
        document = (space or world.space(lab)).document()
        (tmp_path / "space.yaml").write_text(yaml.safe_dump(document))
        given = ["space.yaml", "--table", "runs.parquet", "--algorithm", algorithm, *more]
        code, out, err = thriftlm("simulate", *given, *(["--json"] if as_json else []))
        return code, json.loads(out) if as_json and out else out, err

    return run


@all_algorithms
def test_where_all_is_out_of_memory_the_least_need_and_ways_out_are_named(command, algorithm):
    rows = world.rows(ends=lambda *_: "oom")
    code, (found,), _ = command(rows, algorithm)
    assert code == 0
    assert (found["best_run_id"], found["regret"], found["table_best_score"]) == (None, None, None)
    how, memory = found["learned"]
    assert how == f"{found['trials']} trials: {found['trials']} out of memory"
    assert "out of memory: the smallest need, by estimate, was" in memory
    assert "GB per GPU (1 x cpu, single, micro_batch 1)" in memory
    assert "act_ckpt full, more GPUs with strategy fsdp_full, a GPU with more memory" in memory


@all_algorithms
def test_where_all_diverges_the_lowest_rate_is_named(command, algorithm):
    rows = world.rows(ends=lambda *_: "diverged")
    code, (found,), _ = command(rows, algorithm)
    assert code == 0
    assert found["best_score"] is None
    how, why = found["learned"]
    assert how.startswith(f"{found['trials']} trials: ")
    assert " diverged" in how
    assert how.endswith(" diverged") or algorithm == "factored"  # which leaves some at a rung
    assert "the lowest learning rate that did was 0.0003" in why
    assert "warmup_fraction" in why


def test_a_search_without_an_answer_prints_what_it_learned(command):
    rows = world.rows(ends=lambda layers, rate, micro: "oom" if micro == 2 else "diverged")
    code, out, _ = command(rows, "random", as_json=False)
    assert code == 0
    assert "none: all of its runs broke or diverged" in out
    assert "random seed 0 has no answer." in out
    assert "out of memory: the smallest need" in out
    assert "learning rates below it" in out
    assert "nan" not in out


@all_algorithms
def test_a_single_point_is_tried_once_and_is_the_answer(command, algorithm):
    rows = [row for row in world.rows() if row["run_id"] == "run5"]
    code, (found,), err = command(rows, algorithm)
    assert code == 0
    assert (found["trials"], found["best_run_id"], found["regret"]) == (1, "run5", 0)
    assert found["learned"][0].startswith("1 trial: ")
    assert "held to the 1 recorded runs" in err


def test_a_table_without_needed_columns_is_one_message(command):
    rows = [{k: v for k, v in row.items() if k != "usd_per_hour"} for row in world.rows()]
    code, _, err = command(rows, "random")
    assert code == 2
    assert "missing: usd_per_hour" in err
    rows = [{k: v for k, v in row.items() if k != "optim.lr"} for row in world.rows()]
    assert "missing: optim.lr" in command(rows, "random")[2]


@all_algorithms
def test_a_table_with_part_of_the_space_holds_the_search_to_it(command, algorithm):
    """Ten of 36 runs, such that most pairs of a recorded recipe and system were not recorded."""
    kept = {f"run{number}" for number in range(0, 36, 4)} | {"run3"}
    rows = [row for row in world.rows() if row["run_id"] in kept]
    code, (found,), err = command(rows, algorithm, "--set", "search_budget.usd=1")
    assert code == 0
    assert {row[1] for row in found["trace"]} <= kept
    assert found["best_run_id"] in kept
    assert found["trials"] <= len(kept)
    assert found["reason"] == "every point of the space that fits has been tried"
    assert "held to the 10 recorded runs" in err


@all_algorithms
def test_a_budget_below_one_trial_says_what_one_needs(command, algorithm):
    code, _, err = command(world.rows(), algorithm, "--set", "search_budget.usd=0.001")
    assert code == 2
    assert "no trial could start: search budget of 0.001 USD leaves no room" in err
    assert "a trial needs at least 0.0" in err
    code, _, err = command(
        world.rows(), algorithm, "--set", "search_budget={hours: 0.001}", "--seeds", "1"
    )
    assert code == 2
    assert "hours" in err


@pytest.mark.parametrize("status", ["oom", "diverged"])
def test_the_desk_says_the_same_of_a_real_search(lab, status):
    space = lab.space(search_budget={"trials": 3})
    desk = lab.searched(space, lambda run: lab.Behaviour(failure=(status, 2)))
    assert desk.leader() is None
    words = {"oom": "out of memory", "diverged": "diverged"}[status]
    assert desk.learned()[0] == f"3 trials: 3 {words}"
    assert len(desk.learned()) == 2


def test_a_gpu_that_should_have_held_it_is_told_as_such(lab):
    space = lab.space(search_budget={"trials": 1}, system={"gpu": "T4-16GB", "micro_batch": 4})
    capacity = Capacity({"CPU": 1, "GPU:T4": 1})
    desk = lab.searched(space, lambda run: lab.Behaviour(failure=("oom", 1)), capacity=capacity)
    _, why = desk.learned()
    assert "GB per GPU (1 x T4-16GB, single, micro_batch 4), which has 1" in why
    assert "it needs more than estimated; try micro_batch 1, act_ckpt full" in why


def test_what_fails_is_told_with_its_reason(lab):
    desk = lab.desk(lab.space(search_budget={"trials": 1}))
    assert desk.learned() == ["no trial has started: nothing was learned"]
    trial = desk.next_trial()
    desk.end(trial.trial_id, "failed", "worker lost")
    assert desk.learned() == ["1 trial: 1 failed", "1 failed: worker lost"]


def test_a_real_search_without_room_for_a_trial_says_what_one_needs(lab):
    desk = lab.searched(lab.space(search_budget={"usd": 1e-6}))
    assert desk.learned()[0] == "no trial has started: nothing was learned"
    assert desk.learned()[1].startswith("a trial needs at least ")


@all_algorithms
def test_a_finished_search_is_a_table_to_search_again(lab, tmp_path, algorithm):
    """Export, then simulate: the same runs, at their losses, speeds and prices."""
    space = lab.space(
        search={"seed": 3},
        search_budget={"trials": 8},
        system={"attention": ["math", "flash"]},
        optim={"lr": {"loguniform": [1e-4, 1e-1]}, "schedule": "constant"},
    )
    desk = lab.searched(space)
    path = tmp_path / "runs.parquet"
    write_rows(recorded_rows(desk.state), path)
    usd = next(iter(desk.state.trials.values())).allocations[-1].usd_per_hour
    space.training_budget = space.training_budget.model_copy(
        update={"usd": usd * 50_000 / 1000 / 3600}
    )
    space.search_budget = space.search_budget.model_copy(update={"trials": 20})
    runs = read_runs(path, space)
    assert sorted(runs.ids) == sorted(desk.state.trials)
    held, truth = RecordedSpace(space, runs), truth_of(runs, space, path)
    found = simulate(held, truth, algorithm, 0)
    assert {row[1] for row in found.trace} <= set(desk.state.trials)
    assert found.best_run_id in desk.state.trials
    if algorithm != "factored":
        assert found.trials == 8
        assert found.regret == pytest.approx(0, abs=0.02)


def test_a_search_that_measured_nothing_has_nothing_to_export(lab, tmp_path):
    desk = lab.searched(
        lab.space(search_budget={"trials": 2}), lambda run: lab.Behaviour(failure=("failed", 1))
    )
    with pytest.raises(InputError, match=r"runs\.parquet: no reports to record yet"):
        write_rows(recorded_rows(desk.state), tmp_path / "runs.parquet")
