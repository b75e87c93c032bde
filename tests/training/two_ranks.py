"""One of two ranks that do a list of jobs, each a call of `train`: two_ranks.py FOLDER.

Starting a process and importing DeepSpeed take seconds, so all jobs share one pair of processes.
FOLDER/jobs.json lists them, the first with DDP. The first rank writes FOLDER/results.json, name to
Measurement, and FOLDER/reductions.json; of the last job, where one rank runs out of memory, each
writes FOLDER/oom_RANK.json.
"""

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from thriftlm.spec import Measurement, Progress, RunSpec
from thriftlm.training.engine import build_engine
from thriftlm.training.loop import Decision, train
from thriftlm.training.ranks import Ranks

SPARE_BYTES = 50_000_000
RANK = int(os.environ["RANK"])


def run(job: dict[str, Any], folder: Path) -> Measurement:
    def report(progress: Progress, written: Path | None) -> Decision:
        # Only the second rank says so, since one answer of all is enough.
        return Decision.STOP if RANK == 1 and progress.step == job["stop_at"] else Decision.CONTINUE

    return train(
        RunSpec.model_validate(job["run"]),
        report,
        cache=Path(job["cache"]),
        output=folder / job["name"],
        resume_from=Path(job["resume_from"]) if job["resume_from"] else None,
    )


def run_out_of_memory(job: dict[str, Any], folder: Path) -> None:
    if RANK == 1:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + SPARE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        run(job, folder)
    except Exception as error:  # any: which one it is, is what the test asks
        found = {"type": type(error).__name__, "message": str(error)}
        (folder / f"oom_{RANK}.json").write_text(json.dumps(found))


def ddp_reductions(job: dict[str, Any]) -> list[int]:
    """Buckets that DDP has reduced after each of the two micro-batches of a step."""
    engine = build_engine(RunSpec.model_validate(job["run"]), Ranks(RANK, 2, torch.device("cpu")))
    reduced: list[int] = []

    def hook(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        reduced.append(bucket.index())
        return allreduce_hook(state, bucket)

    engine.module.register_comm_hook(None, hook)
    found = []
    for last in (False, True):
        engine.accumulate(torch.zeros(2, 33, dtype=torch.int64), last=last)
        found.append(len(reduced))
    return found


def main(folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=RANK, world_size=2
    )
    *jobs, last = json.loads((folder / "jobs.json").read_text())
    results = {job["name"]: run(job, folder).model_dump(mode="json") for job in jobs}
    reductions = ddp_reductions(jobs[0])
    if RANK == 0:
        (folder / "results.json").write_text(json.dumps(results))
        (folder / "reductions.json").write_text(json.dumps(reductions))
    run_out_of_memory(last, folder)
    os._exit(0)  # the group is broken, and would be waited for


main(Path(sys.argv[1]))
