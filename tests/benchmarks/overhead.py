"""What telemetry, data and checkpoints cost: shares of the time of a bare step, on this CPU.

    .venv/bin/python tests/benchmarks/overhead.py [SHAPE ...]

One process trains one model, and kinds of steps take turns: bare (forward, backward, update on
batches already in memory), the same with telemetry and a report, the same with batches read from
the shards, and the loop's own `train_step` with all of it. So a slow minute of the machine is
everybody's. What disturbs a step only ever makes it slower, so that a share is the lower quartile
of the step's times over that of the bare one's, less one; in brackets the middle 90% of a
bootstrap.

A checkpoint is charged with all that it adds: the seconds of `Run.save`, and what the steps after
it take longer while the rest is written; one in `CHECKPOINT_SECONDS` of training.

Prints a table and writes it to results/overhead_cpu.md.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from thriftlm.spec import Progress, RunSpec
from thriftlm.training.loop import Decision, Run
from thriftlm.training.ranks import joined
from thriftlm.training.telemetry import Interval
from thriftlm_models.counts import stored_params

MEASURING_SECONDS = 180.0
CHECKPOINTS = 6
CHECKPOINT_SECONDS = 300.0
AFTER_SECONDS = 4.0
"""Training after a save that is charged with what it takes longer."""
TARGET = 0.02
LR = 1e-4
THREADS = os.cpu_count() or 1
RESULTS = Path(__file__).parent / "results" / "overhead_cpu.md"
KINDS = {
    "bare": "bare step",
    "telemetry": "telemetry, a report every step",
    "data": "data",
    "loop": "the loop's step: telemetry and data",
}
SHAPES: dict[str, tuple[dict[str, Any], int, int]] = {
    "10m": ({"n_layers": 10, "d_model": 256, "n_heads": 8, "d_ff": 704, "vocab": 4096}, 8, 256),
    "125m": ({"preset": "mobilellm-125m"}, 2, 512),
}
"""Model, sequences and tokens per sequence by name."""


def run_of(shape: str) -> RunSpec:
    model, sequences, seq_len = SHAPES[shape]
    return RunSpec.model_validate(
        {
            "model": model,
            "data": {"seq_len": seq_len},
            "optim": {"batch_tokens": sequences * seq_len, "schedule": "constant", "lr": LR},
            "system": {
                "micro_batch": sequences,
                "precision": "amp_bf16",
                "cpus_per_worker": THREADS,
            },
            "tokens": 10**9,
        }
    )


class Steps:
    """The kinds of steps over one run."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.kept = list(run.batches.at(0))
        run.step = 1

    def bare(self) -> None:
        self._work(self.kept)

    def data(self) -> None:
        self._work(self.run.batches.at(self.run.step))
        self.run.step += 1

    def telemetry(self) -> None:
        interval = Interval(self.run.telemetry, 1)
        with interval.step(1):
            found = self._work(interval.waiting_for(self.kept))
        self._report(interval, found)

    def loop(self) -> None:
        interval = Interval(self.run.telemetry, 1)
        with interval.step(self.run.step + 1):
            found = self.run.train_step(interval)
        self._report(interval, found)

    def _work(self, batches: Iterable[torch.Tensor]) -> tuple[torch.Tensor, Any]:
        total = torch.zeros(())
        for batch in batches:
            total += self.run.engine.accumulate(batch, last=True)
        return total, self.run.engine.step(LR)

    def _report(self, interval: Interval, found: tuple[torch.Tensor, Any]) -> None:
        interval.add(*found)
        interval.pause()
        self.run.telemetry.reading(interval)


def seconds_of(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def step_seconds(steps: Steps) -> dict[str, list[float]]:
    """Seconds of each step by kind; the order turns, so that nobody always follows the same."""
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    order = list(KINDS)
    until = time.perf_counter() + MEASURING_SECONDS
    while time.perf_counter() < until:
        for kind in order:
            found[kind].append(seconds_of(getattr(steps, kind)))
        order = [*order[1:], order[0]]
    return found


def share(seconds: list[float], bare: list[float]) -> tuple[float, float, float]:
    """What a kind of step takes more than the bare one, with a low and a high estimate."""
    rng = np.random.default_rng(0)
    pairs = np.array([seconds, bare])
    drawn = pairs[:, rng.integers(0, len(bare), (1000, len(bare)))]
    quartiles = np.quantile(drawn, 0.25, axis=2)
    low, high = np.quantile(quartiles[0] / quartiles[1] - 1, [0.05, 0.95])
    middle = np.quantile(pairs, 0.25, axis=1)
    return float(middle[0] / middle[1] - 1), float(low), float(high)


def checkpoint_seconds(steps: Steps, per_step: float) -> list[float]:
    """What each of a few checkpoints adds to the training that follows it, sorted."""
    after = max(1, round(AFTER_SECONDS / per_step))

    def train() -> None:
        for _ in range(after):
            steps.bare()

    found = []
    for _ in range(CHECKPOINTS):
        plain = seconds_of(train)
        steps.run.step += 1  # a name of its own
        found.append(seconds_of(steps.run.save) + seconds_of(train) - plain)
    return sorted(found)


def measured(shape: str, folder: Path) -> list[str]:
    """The rows of one shape."""
    spec = run_of(shape)

    def report(progress: Progress, written: Path | None) -> Decision:
        return Decision.CONTINUE

    with joined(spec.system) as ranks:
        run = Run(spec, report, ranks, folder / shape)
        run.set_up(folder / "shards")
        steps = Steps(run)
        for kind in KINDS:
            getattr(steps, kind)()
        taken = step_seconds(steps)
        bare = taken["bare"]
        saves = checkpoint_seconds(steps, float(np.median(bare)))
        run.writer.wait()
        run.close()
    name = f"{stored_params(spec.model) / 1e6:.0f}M"
    rows = [f"| {name} | {KINDS['bare']}, {len(bare)} of each | {np.quantile(bare, 0.25):.3f} s |"]
    for kind in list(KINDS)[1:]:
        middle, low, high = share(taken[kind], bare)
        rows.append(f"| {name} | {KINDS[kind]} | {middle:+.2%} ({low:+.2%} to {high:+.2%}) |")
    charged = float(np.median(saves)) / CHECKPOINT_SECONDS
    together = middle + charged
    spread = f"{np.median(saves):.2f} s ({saves[0]:.2f} to {saves[-1]:.2f})"
    return [
        *rows,
        f"| {name} | a checkpoint adds {spread} | {charged:+.2%} |",
        f"| {name} | **together** | **{together:+.2%}** |",
    ]


def main(shapes: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for shape in shapes for row in measured(shape, Path(folder))]
    text = "\n".join(
        [
            f"Measured {datetime.now(UTC).date()} on {THREADS} CPU cores, torch "
            f"{torch.__version__}; one checkpoint in {CHECKPOINT_SECONDS:g} s of training. "
            f"Together they should stay below {TARGET:.0%}.",
            "",
            "| parameters | what | share of a bare step's time |",
            "|---|---|---|",
            *rows,
        ]
    )
    print(text)
    RESULTS.write_text(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1:] or list(SHAPES))
