"""One of two ranks that probe: probe_ranks.py FOLDER.

FOLDER/probe.json holds {"run", "systems", "hungry", "cache"}: the second rank's memory is limited
while it trains on the system number `hungry`. Each rank writes FOLDER/timings_RANK.json.
"""

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from thriftlm.spec import RunSpec, SystemSpec
from thriftlm.training import probe as probing

SPARE_BYTES = 20_000_000
RANK = int(os.environ["RANK"])


def main(folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=RANK, world_size=2
    )
    asked = json.loads((folder / "probe.json").read_text())
    systems = [SystemSpec.model_validate(one) for one in asked["systems"]]
    plain = probing.Run.measured

    def limited(run: Any, steps: int) -> Any:
        """The limit is on this process alone, so that the other waits for it in a collective."""
        if RANK == 0 or run.spec.system != systems[asked["hungry"]]:
            return plain(run, steps)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + SPARE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        try:
            return plain(run, steps)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)

    probing.Run.measured = limited
    found = probing.probe(
        RunSpec.model_validate(asked["run"]), systems, cache=Path(asked["cache"]), seconds=0.05
    )
    texts = [one.model_dump(mode="json") for one in found]
    (folder / f"timings_{RANK}.json").write_text(json.dumps(texts))
    dist.barrier()
    os._exit(0)


main(Path(sys.argv[1]))
