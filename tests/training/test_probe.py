"""Many systems timed in one allocation."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from thriftlm.spec import InputError, SystemSpec
from thriftlm.timings import Timing
from thriftlm.training import consecutive
from thriftlm.training.loop import Decision
from thriftlm.training.probe import probe

SCRIPT = Path(__file__).with_name("probe_ranks.py")


def systems(*changes: dict[str, Any], **common: Any) -> list[SystemSpec]:
    return [SystemSpec(**(common | one)) for one in changes]


def test_every_system_is_a_result_of_its_own(bench):
    """One that runs, ones that cannot, and ones that run after them."""
    found = probe(
        bench.spec(),
        systems(
            {"micro_batch": 8},
            {"attention": "fa3"},
            {"micro_batch": 3},
            {"micro_batch": 4, "strategy": "fsdp_full", "cpu_offload": True},
            {"micro_batch": 2, "act_ckpt": "full"},
        ),
        cache=bench.cache,
        seconds=0.05,
    )
    assert [one.status for one in found] == [
        *("timed", "unsupported", "unsupported", "timed", "timed")
    ]
    assert "fa3" in found[1].detail
    assert "divide" in found[2].detail
    for one in (found[0], *found[3:]):
        assert one.repeats == 3
        assert 0 < one.low <= one.tokens_per_s <= one.high
        assert one.peak_mem_gb > 0.05
        assert one.seconds > 3 * one.steps * 256 / one.high


def test_it_measures_what_a_trial_reports(bench, tmp_path):
    """The same quantity; the bound is wide because other work shares the machine."""
    spec = bench.spec(model={"d_model": 128, "n_layers": 4}, report_every_tokens=20 * 256)
    trained = bench.train(spec, tmp_path / "run").final.tokens_per_s
    timed = probe(spec, [spec.system], cache=bench.cache, seconds=0.3)[0].tokens_per_s
    assert 1 / 3 < timed / trained < 3


def test_out_of_memory_is_a_result(bench):
    """A tensor larger than any machine's memory: torch's allocator refuses it."""
    huge = bench.spec(model={"d_model": 8 * 2**16, "n_heads": 4, "n_kv_heads": 4, "d_ff": 2**22})
    found = probe(huge, systems({"micro_batch": 4}), cache=bench.cache)
    assert found[0].status == "oom"
    assert "out of memory on rank 0" in found[0].detail


def test_a_report_can_end_it(bench):
    def stop(timing: Timing) -> Decision:
        return Decision.STOP

    two = systems({"micro_batch": 4}, {"micro_batch": 8})
    assert len(probe(bench.spec(), two, stop, cache=bench.cache, seconds=0.01)) == 1


def test_systems_of_different_workers_are_refused(bench):
    with pytest.raises(InputError, match="one gpu, n_gpus and cpus_per_worker"):
        probe(bench.spec(), systems({}, {"cpus_per_worker": 2}), cache=bench.cache)


def test_peak_memory_is_that_of_the_last_run_alone():
    from thriftlm.training.loop import peak_memory_gb

    cpu = consecutive.torch.device("cpu")
    held = consecutive.torch.ones(100_000_000)
    high = peak_memory_gb(cpu)
    del held
    consecutive.between_runs()
    assert peak_memory_gb(cpu) < high - 0.3


def test_a_rank_that_runs_out_of_memory_ends_one_system_on_all_ranks(bench, tmp_path):
    names = ("fsdp_full", "ddp", "hsdp")
    each = [{"strategy": name} for name in names]
    run = bench.spec(
        model={"d_model": 512, "d_ff": 2048},
        system={"strategy": "ddp", "n_gpus": 2, "micro_batch": 2},
    )
    asked = {
        "run": run.model_dump(mode="json"),
        "systems": [
            one.model_dump(mode="json")
            for one in systems(*each, n_gpus=2, micro_batch=2, gpus_per_node=1)
        ],
        "hungry": 0,
        "cache": str(bench.cache),
    }
    (tmp_path / "probe.json").write_text(json.dumps(asked))
    ranks = []
    for rank in range(2):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        with (tmp_path / f"log_{rank}").open("w") as log:
            command = [sys.executable, str(SCRIPT), str(tmp_path)]
            ranks.append(subprocess.Popen(command, env=os.environ | place, stdout=log, stderr=log))
    try:
        codes = [process.wait(300) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    said = "\n".join((tmp_path / f"log_{rank}").read_text() for rank in range(2))
    assert codes == [0, 0], said
    first, second = (json.loads((tmp_path / f"timings_{rank}.json").read_text()) for rank in (0, 1))
    assert [one["status"] for one in first] == ["oom", "timed", "timed"]
    assert "rank 1" in first[0]["detail"]
    assert [one["tokens_per_s"] for one in first] == [one["tokens_per_s"] for one in second]
