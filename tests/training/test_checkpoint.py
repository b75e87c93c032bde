"""Checkpoints are whole or not there, whatever happens to them and around them."""

import random
import re
import resource
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from thriftlm.spec import InputError, Measurement, Progress
from thriftlm.training import checkpoint
from thriftlm.training.checkpoint_files import MANIFEST, Manifest, outdated, shelf_at
from thriftlm.training.checkpoint_writer import Writer
from thriftlm.training.loop import Decision, train
from thriftlm.training.random_state import random_state, set_random_state
from thriftlm.training.shard_files import TOKENIZER

BATCH_TOKENS = 256
FILES = [".metadata", "__0_0.distcp", MANIFEST, "random_0.pt", "state.json", "tokenizer.json"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def spec(bench: Any, **changes: Any) -> Any:
    fields = {"tokens": 12 * BATCH_TOKENS, "checkpoint_every_tokens": 4 * BATCH_TOKENS}
    return bench.spec(**(fields | changes))


@pytest.fixture(scope="module")
def whole(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Measurement:
    """A run of 12 steps with a checkpoint every 4."""
    measured: Measurement = bench.train(spec(bench), tmp_path_factory.mktemp("whole"))
    return measured


@pytest.fixture
def output(whole: Measurement, tmp_path: Path) -> Path:
    """A folder with that run's checkpoints, of steps 8 and 12."""
    assert whole.checkpoint is not None
    shutil.copytree(Path(whole.checkpoint).parent, tmp_path / "output")
    return tmp_path / "output"


def assert_same_losses(found: Measurement, expected: Measurement) -> None:
    assert found.status == expected.status == "done"
    for field in ("train_loss", "val_loss", "grad_norm"):
        assert [getattr(p, field) for p in found.curve] == [
            getattr(p, field) for p in expected.curve
        ]


def test_last_two_are_kept(output):
    assert names(output) == ["step_00000008", "step_00000012"]
    assert checkpoint.latest(output) == output / "step_00000012"


def test_no_folder_has_no_checkpoint(tmp_path):
    assert checkpoint.latest(tmp_path / "none") is None
    assert checkpoint.latest(tmp_path) is None


def test_a_checkpoint_lists_all_its_files(output):
    folder = output / "step_00000012"
    assert names(folder) == sorted(FILES)
    manifest = Manifest.model_validate_json((folder / MANIFEST).read_text())
    assert set(manifest.files) == set(FILES) - {MANIFEST}


@pytest.mark.parametrize("suffix", [".partial", ".removed"])
def test_leftover_of_a_kill_is_never_taken(suffix, output):
    (output / "step_00000012").rename(output / f"step_00000012{suffix}")
    shutil.copytree(output / "step_00000008", output / f"step_00000020{suffix}")
    assert checkpoint.complete(output) == ["step_00000008"]
    assert checkpoint.latest(output) == output / "step_00000008"


def test_folder_without_a_manifest_is_never_taken(output):
    """As an object store shows an upload that was cut off."""
    (output / "step_00000012" / MANIFEST).unlink()
    assert checkpoint.latest(output) == output / "step_00000008"


def test_next_save_removes_leftovers(bench, output, whole):
    (output / "step_00000012").rename(output / "step_00000012.removed")
    (output / "step_00000011.partial").mkdir()
    again = bench.train(spec(bench), output, resume_from=output / "step_00000008")
    assert names(output) == ["step_00000008", "step_00000012"]
    assert_same_losses(again, whole)


def test_going_back_replaces_what_came_after(bench, output, whole):
    shutil.copytree(output / "step_00000012", output / "step_00000099")
    again = bench.train(spec(bench), output, resume_from=output / "step_00000008")
    assert again.checkpoint == str(output / "step_00000012")
    assert_same_losses(again, whole)
    assert names(output) == ["step_00000008", "step_00000012"]


def test_state_says_where_the_run_was(bench, output, whole):
    state = checkpoint.read_state(output / "step_00000008")
    assert (state.step, state.tokens, state.run) == (8, 8 * BATCH_TOKENS, spec(bench))
    assert state.curve == whole.curve[:8]


@pytest.mark.parametrize("text", ["", "{}", "[1, 2]", '{"step": 8, "extra": 1}'])
def test_damaged_state_is_named(text, output):
    (output / "step_00000008" / checkpoint.STATE).write_text(text)
    with pytest.raises(InputError, match="step_00000008 is not a checkpoint"):
        checkpoint.read_state(output / "step_00000008")


def spoil(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    match how:
        case "truncated":
            path.write_bytes(content[: len(content) // 2])
        case "flipped":
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        case "missing":
            path.unlink()


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing"])
@pytest.mark.parametrize("file", FILES)
def test_damaged_file_is_named_and_the_checkpoint_before_used(
    file, how, bench, output, whole, capsys
):
    spoil(output / "step_00000012" / file, how)
    with pytest.raises(InputError, match=rf"step_00000012 .*{re.escape(file)}"):
        bench.train(spec(bench), output, resume_from=output / "step_00000012")
    with pytest.raises(InputError, match=rf"step_00000012 .*{re.escape(file)}"):
        checkpoint.load_decoder(output / "step_00000012")
    capsys.readouterr()

    again = bench.train(spec(bench), output, go_on=True)
    assert_same_losses(again, whole)
    assert again.curve[:8] == whole.curve[:8]  # to the last digit of its rates: not trained again
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    if (file, how) == (MANIFEST, "missing"):
        assert warnings == []  # then it is no checkpoint at all
    else:
        (line,) = warnings
        assert "step_00000012 is damaged" in line
        assert file in line


def test_no_whole_checkpoint_left_is_bad_input(bench, output):
    for name in ("step_00000008", "step_00000012"):
        spoil(output / name / "__0_0.distcp", "flipped")
    with pytest.raises(InputError, match=r"step_00000008 is damaged.*none before it is whole"):
        bench.train(spec(bench), output, go_on=True)


def test_nothing_to_go_on_from_is_a_beginning(bench, tmp_path, whole):
    assert_same_losses(bench.train(spec(bench), tmp_path / "new", go_on=True), whole)


def test_checkpoint_of_the_version_before_is_refused(output):
    (output / "step_00000012" / MANIFEST).unlink()
    with pytest.raises(InputError, match="is not a checkpoint of this version"):
        checkpoint.load_decoder(output / "step_00000012")
    manifest = output / "step_00000008" / MANIFEST
    manifest.write_text(manifest.read_text().replace('"version":2', '"version":3'))
    with pytest.raises(InputError, match=r"manifest\.json has format 3, this is 2"):
        checkpoint.load_decoder(output / "step_00000008")


def test_system_may_change_and_the_recipe_not(bench, output, whole):
    other = spec(bench, system={"micro_batch": 2})
    found = bench.train(other, output, resume_from=output / "step_00000008")
    assert found.final.val_loss == pytest.approx(whole.final.val_loss, abs=1e-5)
    with pytest.raises(InputError, match="belongs to another run"):
        bench.train(spec(bench, optim={"lr": 0.004}), output, go_on=True)


def test_outdated_are_those_beyond_the_last_and_off_the_grid():
    steps = [f"step_{step:08d}" for step in (5, 10, 15, 20, 25, 30, 35)]
    assert outdated(steps, 2, None) == steps[:-2]
    kept = set(steps) - set(outdated(steps, 1, 20))
    assert kept == {"step_00000020", "step_00000035"}
    off = ["step_00000018", "step_00000027", "step_00000036", "step_00000045"]
    assert outdated(off, 1, 20) == ["step_00000018", "step_00000036"]  # 27 passes 20, 45 passes 40


def test_trunk_checkpoints_stay(bench, tmp_path):
    run = spec(
        bench,
        checkpoint_every_tokens=2 * BATCH_TOKENS,
        keep_checkpoints=1,
        keep_every_tokens=6 * BATCH_TOKENS,
    )
    bench.train(run, tmp_path)
    assert names(tmp_path) == ["step_00000006", "step_00000012"]
    assert run.recipe_id == spec(bench).recipe_id


def test_the_run_goes_on_while_a_checkpoint_is_written(bench, tmp_path, monkeypatch, whole):
    """The first write is held until the run has come four steps further."""
    reached, write_state = threading.Event(), Writer._write_state
    held: list[bool] = []

    def hold(self: Writer, *args: Any) -> None:
        if not held:
            held.append(reached.wait(60))
        write_state(self, *args)

    def report(progress: Progress, written: Path | None) -> Decision:
        if progress.step < 7:
            assert written is None
        else:
            reached.set()
        return Decision.CONTINUE

    monkeypatch.setattr(Writer, "_write_state", hold)
    measured = train(spec(bench), report, cache=bench.cache, output=tmp_path)
    assert held == [True]
    assert_same_losses(measured, whole)
    # Written of the state at step 4, although the weights had moved on.
    again = bench.train(spec(bench), tmp_path / "again", resume_from=tmp_path / "step_00000008")
    assert_same_losses(again, whole)


def test_at_most_one_write_is_in_flight(bench, tmp_path, monkeypatch):
    running: list[int] = []
    most: list[int] = []
    write = Writer._write

    def counted(self: Writer, *args: Any) -> Any:
        running.append(1)
        most.append(len(running))
        try:
            return write(self, *args)
        finally:
            running.pop()

    monkeypatch.setattr(Writer, "_write", counted)
    bench.train(spec(bench, checkpoint_every_tokens=BATCH_TOKENS), tmp_path)
    assert most == [1] * 12


@pytest.mark.parametrize("failing", [[4], [12], [4, 8, 12]])
def test_write_that_fails_is_reported_and_the_run_goes_on(
    failing, bench, tmp_path, monkeypatch, whole, capsys
):
    write_state = Writer._write_state

    def fail(self: Writer, work: Path, staged: Any) -> None:
        write_state(self, work, staged)
        if any(work.name == f"step_{step:08d}.partial" for step in failing):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Writer, "_write_state", fail)
    measured = bench.train(spec(bench), tmp_path)
    assert_same_losses(measured, whole)
    good = [f"step_{step:08d}" for step in (4, 8, 12) if step not in failing]
    assert names(tmp_path) == good[-2:]
    assert measured.checkpoint == (str(tmp_path / good[-1]) if good else None)
    assert len(measured.checkpoint_failures) == len(failing)
    for step, line in zip(failing, measured.checkpoint_failures, strict=True):
        assert line.startswith(f"checkpoint of step {step} could not be written")
        assert "No space left on device" in line
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(lines) == len(failing)
    assert all("the run goes on" in line for line in lines)


def test_full_file_size_limit_does_not_end_the_run(bench, tmp_path, monkeypatch, whole):
    """The kernel refuses the bytes themselves; the limit is lifted once the write has failed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    fail = Writer._fail

    def lift(self: Writer, *args: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        fail(self, *args)

    def report(progress: Progress, written: Path | None) -> Decision:
        if progress.step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        return Decision.CONTINUE

    monkeypatch.setattr(Writer, "_fail", lift)
    try:
        measured = train(spec(bench), report, cache=bench.cache, output=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_same_losses(measured, whole)
    (line,) = measured.checkpoint_failures
    assert "step 4" in line
    assert "File too large" in line
    assert names(tmp_path) == ["step_00000008", "step_00000012"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of two megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("mounting is not permitted here; RLIMIT_FSIZE stands in, in the test before")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_full_disk_does_not_end_the_run(bench, small_disk, monkeypatch, whole):
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(1_900_000))
    fail = Writer._fail
    left: list[list[str]] = []

    def make_room(self: Writer, *args: Any) -> None:
        fail(self, *args)
        left.append(names(small_disk / "output"))
        ballast.unlink()

    monkeypatch.setattr(Writer, "_fail", make_room)
    measured = bench.train(spec(bench), small_disk / "output")
    assert_same_losses(measured, whole)
    (line,) = measured.checkpoint_failures
    assert "step 4" in line
    assert "No space left on device" in line
    assert "0 MB free" in line
    assert left == [[]]  # the partial folder is gone
    assert names(small_disk / "output") == ["step_00000008", "step_00000012"]


def test_disk_that_stays_full_costs_the_checkpoint_and_not_the_result(bench, small_disk, whole):
    (small_disk / "ballast").write_bytes(bytes(1_900_000))
    measured = bench.train(spec(bench), small_disk / "output")
    assert_same_losses(measured, whole)
    assert measured.checkpoint is None
    assert len(measured.checkpoint_failures) == 3


def test_random_states_go_on_where_they_were():
    def drawn() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    np.random.standard_normal()  # leaves one in store
    state = random_state()
    first = drawn()
    assert drawn() != first
    set_random_state(state)
    assert drawn() == first


def test_a_resumed_run_draws_what_the_uninterrupted_one_would(bench, output):
    torch.manual_seed(7)
    bench.train(spec(bench), output, resume_from=output / "step_00000008")
    first = torch.rand(3)
    torch.manual_seed(8)
    bench.train(spec(bench), output, resume_from=output / "step_00000008")
    assert torch.equal(torch.rand(3), first)


def test_the_ledger_goes_on_over_starts(bench, tmp_path):
    def report(progress: Progress, written: Path | None) -> Decision:
        return Decision.STOP if progress.step == 4 else Decision.CONTINUE

    common = {"cache": bench.cache, "output": tmp_path, "usd_per_hour": 3600.0}
    first = train(spec(bench), report, **common)
    assert (first.earlier_seconds, first.earlier_usd) == (0, 0)
    state = checkpoint.read_state(first.checkpoint)
    assert state.spent.seconds > 0
    assert state.spent.usd == pytest.approx(state.spent.seconds)
    second = train(spec(bench), lambda *_: Decision.CONTINUE, go_on=True, **common)
    assert second.earlier_seconds == state.spent.seconds
    last = checkpoint.read_state(second.checkpoint).spent
    assert last.seconds > state.spent.seconds
    assert last.usd == pytest.approx(last.seconds)


@pytest.mark.parametrize("scheme", ["memory", "file", "local"])
def test_object_store_holds_them_by_url(scheme, bench, tmp_path, whole, capsys):
    """fsspec's file systems in memory and on disk, and pyarrow's, stand in for a bucket."""
    path = tmp_path / "bucket/run"
    url = f"memory:/{path}" if scheme == "memory" else f"{scheme}://{path}"
    measured = bench.train(spec(bench), url)
    assert_same_losses(measured, whole)
    assert measured.checkpoint == f"{url}/step_00000012"
    shelf = shelf_at(url)
    assert checkpoint.complete(url) == ["step_00000008", "step_00000012"]
    with shelf.opened("step_00000012") as folder:
        assert names(folder) == sorted(FILES)
    _, state = checkpoint.load_decoder(f"{url}/step_00000012")
    assert state.step == 12

    # Damaged in the store: the one before is used. Cut off before its manifest: it is none.
    with shelf.files.open_output_stream(f"{shelf.path}/step_00000012/{TOKENIZER}") as stream:
        stream.write(b"{}")
    shelf.files.create_dir(f"{shelf.path}/step_00000020", recursive=True)
    with shelf.files.open_output_stream(f"{shelf.path}/step_00000020/state.json") as stream:
        stream.write(b"{}")
    again = bench.train(spec(bench), url, go_on=True)
    assert_same_losses(again, whole)
    assert f"{url}/step_00000012 is damaged: {TOKENIZER}" in capsys.readouterr().err
    assert checkpoint.complete(url) == ["step_00000008", "step_00000012"]
    assert not any("step_00000020" in path for path in shelf._paths())


def test_unknown_url_is_bad_input(bench):
    with pytest.raises(InputError, match="nosuch://bucket/run cannot be opened"):
        bench.train(spec(bench), "nosuch://bucket/run")
