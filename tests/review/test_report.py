import io
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from thriftlm.review import session
from thriftlm.review.live import LiveView
from thriftlm.review.report import next_commands, program, show
from thriftlm.review.session import Sitting
from thriftlm.review.tables import Column, fitted, plain_console
from thriftlm.search.answers.result import Best, SearchResult, row
from thriftlm.search.history.journal import (
    Allocated,
    Ended,
    Event,
    Released,
    Reported,
    SearchStarted,
    StopRequested,
    Suggested,
)
from thriftlm.search.history.state import SearchState
from thriftlm.search.history.storage import Storage
from thriftlm.search.scores.objective import Score
from thriftlm.search.spaces.space import load_space
from thriftlm.spec import ModelSpec, OptimSpec, Progress, RunSpec, SystemSpec

T0 = 1_700_000_000.0
ASHA = "asha: not in the top 1/3 of 3 at 32768 tokens"
ENDS = [("done", ""), ("stopped", ASHA), ("failed", "RuntimeError: [no] room")]
MODEL = ModelSpec(n_layers=2, d_model=64, n_heads=2, vocab=4096)


def trial(number: int, status: str, reason: str) -> list[Event]:
    point = {
        "model.n_layers": 2,
        "model.d_model": 64,
        "model.sharing": "repeat_all_over",
        "optim.lr": 0.0079858,
        "system.n_gpus": 2,
        "system.strategy": "fsdp_full",
        "system.micro_batch": 8,
    }
    system = SystemSpec(n_gpus=2, strategy="fsdp_full")
    optim = OptimSpec(lr=1e-3 * (number + 1))
    run = RunSpec(model=MODEL, optim=optim, system=system, tokens=131_072, report_every_tokens=8192)
    name, at = run.trial_id, T0 + 100 * number
    report = Progress(status="running", step=1, tokens=49_152, val_loss=6.28, tokens_per_s=4784.0)
    events: list[Event] = [
        Suggested(at=at, trial_id=name, number=number, point=point, run=run),
        Allocated(at=at, trial_id=name, usd_per_hour=0.09, price="aws"),
        Reported(at=at + 30, trial_id=name, progress=report),
    ]
    if status == "stopped":
        events.append(StopRequested(at=at + 31, trial_id=name, reason=reason))
    events.append(Released(at=at + 60, trial_id=name, usd=0.0015))
    events.append(Ended(at=at + 60, trial_id=name, status=status, reason=reason))  # type: ignore[arg-type]
    return events


@pytest.fixture(scope="module")
def events() -> list[Event]:
    started = SearchStarted(at=T0, search_id="toy", space={}, versions={}, unique_tokens={})
    return [started, *(event for n, end in enumerate(ENDS) for event in trial(n, *end))]


@pytest.fixture(scope="module")
def state(events: list[Event]) -> SearchState:
    return SearchState(events)


def score(trial_id: str, **given: float) -> Score:
    """A score with what pictures and tables show."""
    fields: dict[str, Any] = {"trial_id": trial_id, "loss_at_budget": 5.5, "low": 5.0, "high": 6.0}
    fields |= {"usd_per_btok": 1.4, "tokens_at_budget": 7e6, "pareto": True} | given
    return Score.model_construct(**fields)


@pytest.fixture(scope="module")
def result(state: SearchState) -> SearchResult:
    winner = next(iter(state.trials.values()))
    best = Best(
        trial_id=winner.trial_id,
        config=winner.run.model_dump(mode="json"),
        loss_at_budget=5.5,
        low=5.0,
        high=6.0,
        usd_per_btok=1.4,
        tokens_at_budget=7e6,
        extrapolation=142.4,
    )
    rows = [row(one, None, state.last_at) for one in state.trials.values()]
    return SearchResult(
        search_id="toy",
        status="finished",
        reason="search budget of 3 trials",
        spent_usd=0.0045,
        budget_usd=0.02,
        hours=0.1,
        best=best,
        pareto=[winner.trial_id],
        trials=rows,
    )


@pytest.fixture
def sitting(tmp_path: Path) -> Sitting:
    place = Storage(tmp_path)
    overrides = ("search_budget.trials=3", "space.model.n_layers=[2,3]")
    made = Sitting(
        space=load_space("quickstart"),
        source="quickstart",
        storage=place,
        name="toy",
        tracking_uri=place.tracking_uri,
        overrides=overrides,
    )
    made.folder.mkdir(parents=True)
    return made


def terminal(width: int) -> Console:
    return Console(file=io.StringIO(), width=width, color_system=None, highlight=False)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_a_trial_is_one_line_at_any_width(
    width: int, result: SearchResult, sitting: Sitting
) -> None:
    console = terminal(width)
    show(result, sitting, console)
    for trial_row in result.trials:
        lines = [line for line in said(console).splitlines() if trial_row.trial_id in line]
        table_line = next(line for line in lines if "n_layers=2" in line)
        assert len(table_line) <= width
        assert "fsdp_full x2" in table_line
        assert ("stopped: asha" in table_line) == (width > 80 and trial_row.status == "stopped")
    assert "1 done, 1 stopped: asha, 1 failed" in said(console)
    assert "failed: RuntimeError: [no] room" in said(console)


def test_a_pipe_gets_everything(result: SearchResult, sitting: Sitting) -> None:
    console = plain_console(io.StringIO())
    show(result, sitting, console)
    what = "n_layers=2 d_model=64 repeat_all_over lr=0.00799 mb=8 fsdp_full x2"
    assert said(console).count(what) == len(result.trials)
    assert "…" not in said(console)
    assert "tok/s" in said(console)


def test_a_winner_that_an_earlier_search_ran_is_marked_so(
    result: SearchResult, sitting: Sitting
) -> None:
    assert result.best is not None
    console = terminal(120)
    best = result.best.model_copy(update={"source": "runs[1].parquet"})
    known = result.trials[0].model_copy(update={"status": "known", "source": "runs[1].parquet"})
    show(result.model_copy(update={"best": best, "trials": [known]}), sitting, console)
    assert f"best: {best.trial_id} (known from runs[1].parquet, not run again)" in said(console)
    assert "1 trials (1 known)" in said(console)


def test_an_interrupted_search_says_how_to_go_on(result: SearchResult, sitting: Sitting) -> None:
    interrupted = result.model_copy(update={"status": "interrupted"})
    assert dict(next_commands(interrupted, sitting))["go on"] == (
        f"{program('thriftlm')} search quickstart --name toy --resume "
        f"--storage {sitting.storage.root} --set search_budget.trials=3 "
        "--set 'space.model.n_layers=[2,3]'"
    )
    console = terminal(80)
    show(interrupted, sitting, console)
    assert "'space.model.n_layers=[2,3]'" in said(console)


@pytest.mark.parametrize("width", [80, 100, 120])
def test_the_live_table_fits(width: int, events: list[Event], sitting: Sitting) -> None:
    view = LiveView(sitting.space, io.StringIO())
    view.console = terminal(width)
    view.replay(events[:-2])
    view.console.print(view.render())
    lines = said(view.console).splitlines()
    assert len(lines) == 1 + 3 + 1, "a line for the head, each trial and the summary"
    assert all(len(line) <= width for line in lines)
    assert "running" in lines[1]
    assert "lowest loss 6.2800, 2/12 trials" in lines[-1]


def test_plain_lines_where_there_is_no_terminal(events: list[Event], sitting: Sitting) -> None:
    stream = io.StringIO()
    with LiveView(sitting.space, stream) as view:
        for event in events:
            view(event)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "search started: quickstart"
    assert "start    n_layers=2 d_model=64" in lines[1]
    assert "report         49,152 tokens  loss 6.2800  9,568 tok/s" in lines[2]
    assert lines[-1].endswith("failed   $0.0015 (RuntimeError: [no] room)")
    assert any(ASHA in line for line in lines)


def test_pictures_are_drawn_where_there_is_something_to_draw(
    result: SearchResult, state: SearchState, sitting: Sitting
) -> None:
    names = list(state.trials)
    files = session.draw(result, {names[0]: score(names[0])}, state, sitting)
    assert [file.name for file in files] == [
        "results.json",
        "best.yaml",
        "pareto.png",
        "curves.png",
    ]
    assert all(file.exists() for file in files[2:])
    unpriced = {names[0]: score(names[0], usd_per_btok=math.inf)}
    kept = session.draw(result, unpriced, state, sitting)
    assert "pareto.png" not in [file.name for file in kept]
    nothing = result.model_copy(update={"best": None})
    assert [f.name for f in session.draw(nothing, {}, state, sitting)] == ["results.json"]


def test_indispensable_columns_stay() -> None:
    columns = [Column("a"), Column("b", dispensable=1), Column("c", dispensable=2)]
    rows = [["x" * 10, "y" * 10, "z" * 10]]
    kept = [[c.header for c in fitted(columns, rows, width).columns] for width in (34, 33, 21, 5)]
    assert kept == [["a", "b", "c"], ["a", "b"], ["a"], ["a"]]


def test_a_program_off_the_path_is_called_by_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(sys.executable).parent
    monkeypatch.setenv("PATH", "/nowhere")
    assert program("python") == str(folder / "python")
    monkeypatch.setenv("PATH", str(folder))
    assert program("python") == "python"
    assert program("no-such-program") == "no-such-program"
