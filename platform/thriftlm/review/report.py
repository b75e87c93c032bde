"""The answer of a search in the terminal: the winner, the Pareto set, the cost, what to do next."""

from rich.console import Console
from rich.table import Table

from thriftlm.review.live import short, usd
from thriftlm.review.session import Sitting
from thriftlm.search.result import Best, SearchResult, TrialRow
from thriftlm.search.space import Space


def show(result: SearchResult, sitting: Sitting, console: Console) -> None:
    """Print the answer."""
    spent = f"{usd(result.spent_usd)} over {len(result.trials)} trials"
    if result.budget_usd is not None:
        spent += f", of {usd(result.budget_usd)}"
    console.print(f"\n[bold]{result.search_id}[/] {result.status}: {result.reason}")
    console.print(f"spent {spent}, {result.hours * 60:.1f} minutes")
    if result.best is None:
        console.print("\nno trial gave a loss; what happened to each:")
        for row in result.trials:
            console.print(f"  {row.trial_id} {row.status}: {row.reason}", soft_wrap=True)
    else:
        show_best(result.best, sitting.space, console)
        show_trials(result, console)
    console.print()
    for what, command in next_commands(result, sitting):
        console.print(f"[dim]{what:<24}[/] {command}", soft_wrap=True)


def show_best(best: Best, space: Space, console: Console) -> None:
    """Print the winner."""
    budget = space.training_budget
    money = [f"{usd(budget.usd)}"] if budget.usd is not None else []
    money += [f"{budget.hours:g} hours"] if budget.hours is not None else []
    console.print(f"\n[bold green]best: {best.trial_id}[/]")
    model, system = best.config["model"], best.config["system"]
    console.print(
        f"  model    {model['n_layers']} layers, sharing {model['sharing']} x{model['repeats']}, "
        f"width {model['d_model']}, {model['n_heads']} heads, d_ff {model['d_ff']}, "
        f"vocab {model['vocab']}"
    )
    optim = best.config["optim"]
    console.print(f"  optim    lr {optim['lr']:.3g}, batch {optim['batch_tokens']:,} tokens")
    console.print(
        f"  system   {system['n_gpus']} x {system['gpu']}, {system['strategy']}, "
        f"micro batch {system['micro_batch']}, {system['attention']}, {system['precision']}"
    )
    console.print(
        f"  loss     {best.loss_at_budget:.3f} nats/token predicted for a training budget of "
        f"{' and '.join(money)} (90% interval {best.low:.3f} to {best.high:.3f})",
        soft_wrap=True,
    )
    if best.tokens_at_budget is not None and best.extrapolation is not None:
        console.print(
            f"  tokens   {best.tokens_at_budget:,.0f} at budget, {best.extrapolation:.0f}x further "
            "than any trial went: train it to believe it",
            soft_wrap=True,
        )


def show_trials(result: SearchResult, console: Console) -> None:
    """Print all trials, the Pareto set of loss at budget against dollars per token marked."""
    table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
    names = ("", "trial", "status", "what", "tokens", "loss", "loss at budget", "tok/s", "USD")
    for name in names:
        table.add_column(name, justify="right" if name in names[4:] else "left")
    for row in result.trials:
        table.add_row("*" if row.trial_id in result.pareto else "", *cells(row))
    console.print()
    console.print(table)
    console.print("[dim]* Pareto set: no other trial has both a lower loss and cheaper tokens[/]")


def cells(row: TrialRow) -> list[str]:
    """A trial's cells."""
    what = " ".join(f"{path.rpartition('.')[2]}={short(v)}" for path, v in row.point.items())
    return [
        row.trial_id,
        row.status,
        what,
        f"{row.tokens:,}",
        "-" if row.loss is None else f"{row.loss:.4f}",
        "-" if row.loss_at_budget is None else f"{row.loss_at_budget:.3f}",
        "-" if row.tokens_per_s is None else f"{row.tokens_per_s:,.0f}",
        usd(row.usd),
    ]


def next_commands(result: SearchResult, sitting: Sitting) -> list[tuple[str, str]]:
    """What to do next, as label and exact command or path."""
    found, folder = [], sitting.folder
    if result.status == "interrupted":
        command = f"thriftlm search {sitting.source} --name {sitting.name} --resume"
        found.append(("go on", f"{command} --storage {sitting.storage.root}"))
    if result.best is not None:
        found.append(("train the winner", f"thriftlm train {folder / 'best.yaml'}"))
        found.append(("picture", str(folder / "pareto.png")))
    ui = f"mlflow ui --backend-store-uri {sitting.tracking_uri}"
    found.append(("compare runs in MLflow", ui))
    return found
