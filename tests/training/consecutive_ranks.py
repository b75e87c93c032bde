"""Chains of runs, each chain on processes of its own: consecutive_ranks.py FOLDER.

Forks the ranks of a chain from a process that has imported everything, so that a new process costs
no seconds. FOLDER/chains.json: {"cache", "chains": [{"name", "ranks", "runs"}]}. The first rank
writes FOLDER/NAME.json: of each run its measurement, and what was left of it afterwards.
"""

import json
import os
import sys
import traceback
import weakref
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from thriftlm.spec import RunSpec
from thriftlm.training import loop
from thriftlm.training.consecutive import before_runs, between_runs


def go(chain: dict[str, Any], cache: Path, folder: Path, rank: int) -> None:
    ranks, name = chain["ranks"], chain["name"]
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    if ranks > 1:
        meeting = f"file://{folder / name}-meeting"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)
    models: list[Any] = []
    plain = loop.build_engine

    def watched(*given: Any) -> Any:
        engine = plain(*given)
        module = engine.module if hasattr(engine, "module") else engine.engine.module
        models.extend(weakref.ref(parameter) for parameter in module.parameters())
        return engine

    loop.build_engine = watched
    found = []
    for number, run in enumerate(chain["runs"]):
        measured = loop.train(
            RunSpec.model_validate(run),
            lambda progress, written: loop.Decision.CONTINUE,
            cache=cache,
            output=folder / f"{name}-{number}",
        )
        torch.rand(3)  # moves what the next run must not depend on
        between_runs()
        alive = sum(one() is not None for one in models)
        groups = len(dist.distributed_c10d._world.pg_map) if dist.is_initialized() else 0
        found.append(
            {"measured": measured.model_dump(mode="json"), "alive": alive, "groups": groups}
        )
    if rank == 0:
        (folder / f"{name}.json").write_text(json.dumps(found))
    os._exit(0)


def main(folder: Path) -> None:
    before_runs()
    # So that the forks have it; a gang imports it in its first run that needs it.
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

    import thriftlm.training.zero  # noqa: F401

    asked = json.loads((folder / "chains.json").read_text())
    for chain in asked["chains"]:
        pids = []
        for rank in range(chain["ranks"]):
            pid = os.fork()
            if pid == 0:
                try:
                    go(chain, Path(asked["cache"]), folder, rank)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
            pids.append(pid)
        assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * len(pids), chain["name"]


main(Path(sys.argv[1]))
