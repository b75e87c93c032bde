"""The commands of planning: their options and help. Everything heavy is imported when they run."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from thriftlm.review.options import Json, StorageOption

STRATEGY = "single|ddp|fsdp_full|fsdp_grad_op|hsdp|zero1|zero2|zero3"
ATTENTION = "math|flash|efficient|cudnn|flex|fa1|fa2|fa3|fa4"
CHECKPOINTING = "none|selective|full"
OPTIMIZER = "adamw|adamw_8bit|muon|sgd"
STACK = "eager|fused|compiled|native|thriftlm"
Precision = Literal["fp32", "amp_bf16", "bf16_true", "fp8"]
Optimizer = Literal["adamw", "adamw_8bit", "muon", "sgd"]

SOFTWARE = "Software that trains: plain torch, fused kernels, torch.compile, CUDA, or ours."
AGAIN = " May be given several times."
BESIDE_SPACE = ("space", "stack", "overrides", "out", "figures", "as_json")
"""Parameters of `estimate` that go with `--space`; the space says the rest."""


def estimate(
    context: typer.Context,
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
    compiled: Annotated[
        bool, typer.Option("--compile", help="Our own core's blocks through torch.compile.")
    ] = False,
    cpu_offload: Annotated[
        bool, typer.Option("--cpu-offload", help="Keep sharded state in host memory.")
    ] = False,
    stack: Annotated[list[str], typer.Option(metavar=STACK, help=SOFTWARE + AGAIN)] = ["thriftlm"],  # noqa: B006
    precision: Annotated[
        Precision,
        typer.Option(help="bf16 with fp32 masters, all bf16, all fp32, or blocks in fp8."),
    ] = "amp_bf16",
    optimizer: Annotated[
        Optimizer,
        typer.Option(metavar=OPTIMIZER, help="Optimizer whose state is held and updated."),
    ] = "adamw",
    seq_len: Annotated[int, typer.Option(metavar="T", min=1, help="Tokens per sequence.")] = 2048,
    batch_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tokens per optimizer step over all GPUs.")
    ] = 524_288,
    gpus_per_node: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="GPUs per node. Default: the catalog's.")
    ] = None,
    cpus_per_worker: Annotated[
        int, typer.Option(metavar="N", min=1, help="CPU threads of a worker, for gpu cpu.")
    ] = 1,
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
    space: Annotated[
        str | None,
        typer.Option(
            metavar="SPACE", help="Estimate every run of a search space instead, file or name."
        ),
    ] = None,
    overrides: Annotated[
        list[str],
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help=f"Override one value of the space, as in space.system.cloud=aws.{AGAIN}",
        ),
    ] = [],  # noqa: B006
    out: Annotated[
        Path | None,
        typer.Option(metavar="OUT", help="Where --table or --space is written with estimates."),
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="With --space apple_bottlenecks: draw the study's figures beside the published "
            "points, and write how they compare.",
        ),
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show where memory and time go, part by part.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Estimate memory, tokens per second and dollars before anything is rented."""
    from thriftlm.planning.grid import Grid
    from thriftlm.review import estimates
    from thriftlm.spec import InputError

    if space is not None:
        refuse_beside_space(context)
        estimate_space(space, overrides, stack, out, figures, as_json=as_json)
        return
    if overrides or figures:
        raise InputError("--set and --figures go with --space, which is not given")
    if (table is None) != (out is None):
        raise InputError("--table and --out go together: rows to read, and where to write them")
    if table is not None and out is not None:
        done = estimates.estimate_file(table, out)
        print(json.dumps(done, indent=2) if as_json else f"{done['out']}: {done['rows']} rows")
        return
    if model is None or not gpu:
        raise InputError("estimate needs a MODEL and at least one --gpu; see `thriftlm gpus`")
    place = {
        "compiled": "yes" if compiled else None,
        "cpu_offload": "yes" if cpu_offload else None,
        "gpus_per_node": gpus_per_node,
        "cpus_per_worker": cpus_per_worker,
        "cloud": cloud,
        "market": market,
        "billing": billing,
    }
    grid = Grid(
        gpus=gpu,
        n_gpus=n_gpus,
        strategies=strategy,
        micro_batches=micro_batch,
        attentions=attention,
        checkpointings=act_ckpt,
        stacks=stack,
        optimizer=optimizer,
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


def refuse_beside_space(context: typer.Context) -> None:
    """Refuse what says a system beside a space that says them all.

    Raises:
        InputError: an argument or option that does not go with `--space`.
    """
    from thriftlm.spec import InputError

    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        is_said = source is not None and source.name == "COMMANDLINE"
        if is_said and parameter.name not in BESIDE_SPACE:
            said = "MODEL" if parameter.name == "model" else parameter.opts[0]
            raise InputError(
                f"--space says which systems are estimated, so {said} must not; "
                "change the space with --set"
            )


def estimate_space(
    space: str,
    overrides: list[str],
    stacks: list[str],
    out: Path | None,
    figures: Path | None,
    *,
    as_json: bool,
) -> None:
    """Estimate the runs of a space: print the best of them, write and draw all where asked."""
    from thriftlm.planning.constants import in_use
    from thriftlm.planning.machine import measured_machine
    from thriftlm.review import space_estimates
    from thriftlm.search.history.storage import storage
    from thriftlm.search.spaces.space import load_space

    kept = storage(None).root
    found = load_space(space, overrides, measured_machine(kept))
    estimated = space_estimates.estimate_space(found, stacks, in_use(kept))
    rows = estimated.rows()
    if figures is not None:
        from thriftlm.review import apple_report

        options = [f"--set {one}" for one in overrides] + [f"--stack {one}" for one in stacks]
        command = f"thriftlm estimate --space {space} {' '.join(options)} --figures {figures}"
        study = apple_report.write_study(estimated, figures, command)
    if out is not None:
        space_estimates.write_space(estimated, out)
    if as_json:
        print(json.dumps(rows if figures is None else {"estimates": rows} | study, indent=2))
        return
    if figures is None:
        space_estimates.show_space_estimates(estimated, rows)
    else:
        print((figures / apple_report.PAGE).read_text(encoding="utf-8"))
        print("\n".join(study["files"]))
    if out is not None:
        print(f"{out}: {len(rows):,} rows")


def calibrate(
    rows: Annotated[
        list[Path],
        typer.Argument(metavar="ROWS", help="CSV files of measured throughput, design section 6."),
    ] = [],  # noqa: B006
    refine: Annotated[
        bool,
        typer.Option("--refine", help="Rows are probes of one cluster: start from what is known."),
    ] = False,
    searches: Annotated[
        list[str],
        typer.Option("--search", metavar="NAME", help=f"Refine by what a search measured.{AGAIN}"),
    ] = [],  # noqa: B006
    keep: Annotated[
        bool,
        typer.Option("--keep", help="Use it from now on: write it into the storage folder."),
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the constants are written as JSON.")
    ] = None,
    storage: StorageOption = None,
    as_json: Json = False,
) -> None:
    """Fit the estimator's constants to measured rows, and say how far they carry."""
    from thriftlm.review import calibrating
    from thriftlm.search.history.storage import storage as storage_at
    from thriftlm.spec import InputError

    if bool(searches) == bool(rows):
        raise InputError("calibrate needs files of ROWS, or --search NAME, and not both")
    if keep and out is not None:
        raise InputError(f"--keep says where it is written, and --out {out} too; give one of them")
    place = storage_at(storage)
    target = calibrating.place_to_keep(place) if keep else out
    if searches:
        found = calibrating.refine_by_searches(searches, place, target)
    elif refine:
        found = calibrating.refine_by_rows(rows, place, target)
    else:
        found = calibrating.calibrate_rows(rows, target)
    print(json.dumps(found, indent=2)) if as_json else calibrating.show_calibration(found)
