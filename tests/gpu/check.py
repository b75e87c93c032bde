"""Everything that needs a GPU, on one of them, without Ray, in under 8 minutes: `make gpu-check`.

    PYTHONPATH=platform:models python -m tests.gpu.check [--gpu ID] [--out FOLDER]

Every attention kernel against fp64, every strategy in a group of one against the single process,
losses on the GPU against those on the CPU; then tokens/s, MFU and peak memory of published models
beside what `thriftlm estimate` expects. Writes gpu_check_ID.json and gpu_check_ID.md. Exits 0 when
all that was checked is right, 1 when something is wrong, 2 without CUDA. What did not fit into the
time or the memory is said.

With `--device cpu` the same code runs over tiny shapes, to prove that it runs.
"""

import argparse
import json
import math
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from tests.gpu import correctness, throughput
from thriftlm import catalog
from thriftlm.spec import InputError

SECONDS = 450.0
"""After which no further measurement begins; one takes up to 20 s."""
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--gpu", help="catalog id; default: the one that this GPU's name says")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "gpu-check needs a CUDA device and this machine has none; run it where nvidia-smi "
            "lists one, or prove on this machine that it runs: --device cpu --out FOLDER",
            file=sys.stderr,
        )
        return 2
    try:
        gpu = catalog.gpu(options.gpu or name_of(options.device)).id
    except InputError as error:
        print(f"error: {error}; say it with --gpu", file=sys.stderr)
        return 2
    begin = time.perf_counter()
    device = torch.device(options.device)
    found: dict[str, Any] = {
        "gpu": gpu,
        "device": name_of(options.device),
        "torch": torch.__version__,
        "date": str(datetime.now(UTC).date()),
        "checks": correctness.checks(device, gpu),
    }
    points = throughput.POINTS if options.device == "cuda" else throughput.TINY_POINTS
    deadline = begin + (SECONDS if options.device == "cuda" else math.inf)
    found["points"] = throughput.measured(points, device, gpu, deadline)
    found["seconds"] = round(time.perf_counter() - begin, 1)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"gpu_check_{gpu}.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.out / f"gpu_check_{gpu}.md").write_text(page(found))
    print(page(found))
    return 1 if any(check["status"] == "wrong" for check in found["checks"]) else 0


def name_of(device: str) -> str:
    return "cpu" if device == "cpu" else torch.cuda.get_device_name()


def page(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    checks, points = found["checks"], found["points"]
    wrong = [check for check in checks if check["status"] == "wrong"]
    late = [point for point in points if point["status"] == "no time left"]
    lines = [
        f"# {found['gpu']}",
        "",
        f"Measured {found['date']} on {found['device']}, torch {found['torch']}, by `make "
        f"gpu-check` in {found['seconds']:.0f} s. {len(wrong)} of {len(checks)} checks are wrong, "
        f"{sum(c['status'] == 'not run' for c in checks)} could not run; {len(late)} of "
        f"{len(points)} measurements found no time.",
        "",
        "## Checks",
        "",
        "Largest difference from the reference over the largest value of it (kernels), or in nats",
        "over 20 steps (losses).",
        "",
        *table(checks, ["check", "case", "status", "difference", "limit", "note"]),
        "",
        "## Throughput",
        "",
        "Medians of steps after warm-up, the range in brackets; `6N+attn`. Estimates are those of",
        "`thriftlm estimate` with our stack, with their 80% interval.",
        "",
        *table([told(point) for point in points], list(told(points[0])) if points else []),
        "",
    ]
    return "\n".join(lines)


def told(point: dict[str, Any]) -> dict[str, Any]:
    """A measurement as the columns of its row."""

    def range_of(middle: str, low: str, high: str) -> str | None:
        if point.get(middle) is None:
            return None
        return f"{point[middle]:,.0f} ({point[low]:,.0f} to {point[high]:,.0f})"

    def share(name: str) -> str | None:
        return None if point.get(name) is None else f"{point[name]:.1%}"

    return {
        "model": point["model"],
        "attention": point["attention"],
        "compile": "yes" if point["compile"] else "no",
        "micro batch": point.get("micro_batch"),
        "tokens/s": range_of("tokens_per_s", "slowest", "fastest") or point["status"],
        "estimated": range_of("est_tokens_per_s", "est_low", "est_high"),
        "MFU": share("mfu"),
        "est. MFU": share("est_mfu"),
        "GB": point.get("peak_mem_gb"),
        "est. GB": point.get("est_peak_mem_gb"),
    }


def table(rows: list[dict[str, Any]], columns: list[str]) -> list[str]:
    def text(value: Any) -> str:
        if value is None:
            return "-"
        return f"{value:.2g}" if isinstance(value, float) and value < 1 else str(value)

    head = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return head + ["| " + " | ".join(text(row.get(c)) for c in columns) + " |" for row in rows]


if __name__ == "__main__":
    sys.exit(main())
