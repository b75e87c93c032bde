"""What a person sees while a search runs: a live table on a terminal, plain lines elsewhere.

A listener of the journal that keeps its own replay of it; losses here are raw, the ranking by
predicted loss comes with the answer.
"""

import sys
import time
from typing import TextIO

from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from thriftlm.review.tables import Column, fitted, plain_console
from thriftlm.review.wording import (
    counted,
    describe,
    duration,
    optional,
    seeded,
    shortened,
    usd,
    why_ended,
)
from thriftlm.search.history.journal import (
    Allocated,
    Ended,
    Event,
    Known,
    Probed,
    Reported,
    SearchEnded,
    SearchResumed,
    SearchStarted,
    StopRequested,
)
from thriftlm.search.history.state import SearchState, TrialState
from thriftlm.search.spaces.space import Space
from thriftlm.timings import Timing

SHOWN_TRIALS = 16
COLUMNS = (
    Column("trial", dispensable=1),
    Column("status"),
    Column("what", shorten=shortened, least=24),
    Column("tokens", is_number=True, dispensable=3),
    Column("loss", is_number=True),
    Column("tok/s", is_number=True, dispensable=2),
    Column("USD", is_number=True),
)


class LiveView:
    """Shows a search on `stream`; use as a context manager around it."""

    def __init__(self, space: Space, stream: TextIO | None = None) -> None:
        self.space = space
        self.state = SearchState()
        self.console = plain_console(stream or sys.stderr)
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
            self.console.print(line, soft_wrap=True, markup=False)

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
            case Known(source=source, runs=runs):
                return f"search knows {len(runs)} runs of {source}"
            case Allocated(trial_id=trial_id):
                return f"{trial_id} start    {what(self.state.trials[trial_id])}"
            case Reported(trial_id=trial_id):
                return f"{trial_id} report   {measured(self.state.trials[trial_id])}"
            case Probed(trial_id=trial_id, timing=timing):
                return f"{trial_id} timed    {timed(timing)}"
            case StopRequested(trial_id=trial_id, reason=reason):
                return f"{trial_id} stop     {reason}"
            case Ended(trial_id=trial_id, status=status, reason=reason):
                cost = usd(self.state.trials[trial_id].usd(event.at))
                return f"{trial_id} {status:<8} {cost}{f' ({reason})' if reason else ''}"
            case SearchEnded(status=status, reason=reason):
                return f"search {status}: {reason}"
        return None

    def render(self) -> RenderableType:
        """The table and the line below it."""
        now = time.time()
        trials = sorted(self.own_trials(), key=lambda t: (t.has_ended, -t.number))
        rows = [cells(trial, now) for trial in trials[:SHOWN_TRIALS]]
        hidden = len(trials) - SHOWN_TRIALS
        more = [Text(f"... and {hidden} more that ended", style="dim")] if hidden > 0 else []
        table = fitted(COLUMNS, rows, self.console.width)
        return Group(table, *more, Text(self.summary(now), style="bold"))

    def own_trials(self) -> list[TrialState]:
        """Trials of this search, without those that others have run."""
        return [trial for trial in self.state.trials.values() if not trial.is_only_known]

    def summary(self, now: float) -> str:
        """Best so far, money and time left."""
        trials, budget = self.own_trials(), self.space.search_budget
        losses = [trial.loss for trial in trials if trial.loss is not None]
        spent = self.state.spent_usd(now)
        parts = [f"lowest loss {min(losses):.4f}" if losses else "no loss yet"]
        if budget.trials is not None:
            ended = sum(trial.has_ended for trial in trials)
            parts.append(f"{ended}/{budget.trials} trials")
        parts.append(f"{usd(spent)} spent")
        if budget.usd is not None:
            parts.append(f"{usd(max(0.0, budget.usd - spent))} left")
        if (left := self.seconds_left(now)) is not None:
            parts.append(f"{duration(left)} to go")
        return ", ".join(parts)

    def seconds_left(self, now: float) -> float | None:
        """Wall-clock seconds to the last trial at the pace so far; None before one has ended."""
        ended = sum(trial.has_ended for trial in self.own_trials())
        trials = self.space.search_budget.trials
        if not ended or trials is None:
            return None
        return (trials - ended) * self.state.hours(now) * 3600 / ended


def what(trial: TrialState) -> str:
    """What sets the trial apart."""
    point = seeded(trial.point, trial.run.seed, trial.repeat_of)
    return describe(point, trial.run.system.strategy, trial.run.system.n_gpus)


def measured(trial: TrialState) -> str:
    """Tokens, loss and speed of a trial so far."""
    loss = optional(trial.loss, ".4f")
    return (
        f"{trial.tokens:>12,} tokens  loss {loss}  {optional(trial.tokens_per_s(), ',.0f')} tok/s"
    )


def timed(timing: Timing) -> str:
    """A system that a probe has timed, and how fast it is."""
    one = timing.system
    named = f"{one.strategy} micro batch {one.micro_batch} {one.attention}"
    if timing.total_tokens_per_s is None:
        return f"{named}  {timing.status} {timing.detail}".rstrip()
    return f"{named}  {timing.total_tokens_per_s:,.0f} tok/s"


def progress(trial: TrialState) -> str:
    """Where a trial stands, and shortly why it ended or will end."""
    if trial.status is not None:
        return why_ended(trial.status, trial.reason)
    if not trial.is_running:
        return "waiting"
    if trial.stop_reason is None:
        return "running"
    return why_ended("stopped", trial.stop_reason).replace("stopped", "stopping")


def cells(trial: TrialState, now: float) -> list[str]:
    """A trial's row."""
    return [
        trial.trial_id,
        progress(trial),
        what(trial),
        f"{counted(trial.tokens)} {trial.tokens / trial.run.tokens:.0%}",
        optional(trial.loss, ".4f"),
        optional(trial.tokens_per_s(), ",.0f"),
        usd(trial.usd(now)),
    ]
