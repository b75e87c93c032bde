"""`thriftlm calibrate --refine` and `--search`: estimates learn from what one cluster measured."""

import csv
import json
import platform
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path

import pytest

from thriftlm.planning.constants import shipped
from thriftlm.planning.estimate import estimate_runs
from thriftlm.planning.machine import Machine, remember
from thriftlm.search.history.journal import Allocated, Event, Reported, SearchStarted, Suggested
from thriftlm.spec import Progress, RunSpec

MACHINE = Machine(
    host=platform.node(),
    cpus=4,
    bf16_tflops=0.4,
    fp32_tflops=0.2,
    memory_gb_per_s=40,
    memory_gb=16,
    measured_on="2026-11-24",
)
SLOWER = 0.7
"""Of the estimated speed that the search measured."""


def run_of(width: int, micro_batch: int) -> RunSpec:
    return RunSpec.model_validate(
        {
            "model": {"n_layers": 4, "d_model": width, "n_heads": 4, "vocab": 2048},
            "data": {"seq_len": 128, "tokenizer": "bpe:2048"},
            "optim": {"batch_tokens": 128 * micro_batch},
            "system": {"gpu": "cpu", "micro_batch": micro_batch},
            "tokens": 100_000,
        }
    )


def events(number: int, run: RunSpec) -> list[Event]:
    """What the journal of a running search holds of one trial."""
    speed = estimate_runs([run], MACHINE)[0].tokens_per_s_per_gpu
    assert speed is not None
    report = Progress(status="running", step=8, tokens=8192, tokens_per_s=SLOWER * speed)
    return [
        Suggested(trial_id=run.trial_id, number=number, point={}, run=run),
        Allocated(trial_id=run.trial_id, usd_per_hour=0.1, price="mine"),
        Reported(trial_id=run.trial_id, progress=report),
    ]


@pytest.fixture
def search(tmp_path: Path) -> str:
    """A running search, in the storage folder that the `thriftlm` fixture uses."""
    runs = [run_of(width, mb) for width in (128, 256, 512) for mb in (4, 16)]
    first = SearchStarted(search_id="probed", space={}, versions={}, unique_tokens={})
    lines = [first, *(event for i, run in enumerate(runs) for event in events(i, run))]
    folder = tmp_path / "storage" / "searches" / "probed"
    folder.mkdir(parents=True)
    text = "".join(event.model_dump_json() + "\n" for event in lines)
    (folder / "journal.jsonl").write_text(text)
    return "probed"


def estimated(thriftlm) -> dict:
    code, out, _ = thriftlm("estimate", "mobilellm-125m", "--gpu", "cpu", "--json")
    assert code == 0
    return json.loads(out)[0]


def test_a_search_teaches_the_estimates_that_come_after_it(thriftlm, search, tmp_path):
    remember(MACHINE, tmp_path / "storage")
    before = estimated(thriftlm)
    code, out, err = thriftlm("calibrate", "--search", search, "--keep", "--json")
    assert (code, err) == (0, "")
    accuracy = json.loads(out)["accuracy"]
    assert accuracy["before"][0]["median"] == pytest.approx(1 / SLOWER - 1, rel=1e-6)
    assert accuracy["after, in sample"][0]["median"] < 0.05
    after = estimated(thriftlm)
    ratio = after["tokens_per_s_per_gpu"] / before["tokens_per_s_per_gpu"]
    assert SLOWER < ratio < 0.8  # of another model, in bf16: most of the way
    assert "search probed" in json.loads(out)["calibration"]["source"]
    again = thriftlm("calibrate", "--search", search, "--keep", "--json")
    assert again == (code, out, err)  # the same probes count once


def test_a_search_on_a_machine_that_was_not_measured_says_what_to_do(thriftlm, search):
    code, _, err = thriftlm("calibrate", "--search", search)
    assert code == 2
    assert "thriftlm doctor" in err


def test_probes_of_a_cluster_move_the_shipped_constants(thriftlm, tmp_path):
    text = files("thriftlm").joinpath("data", "throughput.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    probes = tmp_path / "probes.csv"
    with probes.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows([row for row in rows if row["source"] == "Modalities"][:6])
    code, out, _ = thriftlm("calibrate", str(probes), "--refine", "--json")
    assert code == 0
    found = json.loads(out)["calibration"]
    assert found["source"].endswith("; probes.csv")
    assert found["constants"] != asdict(shipped().constants)
    assert found["constants"]["matmul_fraction_cpu"] == shipped().constants.matmul_fraction_cpu
    fresh = json.loads(thriftlm("calibrate", str(probes), "--json")[1])["calibration"]
    assert fresh["constants"]["older_attention"] == 0.65  # these rows alone leave the first guess


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "calibrate needs files of ROWS, or --search NAME"),
        (("rows.csv", "--search", "x"), "and not both"),
        (("rows.csv", "--keep", "--out", "x.json"), "--keep says where it is written"),
        (("--search", "nowhere"), "no search 'nowhere'"),
        (("rows.csv",), "cannot read rows.csv"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(thriftlm, arguments, message):
    code, _, err = thriftlm("calibrate", *arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_a_damaged_calibration_is_named(thriftlm, tmp_path):
    (tmp_path / "storage").mkdir()
    (tmp_path / "storage" / "calibration.json").write_text('{"constants": {"speed": 1}}')
    code, _, err = thriftlm("estimate", "mobilellm-125m", "--gpu", "H100")
    assert code == 2
    assert "calibration.json: not a calibration of this version" in err
