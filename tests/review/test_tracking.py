import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

from thriftlm.review.tracking import MlflowWriter, rebuild
from thriftlm.search.history.journal import (
    Allocated,
    Ended,
    Event,
    Journal,
    Released,
    Reported,
    RunMinted,
    SearchEnded,
    SearchResumed,
    SearchStarted,
    Suggested,
)
from thriftlm.spec import ModelSpec, Progress, RunSpec

SPACE = {"name": "toy", "objective": "loss_at_budget", "space": {"optim": {"lr": [1e-3, 2e-3]}}}
MODEL = ModelSpec(n_layers=2, d_model=64, n_heads=2, vocab=4096)
T0 = 1_700_000_000.0
MANY = 8
"""Trials of a search that a server has to be told of again."""


def run_spec(seed: int) -> RunSpec:
    return RunSpec(model=MODEL, tokens=400_000, report_every_tokens=100_000, seed=seed)


def started(search_id: str = "toy", at: float = T0) -> SearchStarted:
    versions = {"ray": "2.60.0", "git_commit": "abc123", "price_snapshot": "2026-10-01"}
    return SearchStarted(
        at=at, search_id=search_id, space=SPACE, versions=versions, unique_tokens={}
    )


def suggested(number: int) -> Suggested:
    run = run_spec(number)
    point = {"optim.lr": 1e-3, "model.n_layers": 2}
    return Suggested(at=T0 + number, trial_id=f"t{number}", number=number, point=point, run=run)


def allocated(trial: str, at: float) -> Allocated:
    return Allocated(at=at, trial_id=trial, usd_per_hour=3.6, price="aws us-east-1 on_demand")


def reported(trial: str, tokens: int, at: float, loss: float | None = 5.0) -> Reported:
    progress = Progress(
        status="running",
        step=tokens // 32_768,
        tokens=tokens,
        train_loss=loss,
        val_loss=loss,
        val_bits_per_byte=1.5,
        decayed=False,
        warming_up=False,
        tokens_per_s=9000.0,
        mfu=None,
        mfu_formula="6N+attn",
        peak_mem_gb=0.5,
        grad_norm=float("nan"),
    )
    return Reported(at=at, trial_id=trial, progress=progress)


def one_trial(number: int, at: float, status: str = "done") -> list[Event]:
    """A trial that holds its resources for 100 seconds at 0.001 USD a second."""
    trial = f"t{number}"
    reports = [reported(trial, k * 100_000, at + k, 6.0 - k) for k in range(1, 5)]
    ended = Ended(at=at + 101, trial_id=trial, status=status, reason="why", checkpoint="ckpt")  # type: ignore[arg-type]
    released = Released(at=at + 100, trial_id=trial, usd=0.1)
    return [suggested(number), allocated(trial, at), *reports, released, ended]


def write(uri: str, events: list[Event], known: list[Event] | None = None) -> list[RunMinted]:
    """Send events with a writer of their own; the ids that it minted."""
    minted: list[RunMinted] = []
    writer = MlflowWriter(uri, "toy", minted.append, known or [])  # type: ignore[arg-type]
    for event in events:
        writer(event)
    assert writer.close() == 0
    return minted


def runs(uri: str, search_id: str = "toy") -> dict[str, Run]:
    """All runs of a search by trial, the parent under its kind; no trial has two."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("thriftlm")
    assert experiment is not None
    condition = f"tags.`thriftlm.search_id` = '{search_id}'"
    found = client.search_runs([experiment.experiment_id], condition)
    by_trial = {run.data.tags.get("trial_id", "search"): run for run in found}
    assert len(by_trial) == len(found)
    return by_trial


def steps(uri: str, run: Run, key: str) -> list[int]:
    return [metric.step for metric in MlflowClient(uri).get_metric_history(run.info.run_id, key)]


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.05)


def artifact(uri: str, run: Run, name: str, folder: Path) -> str:
    path = MlflowClient(uri).download_artifacts(run.info.run_id, name, str(folder))
    return Path(path).read_text(encoding="utf-8")


def test_a_search_is_read_back(uri: str, tmp_path: Path) -> None:
    minted: list[Event] = []
    writer = MlflowWriter(uri, "toy", minted.append)
    ended = SearchEnded(at=T0 + 900, status="finished", reason="trials")
    statuses = ("done", "stopped", "oom")
    trials = [e for n, status in enumerate(statuses) for e in one_trial(n, T0 + 200 * n, status)]
    for event in [started(), *trials, ended]:
        writer(event)
    writer.scores({"t0": {"loss_at_budget": 3.5, "usd_per_btok": 1.25, "low": float("nan")}})
    best = tmp_path / "best.yaml"
    best.write_text("seed: 0\n")
    writer.finish({"best": "t0"}, [best])
    assert writer.close() == 0

    found = runs(uri)
    parent, child = found.pop("search"), found["t0"]
    assert set(found) == {"t0", "t1", "t2"}
    assert {(m.trial_id, m.mlflow_run_id) for m in minted if isinstance(m, RunMinted)} == {
        (None, parent.info.run_id),
        *((trial, run.info.run_id) for trial, run in found.items()),
    }

    assert (parent.info.run_name, parent.info.status) == ("toy", "FINISHED")
    assert parent.data.tags["kind"] == "search"
    assert parent.data.tags["git_commit"] == "abc123"
    assert parent.data.tags["version.ray"] == "2.60.0"
    assert parent.data.params["objective"] == "loss_at_budget"
    assert parent.data.metrics["usd"] == pytest.approx(0.3)
    assert yaml.safe_load(artifact(uri, parent, "space.yaml", tmp_path)) == SPACE
    assert '"best": "t0"' in artifact(uri, parent, "results.json", tmp_path)
    assert artifact(uri, parent, "best.yaml", tmp_path / "store") == "seed: 0\n"

    for run in found.values():
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert len(run.data.params) <= 30
    assert [found[f"t{n}"].info.status for n in range(3)] == ["FINISHED", "FINISHED", "FAILED"]
    assert [found[f"t{n}"].data.tags["status"] for n in range(3)] == list(statuses)

    tags = child.data.tags
    assert tags["recipe_id"] == run_spec(0).recipe_id
    assert (tags["kind"], tags["attempt"], tags["reason"]) == ("learn", "1", "why")
    assert (tags["price"], tags["checkpoint"]) == ("aws us-east-1 on_demand", "ckpt")
    assert tags["price_snapshot"] == "2026-10-01"
    params = child.data.params
    assert params["optim.lr"] == "0.001"
    assert int(params["stored_params"]) == int(params["non_embedding_params"]) + 4096 * 64
    assert params["system.strategy"] == "single"

    for key in ("train_loss", "val_loss", "val_bits_per_byte", "tokens_per_s", "peak_mem_gb"):
        assert steps(uri, child, key) == [100_000, 200_000, 300_000, 400_000], key
    assert child.data.metrics["val_loss"] == 2.0
    assert child.data.metrics["usd"] == pytest.approx(0.1)
    assert (child.data.metrics["loss_at_budget"], child.data.metrics["usd_per_btok"]) == (3.5, 1.25)
    assert steps(uri, child, "loss_at_budget") == [400_000]
    assert not {"mfu", "grad_norm", "low"} & set(child.data.metrics), "absent, never 0 or NaN"
    assert child.info.start_time == int(T0 * 1000)
    assert child.info.end_time == int((T0 + 101) * 1000)
    assert RunSpec(**yaml.safe_load(artifact(uri, child, "run.yaml", tmp_path))) == run_spec(0)


def test_artifacts_lie_beside_the_database(uri: str, tmp_path: Path) -> None:
    write(uri, [started()])
    assert runs(uri)["search"].info.artifact_uri.startswith((tmp_path / "store").as_uri())
    assert sorted(p.name for p in (tmp_path / "store").iterdir()) == ["mlartifacts", "mlflow.db"]


@pytest.mark.parametrize("lost_ids", [False, True], ids=["ids journalled", "ids lost"])
def test_a_resumed_search_neither_duplicates_nor_rewinds(uri: str, lost_ids: bool) -> None:
    """Also where the driver died after the server made the runs and before it wrote their ids."""
    first = [started(), *one_trial(0, T0), suggested(1), allocated("t1", T0 + 200)]
    first += [reported("t1", k * 100_000, T0 + 200 + k) for k in (1, 2, 3)]
    minted = write(uri, first)
    before = runs(uri)

    known: list[Event] = first if lost_ids else [*first, *minted]
    after_crash: list[Event] = [
        Released(at=T0 + 203, trial_id="t1", usd=0.003),
        SearchResumed(at=T0 + 500),
        allocated("t1", T0 + 510),
        reported("t1", 300_000, T0 + 511, 4.9),  # again, from the checkpoint at 200,000
        reported("t1", 400_000, T0 + 512, 4.8),
        Released(at=T0 + 513, trial_id="t1", usd=0.003),
        Ended(at=T0 + 513, trial_id="t1", status="done"),
        SearchEnded(at=T0 + 514, status="finished", reason=""),
    ]
    minted_again = write(uri, after_crash, known)

    found = runs(uri)
    assert {k: r.info.run_id for k, r in found.items()} == {
        k: r.info.run_id for k, r in before.items()
    }
    assert len(minted_again) == (3 if lost_ids else 0)
    for trial in ("t0", "t1"):
        assert steps(uri, found[trial], "val_loss") == [100_000, 200_000, 300_000, 400_000]
    assert len(steps(uri, found["t0"], "usd")) == 1
    assert found["t1"].data.metrics["usd"] == pytest.approx(0.006)
    assert found["search"].data.metrics["usd"] == pytest.approx(0.106)
    assert found["t1"].data.tags["attempt"] == "2"
    assert {run.info.status for run in found.values()} == {"FINISHED"}


def test_an_interrupted_search_is_killed_and_runs_again(uri: str) -> None:
    first: list[Event] = [started(), *one_trial(0, T0), suggested(1), allocated("t1", T0 + 200)]
    first += [
        Released(at=T0 + 210, trial_id="t1", usd=0.01),
        SearchEnded(at=T0 + 211, status="interrupted", reason="Ctrl-C"),
    ]
    write(uri, first)
    found = runs(uri)
    assert found["search"].info.status == found["t1"].info.status == "KILLED"
    assert found["t1"].data.tags["status"] == "interrupted"
    assert found["t0"].info.status == "FINISHED"

    write(uri, [SearchResumed(at=T0 + 300), allocated("t1", T0 + 301)], first)
    found = runs(uri)
    assert found["search"].info.status == found["t1"].info.status == "RUNNING"


def test_a_param_that_changed_is_a_tag(uri: str) -> None:
    write(uri, [started(), suggested(0)])
    changed = suggested(0).model_copy(update={"point": {"optim.lr": 5e-3, "optim.new": 1}})
    write(uri, [], [started(), changed])
    run = runs(uri)["t0"]
    assert run.data.params["optim.lr"] == "0.001"
    assert run.data.tags["changed.optim.lr"] == "0.005"
    assert run.data.params["optim.new"] == "1"


def test_two_searches_of_one_name_stay_apart(uri: str) -> None:
    """Two people who share a server and leave the name as the space has it."""
    write(uri, [started(at=T0)])
    write(uri, [started(at=T0 + 1)])
    client = MlflowClient(uri)
    assert len(client.search_runs(["1"])) == 2


def test_unchanged_scores_are_sent_once(uri: str) -> None:
    writer = MlflowWriter(uri, "toy", lambda event: None)
    for event in [started(), *one_trial(0, T0)]:
        writer(event)
    writer.scores({"t0": {"loss_at_budget": 3.5}})
    wait_until(lambda: "t0" in runs(uri))
    wait_until(lambda: "loss_at_budget" in runs(uri)["t0"].data.metrics)
    for value in (3.5, 3.9, 3.4, 3.4):
        writer.scores({"t0": {"loss_at_budget": value}})
    assert writer.close() == 0
    run = runs(uri)["t0"]
    assert len(steps(uri, run, "loss_at_budget")) == 2
    assert run.data.metrics["loss_at_budget"] == 3.4


def test_many_varied_fields_keep_to_the_limit(uri: str) -> None:
    wide = suggested(0).model_copy(update={"point": {f"x.f{i:02d}": i for i in range(60)}})
    write(uri, [started(), wide])
    params = runs(uri)["t0"].data.params
    assert len(params) == 30
    assert {"stored_params", "flops_per_token", "x.f00"} <= set(params)


def test_a_lost_store_is_rebuilt_from_the_journal(uri: str, migrated: bytes) -> None:
    journal: list[Event] = [started(), *one_trial(0, T0)]
    journal += write(uri, journal)
    Path(uri.removeprefix("sqlite:///")).write_bytes(migrated)
    for _ in range(2):
        rebuild(journal, uri)
        assert steps(uri, runs(uri)["t0"], "val_loss") == [100_000, 200_000, 300_000, 400_000]
    assert set(runs(uri)) == {"search", "t0"}


def test_an_artifact_that_cannot_be_sent_stops_nothing_else(uri: str, tmp_path: Path) -> None:
    writer = MlflowWriter(uri, "toy", lambda event: None)
    writer(started())
    writer.finish({}, [tmp_path / "nowhere.png"])
    for event in one_trial(0, T0):
        writer(event)
    assert writer.close() > 0
    assert runs(uri)["t0"].info.status == "FINISHED"


def test_a_journal_that_is_closed_already_loses_nothing(uri: str, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.close()
    writer = MlflowWriter(uri, "toy", journal.append)
    for event in [started(), *one_trial(0, T0)]:
        writer(event)
    assert writer.close() == 0
    assert runs(uri)["t0"].info.status == "FINISHED"


Server = Callable[[], None]
"""Ends it at once."""


@contextmanager
def app_server(folder: Path, port: int) -> Iterator[Server]:
    """MLflow's own application on a thread: the command takes 19 s to start on two cores."""
    from mlflow.server import app
    from werkzeug.serving import make_server

    variables = {
        "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{folder / 'mlflow.db'}",
        "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
        "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(folder / "artifacts"),
        "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        web = make_server("127.0.0.1", port, app, threaded=True)
        thread = threading.Thread(target=web.serve_forever, args=(0.05,))
        thread.start()

        def end() -> None:
            if thread.is_alive():
                web.shutdown()
                thread.join()
                web.server_close()

        try:
            yield end
        finally:
            end()


@contextmanager
def command_server(folder: Path, port: int) -> Iterator[Server]:
    """What a person starts: `mlflow server`, killed without warning."""
    arguments = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
    arguments += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    arguments += ["--artifacts-destination", str(folder / "artifacts"), "--port", str(port)]
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(arguments, stdout=log, stderr=log, start_new_session=True)

    def end() -> None:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    try:
        wait_until(lambda: is_healthy(port), 90)
        yield end
    finally:
        end()


def is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@pytest.mark.parametrize(
    "server", [app_server, pytest.param(command_server, marks=pytest.mark.slow)]
)
def test_a_server_that_dies_and_comes_back(
    server: Callable[[Path, int], AbstractContextManager[Server]],
    port: int,
    tmp_path: Path,
    migrated: bytes,
    *,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One writer is closed during the outage and rebuilt, the other lives through it."""
    caplog.set_level("WARNING", logger="thriftlm")
    (tmp_path / "mlflow.db").write_bytes(migrated)
    url = f"http://127.0.0.1:{port}"
    journal: list[Event] = []
    other = [suggested(50), allocated("t50", T0), reported("t50", 100_000, T0)]

    with server(tmp_path, port) as end:
        writer = MlflowWriter(url, "toy", journal.append, backoff_seconds=0.5)
        survivor = MlflowWriter(url, "other", lambda event: None, backoff_seconds=0.5)
        for event in [started(), *one_trial(0, T0)]:
            writer(event)
        for event in [started("other"), *other]:
            survivor(event)
        wait_until(lambda: len(runs(url, "toy")) == 2 and len(runs(url, "other")) == 2)
        wait_until(lambda: runs(url, "toy")["t0"].info.status == "FINISHED")
        end()

        later = [e for n in range(1, MANY) for e in one_trial(n, T0 + 200 * n)]
        began = time.perf_counter()
        for event in later:
            writer(event)
        assert time.perf_counter() - began < 0.5, "the search waited for a dead server"
        survivor(reported("t50", 200_000, T0 + 1))
        wait_until(lambda: len(caplog.messages) == 2)
        time.sleep(1.5)
        assert len(caplog.messages) == 2, "one warning of each, not one per try"
    assert writer.close(timeout_seconds=15) >= len(later)
    assert "did not reach" in caplog.messages[-1]
    assert len(caplog.messages) == 3

    with server(tmp_path, port):
        survivor(reported("t50", 300_000, T0 + 2))
        wait_until(lambda: len(steps(url, runs(url, "other")["t50"], "val_loss")) == 3)
        assert survivor.close() == 0
        assert steps(url, runs(url, "other")["t50"], "val_loss") == [100_000, 200_000, 300_000]

        rebuild([started(), *one_trial(0, T0), *later, *journal], url)
        found = runs(url, "toy")
        assert len(found) == MANY + 1
        for trial in ("t0", f"t{MANY - 1}"):
            assert steps(url, found[trial], "val_loss") == [100_000, 200_000, 300_000, 400_000]
