"""One of several ranks that train a list of runs step by step: parity_ranks.py FOLDER.

FOLDER/jobs.json lists them. The first rank writes FOLDER/losses.json: by name of the job, the mean
training loss of each step. A process alone needs no group.
"""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from thriftlm.spec import RunSpec
from thriftlm.training.batches import Batches
from thriftlm.training.engine import build_engine
from thriftlm.training.mixture import build
from thriftlm.training.ranks import Ranks
from thriftlm.training.schedule import learning_rate

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def losses(job: dict[str, Any], cache: Path) -> list[float]:
    """The mean loss of each step of a run, over all ranks."""
    spec = RunSpec.model_validate(job["run"])
    ranks = Ranks(RANK, WORLD, torch.device("cpu"))
    torch.set_default_dtype(getattr(torch, job["dtype"]))
    engine = build_engine(spec, ranks)
    batches = Batches(
        build(spec.data, cache),
        seq_len=spec.data.seq_len,
        batch_sequences=spec.optim.batch_tokens // spec.data.seq_len,
        micro_batch=spec.system.micro_batch,
        rank=RANK,
        world_size=WORLD,
        seed=spec.seed,
    )
    found = []
    plain = engine.loss
    for step in range(spec.steps):
        bad = step == job["bad_step"] and RANK == WORLD - 1
        engine.loss = (lambda batch: plain(batch) * float("nan")) if bad else plain
        micro = regrouped(list(batches.at(step)), job["order"], step)
        total = sum(
            float(engine.accumulate(batch, last=number == len(micro)))
            for number, batch in enumerate(micro, start=1)
        )
        norm = engine.step(learning_rate(spec.optim, step, spec.steps))
        assert math.isfinite(norm) == (step != job["bad_step"])
        found += ranks.mean(total / len(micro))
    torch.set_default_dtype(torch.float32)
    return found


def regrouped(micro: list[torch.Tensor], order: int | None, step: int) -> list[torch.Tensor]:
    """The sequences of a step in micro-batches as they come, or drawn anew by an order."""
    if order is None:
        return micro
    whole = torch.cat(micro)
    drawn = torch.Generator().manual_seed(1000 * order + step)
    return list(whole[torch.randperm(len(whole), generator=drawn)].split(len(micro[0])))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    if WORLD > 1:
        meeting = f"file://{folder / 'meeting'}"
        dist.init_process_group("gloo", init_method=meeting, rank=RANK, world_size=WORLD)
    asked = json.loads((folder / "jobs.json").read_text())
    found = {job["name"]: losses(job, Path(asked["cache"])) for job in asked["jobs"]}
    if RANK == 0:
        (folder / "losses.json").write_text(json.dumps(found))
    if WORLD > 1:
        dist.barrier()
    os._exit(0)  # engines are alive, and gloo's threads outlive what they serve


main(Path(sys.argv[1]))
