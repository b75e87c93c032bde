"""Every strategy gives the losses of the single process, however a block is shared or recomputed.

CI trains each strategy once on two ranks against a golden file. The whole matrix (1, 2 and 4 ranks,
sharing, activation checkpointing; 20 steps in fp32 and fp64, 200 in fp32) is slow.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("parity_ranks.py")
GOLDEN = Path(__file__).with_name("golden_losses.json")
"""Training losses of the tiny run in one process, to be changed only where numerics are meant to
change; other instruction sets of the CPU move them by 5e-7."""
TOLERANCE, FP64_TOLERANCE = 1e-5, 1e-8
BF16_TOLERANCE = 0.01
"""bf16 keeps 8 bits, a relative error of 0.4% in each product; measured here: 0.002 nats."""
PURE_BF16_TOLERANCE = 0.05
"""Without fp32 masters an update below 0.4% of a weight is lost: ranks round it apart."""
STEPS, LONG = 20, 200
BATCH_TOKENS = 256

SHARDED = ("fsdp_full", "fsdp_grad_op", "hsdp", "zero1", "zero2", "zero3")
STRATEGIES = ("ddp", *SHARDED)
IN_FP64 = tuple(name for name in STRATEGIES if not name.startswith("zero"))
"""DeepSpeed keeps its masters in fp32."""
SHARINGS = ("none", "immediate")
RECOMPUTED = ("none", "full", "selective")
Losses = dict[str, list[float]]


BAD_STEP = 7
"""At which the last rank alone has a gradient that is not finite, where a test asks for it."""


def job(
    bench: Any,
    name: str,
    dtype: str = "float32",
    steps: int = STEPS,
    bad_step: int | None = None,
    order: int | None = None,
    **changes: Any,
) -> Any:
    run = bench.spec(tokens=steps * BATCH_TOKENS, **changes)
    fields = {"dtype": dtype, "bad_step": bad_step, "order": order}
    return fields | {"name": name, "run": run.model_dump(mode="json")}


def trained(bench: Any, folder: Path, jobs: list[Any], n_ranks: int) -> Losses:
    """Losses by name of the job, from so many processes."""
    folder.mkdir()
    (folder / "jobs.json").write_text(json.dumps({"cache": str(bench.cache), "jobs": jobs}))
    ranks = []
    for rank in range(n_ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n_ranks)}
        with (folder / f"log_{rank}").open("w") as log:
            command = [sys.executable, str(SCRIPT), str(folder)]
            ranks.append(subprocess.Popen(command, env=os.environ | place, stdout=log, stderr=log))
    try:
        codes = [process.wait(1800) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    said = "\n".join((folder / f"log_{rank}").read_text() for rank in range(n_ranks))
    assert codes == [0] * n_ranks, said
    found: Losses = json.loads((folder / "losses.json").read_text())
    return found


def on(n_ranks: int, strategy: str, **system: Any) -> dict[str, Any]:
    """A system of so many ranks; hsdp has nodes of half of them."""
    per_node = max(1, n_ranks // 2)
    fields = {"n_gpus": n_ranks, "gpus_per_node": per_node, "micro_batch": 4 // n_ranks}
    return fields | {"strategy": strategy} | system


def difference(found: list[float], expected: list[float]) -> float:
    assert len(found) == len(expected) > 0
    return max(abs(a - b) for a, b in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def alone(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Losses:
    """The single process: plain, recomputed, compiled, in bf16, with Muon."""
    muon = {"optimizer": "muon"}
    jobs = [
        job(bench, "none"),
        job(bench, "full", system={"act_ckpt": "full"}),
        job(bench, "selective", system={"act_ckpt": "selective"}),
        job(bench, "bf16_true", system={"precision": "bf16_true"}),
        job(bench, "muon", optim=muon),
        job(bench, "bad", bad_step=BAD_STEP),
    ]
    if shutil.which("g++"):
        jobs += [
            job(bench, f"compiled/{way}", system={"compile": True, "act_ckpt": way})
            for way in RECOMPUTED
        ]
    return trained(bench, tmp_path_factory.mktemp("alone") / "ranks", jobs, 1)


@pytest.fixture(scope="module")
def pair(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Losses:
    """Each strategy on two ranks, in its ways."""
    jobs = []
    for strategy in STRATEGIES:
        ways = {"none": {}, "selective": {"act_ckpt": "selective"}}
        ways["bf16_true"] = {"precision": "bf16_true"}
        if strategy in SHARDED:
            ways["offload"] = {"cpu_offload": True}
        jobs += [
            job(bench, f"{strategy}/{name}", system=on(2, strategy, **way))
            for name, way in ways.items()
        ]
        jobs.append(job(bench, f"{strategy}/bad", bad_step=BAD_STEP, system=on(2, strategy)))
        if strategy in IN_FP64:
            muon = {"optimizer": "muon"}
            jobs.append(job(bench, f"{strategy}/muon", optim=muon, system=on(2, strategy)))
    return trained(bench, tmp_path_factory.mktemp("pair") / "ranks", jobs, 2)


def test_golden_losses(alone):
    assert difference(alone["none"], json.loads(GOLDEN.read_text())) < TOLERANCE


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_give_the_golden_losses(strategy, pair):
    golden = json.loads(GOLDEN.read_text())
    assert difference(pair[f"{strategy}/none"], golden) < TOLERANCE
    assert difference(pair[f"{strategy}/selective"], golden) < TOLERANCE


@pytest.mark.parametrize("strategy", SHARDED)
def test_state_in_host_memory_changes_nothing(strategy, pair):
    assert pair[f"{strategy}/offload"] == pytest.approx(pair[f"{strategy}/none"], abs=TOLERANCE)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_gradient_that_is_not_finite_on_one_rank_changes_nothing_anywhere(strategy, pair, alone):
    found, expected = pair[f"{strategy}/bad"], alone["bad"]
    assert math.isnan(found[BAD_STEP])
    assert math.isnan(expected[BAD_STEP])
    assert difference(found[:BAD_STEP], expected[:BAD_STEP]) < TOLERANCE
    assert difference(found[BAD_STEP + 1 :], expected[BAD_STEP + 1 :]) < TOLERANCE
    assert difference(expected[BAD_STEP + 1 :], alone["none"][BAD_STEP + 1 :]) > 1e-3


@pytest.mark.parametrize("way", ["full", "selective"])
def test_recomputation_changes_no_bit(way, alone):
    assert alone[way] == alone["none"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("way", RECOMPUTED)
def test_compiled_blocks_give_the_golden_losses(way, alone):
    assert difference(alone[f"compiled/{way}"], alone["none"]) < TOLERANCE


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_pure_bf16_stays_near_fp32(strategy, pair, alone):
    assert difference(alone["bf16_true"], alone["none"]) < PURE_BF16_TOLERANCE
    found = difference(pair[f"{strategy}/bf16_true"], alone["none"])
    assert 1e-4 < found < PURE_BF16_TOLERANCE


@pytest.mark.parametrize("strategy", IN_FP64)
def test_muon_over_shards_is_that_of_whole_matrices(strategy, pair, alone):
    """It orthogonalises in bf16, whose sums depend on how a matrix is cut."""
    assert difference(alone["muon"], alone["none"]) > 0.05
    assert difference(pair[f"{strategy}/muon"], alone["muon"]) < BF16_TOLERANCE


# --- the whole matrix ---------------------------------------------------------------------------

MATRIX = tuple(product(SHARINGS, ("none", "selective")))
REGROUPED = ((1, None), (2, None), (8, None), *product((1, 2, 4), (1, 2, 3)))
"""Micro-batches of so many sequences, as they come or drawn anew at each step: ranks, too, take
other sequences together. Enough of them that their largest is no accident."""


def name(sharing: str, way: str, strategy: str = "single", dtype: str = "float32") -> str:
    return f"{strategy}/{sharing}/{way}/{dtype}"


def matrix(bench: Any, n_ranks: int, strategies: tuple[str, ...], dtype: str) -> list[Any]:
    steps = LONG if dtype == "float32" else STEPS
    return [
        job(
            bench,
            name(sharing, way, strategy, dtype),
            dtype,
            steps,
            model={"sharing": sharing},
            system=on(n_ranks, strategy, act_ckpt=way),
        )
        for strategy in strategies
        for sharing, way in MATRIX
    ]


@pytest.fixture(scope="module")
def single_matrix(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Losses:
    """The single process, and what regrouping its micro-batches makes of it."""
    jobs = matrix(bench, 1, ("single",), "float32") + matrix(bench, 1, ("single",), "float64")
    for sharing in SHARINGS:
        jobs += [
            job(
                bench,
                f"{sharing}/{size}/{order}",
                steps=LONG,
                order=order,
                model={"sharing": sharing},
                system={"micro_batch": size},
            )
            for size, order in REGROUPED
        ]
    return trained(bench, tmp_path_factory.mktemp("one") / "ranks", jobs, 1)


@pytest.fixture(scope="module", params=[2, 4])
def spread_matrix(
    bench: Any, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Losses:
    """The whole matrix on so many ranks."""
    jobs = matrix(bench, request.param, STRATEGIES, "float32")
    jobs += matrix(bench, request.param, IN_FP64, "float64")
    return trained(bench, tmp_path_factory.mktemp("many") / "ranks", jobs, request.param)


@pytest.mark.slow
@pytest.mark.parametrize(("sharing", "way"), MATRIX)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_matrix(strategy, sharing, way, spread_matrix, single_matrix):
    found = spread_matrix[name(sharing, way, strategy)]
    expected = single_matrix[name(sharing, way)]
    assert difference(found[:STEPS], expected[:STEPS]) < TOLERANCE
    regrouped = max(
        difference(single_matrix[f"{sharing}/{size}/{order}"][-STEPS:], expected[-STEPS:])
        for size, order in REGROUPED
    )
    assert regrouped > 0
    assert difference(found[-STEPS:], expected[-STEPS:]) <= 2 * regrouped


@pytest.mark.slow
@pytest.mark.parametrize(("sharing", "way"), MATRIX)
@pytest.mark.parametrize("strategy", IN_FP64)
def test_matrix_in_fp64(strategy, sharing, way, spread_matrix, single_matrix):
    found = spread_matrix[name(sharing, way, strategy, "float64")]
    assert difference(found, single_matrix[name(sharing, way, dtype="float64")]) < FP64_TOLERANCE


@pytest.fixture(scope="module")
def compiled_pair(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Losses:
    """Each strategy on two ranks with compiled blocks."""
    jobs = [
        job(
            bench,
            name(sharing, way, strategy),
            model={"sharing": sharing},
            system=on(2, strategy, act_ckpt=way, compile=True),
        )
        for strategy in STRATEGIES
        for sharing, way in MATRIX
    ]
    return trained(bench, tmp_path_factory.mktemp("compiled") / "ranks", jobs, 2)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(("sharing", "way"), MATRIX)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_compiled_blocks_over_ranks(strategy, sharing, way, compiled_pair, single_matrix):
    found = compiled_pair[name(sharing, way, strategy)]
    expected = single_matrix[name(sharing, "none", dtype="float64")]
    assert difference(found, expected) < TOLERANCE
