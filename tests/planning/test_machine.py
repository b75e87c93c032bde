"""A laptop's own speed: measured once, kept, shared among its workers, used by every estimate."""

import json
import platform

import pytest

from thriftlm.planning.estimate import estimate
from thriftlm.planning.machine import Machine, measured_machine, remember
from thriftlm.spec import InputError, SystemSpec
from thriftlm_models.config import ModelSpec

MODEL = ModelSpec(n_layers=4, d_model=128, n_heads=4, vocab=2048)
MACHINE = Machine(
    host=platform.node(),
    cpus=8,
    bf16_tflops=1.6,
    fp32_tflops=0.8,
    memory_gb_per_s=80,
    memory_gb=32,
    measured_on="2026-11-24",
)


def on_cpu(machine=MACHINE, **system):
    return estimate(MODEL, SystemSpec(gpu="cpu", **system), 128, 8192, machine=machine)


def test_nothing_is_known_before_it_is_measured():
    found = on_cpu(machine=None)
    assert found.tokens_per_s_per_gpu is found.mfu is found.usd_per_btok is found.fits is None
    assert "thriftlm doctor" in found.reason


def test_a_worker_has_the_share_of_its_threads():
    one, four, all_of_them, too_many = (on_cpu(cpus_per_worker=n) for n in (1, 4, 8, 16))
    for found, threads in ((four, 4), (all_of_them, 8)):
        for part in ("matmul", "attention", "elementwise", "optimizer"):
            assert found.seconds[part] == pytest.approx(one.seconds[part] / threads)
        assert found.seconds["launch"] == one.seconds["launch"]
    assert too_many.tokens_per_s_per_gpu == all_of_them.tokens_per_s_per_gpu
    assert one.interval_class == "own_cpu"


def test_dollars_are_those_of_the_threads():
    one, four = (on_cpu(cpus_per_worker=n) for n in (1, 4))
    assert four.usd_per_btok == pytest.approx(one.usd_per_btok, rel=0.05)


def test_workers_share_the_memory():
    big = ModelSpec(n_layers=24, d_model=1024, n_heads=16, vocab=32_000)
    fits = [
        estimate(big, SystemSpec(n_gpus=n, strategy=s), 128, 8192, machine=MACHINE).fits
        for n, s in ((1, "single"), (8, "ddp"))
    ]
    assert fits == [True, False]


def test_bf16_uses_the_bf16_speed():
    fp32, bf16 = (on_cpu(precision=p) for p in ("fp32", "amp_bf16"))
    assert bf16.seconds["matmul"] == pytest.approx(fp32.seconds["matmul"] / 2)


def test_mfu_is_a_share_of_the_faster_arithmetic():
    """A CPU without bf16 arithmetic does that much more slowly than fp32."""
    without = MACHINE.model_copy(update={"bf16_tflops": MACHINE.fp32_tflops / 5})
    usual, found = (on_cpu(machine, precision="fp32") for machine in (MACHINE, without))
    assert found.tokens_per_s_per_gpu == usual.tokens_per_s_per_gpu
    assert found.mfu == pytest.approx(2 * usual.mfu)


def test_another_machine_that_shares_the_folder_is_not_this_one(tmp_path):
    assert measured_machine(tmp_path) is None
    remember(MACHINE, tmp_path / "new")
    assert measured_machine(tmp_path / "new") == MACHINE
    remember(MACHINE.model_copy(update={"host": "elsewhere"}), tmp_path)
    assert measured_machine(tmp_path) is None


def test_a_damaged_file_says_how_to_make_it_anew(tmp_path):
    (tmp_path / "machine.json").write_text('{"host": ')
    with pytest.raises(InputError, match="thriftlm doctor"):
        measured_machine(tmp_path)


def test_doctor_measures_and_estimate_uses_it(thriftlm):
    command = ("estimate", "mobilellm-125m", "--gpu", "cpu", "--json")
    (before,) = json.loads(thriftlm(*command)[1])
    assert before["tokens_per_s_per_gpu"] is None
    found = json.loads(thriftlm("doctor", "--json")[1])
    assert found["matmul_tflops_measured"]["fp32"] > 0
    (after,) = json.loads(thriftlm(*command)[1])
    assert 0 < after["mfu"] < 1
    assert after["low"] < after["tokens_per_s_per_gpu"] < after["high"]
