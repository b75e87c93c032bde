"""What reports say beside loss: spikes, norms, waits, communication, and the trace."""

import gzip
import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch._C._autograd import DeviceType

from thriftlm.training.profiling import exposed_ns, sorted_out
from thriftlm.training.ranks import Ranks
from thriftlm.training.telemetry import SPIKE_HISTORY, Interval, Spikes, Telemetry

ALONE = Ranks(0, 1, torch.device("cpu"))
BATCH_TOKENS = 256


def curve(measured: Any, field: str) -> list[Any]:
    return [getattr(report, field) for report in measured.curve]


def noisy(level: float, count: int, seed: int = 0) -> list[float]:
    rng = random.Random(seed)
    return [rng.gauss(level, 0.1) for _ in range(count)]


class TestSpikes:
    def test_losses_far_above_the_level_are_counted_and_noise_is_not(self) -> None:
        spikes = Spikes()
        assert spikes.count(noisy(3.0, 200)) == 0
        assert spikes.count([3.0, 4.5, 3.1, 4.5, 3.0]) == 2
        assert spikes.count(noisy(3.0, 50, seed=1)) == 0

    def test_a_fall_is_none_and_a_spike_in_it_is_one(self) -> None:
        falling = [10 * 0.99**step + noise for step, noise in enumerate(noisy(0.0, 300))]
        assert Spikes().count(falling) == 0
        falling[150] += 2.0
        assert Spikes().count(falling) == 1

    def test_small_rises_of_losses_that_do_not_vary_are_none(self) -> None:
        spikes = Spikes()
        spikes.count([1.0] * 50)
        assert spikes.count([1.04]) == 0
        assert spikes.count([1.06]) == 1

    def test_what_is_not_finite_is_one_and_moves_no_level(self) -> None:
        spikes = Spikes()
        spikes.count(noisy(3.0, 50))
        assert spikes.count([math.nan, math.inf, 3.0]) == 2
        assert spikes.count([3.0, 4.5]) == 1

    def test_a_run_that_stays_above_is_the_new_level_in_the_end(self) -> None:
        spikes = Spikes()
        spikes.count(noisy(3.0, 100))
        assert spikes.count(noisy(5.0, 200)) > 20
        assert spikes.count(noisy(5.0, 50, seed=1)) == 0

    def test_nothing_is_said_before_there_is_a_level(self) -> None:
        spikes = Spikes()
        assert spikes.count([3.0] * SPIKE_HISTORY) is None
        assert spikes.count([3.0]) == 0


def test_norms_cover_the_steps_since_the_last_report(bench, tmp_path):
    each = bench.train(bench.spec(), tmp_path / "each")
    fives = bench.train(bench.spec(report_every_tokens=5 * BATCH_TOKENS), tmp_path / "fives")
    norms = curve(each, "grad_norm")
    groups = [norms[first : first + 5] for first in range(0, 20, 5)]
    assert curve(each, "grad_norm_max") == curve(each, "grad_norm_median") == norms
    assert curve(fives, "grad_norm_max") == [max(group) for group in groups]
    assert curve(fives, "grad_norm_median") == [median(group) for group in groups]


def test_what_was_not_measured_is_absent(bench, tmp_path):
    """One process has no communication, its first step no time, a short run no level of spikes."""
    measured = bench.train(bench.spec(), tmp_path)
    assert set(curve(measured, "communication_fraction")) == {None}
    assert set(curve(measured, "loss_spikes")) == {None}
    assert set(curve(measured, "trace")) == {None}
    assert measured.trace is None
    first, *others = curve(measured, "data_wait_fraction")
    assert first is None
    assert all(0 < share < 1 for share in others)


def slow(batches: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    for batch in batches:
        time.sleep(0.02)
        yield batch


def test_waiting_for_data_is_counted_and_work_is_not(bench, tmp_path):
    telemetry = Telemetry(bench.spec(), ALONE, tmp_path)
    interval = Interval(telemetry, 3)
    for number in range(1, 4):
        with interval.step(number):
            for _ in interval.waiting_for(slow([torch.zeros(1)] * 2)):
                time.sleep(0.01)
        interval.add(torch.tensor(2.0), 1.0)
    interval.pause()
    assert interval.steps == 2  # the first of a process is not timed
    assert interval.seconds >= interval.waited + 2 * 2 * 0.01
    assert interval.waited >= 2 * 2 * 0.02
    reading = telemetry.reading(interval)
    assert reading.data_wait_fraction == interval.waited / interval.seconds
    assert reading.train_loss == 1.0  # two micro-batches a step


class TestExposed:
    def test_time_that_computation_covers_is_hidden(self) -> None:
        assert exposed_ns([(0, 10)], []) == 10
        assert exposed_ns([(0, 10)], [(4, 6)]) == 8
        assert exposed_ns([(0, 10)], [(0, 10)]) == 0
        assert exposed_ns([(0, 10)], [(5, 20)]) == 5
        assert exposed_ns([], [(5, 20)]) == 0

    def test_collectives_that_run_at_once_count_once(self) -> None:
        assert exposed_ns([(0, 10), (2, 8), (5, 15)], []) == 15
        assert exposed_ns([(0, 10), (5, 15)], [(8, 12), (9, 11), (20, 30)]) == 11

    def test_it_is_what_counting_every_nanosecond_gives(self) -> None:
        rng = random.Random(0)
        for _ in range(200):
            spans = [
                [(begin, begin + rng.randrange(20)) for begin in rng.choices(range(80), k=5)]
                for _ in range(2)
            ]
            running, computing = ({n for a, b in group for n in range(a, b)} for group in spans)
            assert exposed_ns(*spans) == len(running - computing)


@dataclass
class CudaEvent:
    """What kineto says of an event of a GPU, of which this machine has none."""

    kind: str
    label: str
    span: tuple[int, int]

    def name(self) -> str:
        return self.label

    def activity_type(self) -> str:
        return self.kind

    def device_type(self) -> DeviceType:
        return DeviceType.CUDA

    def start_ns(self) -> int:
        return self.span[0]

    def end_ns(self) -> int:
        return self.span[1]


def test_kernels_of_nccl_are_told_from_others_and_from_labels():
    events = [
        CudaEvent("kernel", "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgs)", (0, 10)),
        CudaEvent("kernel", "ampere_bf16_s16816gemm_bf16_128x128", (2, 6)),
        CudaEvent("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", (6, 7)),
        CudaEvent("gpu_user_annotation", "nccl:all_reduce", (0, 50)),
        CudaEvent("gpu_user_annotation", "Optimizer.step#AdamW.step", (0, 50)),
    ]
    collectives, computation = sorted_out(events)
    assert (collectives, computation) == ([(0, 10)], [(2, 6), (6, 7)])


STRATEGIES = ("ddp", "fsdp_full", "zero2")


@pytest.fixture(scope="module")
def sampled(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks measured; see sampled_ranks.py."""
    folder = tmp_path_factory.mktemp("sampled")
    runs = {
        strategy: bench.spec(
            system={"strategy": strategy, "n_gpus": 2}, optim={"batch_tokens": 256}
        ).model_dump(mode="json")
        for strategy in STRATEGIES
    }
    (folder / "runs.json").write_text(json.dumps(runs))
    command = [sys.executable, str(Path(__file__).with_name("sampled_ranks.py")), str(folder)]
    ranks = [
        subprocess.Popen(
            command,
            env=os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(said)
    assert said == ["", ""]  # the profiler prints by default
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_communication_is_found_under_every_kind_of_strategy(strategy, sampled):
    for rank in sampled:
        found = rank[f"plain/{strategy}"]
        assert 0 < found["own"] < 1
        assert found["mean"] == pytest.approx(
            (sampled[0][f"plain/{strategy}"]["own"] + sampled[1][f"plain/{strategy}"]["own"]) / 2
        )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_late_rank_is_communication_of_the_others_and_not_its_own(strategy, sampled):
    punctual, late = (rank[f"late/{strategy}"] for rank in sampled)
    asleep = late["asleep"] / late["wall"]
    assert asleep > 0.3
    assert punctual["own"] >= 0.9 * asleep
    assert late["own"] <= 1 - 0.9 * asleep


def test_a_slow_collective_is_communication_of_all(sampled):
    for rank in sampled:
        found = rank["slow/ddp"]
        plain = rank["plain/ddp"]
        assert found["own"] >= 0.9 * found["collective"] / found["wall"]
        assert found["own"] * found["wall"] > plain["own"] * plain["wall"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_sampled_step_is_not_timed_and_the_next_sample_must_be_earned(strategy, sampled):
    for rank in sampled:
        found = rank[f"plain/{strategy}"]
        assert found["steps"] == 4
        assert found["timed"] == 2  # neither the first of the process nor the sampled one
        assert found["due"] == [True, False]


def trace_of(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return events


def test_trace_holds_the_steps_asked_for_and_changes_nothing(bench, tmp_path):
    plain = bench.train(bench.spec(), tmp_path / "plain")
    run = bench.spec(profile_steps=[5, 7])
    assert run.trial_id == bench.spec().trial_id
    traced = bench.train(run, tmp_path / "traced")
    path = tmp_path / "traced" / "trace_5_7.json.gz"
    named = [event.get("name", "") for event in trace_of(path)]
    assert named.count("Optimizer.step#AdamW.step") == 3
    assert any(name == "aten::mm" for name in named)
    assert traced.trace == str(path)
    assert [p.step for p in traced.curve if p.trace is not None] == [7]
    assert curve(traced, "train_loss") == curve(plain, "train_loss")
    assert [p.step for p in traced.curve if p.tokens_per_s is None] == [1, 5, 6, 7]


def test_run_that_ends_within_its_trace_leaves_the_profiler_free(bench, tmp_path):
    run = bench.spec(profile_steps=[2, 9])
    first = bench.train(run, tmp_path, stop_at=3)
    assert first.trace is None
    assert not list(tmp_path.glob("trace*"))
    second = bench.train(run, tmp_path, resume_from=Path(first.checkpoint))
    named = [event.get("name", "") for event in trace_of(Path(second.trace))]
    assert named.count("Optimizer.step#AdamW.step") == 6  # from 4 to 9


def test_trace_that_cannot_be_written_does_not_end_the_run(bench, tmp_path):
    (tmp_path / "trace_2_2.json.gz").mkdir()
    with pytest.warns(UserWarning, match=r"trace_2_2\.json\.gz was not written"):
        measured = bench.train(bench.spec(profile_steps=[2, 2]), tmp_path)
    assert (measured.status, measured.trace) == ("done", None)


@pytest.mark.parametrize("steps", [[3, 2], [20, 21]])
def test_steps_to_record_that_are_none_of_the_run_are_refused(steps, bench):
    with pytest.raises(ValidationError, match="profile_steps must be the first and the last"):
        bench.spec(profile_steps=steps)
