"""The commands of planning: their options and help. Everything heavy is imported when they run."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

STRATEGY = "single|ddp|fsdp_full|fsdp_grad_op|hsdp|zero1|zero2|zero3"
ATTENTION = "math|flash|efficient|cudnn|flex|fa1|fa2|fa3|fa4"
CHECKPOINTING = "none|selective|full"
STACK = "eager|fused|compiled|native|thriftlm"
Precision = Literal["fp32", "amp_bf16", "bf16_true"]

SOFTWARE = "Software that trains: plain torch, fused kernels, torch.compile, CUDA, or ours."
AGAIN = " May be given several times."


def estimate(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A shape of `thriftlm models`, Apple's rule as apple:350M, or a run file.",
        ),
    ] = None,
    gpu: Annotated[
        list[str], typer.Option("--gpu", metavar="GPU", help=f"Type of GPU.{AGAIN}")
    ] = [],  # noqa: B006
    n_gpus: Annotated[
        list[int], typer.Option("--gpus", metavar="N", min=1, help=f"Number of GPUs.{AGAIN}")
    ] = [1],  # noqa: B006
    strategy: Annotated[
        list[str],
        typer.Option(
            metavar=STRATEGY,
            help=f"How state is spread; default fsdp_full, with --best all.{AGAIN}",
        ),
    ] = [],  # noqa: B006
    micro_batch: Annotated[
        list[int],
        typer.Option(
            metavar="B",
            min=1,
            help=f"Sequences per GPU and pass; default 8, with --best 1 to 64.{AGAIN}",
        ),
    ] = [],  # noqa: B006
    attention: Annotated[
        list[str], typer.Option(metavar=ATTENTION, help=f"Attention kernel; default flash.{AGAIN}")
    ] = [],  # noqa: B006
    act_ckpt: Annotated[
        list[str],
        typer.Option(metavar=CHECKPOINTING, help=f"Activation checkpointing; default none.{AGAIN}"),
    ] = [],  # noqa: B006
    stack: Annotated[list[str], typer.Option(metavar=STACK, help=SOFTWARE + AGAIN)] = ["thriftlm"],  # noqa: B006
    precision: Annotated[
        Precision, typer.Option(help="bf16 with fp32 masters, all bf16, or all fp32.")
    ] = "amp_bf16",
    seq_len: Annotated[int, typer.Option(metavar="T", min=1, help="Tokens per sequence.")] = 2048,
    batch_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tokens per optimizer step over all GPUs.")
    ] = 524_288,
    gpus_per_node: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="GPUs per node. Default: the catalog's.")
    ] = None,
    cloud: Annotated[str, typer.Option(metavar="CLOUD", help="Whose prices count.")] = "aws",
    market: Annotated[
        Literal["on_demand", "spot"], typer.Option(help="On-demand or spot prices.")
    ] = "on_demand",
    billing: Annotated[
        Literal["whole_node", "pro_rata"] | None,
        typer.Option(help="Whether idle GPUs of a node are paid. Default: the cloud's way."),
    ] = None,
    best: Annotated[
        bool, typer.Option("--best", help="Rank by USD per token, what does not fit last.")
    ] = False,
    table: Annotated[
        Path | None,
        typer.Option(metavar="IN", help="Estimate every row of a CSV instead; needs --out."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Where --table is written with estimates.")
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show where memory and time go, part by part.")
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print one JSON document on stdout; messages go to stderr."),
    ] = False,
) -> None:
    """Estimate memory, tokens per second and dollars before anything is rented."""
    from thriftlm.planning.grid import Grid
    from thriftlm.review import estimates
    from thriftlm.spec import InputError

    if (table is None) != (out is None):
        raise InputError("--table and --out go together: rows to read, and where to write them")
    if table is not None and out is not None:
        done = estimates.estimate_file(table, out)
        print(json.dumps(done, indent=2) if as_json else f"{done['out']}: {done['rows']} rows")
        return
    if model is None or not gpu:
        raise InputError("estimate needs a MODEL and at least one --gpu; see `thriftlm gpus`")
    place = {"gpus_per_node": gpus_per_node, "cloud": cloud, "market": market, "billing": billing}
    grid = Grid(
        gpus=gpu,
        n_gpus=n_gpus,
        strategies=strategy,
        micro_batches=micro_batch,
        attentions=attention,
        checkpointings=act_ckpt,
        stacks=stack,
        precision=precision,
        seq_len=seq_len,
        batch_tokens=batch_tokens,
        place={key: value for key, value in place.items() if value is not None},
    )
    found = estimates.estimate_grid(estimates.model_named(model), grid, best=best, explain=explain)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        estimates.show_estimates(found, best=best, explain=explain)


def calibrate(
    rows: Annotated[
        Path,
        typer.Argument(metavar="ROWS", help="CSV of measured throughput, as design section 6."),
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the constants are written as JSON.")
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print one JSON document on stdout; messages go to stderr."),
    ] = False,
) -> None:
    """Fit the estimator's constants to measured rows, and say how far they carry."""
    from thriftlm.review import estimates

    found = estimates.calibrate_file(rows, out)
    print(json.dumps(found, indent=2)) if as_json else estimates.show_calibration(found)
