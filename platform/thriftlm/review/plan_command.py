"""The `plan` command: its options and help. Everything heavy is imported when it runs."""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from thriftlm.review.options import Json

UNITS = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}


def quantity(text: str) -> float:
    """A number with k, M, B or T behind it, or without.

    Raises:
        typer.BadParameter: it is none.
    """
    number, unit = re.fullmatch(r"(.*?)\s*([kKMBGT]?)", text.strip(), re.DOTALL).groups()  # type: ignore[union-attr]
    try:
        return float(number) * UNITS[unit]
    except ValueError as error:
        raise typer.BadParameter(f"'{text}' must be a number such as 1.62e20 or 350M") from error


def amount(metavar: str, help_text: str) -> Any:
    """An option that takes a quantity."""
    return typer.Option(metavar=metavar, parser=quantity, help=help_text)


def plan(
    flops: Annotated[float | None, amount("C", "Plan from training compute, 6 N D.")] = None,
    usd: Annotated[float | None, amount("USD", "Plan from dollars.")] = None,
    hours: Annotated[float | None, amount("H", "Plan from wall time; needs --gpu.")] = None,
    loss: Annotated[float | None, amount("L", "Plan from a loss, nats per token.")] = None,
    params: Annotated[
        float | None, amount("N", "Plan from the size of the compute-optimal model, as 350M.")
    ] = None,
    gpu: Annotated[
        list[str],
        typer.Option(
            "--gpu",
            metavar="GPU",
            help="Type of GPU; the cheapest of those given, or of all with a price.",
        ),
    ] = [],  # noqa: B006
    n_gpus: Annotated[
        list[int],
        typer.Option(
            "--gpus",
            metavar="N",
            min=1,
            help="Number of GPUs; the best of those given. Default: one node, more if it must be.",
        ),
    ] = [],  # noqa: B006
    cloud: Annotated[str, typer.Option(metavar="CLOUD", help="Whose prices count.")] = "aws",
    market: Annotated[
        Literal["on_demand", "spot"], typer.Option(help="On-demand or spot prices.")
    ] = "on_demand",
    billing: Annotated[
        Literal["whole_node", "pro_rata"] | None,
        typer.Option(help="Whether idle GPUs of a node are paid. Default: the cloud's way."),
    ] = None,
    inference_tokens: Annotated[
        float | None,
        amount("T", "Tokens that will be served: the model that is cheapest over its life."),
    ] = None,
    unique_tokens: Annotated[
        float | None, amount("U", "Fresh tokens that exist; beyond them data repeat.")
    ] = None,
    k_n: Annotated[
        float | None,
        typer.Option(
            "--k-n", metavar="K", help="Train a model this many times the optimal size instead."
        ),
    ] = None,
    bits: Annotated[
        float | None,
        typer.Option(metavar="P", help="Also say what training at P bits would cost in loss."),
    ] = None,
    law: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="harm (default), blog, hoffmann, hoffmann_tex, epoch, or a file of your own.",
        ),
    ] = None,
    fit: Annotated[
        list[Path],
        typer.Option(
            "--fit",
            metavar="RUNS",
            help="Fit the law to recorded runs (Parquet or CSV: thriftlm report SEARCH --runs). "
            "Without a budget the plan is for the largest compute in them. May be given several "
            "times.",
        ),
    ] = [],  # noqa: B006
    form: Annotated[
        Literal["chinchilla", "skaling"],
        typer.Option(help="Form of the fitted law: additive, or with an outer exponent."),
    ] = "chinchilla",
    points: Annotated[
        Literal["auto", "last", "all"],
        typer.Option(help="Reports that are fitted: each run's last, all after warm-up, or auto."),
    ] = "auto",
    seq_len: Annotated[int, typer.Option(metavar="T", min=1, help="Tokens per sequence.")] = 2048,
    corpus: Annotated[
        str, typer.Option(metavar="CORPUS", help="Corpus of the run file.")
    ] = "python-stdlib",
    tokenizer: Annotated[
        str, typer.Option(metavar="TOKENIZER", help="Tokenizer of the run file; sets the vocab.")
    ] = "bpe:32000",
    out: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Where the picture of the curve goes.")
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(metavar="YAML", help="Where the run file goes; it is printed otherwise."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Plan a training run: how small, how long, on which GPUs, for how many dollars."""
    from thriftlm.planning.constants import in_use
    from thriftlm.planning.plan import Request, make_plan
    from thriftlm.planning.rental import Rental
    from thriftlm.review import plans
    from thriftlm.search.history.storage import storage

    place = {"cloud": cloud, "market": market, "billing": billing}
    given = {"flops": flops, "usd": usd, "hours": hours, "loss": loss, "params": params}
    basis = plans.basis(law, fit, form, points)
    request = Request(
        budget=basis.budget(given),
        law=basis.law,
        rental=Rental(
            gpus=tuple(gpu),
            n_gpus=tuple(n_gpus),
            place={key: value for key, value in place.items() if value is not None},
            seq_len=seq_len,
            calibration=in_use(storage(None).root),
        ),
        k_n=k_n,
        inference_tokens=inference_tokens,
        unique_tokens=unique_tokens,
        data=plans.data_named(corpus, tokenizer, seq_len),
    )
    made = make_plan(request)
    found = plans.as_json(made, bits, basis.fit)
    if run is not None:
        plans.write_run(made, run)
    if out is not None:
        from thriftlm.review.plan_pictures import plan_picture

        plan_picture(made, out, basis.fit)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        plans.show(made, found, with_run_file=run is None)
