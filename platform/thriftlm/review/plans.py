"""A plan on paper: what it says in JSON, in the terminal, and as a run file."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console

from thriftlm.config_file import ConfigFile
from thriftlm.planning import hyperparameters
from thriftlm.planning.frontier import CURVE, CurvePoint
from thriftlm.planning.plan import Budget, Plan, PlannedRun, served_cost
from thriftlm.planning.scaling_laws import (
    PLANNING_LAW,
    NamedLaw,
    effective_params,
    effective_tokens,
    law_named,
)
from thriftlm.review.tables import Column, fitted, plain_console
from thriftlm.review.wording import counted, optional, stale_prices, usd
from thriftlm.spec import DataSpec, InputError

if TYPE_CHECKING:
    from thriftlm.planning.fitting import Fit

BAR_CHARACTERS, BAR_OVERHEAD = 24, 2.0
"""Length of a bar, and the overhead that fills it."""
Json = dict[str, Any]


@dataclass(frozen=True)
class Basis:
    """The law of a plan, and the fit that it came from."""

    law: NamedLaw
    fit: "Fit | None" = None

    def budget(self, given: dict[str, float | None]) -> Budget:
        """The one that is given; with a fit and none given, the most compute of its runs."""
        if self.fit is not None and all(value is None for value in given.values()):
            return Budget(flops=float(self.fit.points.flops.max()))
        return Budget(**given)


def basis(law: str | None, paths: Sequence[Path], form: Any, points: Any) -> Basis:
    """The named law, or the one fitted to recorded runs.

    Raises:
        InputError: unknown law; a law and runs; runs that cannot be read or do not tell a law.
    """
    if not paths:
        return Basis(law_named(law or PLANNING_LAW))
    if law is not None:
        raise InputError(f"--fit makes the law, and --law {law} names another; give one of them")
    from thriftlm.planning.fitting import fit_points
    from thriftlm.planning.recorded_points import read_points

    fit = fit_points(read_points(paths, points), form)
    return Basis(fit.named(" + ".join(path.stem for path in paths)), fit)


def as_json(plan: Plan, bits: float | None = None, fit: "Fit | None" = None) -> Json:
    """The plan as `--json` prints it; its keys are the design's and more."""
    request, best, frontier = plan.request, plan.best, plan.frontier
    critical = frontier.critical_k(best)
    return {
        "law": request.law.name,
        "law_detail": request.law.described(),
        "given": {request.budget.kind: request.budget.value},
        "compute_flops": best.flops,
        "n_params": best.n_params,
        "n_tokens": best.n_tokens,
        "tokens_per_param": best.n_tokens / best.n_params,
        "loss": plan.loss,
        "hours": plan.run.hours if plan.run else None,
        "usd": plan.run.usd if plan.run else None,
        "k_min": frontier.law.k_min,
        "critical": {"k_n": critical, "n_params": critical * best.n_params},
        "curve": [_point(plan, point) for point in curve_points(plan)],
        "inference": _inference(plan),
        "unique": _unique(plan),
        "bits": _bits(plan, bits),
        "fit": _fit(plan, fit),
        "run": _run(plan.run, plan) if plan.run else None,
        "why_no_run": plan.why_no_run,
    }


def curve_points(plan: Plan) -> list[CurvePoint]:
    """The shares that are always shown, and the run's own."""
    shares = sorted({*CURVE, float(f"{plan.scale:.12g}")})
    return plan.frontier.curve(plan.best, shares)


def _point(plan: Plan, point: CurvePoint) -> Json:
    known = point.n_tokens is not None
    dollars = plan.usd_at(point.n_params, point.n_tokens) if point.n_tokens is not None else None
    return {
        **point._asdict(),
        "compute_flops": 6 * point.n_params * (point.n_tokens or 0) if known else None,
        "usd": dollars,
    }


def _inference(plan: Plan) -> Json | None:
    served = plan.request.inference_tokens
    if not served:
        return None
    best, frontier = plan.best, plan.frontier
    k_n = frontier.scale_for_demand(served, best)
    large, small = (served_cost(frontier, k, best, served) for k in (1.0, k_n))
    return {
        "tokens": served,
        "over_training_tokens": served / best.n_tokens,
        "k_n": k_n,
        "n_params": k_n * best.n_params,
        "n_tokens": frontier.data_factor(k_n, best) * best.n_tokens,
        "total_flops": small,
        "total_flops_at_optimum": large,
        "saved": 1 - small / large,
    }


def _unique(plan: Plan) -> Json | None:
    unique = plan.request.unique_tokens
    if unique is None:
        return None
    best, law = plan.best, plan.frontier.law
    fresh = law.optimum(best.flops)
    return {
        "tokens": unique,
        "epochs": best.n_tokens / unique,
        "worth_tokens": effective_tokens(best.n_tokens, unique),
        "fresh": {
            "n_params": fresh.n_params,
            "n_tokens": fresh.n_tokens,
            "loss": float(law.loss(*fresh)),
        },
    }


def _bits(plan: Plan, bits: float | None) -> Json | None:
    if bits is None:
        return None
    if not bits > 0:
        raise InputError(f"--bits must be above 0, got {bits:g}")
    worth = effective_params(plan.best.n_params, weights=bits, activations=bits, kv=bits)
    loss = plan.frontier.loss(worth, plan.best.n_tokens)
    return {"bits": bits, "effective_params": worth, "loss": loss}


def _fit(plan: Plan, fit: "Fit | None") -> Json | None:
    if fit is None:
        return None
    from thriftlm.planning.fitting import described
    from thriftlm.planning.measured import measured_overhead

    measured = [point._asdict() for point in measured_overhead(fit.points, fit.law)]
    return described(fit, plan.best) | {"measured_overhead": measured}


def _run(run: PlannedRun, plan: Plan) -> Json:
    spec, shape, rented = run.spec, run.shape, run.rented
    found, speed = rented.estimate, rented.estimate.tokens_per_s_per_gpu or 0.0
    cost = run.usd
    interval = [speed / (found.high or speed), speed / (found.low or speed)]
    return {
        "n_params": run.n_params,
        "stored_params": shape.stored_params,
        "non_embedding_params": shape.non_embedding_params,
        "k_n": run.n_params / plan.best.n_params,
        "tokens": spec.tokens,
        "tokens_per_param": spec.tokens / run.n_params,
        "loss": run.loss,
        "compute_flops": 6 * run.n_params * spec.tokens,
        "batch_tokens": spec.optim.batch_tokens,
        "steps": spec.steps,
        "lr": spec.optim.lr,
        "beyond_step_law": shape.non_embedding_params > hyperparameters.STEP_LAW_PARAMS
        or spec.tokens > hyperparameters.STEP_LAW_TOKENS,
        "other_recipes": _recipes(run),
        "gpu": spec.system.gpu,
        "n_gpus": spec.system.n_gpus,
        "strategy": spec.system.strategy,
        "micro_batch": spec.system.micro_batch,
        "instance": found.instance,
        "tokens_per_s_per_gpu": found.tokens_per_s_per_gpu,
        "mfu": found.mfu,
        "peak_mem_gb": found.peak_mem_gb,
        "usd_per_btok": found.usd_per_btok,
        "hours": run.hours,
        "usd": cost,
        "usd_80": None if cost is None else [cost * share for share in interval],
        "basis": found.basis,
        "spec": spec.model_dump(mode="json"),
    }


def _recipes(run: PlannedRun) -> Json:
    """What other laws say of learning rate and batch, for comparison."""
    n, d = run.shape.non_embedding_params, run.spec.tokens
    batch = run.spec.optim.batch_tokens
    return {
        "step_law": hyperparameters.step_law(n, d)._asdict(),
        "power_lines": hyperparameters.power_lines(n, d, batch)._asdict(),
        "deepseek": hyperparameters.deepseek(6.0 * n * d)._asdict(),
    }


# --- the run file -------------------------------------------------------------------------------


def data_named(corpus: str, tokenizer: str, seq_len: int) -> DataSpec:
    """The data of the run file.

    Raises:
        InputError: no such corpus or tokenizer.
    """
    given = {"corpus": corpus, "tokenizer": tokenizer, "seq_len": seq_len}
    found = ConfigFile("plan", given).parse(DataSpec)
    try:
        _ = found.bpe_vocab
    except ValueError as error:
        raise InputError(str(error)) from error
    return found


def run_file(run: PlannedRun, plan: Plan) -> str:
    """The run as `thriftlm train` reads it."""
    request = plan.request
    head = (
        f"# Planned by law {request.law.name} from {request.budget.kind} "
        f"{request.budget.value:g}. Train it: thriftlm train THIS_FILE\n"
    )
    shown = run.spec.model_dump(mode="json", exclude_defaults=True)
    shown["data"] = {"corpus": run.spec.data.corpus, **shown["data"]}
    return head + yaml.safe_dump(shown, sort_keys=False)


def write_run(plan: Plan, path: Path) -> None:
    """Write the run file.

    Raises:
        InputError: there is no run, or the file cannot be written.
    """
    if plan.run is None:
        raise InputError(f"--run has nothing to write: {plan.why_no_run}")
    try:
        path.write_text(run_file(plan.run, plan), encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


# --- the terminal -------------------------------------------------------------------------------

COLUMNS = [
    Column("k_N", is_number=True),
    Column("parameters", is_number=True),
    Column("k_D", is_number=True, dispensable=2),
    Column("tokens", is_number=True),
    Column("FLOPs", is_number=True, dispensable=3),
    Column("USD", is_number=True),
    Column("overhead", is_number=True),
    Column("", dispensable=1),
    Column("", dispensable=4),
]


def show(plan: Plan, found: Json, *, with_run_file: bool) -> None:
    """Print the plan: in words, as a table with bars, and as a run file."""
    console = plain_console()
    for name, text in _lines(plan, found):
        console.print(f"{name:<10} {text}", soft_wrap=True, markup=False)
    console.print()
    rows = [_cells(row, found) for row in found["curve"]]
    console.print(fitted(COLUMNS, rows, console.width))
    _notes(plan, found, console)
    if plan.run and with_run_file:
        console.print()
        console.print(run_file(plan.run, plan).rstrip(), soft_wrap=True, markup=False)


def _lines(plan: Plan, found: Json) -> list[tuple[str, str]]:
    law, best = plan.request.law, plan.best
    lines = [
        ("law", f"{law.name}: {law.source}; N counts {COUNTED[law.counts]}"),
        *_fit_lines(found["fit"]),
        (
            "optimum",
            f"{counted(best.n_params)} parameters, {counted(best.n_tokens)} tokens "
            f"({found['tokens_per_param']:.1f} each), {best.flops:.3g} FLOPs, loss {plan.loss:.4g}",
        ),
        (
            "critical",
            f"{found['critical']['k_n']:.3f} of that size ({counted(found['critical']['n_params'])}"
            f"): twice the compute for the same loss; none below {found['k_min']:.4f} gets there",
        ),
    ]
    if served := found["inference"]:
        lines.append(
            (
                "serving",
                f"{counted(served['tokens'])} tokens ({served['over_training_tokens']:.3g} times "
                f"the training tokens): cheapest at {served['k_n']:.3f} of that size, "
                f"{counted(served['n_params'])} on {counted(served['n_tokens'])} tokens, saves "
                f"{served['saved']:.1%} of all FLOPs",
            )
        )
    if unique := found["unique"]:
        fresh = unique["fresh"]
        lines.append(
            (
                "data",
                f"{counted(unique['tokens'])} unique tokens, {max(1, unique['epochs']):.3g} "
                f"epochs, worth {counted(unique['worth_tokens'])} fresh ones; with enough data the "
                f"same FLOPs give {counted(fresh['n_params'])} on {counted(fresh['n_tokens'])}, "
                f"loss {fresh['loss']:.4g}",
            )
        )
    if bits := found["bits"]:
        lines.append(
            (
                "bits",
                f"at {bits['bits']:g} bits the model is worth {counted(bits['effective_params'])} "
                f"parameters, loss {bits['loss']:.4g}",
            )
        )
    return lines + (_run_lines(plan.run, found["run"]) if plan.run else [("run", plan.why_no_run)])


def _fit_lines(fit: Json | None) -> list[tuple[str, str]]:
    if fit is None:
        return []
    law, far = fit["coefficients"], fit["extrapolation"]
    ends = {name: (fit[name]["low"], fit[name]["high"]) for name in ("loss", "n_params")}
    beyond = [f"{name} {far[name]:.3g}x" for name in far if far[name] > 1.005]
    return [
        (
            "fit",
            ", ".join(f"{name} {value:.4g}" for name, value in law.items())
            + f"; median error {fit['median_error']:.2%}",
        ),
        (
            "open",
            f"90% intervals at the optimum: loss {ends['loss'][0]:.4g} to {ends['loss'][1]:.4g}, "
            f"parameters {counted(ends['n_params'][0])} to {counted(ends['n_params'][1])}; "
            + (f"beyond the runs: {', '.join(beyond)}" if beyond else "within the runs"),
        ),
    ]


COUNTED = {"all": "all parameters", "non_embedding": "parameters without embeddings"}


def _run_lines(run: PlannedRun, found: Json) -> list[tuple[str, str]]:
    beyond = found["beyond_step_law"]
    model, system, estimate = run.spec.model, run.spec.system, run.rented.estimate
    within = (
        "" if found["usd_80"] is None else " (80%: {} to {})".format(*map(usd, found["usd_80"]))
    )
    return [
        (
            "run",
            f"{run.shape.stored_params:,} parameters ({model.n_layers} layers, width "
            f"{model.d_model}, {model.n_heads} heads, d_ff {model.d_ff}, vocab {model.vocab:,}), "
            f"{counted(run.spec.tokens)} tokens ({found['tokens_per_param']:.1f} each), loss "
            f"{run.loss:.4g}",
        ),
        (
            "recipe",
            f"lr {run.spec.optim.lr:g}, batch {run.spec.optim.batch_tokens:,} tokens, "
            f"{run.spec.steps:,} steps (Step Law{', beyond its runs' if beyond else ''}; Power "
            f"Lines would take lr {found['other_recipes']['power_lines']['lr']:.3g})",
        ),
        (
            "system",
            f"{system.n_gpus} x {system.gpu} ({system.cloud} {system.market} "
            f"{estimate.instance or 'unpriced'}), {system.strategy}, micro batch "
            f"{system.micro_batch}: {optional(estimate.tokens_per_s_per_gpu, ',.0f')} tokens/s/GPU,"
            f" MFU {optional(estimate.mfu, '.0%')}, {optional(estimate.peak_mem_gb, '.1f')} GB",
        ),
        (
            "cost",
            ("no price" if run.usd is None else f"{to_the_cent(run.usd)}{within}")
            + f", {run.hours:,.1f} hours, estimated",
        ),
    ]


def to_the_cent(amount: float) -> str:
    """Dollars with cents, and more digits below one."""
    return f"${amount:,.2f}" if amount >= 1 else usd(amount)


def _cells(row: Json, found: Json) -> list[str]:
    overhead = row["overhead"]
    marks = []
    if row["k_n"] == 1:
        marks.append("compute-optimal")
    if found["run"] and abs(row["k_n"] - found["run"]["k_n"]) < 0.05 * row["k_n"]:
        marks.append("the run")
    if row["diminishing"]:
        marks.append("out of reach" if overhead is None else "diminishing returns")
    return [
        f"{row['k_n']:.3g}",
        counted(row["n_params"]),
        optional(row["k_d"], ".3f"),
        "-" if row["n_tokens"] is None else counted(row["n_tokens"]),
        optional(row["compute_flops"], ".3g"),
        "-" if row["usd"] is None else usd(row["usd"]),
        optional(overhead, ".1%"),
        "" if overhead is None else bar(overhead),
        ", ".join(marks),
    ]


def bar(overhead: float) -> str:
    """A bar of text; one that is longer than there is room ends in an arrow."""
    length = round(BAR_CHARACTERS * max(0.0, overhead) / BAR_OVERHEAD)
    return "#" * length if length <= BAR_CHARACTERS else "#" * (BAR_CHARACTERS - 1) + ">"


def _notes(plan: Plan, found: Json, console: Console) -> None:
    console.print("[dim]every row reaches the optimum's loss; dollars by estimate[/]")
    if found["unique"]:
        console.print(
            "[dim]data wear out by arXiv 2305.16264; that large models wear out sooner on few "
            "data is not in it[/]"
        )
    if plan.run and (
        warning := stale_prices([plan.run.rented.estimate.price_as_of], datetime.now(UTC).date())
    ):
        console.print(f"[yellow]{warning}[/]")
