"""What a search would do, without doing it: points before and after the rules, and budgets."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from statistics import fmean, median
from typing import Any

from rich.markup import escape

from thriftlm.planning.constants import Calibration
from thriftlm.planning.estimate import Estimate, estimate_runs
from thriftlm.prices import usd_per_hour
from thriftlm.review.tables import Column, fitted, plain_console
from thriftlm.review.wording import limits, usd
from thriftlm.search import pbt
from thriftlm.search.asha import bracket_sizes, rungs_of
from thriftlm.search.spaces.settings import Fidelity
from thriftlm.search.spaces.space import Space
from thriftlm.spec import RunSpec
from thriftlm_models.config import ModelSpec
from thriftlm_models.counts import applied_params, stored_params
from thriftlm_models.presets import presets

SHAPE = ("n_layers", "sharing", "repeats", "d_model", "n_heads", "n_kv_heads", "d_ff")
"""Fields of a model that a dry run always shows."""
COUNTS = ("stored_params", "applied_params", "published_as")
SHOWN_MODELS = 24
"""Models listed in the terminal; `--json` lists all."""
START_SECONDS = 20.0
"""Of a trial before it trains: processes and imports, measured 15 to 20 s on two cores."""
SHOWN_REASONS = 5
"""Reasons to be out of memory that the terminal lists."""
NO_SHAPE = {"preset", "init", "parametrization", "mup_base_width"}
"""Fields of a model that say how it learns or what it is called, not what it computes."""


def describe_space(space: Space, calibration: Calibration | None = None) -> dict[str, Any]:
    """Points of a space, what removes some, its budgets, and what the estimator says of it."""
    counts = space.count()
    search = space.search
    varied = [path.removeprefix("model.") for path in space.domains if path.startswith("model.")]
    models = [describe_model(model, varied) for model in counts.models]
    if counts.sampled:
        models.sort(key=lambda model: (model["stored_params"], model["applied_params"]))
    return {
        "name": space.name,
        "points": counts.size,
        "looked_at": counts.total,
        "sampled": counts.sampled,
        "valid": counts.valid,
        "distinct": counts.distinct,
        "rejected": counts.rejected,
        "models": models,
        "estimated": estimated(space, counts.runs, calibration),
        "varied": list(space.domains),
        "algorithm": search.algorithm,
        "scheduler": space.scheduler,
        "rungs_tokens": rungs_tokens(space),
        "max_tokens": search.fidelity.max_tokens,
        "objective": space.objective_name,
        "training_budget": space.training_budget.model_dump(),
        "search_budget": space.search_budget.model_dump(),
        "warnings": space.warnings(),
    }


def describe_model(model: ModelSpec, varied: list[str]) -> dict[str, Any]:
    """A model's shape, and what varies of it, with its counts and the preset of the same shape."""
    fields = model.model_dump(mode="json", include={*SHAPE, *varied})
    return {name: fields[name] for name in (*SHAPE, *(v for v in varied if v not in SHAPE))} | {
        "stored_params": stored_params(model),
        "applied_params": applied_params(model),
        "published_as": published_shapes().get(model.model_dump_json(exclude=NO_SHAPE)),
    }


def estimated(
    space: Space, runs: Sequence[RunSpec], calibration: Calibration | None
) -> dict[str, Any]:
    """What the estimator says of the runs: how many fit into memory, and what the search costs.

    `usd_per_trial` is the median over what fits, each at its full length; None where no speed is
    known, as on a CPU that was not measured. What is not known fits neither in nor out.
    """
    estimates = estimate_runs(runs, space.machine, calibration)
    found = [(run, estimates[i]) for i, run in enumerate(runs)]
    out = Counter(entry.reason for _, entry in found if entry.fits is False)
    known = [(run, entry) for run, entry in found if entry.fits and entry.usd_per_btok is not None]
    costs = [entry.usd_per_btok * run.tokens / 1e9 for run, entry in known if entry.usd_per_btok]
    return {
        "fits": sum(entry.fits is True for _, entry in found),
        "out": out.total(),
        "unknown": sum(entry.fits is None for _, entry in found),
        "reasons": dict(out.most_common()),
        "usd_per_trial": median(costs) if costs else None,
        "spend": predicted_spend(space, known) if known else None,
    }


def predicted_spend(space: Space, known: Sequence[tuple[RunSpec, Estimate]]) -> dict[str, Any]:
    """What the search will do with its budget, by the mean over trials whose speed is estimated.

    Args:
        space: its budgets and scheduler.
        known: runs that fit, each with its estimate.
    """
    tokens = expected_tokens(space)
    each = [
        (entry.usd_per_btok or 0.0) * tokens / 1e9 + usd_per_hour(run.system) * START_SECONDS / 3600
        for run, entry in known
    ]
    usd, budget = fmean(each), space.search_budget
    points = space.size if space.search.algorithm == "grid" else None
    if space.scheduler == "pbt":
        points = pbt.most_trials(space.search)
    wanted = {"trials": budget.trials, "points": points}
    limits = {name: float(number) for name, number in wanted.items() if number is not None}
    if budget.usd is not None:
        limits["usd"] = budget.usd / usd
    by = min(limits, key=lambda name: limits[name], default=None)
    trials = limits[by] if by else None
    return {
        "tokens_per_trial": tokens,
        "usd_per_trial": usd,
        "trials": None if trials is None else int(trials),
        "usd": None if trials is None else min(trials * usd, budget.usd or float("inf")),
        "limited_by": by,
    }


def expected_tokens(space: Space) -> float:
    """Tokens of a mean trial: one in `factor` passes each rung that looks at it.

    Each member of a population is trained to the end, by one trial or several.
    """
    fidelity = space.search.fidelity
    if space.scheduler == "pbt":
        trials = min(pbt.most_trials(space.search), space.search_budget.trials or math.inf)
        return fidelity.max_tokens * min(1.0, space.search.population / trials)
    if space.search.algorithm == "factored":
        return _tokens_past(fidelity.rungs, fidelity)
    cycle = sum(bracket_sizes(len(fidelity.rungs), fidelity.factor))
    return fmean(
        _tokens_past(rungs_of(space.scheduler, n, fidelity.rungs, fidelity.factor), fidelity)
        for n in range(cycle)
    )


def _tokens_past(rungs: Sequence[int], fidelity: Fidelity) -> float:
    legs = pairwise([0, *rungs, fidelity.max_tokens])
    return math.fsum((end - begin) / fidelity.factor**i for i, (begin, end) in enumerate(legs))


def rungs_tokens(space: Space) -> list[int]:
    """Tokens at which trials can end or wait."""
    if space.scheduler == "pbt":
        return list(pbt.intervals(space.search))
    can_end = space.scheduler != "none" or space.search.algorithm == "factored"
    return list(space.search.fidelity.rungs) if can_end else []


@cache
def published_shapes() -> dict[str, str]:
    """Names of the presets by the JSON of their shape; of equal ones the first."""
    models = {name: ModelSpec.model_validate({"preset": name}) for name in presets()}
    return {m.model_dump_json(exclude=NO_SHAPE): name for name, m in reversed(models.items())}


def memory_lines(found: dict[str, Any]) -> Iterator[str]:
    """What the estimator says, in lines."""
    parts = {"fit": found["fits"], "do not fit": found["out"], "not known": found["unknown"]}
    told = ", ".join(f"{number:,} {what}" for what, number in parts.items() if number)
    yield f"memory, estimated: {told}"
    for reason, number in list(found["reasons"].items())[:SHOWN_REASONS]:
        yield f"{number:>8,} out: {reason}"
    if found["usd_per_trial"] is not None:
        yield f"a full trial, estimated: {usd(found['usd_per_trial'])} (median of what fits)"
    if found["spend"]:
        yield spend_line(found["spend"])


def spend_line(spend: dict[str, Any]) -> str:
    """What the search is expected to spend."""
    each = f"{usd(spend['usd_per_trial'])} a trial ({spend['tokens_per_trial']:,.0f} tokens)"
    if spend["trials"] is None:
        return f"the search, estimated: {each}, until its hours are over"
    limits = {"trials": "all it may start", "points": "the whole grid", "usd": "then it is spent"}
    return (
        f"the search, estimated: {spend['trials']:,} trials, {limits[spend['limited_by']]}; "
        f"{usd(spend['usd'])} at {each}"
    )


def in_words(value: Any) -> str:
    """A field of a model in a table: patterns as their words."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def show_models(models: list[dict[str, Any]]) -> None:
    """Print the models of a space, where they are few enough to read."""
    if not 1 < len(models) <= SHOWN_MODELS:
        return
    names = ("layers", "width", "heads", "d_ff", "stored params")
    columns = [*(Column(name, is_number=True) for name in names), Column("sharing")]
    others = [name for name in models[0] if name not in (*SHAPE, *COUNTS)]
    columns += [Column(name) for name in others]
    columns.append(Column("published as", dispensable=1))
    cells = [
        [
            str(model["n_layers"]),
            f"{model['d_model']:,}",
            f"{model['n_heads']}/{model['n_kv_heads']}",
            f"{model['d_ff']:,}",
            f"{model['stored_params']:,}",
            model["sharing"] + (f" x{model['repeats']}" if model["repeats"] > 1 else ""),
            *(in_words(model[name]) for name in others),
            model["published_as"] or "-",
        ]
        for model in models
    ]
    console = plain_console()
    console.print(fitted(columns, cells, console.width))


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
    show_models(found["models"])
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
    for line in memory_lines(found["estimated"]):
        console.print(f"  {line}", soft_wrap=True)
    for line in found.get("known", ()):
        console.print(f"  {line['sentence']}", soft_wrap=True, markup=False)
    for warning in found["warnings"]:
        console.print(f"  [yellow]warning: {escape(warning)}[/]", soft_wrap=True)
