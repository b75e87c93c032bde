"""The command line as a user meets it: what it loads, prints and refuses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "ray", "mlflow", "optuna", "deepspeed", "pyarrow", "matplotlib")
RUN = """model: {preset: mobilellm-125m}
optim: {batch_tokens: 1024}
data: {seq_len: 128, tokenizer: "bpe:2048"}
system: {gpu: cpu, micro_batch: 8}
tokens: 4096
"""
SPACE = """name: tiny
training_budget: {usd: 0.01}
search_budget: {trials: 2}
search: {fidelity: {min_tokens: 1024, max_tokens: 4096}}
space:
  model: {n_layers: [2, 3], d_model: 64, head_dim: 32, n_heads: 2, d_ff: 128}
  optim: {batch_tokens: 1024}
  system: {gpu: cpu, micro_batch: 1}
"""


@pytest.fixture
def space(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(SPACE)
    return path


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['thriftlm', '--help']\n"
        "from thriftlm.cli import main\n"
        "try: main()\n"
        "except SystemExit as ended: assert not ended.code\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    for command in ("search", "train", "estimate", "models", "gpus", "spaces", "doctor", "data"):
        assert command in done.stdout


def test_module_and_script_are_the_same() -> None:
    command = [sys.executable, "-m", "thriftlm"]
    environment = os.environ | {"COLUMNS": "100"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert "Usage: thriftlm [OPTIONS] COMMAND" in done.stdout
    assert done.stderr == ""


def test_every_option_is_explained(thriftlm) -> None:
    for command in (
        ["search"],
        ["train"],
        ["estimate"],
        ["calibrate"],
        ["models"],
        ["doctor"],
        ["data", "build"],
    ):
        code, out, _ = thriftlm(*command, "--help")
        assert code == 0
        options = [line for line in out.splitlines() if line.lstrip("│ ").startswith("--")]
        assert options
        assert all(len(line.strip("│ ").split()) > 3 for line in options), command


@pytest.mark.parametrize("command", ["models", "gpus", "spaces"])
def test_listings_are_whole_and_json_is_valid(command: str, thriftlm) -> None:
    code, out, err = thriftlm(command, "--json")
    rows = json.loads(out)
    assert (code, err) == (0, "")
    code, out, err = thriftlm(command)
    assert (code, err) == (0, "")
    assert "…" not in out
    for row in rows:
        assert row.get("name", row.get("id")) in out


def test_a_dry_run_counts_points(space: Path, thriftlm, tmp_path: Path) -> None:
    code, out, err = thriftlm("search", str(space), "--dry-run", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["points"] == 2
    code, out, err = thriftlm("search", str(space), "--dry-run")
    assert (code, err) == (0, "")
    assert "2 points" in out
    assert not (tmp_path / "storage").exists()


BAD = {
    "no such command": (["serach"], "no such command 'serach'.*thriftlm --help"),
    "no such option": (["search", "x", "--bogus"], "--bogus.*thriftlm search --help"),
    "missing argument": (["search"], "missing argument 'SPACE'"),
    "missing command": (["data"], "missing command; see thriftlm data --help"),
    "misspelt space": (["search", "quikstart"], "did you mean 'quickstart'"),
    "missing file": (["train", "nowhere.yaml"], "nowhere.yaml: no such file"),
    "set without value": (["search", "SPACE", "--set", "name"], "--set name.*must look like"),
    "set of an unknown key": (["search", "SPACE", "--set", "serach.seed=1"], "serach.*'search'"),
    "unknown gpu": (["search", "SPACE", "--set", "space.system.gpu=H10"], "H10.*H100"),
    "unknown preset": (
        ["train", "RUN", "--set", "model.preset=mobilellm-126m"],
        "did you mean 'mobilellm-125m'",
    ),
    "resume of nothing": (["search", "SPACE", "--resume"], "nothing to resume.*tiny"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_message(arguments, message, space: Path, thriftlm) -> None:
    run = space.with_name("run.yaml")
    run.write_text(RUN)
    files = {"SPACE": str(space), "RUN": str(run)}
    code, out, err = thriftlm(*(files.get(argument, argument) for argument in arguments))
    assert code == 2
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert re.search(message, err), err
    assert "Traceback" not in out + err


def test_an_unknown_key_is_named_with_its_line(space: Path, thriftlm) -> None:
    space.write_text(SPACE.replace("optim:", "optin:"))
    code, _, err = thriftlm("search", str(space))
    assert code == 2
    assert err.startswith("error: ")
    assert f"{space.name}:7" in err
    assert "'optim'" in err
