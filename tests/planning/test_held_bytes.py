"""What each strategy really holds on CPU ranks is what the estimate says, within 1%."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from thriftlm.planning.estimate import estimate
from thriftlm.spec import SystemSpec
from thriftlm_models.config import ModelSpec

SCRIPT = Path(__file__).parent / "held_bytes.py"
MODEL = ModelSpec(n_layers=4, d_model=256, n_heads=4, vocab=2048)
STRATEGIES = ("ddp", "fsdp_full", "fsdp_grad_op", "hsdp", "zero1", "zero2", "zero3")


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def measured(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("held")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder), *STRATEGIES],
            env=os.environ
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(request.param)}
            | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(request.param)
    ]
    said = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * request.param, said
    return request.param, json.loads((folder / "held.json").read_text())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bytes_are_those_of_the_estimate(measured, strategy):
    n_ranks, found = measured
    node = n_ranks // 2 if strategy == "hsdp" else None
    system = SystemSpec(
        gpu="cpu", n_gpus=n_ranks, gpus_per_node=node, strategy=strategy, micro_batch=2
    )
    expected = estimate(MODEL, system, 32, 2 * 64 * n_ranks).memory_gb
    assert {"weights", "gradients", "optimizer"} <= set(found[strategy])
    for kind, n_bytes in found[strategy].items():
        assert n_bytes == pytest.approx(expected[kind] * 1e9, rel=0.01), kind
