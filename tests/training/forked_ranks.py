"""Forks the ranks of runs from a process that has imported everything: starting costs no seconds.

A line on stdin is a job: {"run", "cache", "output", "ranks", "meeting", "log"}; the answer are the
ranks' process ids. The line after it asks for their exit statuses: until then none is waited for,
so that its process id stays its own. A run goes on from what lies in its output; its first rank
writes the measurement to OUTPUT.json at the end.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from thriftlm.spec import RunSpec
from thriftlm.training.loop import Decision, train


def run(job: dict[str, Any], rank: int) -> None:
    ranks = job["ranks"]
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    log = os.open(f"{job['log']}_{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if ranks > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{job['meeting']}", rank=rank, world_size=ranks
        )
    measured = train(
        RunSpec.model_validate(job["run"]),
        lambda progress, written: Decision.CONTINUE,
        cache=Path(job["cache"]),
        output=Path(job["output"]),
        go_on=True,
    )
    if rank == 0:
        Path(f"{job['output']}.json").write_text(measured.model_dump_json())


def main() -> None:
    for line in sys.stdin:
        job, pids = json.loads(line), []
        for rank in range(job["ranks"]):
            pid = os.fork()
            if pid == 0:
                try:
                    run(job, rank)
                    os._exit(0)
                except BaseException as error:
                    print(repr(error), file=sys.stderr, flush=True)
                    os._exit(1)
            pids.append(pid)
        print(json.dumps(pids), flush=True)
        sys.stdin.readline()
        print(json.dumps([os.waitpid(pid, 0)[1] for pid in pids]), flush=True)


main()
