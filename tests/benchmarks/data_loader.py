"""How fast one process reads batches, and whether its memory stays flat: data_loader.py [OUT.md].

Measured: tokens per second of `Batches` and `Prefetch` on this machine, from files in its page
cache, and private memory over 10,000 batches. Estimated: what an H200 trains at 125M.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from thriftlm.spec import DataSpec
from thriftlm.training.batches import Batches
from thriftlm.training.mixture import Mixture, build
from thriftlm.training.prefetch import Prefetch

SEQ_LEN, MICRO_BATCH, BATCH_SEQUENCES = 2048, 16, 256
BATCHES = 10_000
ROUNDS = 5
TARGET = 20
ESTIMATE = (
    "estimate", "mobilellm-125m", "--gpu", "H200-141GB", "--seq-len", "2048", "--micro-batch", "32",
    "--batch-tokens", "524288", "--precision", "amp_bf16", "--best", "--json",
)  # fmt: skip


def corpus(folder: Path, name: str, megabytes: int, seed: int) -> str:
    """JSONL of documents with log-normal lengths, a median of 600 words."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(5000)]
    path, written = folder / f"{name}.jsonl", 0
    with path.open("w") as file:
        while written < megabytes * 1_000_000:
            text = " ".join(rng.choices(words, k=max(5, int(rng.lognormvariate(6.4, 1.0)))))
            written += file.write(json.dumps({"text": text}) + "\n")
    return str(path)


def private_bytes() -> int:
    """Memory that is this process's own: mapped files do not count."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this kernel does not report RssAnon")


def batches(mixture: Mixture, packing: str) -> Batches:
    return Batches(
        mixture,
        seq_len=SEQ_LEN,
        batch_sequences=BATCH_SEQUENCES,
        micro_batch=MICRO_BATCH,
        rank=0,
        world_size=1,
        seed=0,
        packing=packing,
    )


def rate(at: Callable[[int], Iterator[Tensor]], first: int, steps: int = 20) -> float:
    """Tokens per second over some steps."""
    begin, tokens = time.perf_counter(), 0
    for step in range(first, first + steps):
        tokens += sum(batch[:, 1:].numel() for batch in at(step))
    return tokens / (time.perf_counter() - begin)


def measured(mixture: Mixture, packing: str) -> dict[str, float]:
    """Rates with and without the thread, and private memory over `BATCHES` micro-batches."""
    source = batches(mixture, packing)
    rate(source.at, 0)  # pages, orders
    plain = [rate(source.at, 20 * number) for number in range(ROUNDS)]
    ahead = Prefetch(source, 10**9, torch.device("cpu"))
    fetched = [rate(ahead.at, 20 * number) for number in range(ROUNDS)]
    ahead.close()
    in_step, seen = source.in_step, []
    for step in range(BATCHES // in_step):
        for _ in source.at(step):
            pass
        if step % 25 == 0:
            seen.append(private_bytes())
    warm = seen[len(seen) // 10]
    return {
        "plain": median(plain),
        "prefetch": median(fetched),
        "low": min(plain),
        "high": max(plain),
        "growth_mb": (max(seen[len(seen) // 10 :]) - warm) / 1e6,
        "epochs": BATCHES * MICRO_BATCH / sum(source.epoch_sequences),
    }


def estimated_h200() -> float:
    """Tokens per second that the estimator gives MobileLLM-125M on one H200."""
    done = subprocess.run(
        [sys.executable, "-m", "thriftlm", *ESTIMATE], capture_output=True, text=True, check=True
    )
    return float(json.loads(done.stdout)[0]["tokens_per_s_per_gpu"])


def main() -> None:
    """Measure, and print or write the page."""
    needed = TARGET * estimated_h200()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first, second = corpus(folder, "one", 20, 1), corpus(folder, "two", 5, 2)
        fields = {"tokenizer": "bpe:4096", "seq_len": SEQ_LEN}
        one = build(DataSpec(corpus=first, **fields), folder)
        both = build(
            DataSpec.model_validate({"corpus": {first: 0.7, second: 0.3}, **fields}), folder
        )
        cases = {
            "stream": measured(one, "stream"),
            "best_fit": measured(one, "best_fit"),
            "mixture 0.7 + 0.3, stream": measured(both, "stream"),
        }
    lines = [
        "# The loader",
        "",
        f"`tests/benchmarks/data_loader.py`, one process, sequences of {SEQ_LEN}, micro-batches of "
        f"{MICRO_BATCH}, median of {ROUNDS} rounds of 20 steps, files in the page cache of this "
        f"machine (two cores, other work may have run beside).",
        "",
        f"MobileLLM-125M on one H200: {needed / TARGET:,.0f} tokens/s, **estimated** (`thriftlm "
        f"{' '.join(ESTIMATE[:-1])}`). {TARGET} times that is {needed / 1e6:.1f}M tokens/s. The "
        "rates below are **measured**.",
        "",
        "| sequences | M tokens/s | lowest to highest | through the thread | times an H200 at 125M "
        f"| private memory over {BATCHES:,} batches | epochs in them |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {m['plain'] / 1e6:.0f} | {m['low'] / 1e6:.0f} to {m['high'] / 1e6:.0f} | "
        f"{m['prefetch'] / 1e6:.0f} | {m['plain'] / needed * TARGET:.0f} | "
        f"{m['growth_mb']:+.1f} MB | {m['epochs']:.0f} |"
        for name, m in cases.items()
    ]
    page = "\n".join(lines) + "\n"
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(page)
    print(page)


if __name__ == "__main__":
    main()
