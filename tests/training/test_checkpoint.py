"""Checkpoints are whole or not there, whatever moment a kill picks."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from thriftlm.spec import InputError, Measurement
from thriftlm.training import checkpoint

BATCH_TOKENS = 256

CHILD = """
import shutil, sys
from pathlib import Path
from thriftlm.spec import RunSpec
from thriftlm.training import checkpoint
from thriftlm.training.engine import TorchEngine
from thriftlm.training.loop import Decision, train

spec = RunSpec.model_validate_json(sys.argv[1])
cache, output, moment = Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
write, remove_tree = TorchEngine.save, shutil.rmtree

def hold():
    print("holding", flush=True)
    sys.stdin.readline()

def save(self, folder):
    write(self, folder)
    if moment == "saving" and folder.name.startswith("step_00000008"):
        next(folder.glob("*.distcp")).write_bytes(b"half")  # as a kill within the write leaves it
        hold()

def rmtree(path, *args, **kwargs):
    if moment == "pruning" and Path(path).name.startswith("step_"):
        next(Path(path).iterdir()).unlink()
        hold()
    remove_tree(path, *args, **kwargs)

TorchEngine.save, shutil.rmtree = save, rmtree
train(spec, lambda progress, written: Decision.CONTINUE, cache=cache, output=output)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def whole(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Measurement:
    """A run of 12 steps with a checkpoint every 4."""
    measured: Measurement = bench.train(spec(bench), tmp_path_factory.mktemp("whole"))
    return measured


def spec(bench: Any, **changes: Any) -> Any:
    fields = {"tokens": 12 * BATCH_TOKENS, "checkpoint_every_tokens": 4 * BATCH_TOKENS}
    return bench.spec(**(fields | changes))


@pytest.fixture
def output(whole: Measurement, tmp_path: Path) -> Path:
    """A folder with that run's checkpoints, of steps 8 and 12."""
    assert whole.checkpoint is not None
    shutil.copytree(Path(whole.checkpoint).parent, tmp_path / "output")
    return tmp_path / "output"


def test_last_two_are_kept(output):
    assert names(output) == ["step_00000008", "step_00000012"]
    assert checkpoint.latest(output) == output / "step_00000012"


def test_no_folder_has_no_checkpoint(tmp_path):
    assert checkpoint.latest(tmp_path / "none") is None
    assert checkpoint.latest(tmp_path) is None


@pytest.mark.parametrize("suffix", [".partial", ".removed"])
def test_leftover_of_a_kill_is_never_taken(suffix, output):
    (output / "step_00000012").rename(output / f"step_00000012{suffix}")
    shutil.copytree(output / "step_00000008", output / f"step_00000020{suffix}")
    assert checkpoint.complete(output) == [output / "step_00000008"]
    assert checkpoint.latest(output) == output / "step_00000008"


def test_next_save_removes_leftovers(bench, output, whole):
    (output / "step_00000012").rename(output / "step_00000012.removed")
    (output / "step_00000011.partial").mkdir()
    again = bench.train(spec(bench), output, resume_from=output / "step_00000008")
    assert again.status == "done"
    assert names(output) == ["step_00000008", "step_00000012"]
    assert again.final.val_loss == whole.final.val_loss


def test_going_back_replaces_what_came_after(bench, output, whole):
    again = bench.train(spec(bench), output, resume_from=output / "step_00000008")
    assert again.checkpoint == str(output / "step_00000012")
    assert [p.val_loss for p in again.curve] == [p.val_loss for p in whole.curve]
    assert names(output) == ["step_00000008", "step_00000012"]


def test_state_says_where_the_run_was(bench, output, whole):
    state = checkpoint.read_state(output / "step_00000008")
    assert (state.step, state.run) == (8, spec(bench))
    assert state.curve == whole.curve[:8]


@pytest.mark.parametrize("text", ["", "{}", "[1, 2]", '{"step": 8, "extra": 1}'])
def test_damaged_state_is_named(text, output):
    (output / "step_00000008" / checkpoint.STATE).write_text(text)
    with pytest.raises(InputError, match="step_00000008 is not a checkpoint"):
        checkpoint.read_state(output / "step_00000008")


def test_zero_checkpoint_is_refused_by_another_layout(bench, output):
    """DeepSpeed's files are read at their own stage and world size only; others say so."""
    path = output / "step_00000012" / checkpoint.STATE
    state = json.loads(path.read_text())
    state["run"]["system"] |= {"strategy": "zero2", "n_gpus": 2, "micro_batch": 2}
    path.write_text(json.dumps(state))
    with pytest.raises(
        InputError, match="written by zero2 on 2 workers and cannot be read by torch"
    ):
        bench.train(spec(bench), output, resume_from=path.parent)


def run_and_kill(bench: Any, output: Path, moment: str) -> None:
    """Start the run in a process, and kill it at the moment."""
    command = [sys.executable, "-c", CHILD, spec(bench).model_dump_json()]
    child = subprocess.Popen(
        [*command, str(bench.cache), str(output), moment],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    with child, child.stdin, child.stdout:
        assert child.stdout.readline() == "holding\n"
        child.send_signal(signal.SIGKILL)
        assert child.wait(30) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("moment", "left", "latest"),
    [
        ("saving", ["step_00000004", "step_00000008.partial"], 4),
        ("pruning", ["step_00000004.removed", "step_00000008", "step_00000012"], 12),
    ],
)
def test_kill_leaves_the_checkpoint_before_usable(moment, left, latest, bench, whole, tmp_path):
    run_and_kill(bench, tmp_path, moment)
    assert names(tmp_path) == left
    found = checkpoint.latest(tmp_path)
    assert found == tmp_path / f"step_{latest:08d}"
    again = bench.train(spec(bench), tmp_path, resume_from=found)
    assert again.status == "done"
    assert [p.train_loss for p in again.curve] == [p.train_loss for p in whole.curve]
    assert [p.val_loss for p in again.curve] == [p.val_loss for p in whole.curve]
