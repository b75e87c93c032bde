"""`thriftlm estimate --space`: every run of a space, by estimate."""

import csv
import json
import subprocess
import sys

import pytest

from thriftlm import prices
from thriftlm.config_file import space_files
from thriftlm.planning.estimate import estimate
from thriftlm.review.space_estimates import estimate_space
from thriftlm.search.spaces.space import load_space

ESTIMATES = ("tokens_per_s_per_gpu", "low", "high", "mfu", "peak_mem_gb", "usd_per_btok")


@pytest.mark.parametrize("name", space_files())
def test_every_shipped_space_is_estimated_as_its_runs_one_by_one(name):
    estimated = estimate_space(load_space(name), ["fused"])
    assert not estimated.sampled
    assert len(estimated.found) == len(estimated.runs) > 0
    for i in range(0, len(estimated.runs), max(1, len(estimated.runs) // 40)):
        run, here = estimated.runs[i], estimated.found[i]
        batch = run.optim.batch_tokens
        alone = estimate(run.model, run.system, run.data.seq_len, batch, stack="fused")
        assert (here.fits, here.reason, here.instance) == (alone.fits, alone.reason, alone.instance)
        for what in ESTIMATES:
            assert getattr(here, what) == pytest.approx(getattr(alone, what))


@pytest.mark.parametrize(
    ("name", "number"),
    [
        # 18 models; one worker has two micro batches, two have six strategies and one micro batch
        ("quickstart", 18 * (2 + 6)),
        ("tinyllama", 6 * 3),  # the learning rate does not matter
        ("mobilellm_sharing", 10),
        ("apple_bottlenecks", 2280),
    ],
)
def test_runs_of_one_throughput_are_one(name, number):
    assert len(estimate_space(load_space(name), ["eager"]).runs) == number


def test_what_is_too_much_to_list_is_drawn_and_said(thriftlm):
    many = "space.model.d_ff={randint: [1024, 9000]}"
    code, out, _ = thriftlm("estimate", "--space", "tinyllama", "--set", many)
    assert code == 0
    assert "of points drawn at random" in out


def test_json_has_every_run_on_every_stack_best_first(thriftlm):
    stacks = ("--stack", "eager", "--stack", "fused", "--stack", "eager")
    code, out, err = thriftlm("estimate", "--space", "tinyllama", *stacks, "--json")
    assert (code, err) == (0, "")
    rows = json.loads(out)
    assert len(rows) == 2 * 18
    assert [row["stack"] for row in rows].count("eager") == 18
    assert {row["model"] for row in rows} == {"tinyllama-1.1b"}
    fits = [row["fits"] for row in rows]
    assert fits == sorted(fits, reverse=True)
    dollars = [row["usd_per_btok"] for row in rows if row["fits"]]
    assert dollars == sorted(dollars)


def test_the_table_has_the_best_of_each_model(thriftlm):
    code, out, _ = thriftlm("estimate", "--space", "apple_bottlenecks", "--stack", "eager")
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    sizes = ("100m", "500m", "1b", "2b")
    for model in (f"apple-{size}" for size in sizes):
        assert sum(line[:1] == [model] for line in lines) == 5
    assert "2,260 more" in out
    assert "A100-40GB hours, not dollars" in out


def test_models_are_told_apart_by_what_varies():
    estimated = estimate_space(load_space("mobilellm_sharing"), ["fused"])
    labels = estimated.table["model"]
    assert len(set(labels)) == len(labels)
    assert "mobilellm-125m-depth8 reverse repeats=3" in labels


@pytest.mark.parametrize("name", ["mobilellm_sharing", "apple_bottlenecks"])
def test_the_csv_is_a_table_of_throughput_rows_that_estimates_the_same(name, thriftlm, tmp_path):
    first, second = tmp_path / "first.csv", tmp_path / "second.csv"
    thriftlm("estimate", "--space", name, "--stack", "eager", "--out", str(first))
    code, *_ = thriftlm("estimate", "--table", str(first), "--out", str(second))
    assert code == 0
    assert first.read_text() == second.read_text()
    rows = list(csv.DictReader(first.read_text().splitlines()))
    assert len(rows) == len(estimate_space(load_space(name), ["eager"]).runs)
    assert float(rows[0]["est_usd_per_btok"]) > 0


def test_threads_of_a_worker_are_paid():
    space = load_space("quickstart", ["space.system.cpus_per_worker=[1,16]"])
    estimated = estimate_space(space, ["thriftlm"])
    paid = [estimated.found[i].instance for i in range(len(estimated.runs))]
    assert paid == [prices.price(run.system).instance for run in estimated.runs]
    assert len(set(paid)) > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--space", "quickstart", "apple-1b"], "so MODEL must not"),
        (["--space", "quickstart", "--gpu", "H100"], "so --gpu must not"),
        (["--space", "quickstart", "--gpus", "1"], "so --gpus must not"),
        (["--space", "quickstart", "--best"], "so --best must not"),
        (["--space", "quickstart", "--table", "x.csv"], "so --table must not"),
        (["--space", "quickstar"], "did you mean 'quickstart'?"),
        (["--space", "tinyllama", "--stack", "eagr"], "stack: unknown 'eagr'; known: eager"),
        (["--space", "tinyllama", "--out", "no/where.csv"], "cannot write no/where.csv"),
        (["apple-1b", "--gpu", "H100", "--set", "a.b=1"], "--set and --figures go with --space"),
    ],
)
def test_bad_input_is_one_line(arguments, message, thriftlm):
    code, out, err = thriftlm("estimate", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_space_is_estimated_without_torch_ray_and_mlflow():
    code = (
        "import sys; from thriftlm.review import space_estimates as s;"
        "from thriftlm.search.spaces.space import load_space;"
        "s.estimate_space(load_space('apple_bottlenecks'), ['eager']).rows();"
        "print({'torch', 'ray', 'mlflow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
