"""A tracking server that cannot be used is bad input at once; what reports add arrives."""

import socket
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from thriftlm.review.drafts import STEP_METRICS
from thriftlm.review.mlflow_store import connect
from thriftlm.review.tracking import MlflowWriter
from thriftlm.search.history.journal import Reported, SearchStarted
from thriftlm.spec import InputError, Progress


def test_a_refused_port_is_bad_input(port: int) -> None:
    with pytest.raises(InputError, match=rf"127\.0\.0\.1:{port} cannot be used.*--tracking-uri"):
        MlflowWriter(f"http://127.0.0.1:{port}", "toy", lambda event: None)


def test_a_server_that_hangs_is_bad_input() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        began = time.perf_counter()
        with pytest.raises(InputError, match=r"no answer within 0\.2 s"):
            connect(f"http://me:secret@127.0.0.1:{port}", timeout_seconds=0.2)
        assert time.perf_counter() - began < 3


def test_messages_hide_passwords(port: int) -> None:
    with pytest.raises(InputError) as caught:
        MlflowWriter(f"http://me:secret@127.0.0.1:{port}", "toy", lambda event: None)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("uri", ["htp://nowhere", "sqlite:////proc/nowhere/mlflow.db"])
def test_an_unusable_uri_is_bad_input(uri: str) -> None:
    with pytest.raises(InputError, match="cannot be used"):
        MlflowWriter(uri, "toy", lambda event: None)


def test_nothing_is_printed(first_use: tuple[Path, str]) -> None:
    """MLflow's migrations and run links would land between the lines of the search."""
    path, printed = first_use
    assert path.exists()
    assert printed == ""


def test_telemetry_becomes_metrics_and_a_trace_an_artifact(uri: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace_5_7.json.gz"
    trace.write_text("recorded")
    counts = {"loss_spikes": 2, "skipped_steps": 0}
    measured = {name: 0.25 for name in STEP_METRICS if name not in counts} | counts
    found = Progress(status="running", step=1, tokens=5, **measured)  # type: ignore[arg-type]
    kept = found.model_copy(update={"trace": str(trace)})
    lost = found.model_copy(update={"tokens": 10, "trace": str(tmp_path / "elsewhere")})
    writer = MlflowWriter(uri, "toy", lambda event: None)
    writer(SearchStarted(at=1.0, search_id="toy", space={}, versions={}, unique_tokens={}))
    for report in (kept, lost):
        writer(Reported(at=2.0, trial_id="t0", progress=report))
    assert writer.close() == 0  # a file that is elsewhere holds nothing up
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("thriftlm")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], "tags.`thriftlm.trial_id` = 't0'")
    assert run.data.metrics.keys() == set(STEP_METRICS)
    assert (run.data.metrics["loss_spikes"], run.data.metrics["data_wait_fraction"]) == (2, 0.25)
    (path,) = [file.path for file in client.list_artifacts(run.info.run_id)]
    assert Path(client.download_artifacts(run.info.run_id, path)).read_text() == "recorded"
