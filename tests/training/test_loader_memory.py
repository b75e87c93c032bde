"""What reading batches costs in memory: nothing that grows."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch

from thriftlm.spec import DataSpec
from thriftlm.training.batches import Batches
from thriftlm.training.mixture import build
from thriftlm.training.prefetch import Prefetch

BATCHES = 10_000


def private_bytes() -> int:
    """Memory that is this process's own: mapped files, which the system can drop, do not count."""
    (line,) = (
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("RssAnon:")
    )
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("packing", ["stream", "best_fit"])
def test_memory_stays_flat_over_ten_thousand_batches(packing: str, tmp_path: Path) -> None:
    rng = random.Random(0)
    for name in ("a", "b"):
        with (tmp_path / f"{name}.jsonl").open("w") as file:
            for _ in range(500):
                text = "".join(rng.choices("abcdefgh \n", k=rng.randrange(100, 3000)))
                file.write(json.dumps({"text": text}) + "\n")
    corpus = {str(tmp_path / "a.jsonl"): 0.7, str(tmp_path / "b.jsonl"): 0.3}
    data = DataSpec.model_validate({"corpus": corpus, "tokenizer": "bpe:300", "seq_len": 512})
    batches = Batches(
        build(data, tmp_path / "cache"),
        seq_len=512,
        batch_sequences=16,
        micro_batch=4,
        rank=0,
        world_size=1,
        seed=0,
        packing=packing,
    )
    steps = BATCHES // batches.in_step
    assert steps * 16 > 5 * sum(batches.epoch_sequences)  # several epochs
    ahead = Prefetch(batches, steps, torch.device("cpu"))
    seen = []
    for step in range(steps):
        for _ in ahead.at(step):
            pass
        seen.append(private_bytes())
    ahead.close()
    warm = seen[steps // 10]
    assert max(seen[steps // 10 :]) < warm + 4_000_000  # a batch has 16 kB, all of them 164 MB
