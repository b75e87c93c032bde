"""Published throughput is reached within what the issue asks, and no answer leaks into it."""

import csv
import subprocess
import sys
import time
from dataclasses import fields, replace
from importlib.resources import files

import numpy as np
import pytest

from thriftlm.planning import calibration as calibrating
from thriftlm.planning.calibration import (
    accuracy,
    calibrate,
    leave_one_out,
    measured_tokens_per_s,
    own,
    published,
    read_rows,
    refined,
    tokens_per_s,
    utilisation_per_architecture,
)
from thriftlm.planning.constants import Constants, from_json, shipped, to_json
from thriftlm.planning.estimate import estimate_table
from thriftlm.planning.systems import from_table

ANSWERS = ("tokens_per_s_per_gpu", "tflops_per_gpu", "mfu", "peak_mem_gb", "oom")


@pytest.fixture(scope="module")
def every_row():
    return read_rows()


@pytest.fixture(scope="module")
def table(every_row):
    return published(every_row)


@pytest.fixture(scope="module")
def left_out(table):
    return leave_one_out(table, "source")


def test_shipped_constants_are_what_the_shipped_rows_give(every_row):
    again = calibrate(every_row)
    for field in fields(Constants):
        fitted, stored = (
            getattr(again.constants, field.name),
            getattr(shipped().constants, field.name),
        )
        assert fitted == pytest.approx(stored, rel=2e-3), field.name
    assert again.identified_by == shipped().identified_by
    assert again.log_sd == pytest.approx(shipped().log_sd, rel=2e-3)


def test_there_are_at_most_a_dozen_constants_each_with_error_and_rows():
    names = {field.name for field in fields(Constants)}
    assert len(names) <= 12
    assert names == set(shipped().relative_sd) == set(shipped().identified_by)
    assert from_json(to_json(shipped())) == shipped()


def test_in_sample_error(table):
    systems = from_table(table)
    log_error = np.log(
        tokens_per_s(systems, shipped().constants) / measured_tokens_per_s(table, systems)
    )
    found = accuracy(log_error)
    assert found.n_rows == 191
    assert found.median < 0.05
    assert found.p90 < 0.15


def test_error_with_one_source_left_out_and_the_baselines(table, left_out):
    found, rival = (
        accuracy(left_out),
        accuracy(leave_one_out(table, "source", utilisation_per_architecture)),
    )
    assert found.n_rows == rival.n_rows == 191
    assert found.median < 0.09
    assert found.p90 < 0.22
    assert found.median < 0.6 * rival.median
    assert found.p90 < 0.6 * rival.p90


def test_interval_covers_what_it_says_on_sources_left_out(left_out):
    half = 1.2816 * shipped().log_sd["new_source"]
    assert 0.7 < (np.abs(left_out) < half).mean() < 0.92  # 80% interval, 191 rows


def test_estimates_never_read_an_answer_column(table):
    rng = np.random.default_rng(0)
    shuffled = dict(table)
    for name in ANSWERS:
        shuffled[name] = list(rng.permutation(table[name]))
        assert shuffled[name] != table[name]
    blind = {name: cells for name, cells in table.items() if name not in ANSWERS}
    told, mixed, without = map(estimate_table, (table, shuffled, blind))
    for name in ("tokens_per_s_per_gpu", "mfu", "peak_mem_gb", "fits", "usd_per_btok", "low"):
        np.testing.assert_array_equal(getattr(told, name), getattr(mixed, name))
        np.testing.assert_array_equal(getattr(told, name), getattr(without, name))


def test_the_answer_columns_do_reach_the_fit(table):
    slower = table | {
        "tokens_per_s_per_gpu": [
            str(float(x) / 2) if x else x for x in table["tokens_per_s_per_gpu"]
        ],
        "mfu": ["" for _ in table["mfu"]],
    }
    systems = from_table(slower)
    constants, _ = calibrating.fit_constants(systems, measured_tokens_per_s(slower, systems))
    assert constants.matmul_fraction_ampere < 0.7 * shipped().constants.matmul_fraction_ampere


@pytest.mark.parametrize("source", ["llm-foundry", "Modalities"])
def test_probes_of_a_new_cluster_bring_the_error_down(table, source):
    systems, sources = from_table(table), np.array(table["source"])
    measured = measured_tokens_per_s(table, systems)
    own = np.flatnonzero(sources == source)
    constants, _ = calibrating.fit_constants(
        systems.take(sources != source), measured[sources != source]
    )
    stranger = replace(shipped(), constants=constants)
    rng = np.random.default_rng(0)
    before, after = [], []
    for _ in range(8):
        probed = rng.choice(own, 5, replace=False)
        rest = np.setdiff1d(own, probed)
        known = refined(stranger, systems.take(probed), measured[probed], "probes")
        for found, errors in ((stranger, before), (known, after)):
            speed = tokens_per_s(systems.take(rest), found.constants)
            errors.extend(np.abs(speed / measured[rest] - 1))
    assert np.median(after) < 0.9 * np.median(before)  # 5 of 7.7%, 8 of 9.9%


def test_our_core_on_a_cpu_with_one_model_left_out(every_row):
    # Seven shapes, fp32 and bf16, both kernels, one process and two under every strategy.
    found = accuracy(leave_one_out(own(every_row), "model"))
    assert found.n_rows == 20
    assert found.median < 0.09
    assert found.p90 < 0.22


def test_rows_of_cpus_say_nothing_of_gpus(every_row, table):
    systems = from_table(table)
    alone, _ = calibrating.fit_constants(systems, measured_tokens_per_s(table, systems))
    for field in fields(Constants):
        if field.name not in calibrating.CPU_NAMES:
            assert getattr(shipped().constants, field.name) == pytest.approx(
                getattr(alone, field.name), rel=2e-3
            )


def test_a_worker_on_a_cpu_holds_what_was_measured(every_row):
    rows = own(every_row)
    ratio = estimate_table(rows).peak_mem_gb / np.array(rows["peak_mem_gb"], dtype=float)
    assert np.median(np.abs(ratio - 1)) < 0.10
    assert ratio.min() > 0.85
    assert ratio.max() < 1.15


def test_intervals_narrow_to_what_the_probes_leave_open(every_row):
    rows = own(every_row)
    systems = from_table(rows)
    measured = measured_tokens_per_s(rows, systems)
    exact = tokens_per_s(systems, replace(shipped().constants, matmul_fraction_cpu=0.7))
    sure = refined(shipped(), systems, exact, "probes")
    assert sure.constants.matmul_fraction_cpu == pytest.approx(0.7, rel=0.01)
    assert sure.log_sd["own_cpu"] == calibrating.ROW_SD  # no narrower than repeated rows
    assert sure.log_sd["new_source"] == shipped().log_sd["new_source"]
    few = refined(shipped(), systems.take(range(3)), measured[:3], "probes")
    assert few.log_sd == shipped().log_sd


def test_refining_needs_a_measurement(table):
    systems = from_table(table)
    with pytest.raises(ValueError, match="got none"):
        refined(shipped(), systems, np.full(len(systems), np.nan), "probes")


def test_row_order_and_repetition_change_nothing(table):
    order = np.random.default_rng(1).permutation(len(table["gpu"]))
    turned = estimate_table({name: [cells[i] for i in order] for name, cells in table.items()})
    np.testing.assert_allclose(
        turned.tokens_per_s_per_gpu, estimate_table(table).tokens_per_s_per_gpu[order], rtol=1e-12
    )


def test_peak_memory_of_published_rows(table):
    measured = np.array([float(x or "nan") for x in table["peak_mem_gb"]])
    error = np.abs(estimate_table(table).peak_mem_gb / measured - 1)
    assert np.isfinite(measured).sum() == 11
    assert np.nanmedian(error) < 0.10


def test_what_ran_fits(table):
    # Two of 191 do not: one by 0.4 GB of 86, and one whose micro batch its source does not tell.
    found = estimate_table(table)
    assert (found.fits == 1).sum() >= 189


def test_bulk_speed(table):
    many = {name: cells * 600 for name, cells in table.items()}
    estimate_table(many)
    rates = []
    for _ in range(3):
        start = time.process_time()
        estimate_table(many)
        rates.append(len(many["gpu"]) / (time.process_time() - start))
    assert max(rates) >= 100_000


def test_shipped_rows_are_whole_and_have_sources():
    text = files("thriftlm").joinpath("data", "throughput.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    assert len(rows) == 191
    assert all(row["source"] and row["gpu"] for row in rows)


def test_planning_is_light_enough_for_a_cold_start():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, thriftlm.planning.estimate; print('scipy' in sys.modules)",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"  # scipy alone takes a third of a second
