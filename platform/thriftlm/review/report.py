"""The answer of a search in the terminal: the winner, the Pareto set, the cost, what to do next."""

import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from thriftlm.review.session import Sitting
from thriftlm.review.sureness import sentences
from thriftlm.review.tables import Column, fitted
from thriftlm.review.wording import (
    describe,
    duration,
    limits,
    optional,
    seeded,
    shortened,
    usd,
    why_ended,
)
from thriftlm.search.answers.result import Best, SearchResult, TrialRow
from thriftlm.search.spaces.space import Space

COLUMNS = (
    Column(""),
    Column("trial"),
    Column("status", dispensable=1),
    Column("what", shorten=shortened, least=34),
    Column("tokens", is_number=True, dispensable=3),
    Column("loss", is_number=True, dispensable=2),
    Column("at budget", is_number=True),
    Column("tok/s", is_number=True, dispensable=4),
    Column("USD", is_number=True),
)
NOTES = (
    "* Pareto set: no other trial has both a lower loss and cheaper tokens",
    "at budget: predicted loss when the training budget is spent",
    "best first by a pessimistic prediction: what is uncertain counts against a trial",
)
BROKEN = ("failed", "oom", "diverged")
"""Statuses whose reason is worth a line of its own."""


def show(result: SearchResult, sitting: Sitting, console: Console) -> None:
    """Print the answer."""
    console.print(f"\n[bold]{result.search_id}[/] {result.status}: {escape(result.reason)}")
    cap = "" if result.budget_usd is None else f" of {usd(result.budget_usd)}"
    spent = f"{usd(result.spent_usd)}{cap} in {duration(result.hours * 3600)}"
    ends = Counter(why_ended(row.status, row.reason) for row in result.trials)
    counts = ", ".join(f"{number} {end}" for end, number in ends.items())
    console.print(f"{len(result.trials)} trials ({counts}), spent {spent}", soft_wrap=True)
    if result.best is None:
        console.print("\nno trial gave a loss that can be scored")
        for sentence in result.learned:
            console.print(f"  - {sentence}", soft_wrap=True, markup=False)
    else:
        show_best(result.best, sitting.space, console)
        for sentence in sentences(result):
            console.print(f"  - {sentence}", soft_wrap=True, markup=False)
    show_trials(result, console)
    console.print()
    for label, command in next_commands(result, sitting):
        console.print(f"[dim]{label:<18}[/] {escape(command)}", soft_wrap=True)


def show_best(best: Best, space: Space, console: Console) -> None:
    """Print the winner."""
    known = "" if best.source is None else f" (known from {escape(best.source)}, not run again)"
    console.print(f"\n[bold green]best: {best.trial_id}[/]{known}", soft_wrap=True)
    for name, value in best_lines(best, space):
        console.print(f"  {name:<8} {value}", soft_wrap=True, markup=False)


def best_lines(best: Best, space: Space) -> Iterator[tuple[str, str]]:
    """The winner, aspect by aspect."""
    model, optim, system = (best.config[name] for name in ("model", "optim", "system"))
    shared = f", sharing {model['sharing']} x{model['repeats']}" if model["repeats"] > 1 else ""
    yield (
        "model",
        f"{model['n_layers']} layers{shared}, width {model['d_model']}, {model['n_heads']} heads, "
        f"d_ff {model['d_ff']}, vocab {model['vocab']}",
    )
    later = "".join(f", {lr:.3g} from {tokens:,} tokens on" for tokens, lr in optim["lr_changes"])
    yield "optim", f"lr {optim['lr']:.3g}{later}, batch {optim['batch_tokens']:,} tokens"
    yield (
        "system",
        f"{system['n_gpus']} x {system['gpu']}, {system['strategy']}, micro batch "
        f"{system['micro_batch']}, attention {system['attention']}, {system['precision']}",
    )
    yield (
        "loss",
        f"{best.loss_at_budget:.3f} nats/token predicted for a training budget of "
        f"{limits(space.training_budget.model_dump())} (90% interval {best.low:.3f} to "
        f"{best.high:.3f})",
    )
    if best.tokens_at_budget is not None and best.extrapolation is not None:
        yield "tokens", reach(best.tokens_at_budget, best.extrapolation)
    if best.usd_per_btok is not None:
        yield "cost", f"{usd(best.usd_per_btok)} per billion tokens"


def reach(tokens: float, extrapolation: float) -> str:
    """Tokens at budget, and how far they lie beyond what was measured."""
    bought = f"{tokens:,.0f} at budget"
    if extrapolation <= 1:
        return f"{bought}, no more than were trained"
    return f"{bought}, {extrapolation:.3g}x what it was trained for: train it to believe it"


def show_trials(result: SearchResult, console: Console) -> None:
    """Print all trials, the Pareto set of loss at budget against dollars per token marked."""
    rows = [cells(row, row.trial_id in result.pareto) for row in result.trials]
    console.print()
    console.print(fitted(COLUMNS, rows, console.width))
    if result.pareto:
        for note in NOTES:
            console.print(f"[dim]{note}[/]")
    for row in result.trials:
        if row.status in BROKEN and row.reason:
            said = f"{row.trial_id} {row.status}: {row.reason}"
            console.print(said, soft_wrap=True, markup=False)


def cells(row: TrialRow, on_front: bool) -> list[str]:
    """A trial's cells."""
    system = row.config["system"]
    point = seeded(row.point, row.config["seed"], row.repeat_of)
    return [
        "*" if on_front else "",
        row.trial_id,
        why_ended(row.status, row.reason),
        describe(point, system["strategy"], system["n_gpus"]),
        f"{row.tokens:,}",
        optional(row.loss, ".4f"),
        optional(row.loss_at_budget, ".3f"),
        optional(row.tokens_per_s, ",.0f"),
        usd(row.usd),
    ]


def next_commands(result: SearchResult, sitting: Sitting) -> list[tuple[str, str]]:
    """What to do next, as label and exact command or path."""
    found, folder = [], sitting.folder
    if result.status == "interrupted":
        found.append(("go on", resume_command(sitting)))
    if result.best is not None:
        found.append(
            ("train the winner", shlex.join([program("thriftlm"), "train", f"{folder}/best.yaml"]))
        )
    pictures = [folder / name for name in ("pareto.png", "curves.png")]
    found += [("picture", str(path)) for path in pictures if path.exists()]
    found.append(("compare in MLflow", mlflow_command(sitting.tracking_uri)))
    return found


def resume_command(sitting: Sitting) -> str:
    """The command that goes on with the search, with all that makes it the same search."""
    command = [program("thriftlm"), "search", sitting.source, "--name", sitting.name, "--resume"]
    command += ["--storage", str(sitting.storage.root)]
    for override in sitting.overrides:
        command += ["--set", override]
    if sitting.address is not None:
        command += ["--address", sitting.address]
    if sitting.tracking_uri != sitting.storage.tracking_uri:
        command += ["--tracking-uri", sitting.tracking_uri]
    return shlex.join(command)


def program(name: str) -> str:
    """How to call a program of this environment: by name where that finds it, else by path."""
    here = Path(sys.executable).parent / name
    found = shutil.which(name)
    if not here.exists() or (found is not None and Path(found).resolve() == here.resolve()):
        return name
    return str(here)


def mlflow_command(tracking_uri: str) -> str:
    """How to see the runs: a server is there already, a database needs one."""
    if tracking_uri.startswith(("http://", "https://")):
        return f"open {tracking_uri}"
    return shlex.join([program("mlflow"), "ui", "--backend-store-uri", tracking_uri])
