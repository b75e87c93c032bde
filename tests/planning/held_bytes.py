"""One of several ranks that say what they hold of each strategy: held_bytes.py FOLDER STRATEGY...

After one step on the CPU, FOLDER/held.json gets bytes by strategy and kind, of rank 0.
"""

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from thriftlm.spec import RunSpec
from thriftlm.training.engine import build_engine
from thriftlm.training.ranks import Ranks

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
MODEL = {"n_layers": 4, "d_model": 256, "n_heads": 4, "vocab": 2048}


def run_of(strategy: str, n_ranks: int) -> RunSpec:
    system = {"gpu": "cpu", "n_gpus": n_ranks, "strategy": strategy, "micro_batch": 2}
    if strategy == "hsdp":
        system["gpus_per_node"] = n_ranks // 2
    return RunSpec.model_validate(
        {
            "model": MODEL,
            "optim": {"batch_tokens": 2 * 64 * n_ranks},
            "data": {"seq_len": 32, "tokenizer": "bpe:2048"},
            "system": system,
            "tokens": 512 * n_ranks,
        }
    )


def held(tensors: Iterable[Any]) -> int:
    """Bytes of the storages behind tensors, each counted once; of a sharded one, the shard here."""
    locals_ = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in locals_)}
    return sum(storages.values())


def gradients(strategy: str, optimizer: Any, parameters: list[Any]) -> list[Tensor]:
    """DeepSpeed keeps those of stages 2 and 3 in partitions of its own.

    In stage 2 one that straddles two ranks is a view of a whole matrix: copied, it holds its part.
    """
    if strategy == "zero3":
        return [optimizer.grad_partitions_flat_buffer]
    if strategy == "zero2":
        return [part.clone() for group in optimizer.averaged_gradients.values() for part in group]
    return [p.grad for p in parameters]


def one(strategy: str) -> dict[str, int]:
    engine: Any = build_engine(run_of(strategy, WORLD), Ranks(RANK, WORLD, torch.device("cpu")))
    batch = torch.randint(0, MODEL["vocab"], (2, 33))
    engine.accumulate(batch, last=False)
    zero = strategy.startswith("zero")
    parameters = list((engine.engine if zero else engine.module).parameters())
    shards = [p.ds_tensor for p in parameters] if strategy == "zero3" else parameters
    outer = engine.optimizer if zero else engine.optimizers[0]
    found = {"weights": held(shards)}
    if strategy != "zero2":  # whose partition is complete after the last micro-batch
        found["gradients"] = held(gradients(strategy, outer, parameters))
    engine.accumulate(batch, last=True)
    if strategy == "zero2":
        found["gradients"] = held(gradients(strategy, outer, parameters))
    engine.step(1e-3)
    state = getattr(outer, "optimizer", outer).state.values()
    moments = (v for s in state for v in s.values() if isinstance(v, Tensor) and v.numel() > 1)
    found["optimizer"] = held(moments)
    names = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
    found["masters"] = sum(held(getattr(outer, name, ())) for name in names)
    return found


def main(folder: Path, strategies: list[str]) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=RANK, world_size=WORLD)
    found = {strategy: one(strategy) for strategy in strategies}
    if RANK == 0:
        (folder / "held.json").write_text(json.dumps(found))
    dist.barrier()
    # Leaving with six engines alive aborts now and then: gloo's threads outlive what they serve.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
