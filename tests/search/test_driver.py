"""The search on real Ray, through the command line, as the quickstart runs it but smaller."""

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from mlflow.tracking import MlflowClient

from thriftlm.search.history.journal import (
    Dismissed,
    Ended,
    Released,
    Reported,
    RunMinted,
    Suggested,
    read,
)
from thriftlm.spec import RunSpec

pytestmark = pytest.mark.ray

TINY = [
    "search.algorithm=random",
    "data.tokenizer=bpe:512",
    "data.seq_len=64",
    "space.model.n_layers=[1,2]",
    "space.model.d_model=32",
    "space.optim.batch_tokens=1024",
    "space.system.n_gpus=2",
    "space.system.strategy=[fsdp_full,zero1]",
    "space.system.micro_batch=8",
    "search.fidelity={min_tokens: 4096, max_tokens: 16384, validation_tokens: 2048}",
]


def command(storage: Path, corpus: Path, *more: str, trials: int = 4) -> list[str]:
    settings = [*TINY, f"data.corpus={corpus}", f"search_budget.trials={trials}"]
    sets = [part for setting in settings for part in ("--set", setting)]
    base = [sys.executable, "-m", "thriftlm", "search", "quickstart", "--storage", str(storage)]
    return [*base, "--json", *sets, *more]


def search(*args: str, **kwargs: int) -> tuple[int, dict, str]:
    done = subprocess.run(
        command(*args, **kwargs), capture_output=True, text=True, check=False, timeout=500
    )
    return done.returncode, json.loads(done.stdout or "null"), done.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory, corpus) -> tuple[Path, dict, str]:
    storage = tmp_path_factory.mktemp("storage")
    code, found, stderr = search(storage, corpus)
    assert code == 0, stderr
    return storage, found, stderr


def test_every_trial_trained_on_two_workers_and_the_best_beats_chance(finished):
    _, found, stderr = finished
    assert found["status"] == "finished"
    assert len(found["trials"]) == 4
    assert {t["status"] for t in found["trials"]} <= {"done", "stopped"}, stderr
    assert {t["config"]["system"]["strategy"] for t in found["trials"]} == {"fsdp_full", "zero1"}
    assert all(t["config"]["system"]["n_gpus"] == 2 for t in found["trials"])
    best = next(t for t in found["trials"] if t["trial_id"] == found["best"]["trial_id"])
    assert best["loss"] < math.log(512)
    assert found["best"]["low"] <= found["best"]["loss_at_budget"] <= found["best"]["high"]


def test_ledger_adds_up(finished):
    storage, found, _ = finished
    events = list(read(storage / "searches/quickstart/journal.jsonl"))
    released = sum(event.usd for event in events if isinstance(event, Released))
    idle = sum(event.usd for event in events if isinstance(event, Dismissed))
    assert sum(t["usd"] for t in found["trials"]) == pytest.approx(released, rel=1e-12)
    assert found["idle_usd"] >= idle > 0
    assert released + found["idle_usd"] == pytest.approx(found["spent_usd"], rel=1e-12)
    assert 0 < found["spent_usd"] <= found["budget_usd"]


def test_mlflow_holds_one_parent_and_its_children(finished):
    storage, found, _ = finished
    client = MlflowClient(f"sqlite:///{storage / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("thriftlm")
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = {
        run.data.tags["thriftlm.trial_id"]: run
        for run in runs
        if run.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id
    }
    assert len(parents) == 1
    assert set(children) == {trial["trial_id"] for trial in found["trials"]}
    for trial in found["trials"]:
        run = children[trial["trial_id"]]
        history = client.get_metric_history(run.info.run_id, "val_loss")
        assert history[-1].step == trial["tokens"]
        assert history[-1].value == pytest.approx(trial["loss"])
        assert run.data.metrics["loss_at_budget"] == pytest.approx(trial["loss_at_budget"])
        assert run.data.metrics["usd"] == pytest.approx(trial["usd"])
    artifacts = {item.path for item in client.list_artifacts(parents[0].info.run_id)}
    assert {"best.yaml", "pareto.png", "results.json"} <= artifacts


def test_best_yaml_is_a_run_over_the_training_budget(finished):
    storage, found, _ = finished
    run = RunSpec.model_validate(
        yaml.safe_load((storage / "searches/quickstart/best.yaml").read_text())
    )
    assert run.tokens == pytest.approx(found["best"]["tokens_at_budget"], abs=1)
    assert run.model.model_dump(mode="json") == found["best"]["config"]["model"]


def test_a_finished_search_prints_its_answer_again(finished, corpus):
    storage, found, _ = finished
    journal = storage / "searches/quickstart/journal.jsonl"
    before = journal.read_bytes()
    code, again, _ = search(storage, corpus)
    assert (code, again) == (0, found)
    assert journal.read_bytes() == before


def test_another_space_in_the_same_name_is_refused(finished, corpus):
    storage, _, _ = finished
    code, _, stderr = search(storage, corpus, trials=5)
    assert code == 2
    assert "belongs to another search" in stderr
    assert "--name" in stderr


def events_when(process: subprocess.Popen, journal: Path, enough) -> list:
    """The journal's events as soon as `enough` of them are there."""
    for _ in range(3000):
        events = list(read(journal)) if journal.exists() else []
        if enough(events):
            return events
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError("the search did not get there in five minutes")


def begin(*args: str, **kwargs: int) -> subprocess.Popen:
    return subprocess.Popen(
        command(*args, **kwargs), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def count(events: list, kind: type) -> int:
    return sum(isinstance(event, kind) for event in events)


UNSTOPPED = (
    "--set=search.scheduler=none",
    "--set=search.fidelity.max_tokens=65536",
    "--set=search.fidelity.report_every_tokens=4096",
    "--set=search.fidelity.checkpoint_every_tokens=8192",
)
REPORTS_OF_A_TRIAL = 16


def test_kill_and_interrupt_then_resume_lose_nothing(tmp_path, corpus):
    journal = tmp_path / "searches/quickstart/journal.jsonl"

    killed = begin(tmp_path, corpus, *UNSTOPPED, trials=2)
    halfway = REPORTS_OF_A_TRIAL + 4
    events = events_when(killed, journal, lambda found: count(found, Reported) >= halfway)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    (ended,) = (event.trial_id for event in events if isinstance(event, Ended))

    code, _, stderr = search(tmp_path, corpus, *UNSTOPPED, trials=2)
    assert code == 2
    assert "--resume" in stderr

    interrupted = begin(tmp_path, corpus, *UNSTOPPED, "--resume", trials=2)
    known = len(list(read(journal)))
    events = events_when(interrupted, journal, lambda found: count(found[known:], Reported) > 0)
    interrupted.send_signal(signal.SIGINT)
    out, stderr = interrupted.communicate(timeout=120)
    assert interrupted.returncode == 130, stderr
    assert json.loads(out)["status"] == "interrupted"
    (first, *_) = (event for event in events[known:] if isinstance(event, Reported))
    assert first.progress.tokens > 8192, "the killed trial went on from its checkpoint"

    code, found, stderr = search(tmp_path, corpus, *UNSTOPPED, "--resume", trials=2)
    assert code == 0, stderr
    events = list(read(journal))
    assert {trial["status"] for trial in found["trials"]} == {"done"}
    assert count(events, Suggested) == count(events, Ended) == 2
    assert not [e for e in events[known:] if isinstance(e, Reported) and e.trial_id == ended]
    released = sum(event.usd for event in events if isinstance(event, Released))
    assert released + found["idle_usd"] == pytest.approx(found["spent_usd"], rel=1e-12)
    minted = [event.trial_id for event in events if isinstance(event, RunMinted)]
    assert len(minted) == len(set(minted)) == 3


@pytest.mark.slow
def test_stop_from_another_process_ends_it_cleanly_and_resume_goes_on(tmp_path, corpus):
    journal = tmp_path / "searches/quickstart/journal.jsonl"
    driver = begin(tmp_path, corpus, *UNSTOPPED, trials=2)
    events_when(driver, journal, lambda found: count(found, Reported) > 0)

    def told(*words: str) -> dict:
        base = [sys.executable, "-m", "thriftlm", *words, "--storage", str(tmp_path), "--json"]
        done = subprocess.run(base, capture_output=True, text=True, check=True, timeout=120)
        return json.loads(done.stdout)

    seen = told("status", "quickstart")
    assert (seen["status"], len(seen["running"])) == ("running", 1)
    said = told("stop", "quickstart", "--wait")
    assert (said["asked"], said["status"]) == (True, "interrupted")
    out, stderr = driver.communicate(timeout=120)
    assert driver.returncode == 130, stderr
    assert json.loads(out)["status"] == "interrupted"
    assert told("stop", "quickstart")["asked"] is False
    (listed,) = told("searches")
    assert (listed["name"], listed["status"]) == ("quickstart", "interrupted")

    code, found, stderr = search(tmp_path, corpus, *UNSTOPPED, "--resume", trials=2)
    assert code == 0, stderr
    assert {trial["status"] for trial in found["trials"]} == {"done"}
