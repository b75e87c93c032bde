"""`thriftlm plan`: from one budget to a run, with the curve, the picture and the run file."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from thriftlm.planning.scaling_laws import law_named
from thriftlm.records import write_rows
from thriftlm.review.plan_command import quantity

ALWAYS = [0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 1]


def planned(thriftlm, *arguments):
    code, out, err = thriftlm("plan", *arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_json_has_the_keys_of_the_design(thriftlm):
    found = planned(thriftlm, "--flops", "1.62e20", "--gpu", "H100")
    assert found["law"] == "harm"
    assert found["compute_flops"] == pytest.approx(1.62e20)
    assert found["n_params"] == pytest.approx(0.9928012883e9)
    assert found["n_tokens"] == pytest.approx(27.1957745398e9)
    assert [row["k_n"] for row in found["curve"]] == ALWAYS
    half = found["curve"][3]
    assert half["k_d"] == pytest.approx(2.41565, abs=1e-5)
    assert half["overhead"] == pytest.approx(0.2078, abs=5e-5)
    assert half["n_params"] == pytest.approx(found["n_params"] / 2)
    assert half["n_tokens"] == pytest.approx(65.70e9, rel=1e-4)
    assert found["hours"] > 0
    assert found["usd"] > 0
    assert [row["k_n"] for row in found["curve"] if row["diminishing"]] == [0.25, 0.3]


@pytest.mark.parametrize(
    "budget",
    [
        ["--usd", "5000", "--gpu", "A100-40GB"],
        ["--usd", "300", "--gpu", "H100", "--gpus", "16", "--market", "spot"],
        ["--params", "350M", "--gpu", "L4", "--cloud", "gcp", "--inference-tokens", "100B"],
        ["--hours", "48", "--gpu", "A100-80GB", "--gpus", "8"],
        ["--loss", "2.4"],
    ],
)
def test_dollars_are_those_of_estimate_to_the_cent(budget, thriftlm, tmp_path):
    found = planned(thriftlm, *budget, "--run", "run.yaml")
    spec = yaml.safe_load((tmp_path / "run.yaml").read_text())
    system, batch = spec["system"], spec["optim"]["batch_tokens"]
    options = {
        "--gpu": system["gpu"],
        "--gpus": system.get("n_gpus", 1),
        "--strategy": system.get("strategy", "single"),
        "--micro-batch": system.get("micro_batch", 8),
        "--cloud": system.get("cloud", "aws"),
        "--market": system.get("market", "on_demand"),
        "--batch-tokens": batch,
        "--seq-len": spec["data"]["seq_len"],
    }
    words = [str(word) for pair in options.items() for word in pair]
    code, out, err = thriftlm("estimate", "run.yaml", *words, "--json")
    assert (code, err) == (0, "")
    (estimate,) = json.loads(out)
    assert estimate["fits"]
    assert round(estimate["usd_per_btok"] * spec["tokens"] / 1e9, 2) == round(found["usd"], 2)
    speed = estimate["tokens_per_s_per_gpu"] * estimate["n_gpus"]
    assert spec["tokens"] / speed / 3600 == pytest.approx(found["hours"])


def test_the_run_file_is_the_run(thriftlm, tmp_path):
    found = planned(thriftlm, "--usd", "5000", "--gpu", "A100-40GB", "--run", "run.yaml")
    from thriftlm.config_file import ConfigFile
    from thriftlm.spec import RunSpec
    from thriftlm_models.counts import stored_params

    spec = ConfigFile.read(tmp_path / "run.yaml").parse(RunSpec)
    assert spec.model_dump(mode="json") == found["run"]["spec"]
    assert spec.steps == found["run"]["steps"]
    assert spec.tokens % spec.optim.batch_tokens == 0
    assert stored_params(spec.model) == found["run"]["stored_params"]
    assert spec.data.bpe_vocab == spec.model.vocab == 32_000


def test_sardanas_thirty_billion(thriftlm):
    found = planned(thriftlm, "--params", "30B", "--inference-tokens", "5T", "--gpu", "H100")
    served = found["inference"]
    assert served["n_params"] == pytest.approx(16.4e9, rel=0.005)
    assert served["n_tokens"] == pytest.approx(3.27e12, rel=0.005)
    assert served["saved"] == pytest.approx(0.1628, abs=5e-5)
    assert found["run"]["n_params"] == pytest.approx(16.4e9, rel=0.06)
    assert len(found["curve"]) == len(ALWAYS) + 1  # the run's own size is in it


def test_unique_tokens_repeat(thriftlm):
    found = planned(thriftlm, "--flops", "1e21", "--unique-tokens", "10B")
    unique = found["unique"]
    assert unique["epochs"] == pytest.approx(found["n_tokens"] / 1e10)
    assert 1e10 < unique["worth_tokens"] < found["n_tokens"]
    assert found["loss"] > unique["fresh"]["loss"]


def test_few_bits_are_told(thriftlm):
    found = planned(thriftlm, "--flops", "1e21", "--bits", "4")
    assert found["bits"]["effective_params"] < 0.8 * found["n_params"]
    assert found["bits"]["loss"] > found["loss"]


def test_another_law_by_name_or_file(thriftlm, tmp_path):
    epoch = planned(thriftlm, "--flops", "1e22", "--law", "epoch")
    assert epoch["k_min"] == pytest.approx(0.1464, abs=5e-5)
    (tmp_path / "mine.yaml").write_text(
        "{E: 0.1, A: 40, B: 60, alpha: 0.3, beta: 0.32, k: 0.5, counts: non_embedding}"
    )
    mine = planned(thriftlm, "--flops", "1e20", "--law", "mine.yaml", "--gpu", "H100")
    assert mine["law_detail"]["k"] == 0.5
    assert mine["run"]["n_params"] == mine["run"]["non_embedding_params"]


def test_the_terminal_shows_table_bars_and_run(thriftlm):
    code, out, err = thriftlm("plan", "--usd", "5000", "--gpu", "A100-40GB")
    assert (code, err) == (0, "")
    assert "188.9%  #######" in out
    assert "diminishing returns" in out
    assert "compute-optimal, the run" in out
    assert "\nmodel:\n  n_layers: 25\n" in out
    assert "cost       $4,9" in out


def test_the_picture_is_written_only_where_asked(thriftlm, tmp_path):
    code, *_ = thriftlm("plan", "--flops", "1e20", "--out", "plan.png", "--run", "run.yaml")
    assert code == 0
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"
    assert {path.name for path in tmp_path.iterdir()} == {"plan.png", "run.yaml"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--usd", "-5"], "--usd must be a number above 0, got -5"),
        (["--usd", "nan"], "--usd must be a number above 0, got nan"),
        (["--flops", "inf"], "--flops must be a number above 0, got inf"),
        (["--flops", "abc"], "'abc' must be a number such as 1.62e20 or 350M"),
        ([], "plan needs exactly one of --flops"),
        (["--flops", "1e20", "--usd", "5"], "given: --flops and --usd"),
        (["--flops", "1e50"], "must ask for a language model"),
        (["--usd", "0.001"], "buys too few tokens"),
        (["--usd", "1e9", "--gpu", "L4", "--gpus", "1"], "does not, at best it needs"),
        (["--params", "100B", "--gpu", "L4", "--gpus", "1"], "it needs 1912 GB of 24"),
        (["--params", "190B", "--gpu", "A100-40GB"], "at up to 1024 x A100-40GB it does not"),
        (["--flops", "1e20", "--k-n", "0.05"], "k_n must be above 0.0974"),
        (["--flops", "1e20", "--k-n", "-1"], "--k-n must be a number above 0, got -1"),
        (["--loss", "1.5"], "above the law's floor E = 1.62"),
        (["--loss", "2", "--unique-tokens", "1M"], "however often they repeat"),
        (["--flops", "1e20", "--unique-tokens", "-1"], "--unique-tokens must be a number above 0"),
        (["--flops", "1e20", "--bits", "0"], "--bits must be above 0"),
        (["--flops", "1e20", "--law", "harmm"], "unknown law 'harmm'"),
        (["--hours", "5"], "--hours needs --gpu"),
        (["--params", "1B", "--gpu", "H10"], "unknown GPU 'H10'"),
        (["--params", "1B", "--gpu", "cpu"], "what cpu can do is not known"),
        (["--params", "1B", "--gpu", "V100-16GB"], "must run flash attention in bf16"),
        (["--usd", "50", "--cloud", "azz"], "unknown cloud 'azz'"),
        (["--usd", "50", "--gpu", "L4", "--cloud", "lambda"], "has no on_demand price for L4"),
        (["--usd", "50", "--tokenizer", "bpe:9"], "bpe:N needs N of at least 257"),
        (["--usd", "50", "--corpus", "hf://a/b?c=1"], "hf:// takes ?config="),
        (["--flops", "1e15", "--run", "x.yaml"], "--run has nothing to write"),
    ],
)
def test_bad_input_is_one_line(arguments, message, thriftlm):
    code, out, err = thriftlm("plan", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "value"), [("350M", 3.5e8), ("5T", 5e12), ("1e9", 1e9), ("2 B", 2e9)]
)
def test_quantities(text, value):
    assert quantity(text) == value


def test_a_plan_answers_at_once_and_loads_nothing_heavy():
    code = (
        "import sys, time; start = time.process_time()\n"
        "sys.argv = ['thriftlm', 'plan', '--usd', '5000', '--gpu', 'A100-40GB', '--json']\n"
        "from thriftlm.cli import main\n"
        "try: main()\n"
        "except SystemExit as ended: assert not ended.code\n"
        "heavy = {'torch', 'ray', 'mlflow', 'scipy', 'pyarrow', 'matplotlib'} & set(sys.modules)\n"
        "print(time.process_time() - start, sorted(heavy), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, heavy = done.stderr.split(maxsplit=1)
    assert heavy.strip() == "[]"
    assert float(seconds) < 1


def test_the_plan_that_the_readme_shows_is_the_one_that_comes(thriftlm):
    text = (Path(__file__).parents[2] / "README.md").read_text()
    ((command, shown),) = re.findall(r"\$ thriftlm (plan .*)\n((?:.*\n)+?)```", text)
    code, out, _ = thriftlm(*command.split())
    assert code == 0
    lines = [line.rstrip() for line in out.splitlines()]
    assert lines[: len(shown.splitlines())] == shown.splitlines()


# --- fitted -------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path):
    law = law_named("epoch").law
    n, d = (x.ravel() for x in np.meshgrid(np.geomspace(1e7, 1e9, 8), np.geomspace(1e8, 1e11, 8)))
    noise = np.exp(0.003 * np.random.default_rng(0).standard_normal(len(n)))
    loss = law.loss(n, d) * noise
    rows = [
        {"run_id": str(i), "non_embedding_params": n[i], "tokens": d[i], "loss": loss[i]}
        for i in range(len(n))
    ]
    write_rows(rows, tmp_path / "runs.parquet")
    write_rows(rows[:3], tmp_path / "three.csv")
    return "runs.parquet"


def test_a_plan_goes_on_with_the_fitted_law(thriftlm, runs):
    found = planned(thriftlm, "--usd", "500", "--gpu", "H100", "--fit", runs)
    assert found["law"] == "runs"
    assert found["law_detail"]["N"] == "non_embedding"
    assert found["run"]["n_params"] == found["run"]["non_embedding_params"]
    fit = found["fit"]
    assert fit["loss"]["low"] < found["loss"] < fit["loss"]["high"]
    assert fit["n_params"]["low"] < found["n_params"] < fit["n_params"]["high"]
    assert fit["extrapolation"]["flops"] == 1.0
    assert fit["runs"] == 64
    assert found["k_min"] == pytest.approx(0.1464, abs=0.03)  # the truth's


def test_without_a_budget_the_plan_is_for_what_the_runs_took(thriftlm, runs, tmp_path):
    found = planned(thriftlm, "--fit", runs, "--out", "fit.png")
    assert found["compute_flops"] == pytest.approx(6e20)
    assert {round(point["loss"], 6) for point in found["fit"]["measured_overhead"]}
    assert (tmp_path / "fit.png").read_bytes()[:4] == b"\x89PNG"
    code, out, _ = thriftlm("plan", "--fit", runs, "--flops", "1e19")
    assert code == 0
    assert "within the runs" in out
    code, out, _ = thriftlm("plan", "--fit", runs, "--flops", "6e21", "--form", "skaling")
    assert "beyond the runs: flops 10x" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fit", "three.csv"], "needs at least 6 points, the runs have 3"),
        (["--fit", "nowhere.parquet"], "cannot be read as recorded runs"),
        (["--fit", "runs.parquet", "--law", "epoch"], "give one of them"),
    ],
)
def test_runs_that_tell_nothing_are_refused_in_one_line(arguments, message, thriftlm, runs):
    code, out, err = thriftlm("plan", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1
