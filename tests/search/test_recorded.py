"""Recorded runs are the journal's reports, one row each, whatever became of the trial."""

import pytest

from thriftlm.records import read_columns, write_rows
from thriftlm.search.history.recorded import recorded_rows
from thriftlm.search.history.state import SearchState
from thriftlm_models.counts import non_embedding_params, stored_params


def test_one_row_per_run_and_report(lab, tmp_path):
    def behave(run):
        return lab.Behaviour(failure=("diverged", 3) if run.model.n_layers == 2 else None)

    desk = lab.searched(lab.space(search={"seed": 3}), behave)
    rows = recorded_rows(SearchState(desk.journal.events))
    trials = desk.state.trials
    assert len(rows) == sum(len(trial.curve) for trial in trials.values())
    for row in rows:
        trial = trials[row["run_id"]]
        assert row["model.n_layers"] == trial.run.model.n_layers
        assert row["optim.lr"] == trial.run.optim.lr
        assert row["params"] == stored_params(trial.run.model)
        assert row["non_embedding_params"] == non_embedding_params(trial.run.model)
        assert row["tokens_per_s"] == 1000 * trial.run.system.n_gpus
        assert row["usd_per_hour"] == trial.allocations[-1].usd_per_hour
    last = {row["run_id"]: row["status"] for row in rows}
    assert last == {name: trial.status for name, trial in trials.items()}
    assert set(last.values()) == {"done", "diverged"}
    for suffix in ("parquet", "csv"):
        path = tmp_path / f"runs.{suffix}"
        write_rows(rows, path)
        assert read_columns(path)["loss"] == pytest.approx([row["loss"] for row in rows])


def test_a_trial_that_never_started_has_no_rows(lab):
    desk = lab.desk(lab.space())
    desk.next_trial()
    assert recorded_rows(SearchState(desk.journal.events[:2])) == []
