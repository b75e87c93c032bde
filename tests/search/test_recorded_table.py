"""A table of recorded runs says what a search may propose and what each run is worth."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import recorded_world as world

from thriftlm.records import write_rows
from thriftlm.search.simulation.truth import truth_of
from thriftlm.search.spaces.recorded_table import RecordedSpace, read_runs
from thriftlm.search.spaces.section import Rejected
from thriftlm.spec import InputError


@pytest.fixture
def space(lab):
    return world.space(lab)


def test_worth_is_the_loss_at_the_tokens_that_the_best_system_buys(space, tmp_path):
    path = world.write(tmp_path)
    runs = read_runs(path, space)
    truth = truth_of(runs, space, path)
    assert len(runs) == 36
    assert truth.tokens == pytest.approx(np.full(9, 540_000))
    at, curve = np.log(world.TOKENS), [world.loss(8, 3e-3, t) for t in world.TOKENS]
    assert truth.best == pytest.approx(np.interp(np.log(540_000), at, curve))


def test_order_of_rows_does_not_matter(space, tmp_path):
    path = world.write(tmp_path)
    straight = truth_of(read_runs(path, space), space, path)
    write_rows(world.rows()[::-1], path)
    runs = read_runs(path, space)
    again = truth_of(runs, space, path)
    assert sorted(again.loss) == sorted(straight.loss)
    assert all(np.diff(runs.tokens[runs.reports(i)]).min() > 0 for i in range(len(runs)))


def test_what_broke_is_worth_nothing_where_nothing_else_ran(space, tmp_path):
    def ends(layers, rate, micro):
        if layers == 2:
            return "oom"
        if layers == 4 and micro == 2:
            return "oom"
        return "diverged" if rate > 1e-2 else "done"

    path = world.write(tmp_path, ends=ends)
    runs = read_runs(path, space)
    truth = truth_of(runs, space, path)
    by_point = {(r["model.n_layers"], r["optim.lr"]): i for i, r in enumerate(runs.recipes)}
    assert np.isinf(truth.loss[by_point[2, 3e-3]])
    assert np.isinf(truth.loss[by_point[8, 3e-2]])
    assert truth.tokens[by_point[4, 3e-3]] == pytest.approx(360_000)  # micro batch 1 is left


def test_budget_beyond_the_recorded_tokens_is_refused(lab, tmp_path):
    space = world.space(lab)
    path = world.write(tmp_path, tokens=world.TOKENS[:7])
    with pytest.raises(InputError, match=r"buys run run\d+ 5.4e\+05 tokens .* --set"):
        truth_of(read_runs(path, space), space, path)


@pytest.mark.parametrize("column", ["optim.lr", "tokens_per_s", "status"])
def test_missing_column_is_named(space, tmp_path, column):
    path = tmp_path / "runs.parquet"
    write_rows([{k: v for k, v in row.items() if k != column} for row in world.rows()], path)
    with pytest.raises(InputError, match=f"missing: {column}$"):
        read_runs(path, space)


def test_table_of_another_space_is_refused(space, tmp_path):
    path = tmp_path / "runs.parquet"
    write_rows([row | {"optim.lr": 5.0} for row in world.rows()], path)
    with pytest.raises(InputError, match="none of its 36 runs lies in space tiny"):
        read_runs(path, space)


def test_runs_outside_the_space_are_left_out(lab, tmp_path):
    space = world.space(lab)
    path = tmp_path / "runs.parquet"
    write_rows([*world.rows(), *(r | {"run_id": "x", "optim.lr": 5.0} for r in world.rows())], path)
    assert len(read_runs(path, space)) == 36


def test_held_space_proposes_recorded_runs_and_snaps_to_them(space, tmp_path):
    path = tmp_path / "runs.parquet"
    part = [row for row in world.rows() if row["model.n_layers"] != 4 or row["optim.lr"] > 1e-2]
    write_rows(part, path)
    held = RecordedSpace(space, read_runs(path, space))
    near = held.nearest(
        {
            "model.n_layers": 4.4,
            "optim.lr": 2e-2,
            "system.attention": "flash",
            "system.micro_batch": 1.2,
        }
    )
    assert near["model.n_layers"] == 4
    assert near["optim.lr"] == 3e-2
    assert near["system.micro_batch"] == 1
    missing = near | {"optim.lr": 3e-3}
    found = held.resolve(missing, 0)
    assert isinstance(found, Rejected)
    assert found.reason == "not recorded"
    drawn = [held.sample(np.random.default_rng(i)) for i in range(50)]
    assert all(not isinstance(held.resolve(point, 0), Rejected) for point in drawn)
