"""What a search would do, without doing it: points before and after the rules, and budgets."""

from typing import Any

from rich.markup import escape

from thriftlm.review.tables import plain_console
from thriftlm.review.wording import limits
from thriftlm.search.space import Space


def describe_space(space: Space) -> dict[str, Any]:
    """Points of a space, what removes some, and its budgets."""
    counts = space.count()
    search = space.search
    return {
        "name": space.name,
        "points": counts.size,
        "looked_at": counts.total,
        "sampled": counts.sampled,
        "valid": counts.valid,
        "distinct": counts.distinct,
        "rejected": counts.rejected,
        "varied": list(space.domains),
        "algorithm": search.algorithm,
        "scheduler": space.scheduler,
        "rungs_tokens": list(search.fidelity.rungs) if space.scheduler == "asha" else [],
        "max_tokens": search.fidelity.max_tokens,
        "objective": space.objective_name,
        "training_budget": space.training_budget.model_dump(),
        "search_budget": space.search_budget.model_dump(),
        "warnings": space.warnings(),
    }


def show_space(found: dict[str, Any]) -> None:
    """Print what `describe_space` found."""
    console = plain_console()
    points = "continuous" if found["points"] is None else f"{found['points']:,} points"
    how = "drawn at random" if found["sampled"] else "all of them"
    console.print(f"[bold]{found['name']}[/]  {points}, {len(found['varied'])} fields vary")
    console.print(
        f"  looked at {found['looked_at']:,} ({how}): {found['valid']:,} valid, "
        f"{found['distinct']:,} distinct"
    )
    for reason, number in found["rejected"].items():
        console.print(f"  {number:>8,} removed: {reason}", soft_wrap=True, markup=False)
    rungs = ", ".join(f"{rung:,}" for rung in found["rungs_tokens"])
    varied = ", ".join(found["varied"])
    console.print(f"  vary: {varied}", soft_wrap=True)
    console.print(
        f"  {found['algorithm']} search, {found['scheduler']}"
        + (f" at {rungs} tokens" if rungs else "")
        + f", at most {found['max_tokens']:,} tokens a trial, objective {found['objective']}",
        soft_wrap=True,
    )
    for kind in ("search_budget", "training_budget"):
        console.print(f"  {kind.replace('_', ' ')}: {limits(found[kind])}")
    console.print("  what fits in memory and the predicted spend: not built yet")
    for warning in found["warnings"]:
        console.print(f"  [yellow]warning: {escape(warning)}[/]", soft_wrap=True)
