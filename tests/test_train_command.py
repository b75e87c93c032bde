"""`thriftlm train`: alone, under torchrun, again, and when a run ends badly."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from thriftlm.cli import main

KEYS = {
    "status",
    "tokens",
    "train_loss",
    "val_loss",
    "tokens_per_s",
    "mfu",
    "peak_mem_gb",
    "grad_norm",
    "grad_norm_max",
    "loss_spikes",
    "data_wait_fraction",
    "communication_fraction",
    "usd",
    "usd_total",
    "checkpoint",
    "trace",
    "checkpoint_failures",
    "skipped_steps",
}
TOKENS = 10 * 256
HUGE = ["system.micro_batch=65536", "optim.batch_tokens=2097152", "model.d_model=1024"]
"""The first activation alone takes 8 GiB."""
LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
from thriftlm.cli import main
main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, a run file over it, and room for the storage."""
    folder = tmp_path_factory.mktemp("train")
    rng, known = random.Random(0), [f"word{number}" for number in range(10)]
    with (folder / "corpus.jsonl").open("w") as file:
        for number in range(200):
            text = f"{number} {' '.join(rng.choices(known, k=60))}"
            file.write(json.dumps({"text": text}) + "\n")
    run = {
        "model": {"n_layers": 1, "d_model": 32, "n_heads": 4, "d_ff": 64},
        "optim": {"lr": 0.01, "batch_tokens": 256},
        "data": {
            "corpus": str(folder / "corpus.jsonl"),
            "tokenizer": "bpe:300",
            "seq_len": 32,
            "validation_fraction": 0.1,
        },
        "system": {"micro_batch": 4},
        "tokens": TOKENS,
        "report_every_tokens": TOKENS // 5,
        "validation_tokens": 512,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder


def options(folder: Path, output: str, *changes: str) -> list[str]:
    """Arguments of a train command, each with a folder of checkpoints of its own."""
    named = ["--storage", str(folder / "storage"), "--output", str(folder / output)]
    overrides = [word for change in changes for word in ("--set", change)]
    return ["train", str(folder / "run.yaml"), *named, *overrides]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, timeout=300
    )


def called(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> int:
    """The exit code of the command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["thriftlm", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def document(text: str) -> dict[str, Any]:
    """The one JSON document that stdout is."""
    found: dict[str, Any] = json.loads(text)
    assert set(found) == KEYS
    return found


@pytest.fixture(scope="module")
def alone(folder: Path) -> subprocess.CompletedProcess[str]:
    """One process that trained to the end."""
    return run("-m", "thriftlm", *options(folder, "alone"), "--json")


def test_alone_prints_one_json_document_and_progress_beside_it(alone, folder):
    assert alone.returncode == 0, alone.stderr
    found = document(alone.stdout)
    assert (found["status"], found["tokens"]) == ("done", TOKENS)
    assert 0 < found["val_loss"] < 5.7  # ln(300), what guessing gives
    assert found["tokens_per_s"] > 0
    assert found["usd"] > 0
    assert found["mfu"] is found["communication_fraction"] is found["trace"] is None
    assert found["grad_norm_max"] >= found["grad_norm"] > 0
    assert 0 < found["data_wait_fraction"] < 1
    assert Path(found["checkpoint"]).parent == folder / "alone"
    lines = alone.stderr.splitlines()
    assert [line for line in lines if not line.startswith("step ")] == []  # no library's warnings
    assert len(lines) == 5


def test_finished_run_prints_its_result_again(alone, folder, monkeypatch, capsys):
    assert called(monkeypatch, [*options(folder, "alone"), "--json"]) == 0
    again = capsys.readouterr()
    first, second = document(alone.stdout), document(again.out)
    # Its rate and memory too, to the last digit: it was not trained again.
    starts = {"usd": 0, "usd_total": 0}
    assert second | starts == first | starts
    assert second["usd_total"] > second["usd"]  # what the first start had cost comes on top
    assert again.err.startswith(f"going on from {first['checkpoint']}")


def test_branch_of_a_trunk_ends_its_own_way(alone, folder, monkeypatch, capsys):
    trunk = options(
        folder, "trunk", f"keep_every_tokens={4 * 256}", f"checkpoint_every_tokens={4 * 256}"
    )
    assert called(monkeypatch, trunk) == 0
    given = ["--branch-from", str(folder / "trunk/step_00000004")]
    shorter = options(folder, "branch", f"tokens={TOKENS - 256}")
    capsys.readouterr()
    assert called(monkeypatch, [*shorter, *given, "--json"]) == 0
    branch = capsys.readouterr()
    found = document(branch.out)
    assert (found["status"], found["tokens"]) == ("done", TOKENS - 256)
    assert branch.err.startswith(f"branching from {folder / 'trunk/step_00000004'}")
    # Its default folder is not the trunk's: the recipe has the trunk's horizon in it.
    assert called(monkeypatch, [*options(folder, "late"), "--branch-from", str(folder)]) == 2
    assert "is not a checkpoint" in capsys.readouterr().err


def test_two_processes_under_torchrun(alone, folder):
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    system = ["system.n_gpus=2", "system.strategy=zero2"]
    found = run(*torchrun, "-m", "thriftlm", *options(folder, "pair", *system), "--json")
    assert found.returncode == 0, found.stderr
    pair, single = document(found.stdout), document(alone.stdout)  # of the first rank alone
    assert pair["val_loss"] == pytest.approx(single["val_loss"], abs=1e-5)
    assert pair["train_loss"] == pytest.approx(single["train_loss"], abs=1e-5)
    assert len([line for line in found.stderr.splitlines() if line.startswith("step ")]) == 5


def test_lines_for_people_go_to_stdout(folder, monkeypatch, capsys):
    assert called(monkeypatch, options(folder, "plain")) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert len([line for line in shown.out.splitlines() if line.startswith("step ")]) == 5
    assert "done" in shown.out
    assert str(folder / "plain") in shown.out


def test_trace_is_named_in_the_answer(folder, monkeypatch, capsys):
    traced = options(folder, "traced", "profile_steps=[3, 4]")
    assert called(monkeypatch, traced) == 0
    path = folder / "traced" / "trace_3_4.json.gz"
    assert path.is_file()
    shown = capsys.readouterr().out
    assert f"trace          {path}" in shown
    assert "data wait" in shown
    assert called(monkeypatch, [*traced, "--json"]) == 0
    assert document(capsys.readouterr().out)["trace"] == str(path)


def test_diverged_run_exits_1_and_prints_its_json(folder, monkeypatch, capsys):
    wild = options(folder, "wild", "optim.lr=1000", "optim.warmup_fraction=0")
    assert called(monkeypatch, [*wild, "--json"]) == 1
    found = document(capsys.readouterr().out)
    assert (found["status"], found["val_loss"], found["checkpoint"]) == ("diverged", None, None)


def test_run_that_does_not_fit_into_memory_exits_1_and_prints_its_json(folder):
    """Under a limit that its first activation passes: torch's allocator really fails."""
    found = run("-c", LIMITED, *options(folder, "huge", *HUGE), "--json")
    assert found.returncode == 1, found.stderr
    huge = document(found.stdout)
    assert (huge["status"], huge["tokens"], huge["train_loss"]) == ("oom", 0, None)
    assert "out of memory on rank 0" in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("system.n_gpus=2", "strategy"),
        ("optim.learning_rate=1", "learning_rate"),
        ("data.seq_len=100000", "divide"),
        ("model.vocab=299", "vocab"),
    ],
)
def test_bad_value_exits_2_with_one_message(change, words, folder, monkeypatch, capsys):
    assert called(monkeypatch, options(folder, "bad", change)) == 2
    shown = capsys.readouterr()
    assert words in shown.err
    assert shown.out == ""
    assert not (folder / "bad").exists()


def test_several_workers_without_torchrun_exit_2_with_the_way_out(folder, monkeypatch, capsys):
    system = ["system.n_gpus=2", "system.strategy=ddp"]
    assert called(monkeypatch, options(folder, "lonely", *system)) == 2
    assert "torchrun --nproc-per-node 2 -m thriftlm train" in capsys.readouterr().err


def test_output_that_is_a_file_exits_2(folder, monkeypatch, capsys):
    (folder / "file").write_text("")
    assert called(monkeypatch, options(folder, "file")) == 2
    assert str(folder / "file") in capsys.readouterr().err
