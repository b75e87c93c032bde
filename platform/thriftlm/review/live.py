"""What a person sees while a search runs: a live table on a terminal, plain lines elsewhere.

A listener of the journal that keeps its own replay of it; losses here are raw, the ranking by
predicted loss comes with the answer.
"""

import sys
import time
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from thriftlm.search.journal import (
    Allocated,
    Ended,
    Event,
    Reported,
    SearchEnded,
    SearchResumed,
    SearchStarted,
    StopRequested,
)
from thriftlm.search.space import Space
from thriftlm.search.state import SearchState, TrialState

SHOWN_TRIALS = 16


class LiveView:
    """Shows a search on `stream`; use as a context manager around it."""

    def __init__(self, space: Space, stream: TextIO = sys.stderr) -> None:
        self.space = space
        self.state = SearchState()
        self.console = Console(file=stream, highlight=False)
        self.live: Live | None = None
        self.staged = ""

    def __enter__(self) -> "LiveView":
        return self

    def __exit__(self, *exc: object) -> None:
        if self.live is not None:
            self.live.stop()

    def stage(self, name: str, fraction: float) -> None:
        """Say what is being waited for before the first trial."""
        if self.console.is_terminal:
            self.console.print(f"{name} {fraction:.0%}   ", end="\r", style="dim")
        elif name != self.staged:
            self.console.print(name)
        self.staged = name

    def replay(self, events: list[Event]) -> None:
        """Take what an earlier driver journaled into account, without showing it."""
        for event in events:
            self.state.apply(event)

    def __call__(self, event: Event) -> None:
        """Take one event into account and show it."""
        self.state.apply(event)
        if self.console.is_terminal:
            self._show_table()
        elif (line := self.line(event)) is not None:
            self.console.print(line, soft_wrap=True)

    def _show_table(self) -> None:
        if self.live is None:
            self.live = Live(
                console=self.console,
                get_renderable=self.render,
                refresh_per_second=2,
                transient=True,
            )
            self.live.start()

    def line(self, event: Event) -> str | None:
        """One plain line for an event, None for those that need none."""
        match event:
            case SearchStarted() | SearchResumed():
                verb = "started" if isinstance(event, SearchStarted) else "resumed"
                return f"search {verb}: {self.space.name}"
            case Allocated(trial_id=trial_id):
                return f"{trial_id} start   {describe(self.state.trials[trial_id])}"
            case Reported(trial_id=trial_id):
                return f"{trial_id} {self.measured(self.state.trials[trial_id])}"
            case StopRequested(trial_id=trial_id, reason=reason):
                return f"{trial_id} stop    {reason}"
            case Ended(trial_id=trial_id, status=status, reason=reason):
                trial = self.state.trials[trial_id]
                said = f" ({reason})" if reason else ""
                return f"{trial_id} {status:<7} {usd(trial.usd(event.at))}{said}"
            case SearchEnded(status=status, reason=reason):
                return f"search {status}: {reason}"
        return None

    def measured(self, trial: TrialState) -> str:
        """Tokens, loss and speed of a trial so far."""
        loss = f"{trial.loss:.4f}" if trial.loss is not None else "-"
        rate = trial.tokens_per_s()
        speed = f"{rate:,.0f} tok/s" if rate is not None else "-"
        return f"report  {trial.tokens:>10,} tokens  loss {loss}  {speed}"

    def render(self) -> RenderableType:
        """The table and the line below it."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name, side in COLUMNS.items():
            table.add_column(name, justify=side)  # type: ignore[arg-type]
        trials = sorted(self.state.trials.values(), key=lambda t: (t.has_ended, -t.number))
        for trial in trials[:SHOWN_TRIALS]:
            table.add_row(*self.cells(trial))
        hidden = len(trials) - SHOWN_TRIALS
        more = [Text(f"... and {hidden} more that ended", style="dim")] if hidden > 0 else []
        return Group(table, *more, Text(self.summary(), style="bold"))

    def cells(self, trial: TrialState) -> list[str]:
        """A trial's row."""
        status = trial.status or ("running" if trial.is_running else "waiting")
        rate = trial.tokens_per_s()
        share = trial.tokens / trial.run.tokens
        return [
            trial.trial_id,
            "stopping" if status == "running" and trial.stop_reason else status,
            describe(trial),
            f"{trial.tokens:,} ({share:.0%})",
            f"{trial.loss:.4f}" if trial.loss is not None else "-",
            f"{rate:,.0f}" if rate is not None else "-",
            usd(trial.usd(time.time())),
        ]

    def summary(self) -> str:
        """Best so far, money and time left."""
        now = time.time()
        ended = [t for t in self.state.trials.values() if t.has_ended]
        losses = [t.loss for t in self.state.trials.values() if t.loss is not None]
        best = f"lowest loss so far {min(losses):.4f}" if losses else "no loss yet"
        budget = self.space.search_budget
        parts = [best, f"{usd(self.state.spent_usd(now))} spent"]
        if budget.usd is not None:
            parts.append(f"{usd(max(0.0, budget.usd - self.state.spent_usd(now)))} left")
        if budget.trials is not None:
            parts.append(f"{len(ended)}/{budget.trials} trials")
        if (left := self.seconds_left(now)) is not None:
            parts.append(f"about {minutes(left)} to go")
        return "  ".join(parts)

    def seconds_left(self, now: float) -> float | None:
        """Wall-clock seconds to the last trial at the pace so far; None before one has ended."""
        ended = sum(trial.has_ended for trial in self.state.trials.values())
        trials = self.space.search_budget.trials
        if not ended or trials is None:
            return None
        return (trials - ended) * self.state.hours(now) * 3600 / ended


COLUMNS = {
    "trial": "left",
    "status": "left",
    "what": "left",
    "tokens": "right",
    "loss": "right",
    "tok/s": "right",
    "USD": "right",
}


def describe(trial: TrialState) -> str:
    """The varied fields of a trial in short: `n_layers=4 lr=0.003 ddp x2`."""
    system = trial.run.system
    said = {k: v for k, v in trial.point.items() if k not in SYSTEM_FIELDS}
    fields = " ".join(f"{path.rpartition('.')[2]}={short(value)}" for path, value in said.items())
    return f"{fields} {system.strategy} x{system.n_gpus}".strip()


SYSTEM_FIELDS = ("system.strategy", "system.n_gpus")


def short(value: object) -> str:
    """A value in a few characters."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def usd(amount: float) -> str:
    """Dollars with three significant digits at least, never in scientific notation."""
    digits = 2 if amount >= 1 or amount == 0 else 6
    return f"${amount:.{digits}f}"


def minutes(seconds: float) -> str:
    """A span in minutes and seconds."""
    return f"{int(seconds) // 60}m{int(seconds) % 60:02d}s"
