"""One run in the foreground, as `thriftlm train` shows it: progress, Ctrl-C, what it cost."""

import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from thriftlm import prices
from thriftlm.review.tables import plain_console
from thriftlm.review.wording import optional, usd
from thriftlm.search.history.storage import writable
from thriftlm.spec import Measurement, Progress, RunSpec
from thriftlm.training import checkpoint
from thriftlm.training.checkpoint_files import Location
from thriftlm.training.loop import Decision, OutOfMemoryOnOneRankError, Report, train


def train_alone(
    spec: RunSpec,
    *,
    cache: Path,
    output: Location,
    quiet: bool,
    branch_from: Location | None = None,
) -> dict[str, Any] | None:
    """What `thriftlm train --json` prints; None on every rank but the first.

    Goes on from the newest checkpoint in `output`, else begins at `branch_from`. `usd` is what this
    start cost, `usd_total` what all of them did.

    Raises:
        InputError: `output` cannot be written, or the system has no price; and what `train` raises.
    """
    begin = time.perf_counter()
    first = os.environ.get("RANK", "0") == "0"
    console = plain_console(sys.stderr if quiet else sys.stdout)
    console.quiet = not first
    if first and isinstance(output, Path):
        writable(output)
    usd_per_hour = prices.usd_per_hour(spec.system) if first else 0.0  # refused before it trains
    newest = checkpoint.latest(output) if first else None
    if newest is not None:
        console.print(f"going on from {newest}", soft_wrap=True, markup=False)
    elif branch_from is not None:
        console.print(f"branching from {branch_from}", soft_wrap=True, markup=False)
    with stoppable(spec, console) as report:
        try:
            measured = train(
                spec,
                report,
                cache=cache,
                output=output,
                go_on=True,
                branch_from=branch_from,
                usd_per_hour=usd_per_hour,
            )
        except OutOfMemoryOnOneRankError as error:
            if not first:
                raise SystemExit(f"error: {error}") from None  # torchrun then ends the others
            measured = error.measured
            report(measured.final, None)
    if not first:
        return None
    cost = usd_per_hour * (time.perf_counter() - begin) / 3600
    found = summary(measured, cost)
    if not quiet:
        for name, value in outcome(measured, cost):
            console.print(f"{name:<14} {value}", soft_wrap=True, markup=False)
    return found


def checkpoint_location(given: str | None) -> Location | None:
    """An option's folder as an absolute path, or its URL as it is."""
    return given if given is None or "://" in given else Path(given).resolve()


def branch(spec: RunSpec, trunk: Location | None) -> RunSpec:
    """The run, with the warm-up of its trunk when it has one.

    Raises:
        InputError: the trunk is no checkpoint, or a folder of several.
    """
    return spec if trunk is None else checkpoint.branch_of(spec, trunk)


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

    def report(progress: Progress, written: Location | None) -> Decision:
        console.print(line(progress, spec), soft_wrap=True, markup=False)
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
        f"train {optional(progress.train_loss, '.4f')}",
        f"val {optional(progress.val_loss, '.4f')}",
    ]
    if progress.tokens_per_s is not None:
        parts.append(f"{progress.tokens_per_s:,.0f} tok/s per worker")
    if progress.mfu is not None:
        parts.append(f"MFU {progress.mfu:.1%} ({progress.mfu_formula})")
    if progress.skipped_steps:
        parts.append(f"{progress.skipped_steps} skipped (gradients not finite)")
    if progress.loss_spikes:
        parts.append(f"{progress.loss_spikes} loss spike{'s' * (progress.loss_spikes > 1)}")
    if progress.status != "running":
        parts.append(f"{progress.status} {progress.detail}".strip())
    return "  ".join(parts)


def outcome(measured: Measurement, cost: float) -> Iterator[tuple[str, str]]:
    """The end of a run, line by line."""
    last = measured.final
    yield "status", f"{last.status} {last.detail}".strip()
    yield "tokens", f"{last.tokens:,}"
    yield "training loss", f"{optional(last.train_loss, '.4f')} nats/token"
    yield "validation", f"{optional(last.val_loss, '.4f')} nats/token"
    rate = middle(p.tokens_per_s for p in measured.curve)
    yield "speed", f"{optional(rate, ',.0f')} tok/s per worker"
    yield "data wait", share(middle(p.data_wait_fraction for p in measured.curve))
    communication = middle(p.communication_fraction for p in measured.curve)
    if communication is not None:
        yield "communication", share(communication)
    if (spikes := total(p.loss_spikes for p in measured.curve)) is not None:
        yield "loss spikes", str(spikes)
    if skipped := sum(p.skipped_steps for p in measured.curve):
        yield "skipped", f"{skipped} steps with gradients that are not finite"
    yield "peak memory", f"{optional(last.peak_mem_gb, '.2f')} GB"
    yield "cost", usd(cost)
    if measured.earlier_usd:
        yield "with earlier", f"{usd(measured.earlier_usd + cost)} over all starts"
    yield "checkpoint", measured.checkpoint or "none"
    for failure in measured.checkpoint_failures:
        yield "not written", failure
    if measured.trace is not None:
        yield "trace", measured.trace


def share(fraction: float | None) -> str:
    """A share of the step time."""
    return f"{optional(fraction, '.1%')} of the step time"


def total(values: Iterable[int | None]) -> int | None:
    """The sum of the values that were measured, None where none was."""
    measured = [value for value in values if value is not None]
    return sum(measured) if measured else None


def middle(values: Iterable[float | None]) -> float | None:
    """The median of the values that were measured, None where none was."""
    measured = [value for value in values if value is not None]
    return median(measured) if measured else None


def summary(measured: Measurement, cost: float) -> dict[str, Any]:
    """What `--json` prints of a run; `usd` is `cost`, of this start."""
    last, curve = measured.final, measured.curve
    return {
        "status": last.status,
        "tokens": last.tokens,
        "train_loss": last.train_loss,
        "val_loss": last.val_loss,
        "tokens_per_s": middle(p.tokens_per_s for p in curve),
        "mfu": middle(p.mfu for p in curve),
        "peak_mem_gb": last.peak_mem_gb,
        "grad_norm": last.grad_norm,
        "grad_norm_max": max((p.grad_norm_max for p in curve if p.grad_norm_max), default=None),
        "skipped_steps": sum(p.skipped_steps for p in curve),
        "loss_spikes": total(p.loss_spikes for p in curve),
        "data_wait_fraction": middle(p.data_wait_fraction for p in curve),
        "communication_fraction": middle(p.communication_fraction for p in curve),
        "usd": cost,
        "usd_total": measured.earlier_usd + cost,
        "checkpoint": measured.checkpoint,
        "checkpoint_failures": list(measured.checkpoint_failures),
        "trace": measured.trace,
    }
