"""`thriftlm report SEARCH --runs OUT`: what a search measured, also while it runs."""

import json

from thriftlm.records import read_columns
from thriftlm.search.history.journal import Allocated, Journal, Reported, SearchStarted, Suggested
from thriftlm.search.spaces.space import load_space
from thriftlm.spec import Progress


def begin_search(folder):
    space = load_space("quickstart")
    point = next(p for p in space_points(space))
    run = space.resolve(point, 0)
    folder.mkdir(parents=True)
    with Journal(folder / "journal.jsonl") as journal:
        journal.append(
            SearchStarted(search_id="mine", space=space.document(), versions={}, unique_tokens={})
        )
        journal.append(Suggested(trial_id=run.trial_id, number=0, point=point, run=run))
        journal.append(Allocated(trial_id=run.trial_id, usd_per_hour=0.1, price="x"))
        for step in (4, 8):
            progress = Progress(
                status="running",
                step=step,
                tokens=step * 2048,
                val_loss=7 - step / 8,
                tokens_per_s=500,
            )
            journal.append(Reported(trial_id=run.trial_id, progress=progress))
    return run


def space_points(space):
    import numpy as np

    from thriftlm.spec import RunSpec

    rng = np.random.default_rng(0)
    while True:
        point = space.sample(rng)
        if isinstance(space.resolve(point, 0), RunSpec):
            yield point


def test_reports_are_written_while_the_search_runs(thriftlm, tmp_path):
    run = begin_search(tmp_path / "storage" / "searches" / "mine")
    code, out, err = thriftlm("report", "mine", "--runs", "runs.parquet", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {"runs": 1, "rows": 2, "out": "runs.parquet"}
    table = read_columns(tmp_path / "runs.parquet")
    assert table["run_id"] == [run.trial_id] * 2
    assert table["tokens"] == [8192, 16384]
    assert table["loss"] == [6.5, 6.0]
    assert table["status"] == ["running", "running"]
    assert table["model.n_layers"] == [run.model.n_layers] * 2


def test_an_unknown_search_is_refused(thriftlm):
    code, _, err = thriftlm("report", "nothing", "--runs", "runs.parquet")
    assert code == 2
    assert "no search named nothing" in err
    assert len(err.splitlines()) == 1
