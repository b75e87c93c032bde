"""kill -9 at random moments, while checkpoints are written too: no run lost, none loaded torn."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from thriftlm.spec import Measurement, RunSpec
from thriftlm.training import checkpoint
from thriftlm.training.checkpoint_files import step_of

BATCH_TOKENS = 256
LONGEST_SECONDS = 3.0
"""Of a start that is killed; one that sets up and makes some steps takes less."""


class Forks:
    """The process that forks ranks."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("forked_ranks.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def start(self, job: dict[str, Any]) -> list[int]:
        """Process ids of the ranks."""
        return self.ask(json.dumps(job))

    def statuses(self) -> list[int]:
        """How the ranks ended, once they have: numbers of signals, 0 for a good end."""
        return self.ask("")

    def ask(self, line: str) -> list[int]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(line, file=self.process.stdin, flush=True)
        found: list[int] = json.loads(self.process.stdout.readline())
        return found


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    found = Forks()
    yield found
    found.process.kill()
    found.process.wait()


def job(run: RunSpec, bench: Any, output: Path, start: int) -> dict[str, Any]:
    return {
        "run": run.model_dump(mode="json"),
        "cache": str(bench.cache),
        "output": str(output),
        "ranks": run.system.n_gpus,
        "meeting": str(output.with_name(f"meeting-{output.name}-{start}")),
        "log": str(output.with_name(f"log-{output.name}")),
    }


def wait_for_a_write(output: Path, rng: random.Random) -> bool:
    """Until one of the next checkpoints is being written, and some of that; False where none is."""
    left = {path.name for path in output.glob("step_*.partial")}  # by the kill before
    seen, wanted = set(left), rng.randrange(1, 6)
    deadline = time.monotonic() + LONGEST_SECONDS
    while time.monotonic() < deadline:
        seen |= {path.name for path in output.glob("step_*.partial")}
        if len(seen - left) >= wanted:
            time.sleep(rng.uniform(0, 0.05))
            return True
        time.sleep(0.0005)
    return False


def losses(measured: Measurement) -> list[Any]:
    return [(p.step, p.train_loss, p.val_loss, p.grad_norm) for p in measured.curve]


def kill_many(kills: int, run: RunSpec, bench: Any, forks: Forks, folder: Path) -> dict[str, int]:
    """Kill a run that often, starting a new one whenever it ends; what happened, in numbers."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    whole_job = job(run, bench, folder / "whole", 0)
    forks.start(whole_job)
    assert forks.statuses() == [0] * run.system.n_gpus
    whole = Measurement.model_validate_json((folder / "whole.json").read_text())

    counts = {"killed": 0, "while writing": 0, "left partial": 0, "with a checkpoint": 0, "runs": 0}
    for start in range(10 * kills):
        output = folder / f"run-{counts['runs']}"
        before = step_of(latest.name) if (latest := checkpoint.latest(output)) else 0
        pids = forks.start(job(run, bench, output, start))
        if counts["killed"] < kills:
            if rng.random() < 0.5:
                counts["while writing"] += wait_for_a_write(output, rng)
            else:
                time.sleep(rng.uniform(0, LONGEST_SECONDS))
            order = rng.sample(pids, len(pids))  # the first to die is noticed by the others, or not
            for pid in order:
                os.kill(pid, signal.SIGKILL)
                time.sleep(rng.choice([0, 0.02]))
        codes = forks.statuses()
        if all(code == 0 for code in codes):
            measured = Measurement.model_validate_json(Path(f"{output}.json").read_text())
            assert measured.status == "done"
            assert losses(measured) == losses(whole)
            counts["runs"] += 1
            if counts["killed"] >= kills:
                break
            continue
        assert signal.SIGKILL in codes
        counts["killed"] += 1
        counts["left partial"] += any(output.glob("step_*.partial"))
        latest = checkpoint.latest(output)
        counts["with a checkpoint"] += latest is not None
        assert (step_of(latest.name) if latest else 0) >= before, "a checkpoint was lost"
    else:
        raise AssertionError(f"the run did not end: {counts}")
    logs = "".join(path.read_text() for path in folder.glob("log-*"))
    assert "damaged" not in logs
    return counts


def spec(bench: Any, steps: int, ranks: str) -> RunSpec:
    each = 3 * BATCH_TOKENS
    found: RunSpec = bench.spec(
        tokens=steps * BATCH_TOKENS,
        report_every_tokens=each,
        checkpoint_every_tokens=each,
        system=RANKS[ranks],
    )
    return found


RANKS = {"one": {}, "two": {"n_gpus": 2, "micro_batch": 2, "strategy": "fsdp_full"}}


@pytest.mark.parametrize("ranks", RANKS)
def test_killed_runs_end_as_if_they_had_not_been(ranks, bench, forks, tmp_path):
    counts = kill_many(5, spec(bench, 60, ranks), bench, forks, tmp_path)
    assert counts["killed"] == 5


def values(measured: Measurement) -> list[float]:
    return [value for p in measured.curve for value in (p.train_loss, p.val_loss) if value]


CHAINS = {
    "torch": [("ddp", 2), ("fsdp_full", 4), ("single", 1)],
    "zero": [("zero2", 2), ("single", 1), ("zero3", 2)],
}


@pytest.mark.parametrize("chain", CHAINS)
def test_killed_run_goes_on_on_other_ranks_with_another_strategy(chain, bench, forks, tmp_path):
    output = tmp_path / "run"
    whole = bench.train(bench.spec(), tmp_path / "whole")
    steps = []
    for start, (strategy, n_gpus) in enumerate(CHAINS[chain]):
        system = {"strategy": strategy, "n_gpus": n_gpus, "micro_batch": 2}
        run = bench.spec(system=system, checkpoint_every_tokens=BATCH_TOKENS)
        pids = forks.start(job(run, bench, output, start))
        if start < 2:  # once it has got further, kill it
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline:
                latest = checkpoint.latest(output)
                if latest is not None and step_of(latest.name) > (steps or [0])[-1]:
                    steps.append(step_of(latest.name))
                    break
                time.sleep(0.001)
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        codes = forks.statuses()
    assert codes == [0] * n_gpus, (tmp_path / "log-run_0").read_text()
    assert len(steps) == 2
    assert 0 < steps[0] < steps[1] < 20
    found = Measurement.model_validate_json(Path(f"{output}.json").read_text())
    assert found.status == "done"
    assert values(found) == pytest.approx(values(whole), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", RANKS)
def test_killed_fifty_times(ranks, bench, forks, tmp_path):
    counts = kill_many(50, spec(bench, 300, ranks), bench, forks, tmp_path)
    print(counts)
    assert counts["killed"] == 50
    assert counts["while writing"] > 5
    assert counts["left partial"] > 5
    assert counts["with a checkpoint"] > 25
