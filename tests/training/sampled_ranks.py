"""One of two ranks that sample the communication of a few steps: sampled_ranks.py FOLDER.

FOLDER/runs.json holds a run by strategy; each rank writes FOLDER/rank_RANK.json. A step is plain,
or late (the second rank sleeps before it), or slow (both ranks reduce a large tensor in it).
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from thriftlm.spec import RunSpec
from thriftlm.training import telemetry
from thriftlm.training.engine import build_engine
from thriftlm.training.ranks import Ranks

RANK = int(os.environ["RANK"])
SLEEP_SECONDS = 5.0
"""Ten times what a rank may be late by itself on a machine that two test processes share."""
STEPS = 4


def asleep() -> float:
    if RANK == 0:
        return 0.0
    begin = time.perf_counter()
    time.sleep(SLEEP_SECONDS)
    return time.perf_counter() - begin


def in_collective() -> float:
    large = torch.zeros(2**25)
    dist.barrier()
    begin = time.perf_counter()
    for _ in range(3):
        dist.all_reduce(large)
    return time.perf_counter() - begin


def sample(run: RunSpec, ranks: Ranks, before_step: Callable[[], float]) -> dict[str, Any]:
    """What the second of a few steps measured, with seconds that the script took itself."""
    telemetry.ASSUMED_SAMPLE_SECONDS = 0.0
    measured = telemetry.Telemetry(run, ranks, Path())
    engine = build_engine(run, ranks)
    batch = torch.zeros(run.system.micro_batch, run.data.seq_len + 1, dtype=torch.int64)
    due = [measured.is_sample_due]
    interval = telemetry.Interval(measured, STEPS)
    known = {}
    for number in range(1, STEPS + 1):
        begin = time.perf_counter()
        with interval.step(number):
            own = before_step()
            loss = engine.accumulate(batch, last=True)
            norm = engine.step(1e-3)
            wall = time.perf_counter() - begin
        interval.add(loss, norm)
        if number == 2:
            known = {"own_seconds": own, "wall": wall}
    interval.pause()
    reading = measured.reading(interval)
    assert interval.sample is not None
    return {
        "own": interval.sample.fraction,
        "mean": reading.communication_fraction,
        "steps": len(interval.losses),
        "timed": reading.timed_steps,
        "due": [*due, measured.is_sample_due],
        "asleep": known["own_seconds"],
        "collective": known["own_seconds"],
        "wall": known["wall"],
    }


def main(folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=RANK, world_size=2
    )
    ranks = Ranks(RANK, 2, torch.device("cpu"))
    found = {}
    for strategy, fields in json.loads((folder / "runs.json").read_text()).items():
        run = RunSpec.model_validate(fields)
        found[f"plain/{strategy}"] = sample(run, ranks, lambda: 0.0)
        found[f"late/{strategy}"] = sample(run, ranks, asleep)
        if strategy == "ddp":
            found[f"slow/{strategy}"] = sample(run, ranks, in_collective)
    (folder / f"rank_{RANK}.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)


main(Path(sys.argv[1]))
