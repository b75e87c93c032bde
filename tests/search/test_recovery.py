"""A gang that loses a worker goes on from its trial's last checkpoint, on real Ray."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from thriftlm.search.cluster.gang import LOSSES, is_worth_retrying
from thriftlm.search.cluster.worker import said_of_losses, success
from thriftlm.search.history.journal import Allocated, Ended, Released, Reported, Suggested, read
from thriftlm.spec import InputError, Measurement, Progress, SystemSpec
from thriftlm.training.loop import Decision, train

SETTINGS = [
    "search.algorithm=random",
    "data.tokenizer=bpe:512",
    "data.seq_len=64",
    "space.model.n_layers=[2]",
    "space.model.d_model=32",
    "space.optim.batch_tokens=1024",
    "space.system.n_gpus=2",
    "space.system.strategy=[fsdp_full]",
    "space.system.micro_batch=8",
    "search_budget.trials=1",
    "search.scheduler=none",
    "search.fidelity={min_tokens: 4096, max_tokens: 262144, validation_tokens: 2048}",
    "search.fidelity.report_every_tokens=8192",
    "search.fidelity.checkpoint_every_tokens=16384",
]


def raised(error: Exception) -> UserExceptionWithTraceback:
    return UserExceptionWithTraceback(error, traceback_str=repr(error))


def broken(**by_rank: Exception) -> WorkerGroupError:
    failures = {int(rank.removeprefix("rank")): error for rank, error in by_rank.items()}
    return WorkerGroupError("\n".join(repr(error) for error in failures.values()), failures)


PEER = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:26029")
LOST = broken(rank0=raised(PEER), rank1=ActorDiedError())
HEARD_OF = broken(rank0=raised(PEER))
BUG = broken(rank0=raised(KeyError("a bug")))
BAD = broken(rank0=raised(InputError("corpus too short")))
CONTROLLER = ControllerError(ValueError("no resources"))


@pytest.mark.parametrize(
    ("failures", "again"),
    [
        ([LOST], True),
        ([HEARD_OF], True),
        ([LOST] * LOSSES, True),
        ([LOST] * (LOSSES + 1), False),
        ([BUG], True),
        ([BUG, LOST], True),
        ([BUG, BUG], False),
        ([LOST, BUG, BUG], False),
        ([BAD], False),
        ([CONTROLLER, CONTROLLER], False),
    ],
)
def test_only_what_may_end_otherwise_is_tried_again(
    failures: list[TrainingFailedError], again: bool
):
    assert is_worth_retrying(failures) is again


def test_a_trial_that_went_on_says_so():
    final = Progress(status="done", step=1, tokens=256)
    measured = Measurement(final=final, curve=(final,), checkpoint="step_00000001")
    outcome = success(measured)
    assert said_of_losses(outcome, 0)["reason"] == ""
    lost = said_of_losses(outcome, 2)["reason"]
    assert lost == "(a worker was lost 2 time(s), the trial went on)"


class Searching:
    """A search in a process of its own, with what can be seen of it from outside."""

    def __init__(self, storage: Path, corpus: Path, *settings: str) -> None:
        every = (*SETTINGS, f"data.corpus={corpus}", *settings)
        sets = [part for setting in every for part in ("--set", setting)]
        command = [sys.executable, "-m", "thriftlm", "search", "quickstart", "--json", *sets]
        self.process = subprocess.Popen(
            [*command, "--storage", str(storage)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.journal = storage / "searches/quickstart/journal.jsonl"

    def events(self, kind: type) -> list[Any]:
        found = list(read(self.journal)) if self.journal.exists() else []
        return [event for event in found if isinstance(event, kind)]

    def workers(self) -> set[int]:
        """Process ids of the gang's workers."""
        found = set()
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.Error):  # ended meanwhile
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    found.add(process.pid)
        return found

    def wait_for(self, enough: Callable[[], Any]) -> None:
        for _ in range(3000):
            if enough():
                return
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.1)
        raise AssertionError("not in five minutes")

    def lose_a_worker(self) -> None:
        """Kill one, and wait until there is another for it."""
        before = self.workers()
        os.kill(max(before), signal.SIGKILL)
        self.wait_for(lambda: self.workers() - before)

    def ended(self) -> dict[str, Any]:
        """What it printed."""
        out, stderr = self.process.communicate(timeout=300)
        assert self.process.returncode == 0, stderr
        found: dict[str, Any] = json.loads(out)
        return found


@pytest.mark.slow
@pytest.mark.ray
def test_worker_killed_within_a_trial_recovers_from_its_checkpoint(tmp_path, corpus):
    storage = tmp_path / "storage"
    search = Searching(storage, corpus)
    events = search.events
    search.wait_for(lambda: any(event.checkpoint for event in events(Reported)))
    assert len(search.workers()) == 2
    reported = len(events(Reported))
    search.lose_a_worker()
    (trial,) = search.ended()["trials"]
    assert trial["status"] == "done"
    (ended,) = events(Ended)
    assert ended.reason == "(a worker was lost 1 time(s), the trial went on)"
    # One allocation, held and paid throughout.
    assert len(events(Allocated)) == len(events(Released)) == 1
    tokens = [event.progress.tokens for event in events(Reported)]
    assert tokens == sorted(set(tokens))
    assert len(tokens) == 32 > reported
    # The curve is that of the run alone.
    (suggested,) = events(Suggested)
    alone = SystemSpec(micro_batch=8)
    measured = train(
        suggested.run.model_copy(update={"system": alone}),
        lambda progress, written: Decision.CONTINUE,
        cache=storage / "data",
        output=tmp_path / "alone",
    )
    for field in ("train_loss", "val_loss"):
        expected = [getattr(report, field) for report in measured.curve]
        found = [getattr(event.progress, field) for event in events(Reported)]
        assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
@pytest.mark.ray
def test_a_search_that_loses_workers_spends_no_more_than_its_cap(tmp_path, corpus):
    search = Searching(tmp_path / "storage", corpus, "search_budget={usd: 0.004}")
    for trials in (1, 2):
        search.wait_for(lambda so_far=trials: len(search.events(Ended)) >= so_far)
        search.wait_for(search.workers)
        search.lose_a_worker()
    found = search.ended()
    assert found["reason"].startswith("search budget of 0.004 USD")
    assert 0.002 < found["spent_usd"] <= 0.004
