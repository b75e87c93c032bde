"""The command line. Commands import what they need, so that `--help` answers at once."""

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from thriftlm.review import (
    plan_command,
    planning_commands,
    report_command,
    searches_command,
    simulate_command,
)
from thriftlm.review.data_command import data
from thriftlm.review.options import Json, StorageOption

app = typer.Typer(
    name="thriftlm",
    help="Which small language model, on which GPUs, sharded how, for the lowest loss per dollar.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def overrides_like(example: str) -> Any:
    """The `--set` option, with an example that fits the command's file."""
    return typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help=f"Override one value of the file, as in {example}. May be given several times.",
    )


def main() -> None:
    """Run the command line: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    from thriftlm.spec import InputError

    try:
        sys.exit(app(prog_name="thriftlm", standalone_mode=False))
    except InputError as error:
        refuse(str(error))
    except typer.TyperException as error:
        refuse(usage_message(error))
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def refuse(message: str) -> None:
    """Exit for bad input; an empty message says that help was printed instead."""
    if message:
        print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def usage_message(error: typer.TyperException) -> str:
    """What is wrong with the command line, in one line that names the help to read."""
    message = error.format_message().rstrip(".")
    context = getattr(error, "ctx", None)
    if not message or context is None:
        return message
    return f"{message[0].lower()}{message[1:]}; see {context.command_path} --help"


def emit(value: Any) -> None:
    """Print one JSON document on stdout."""
    print(json.dumps(value, indent=2, default=str))


@app.command()
def search(
    space: Annotated[
        str,
        typer.Argument(
            metavar="SPACE", help="A space file, or the name of a shipped one: `thriftlm spaces`."
        ),
    ],
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Name of the search. Default: the name in the space file."
        ),
    ] = None,
    storage: StorageOption = None,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Ray cluster to run on. Default: $RAY_ADDRESS, else this machine alone.",
        ),
    ] = None,
    tracking_uri: Annotated[
        str | None,
        typer.Option(
            metavar="URI",
            help="MLflow server or database. Default: mlflow.db in the storage folder.",
        ),
    ] = None,
    overrides: Annotated[list[str], overrides_like("space.model.n_layers=[8,12]")] = [],  # noqa: B006
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a search that was begun and interrupted.")
    ] = False,
    earlier: Annotated[
        list[str],
        typer.Option(
            "--from",
            metavar="RUNS",
            help="Begin with what an earlier search measured: its name, a file of recorded runs "
            "(`report --runs`), or mlflow:EXPERIMENT. May be given several times.",
        ),
    ] = [],  # noqa: B006
    cold: Annotated[
        bool,
        typer.Option(
            "--cold", help="Start workers for every trial, instead of handing live ones on."
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Count the points of the space, show the budgets, run nothing."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Search a space for the model and system with the lowest loss for the dollars.

    A finished search prints its answer again.
    """
    from thriftlm.planning.machine import measured_machine
    from thriftlm.search.history.storage import storage as storage_at
    from thriftlm.search.spaces.space import load_space

    place = storage_at(storage)
    found = load_space(space, overrides, measured_machine(place.root))
    tracking = tracking_uri or place.tracking_uri
    known = _taken_in(found, earlier, place, tracking)
    if dry_run:
        from thriftlm.planning.constants import in_use
        from thriftlm.review.dry_run import describe_space, show_space

        described = describe_space(found, in_use(place.root))
        described["known"] = [one.summary() for one in known]
        emit(described) if as_json else show_space(described)
        return
    from thriftlm.review.session import Sitting

    sitting = Sitting(
        space=found,
        source=space,
        storage=place,
        name=name or found.name,
        tracking_uri=tracking,
        address=address,
        resume=resume,
        cold=cold,
        overrides=tuple(overrides),
        known=tuple(one.known for one in known),
    )
    for one in known:
        print(one.sentence(), file=sys.stderr)
    sys.exit(_hold(sitting, as_json))


def _taken_in(space: Any, earlier: list[str], place: Any, tracking_uri: str) -> list[Any]:
    """What `--from` means to the space."""
    if not earlier:
        return []
    from thriftlm.review.earlier_runs import taken_in

    return taken_in(space, earlier, place, tracking_uri)


def _hold(sitting: Any, as_json: bool) -> int:
    from thriftlm.review import session
    from thriftlm.review.live import LiveView
    from thriftlm.review.report import show
    from thriftlm.review.tables import plain_console

    console = plain_console(sys.stderr if as_json else sys.stdout)
    console.print(f"storage {sitting.folder}", soft_wrap=True, markup=False)
    found = session.answered(sitting)
    if found is None:
        # Ray prints its warnings on stdout, which belongs to the answer.
        with redirect_stdout(sys.stderr), LiveView(sitting.space) as view:
            found = session.hold(sitting, view)
    if as_json:
        emit(found.model_dump(mode="json", exclude={"trials": {"__all__": {"point"}}}))
    else:
        show(found, sitting, console)
    if found.status == "interrupted":
        return 130
    return 0 if found.best is not None else 1


app.command()(searches_command.searches)
app.command()(searches_command.status)
app.command()(searches_command.stop)


@app.command()
def train(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run file, such as the best.yaml of a search.")
    ],
    output: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder of checkpoints, or a URL (s3://...). Default: one in the storage folder.",
        ),
    ] = None,
    branch_from: Annotated[
        str | None,
        typer.Option(
            metavar="CKPT",
            help="Begin with the steps of another run's checkpoint, taken before its rate fell.",
        ),
    ] = None,
    storage: StorageOption = None,
    overrides: Annotated[list[str], overrides_like("optim.lr=0.002")] = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Train one run, without Ray, and go on where it stopped.

    Several workers are started by torchrun.
    """
    from thriftlm.config_file import ConfigFile
    from thriftlm.review.single_run import branch, checkpoint_location, train_alone
    from thriftlm.search.history.storage import storage as storage_at
    from thriftlm.spec import RunSpec

    trunk = checkpoint_location(branch_from)
    spec = branch(ConfigFile.read(run, overrides).parse(RunSpec), trunk)
    place = storage_at(storage)
    folder = checkpoint_location(output) or place.runs / f"{run.stem}-{spec.trial_id}"
    summary = train_alone(spec, cache=place.data, output=folder, branch_from=trunk, quiet=as_json)
    if summary is None:  # not the first rank
        return
    if as_json:
        emit(summary)
    if summary["status"] == "stopped":
        sys.exit(130)
    sys.exit(0 if summary["status"] == "done" else 1)


@app.command()
def generate(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CKPT",
            help="A checkpoint, a run's folder (its newest one), or a Hugging Face folder.",
        ),
    ],
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What the model is to continue.")],
    tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Most new tokens.")] = 64,
    temperature: Annotated[
        float, typer.Option(metavar="T", help="0 takes the likeliest token each time.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(metavar="P", help="Share of the probability that is drawn from.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the draws.")] = 0,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Run the whole text again for every token.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Continue a text with a trained model, on the CPU: a smoke test of a checkpoint."""
    from thriftlm.release.checkpoints import open_model
    from thriftlm.release.continuation import Sampling, continue_text

    how = Sampling(tokens, temperature, top_p, seed, use_cache=not no_cache)
    found = continue_text(
        open_model(checkpoint),
        text,
        how,
        lambda piece: None if as_json else print(piece, end="", flush=True),
    )
    emit(found) if as_json else print()


@app.command()
def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="CKPT", help="A checkpoint, or a run's folder (its newest one)."),
    ],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder for the model.")],
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Of the weights in the folder.")
    ] = "float32",
    as_json: Json = False,
) -> None:
    """Write a trained model as a folder that Hugging Face transformers loads.

    Weights as safetensors, configuration, tokenizer, and a card that says how it was trained.
    """
    from thriftlm.release.checkpoints import open_model
    from thriftlm.release.export import export as export_model

    found = export_model(open_model(checkpoint), folder, dtype)
    if as_json:
        emit(found)
        return
    print(f"{found['folder']}: {found['architecture']}, {found['exported_params']:,} parameters")
    for note in found["notes"]:
        print(f"note: {note}")


app.command()(planning_commands.estimate)
app.command()(planning_commands.calibrate)
app.command()(plan_command.plan)
app.command()(report_command.report)
app.command()(simulate_command.simulate)


@app.command()
def models(as_json: Json = False) -> None:
    """List the published model shapes, with parameters and FLOPs per token."""
    from thriftlm.review.listings import model_rows, show_models

    rows = model_rows()
    emit(rows) if as_json else show_models(rows)


@app.command()
def gpus(
    refresh: Annotated[
        Path | None,
        typer.Option(
            "--refresh",
            metavar="OUT.csv",
            help="Write today's list prices there instead (needs gpuhunt).",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the hardware of the catalog, with prices and their age."""
    from thriftlm.review.listings import gpu_rows, refreshed, show_gpus, show_refreshed

    if refresh:
        found = refreshed(refresh)
        emit(found) if as_json else show_refreshed(found)
        return
    rows = gpu_rows()
    emit(rows) if as_json else show_gpus(rows)


@app.command()
def spaces(as_json: Json = False) -> None:
    """List the shipped search spaces, with what they vary."""
    from thriftlm.review.listings import show_spaces, space_rows

    rows = space_rows()
    emit(rows) if as_json else show_spaces(rows)


@app.command()
def doctor(storage: StorageOption = None, as_json: Json = False) -> None:
    """Show what this machine can run, and measure its arithmetic and memory."""
    from thriftlm.review.doctor import examine, show_examination
    from thriftlm.search.history.storage import storage as storage_at

    found = examine(storage_at(storage))
    emit(found) if as_json else show_examination(found)


app.add_typer(data, name="data")
