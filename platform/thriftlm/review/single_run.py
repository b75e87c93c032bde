"""One run in the foreground, as `thriftlm train` shows it: progress, Ctrl-C, what it cost."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from thriftlm import catalog
from thriftlm.spec import Measurement, Progress, RunSpec
from thriftlm.training import checkpoint
from thriftlm.training.loop import Decision, Report, train


def train_alone(spec: RunSpec, *, cache: Path, output: Path, quiet: bool) -> dict[str, Any] | None:
    """What `thriftlm train --json` prints; None on every rank but the first.

    Goes on from the newest checkpoint in `output`. `usd` is what this process cost, from its start.
    """
    begin = time.perf_counter()
    first = os.environ.get("RANK", "0") == "0"
    console = Console(file=sys.stderr if quiet else sys.stdout, highlight=False, quiet=not first)
    resume_from = checkpoint.latest(output)
    if resume_from is not None:
        console.print(f"going on from {resume_from}", soft_wrap=True)
    with stoppable(spec, console) as report:
        measured = train(spec, report, cache=cache, output=output, resume_from=resume_from)
    if not first:
        return None
    usd = catalog.usd_per_hour(spec.system) * (time.perf_counter() - begin) / 3600
    found = summary(measured, usd)
    if not quiet:
        for name, value in found.items():
            console.print(f"{name:<14} {value}", soft_wrap=True)
    return found


@contextmanager
def stoppable(spec: RunSpec, console: Console) -> Iterator[Report]:
    """A report that prints, and says stop after a first Ctrl-C; a second one ends at once."""
    asked = False

    def on_signal(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        console.print("stopping at the next report; once more to stop now")

    def report(progress: Progress, written: Path | None) -> Decision:
        console.print(line(progress, spec), soft_wrap=True)
        return Decision.STOP if asked else Decision.CONTINUE

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield report
    finally:
        signal.signal(signal.SIGINT, before)


def line(progress: Progress, spec: RunSpec) -> str:
    """One report in a line."""
    parts = [
        f"step {progress.step:>6,}/{spec.steps:,}",
        f"{progress.tokens:>13,} tokens",
        f"train {number(progress.train_loss)}",
        f"val {number(progress.val_loss)}",
    ]
    if progress.tokens_per_s is not None:
        parts.append(f"{progress.tokens_per_s:,.0f} tok/s per worker")
    if progress.mfu is not None:
        parts.append(f"MFU {progress.mfu:.1%} ({progress.mfu_formula})")
    if progress.status != "running":
        parts.append(f"{progress.status} {progress.detail}".strip())
    return "  ".join(parts)


def number(value: float | None) -> str:
    """A loss, or a dash."""
    return "-" if value is None else f"{value:.4f}"


def summary(measured: Measurement, usd: float) -> dict[str, Any]:
    """The end of a run in a few numbers."""
    last = measured.final
    rates = sorted(p.tokens_per_s for p in measured.curve if p.tokens_per_s is not None)
    return {
        "status": last.status,
        "tokens": last.tokens,
        "train_loss": last.train_loss,
        "val_loss": last.val_loss,
        "tokens_per_s": rates[len(rates) // 2] if rates else None,
        "mfu": last.mfu,
        "peak_mem_gb": last.peak_mem_gb,
        "usd": usd,
        "checkpoint": measured.checkpoint,
    }
