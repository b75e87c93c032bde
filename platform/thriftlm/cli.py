"""The command line. Commands import what they need, so that `--help` answers at once."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="thriftlm",
    help="Which small language model, on which GPUs, sharded how, for the lowest loss per dollar.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Overrides = Annotated[
    list[str], typer.Option("--set", help="Override one value: space.model.n_layers=[8,12].")
]
StorageOption = Annotated[
    str | None,
    typer.Option(
        "--storage",
        help="Folder of searches, shards and tracking; $THRIFTLM_STORAGE, else ~/thriftlm.",
    ),
]


def main() -> None:
    """Run the command line: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    from thriftlm.spec import InputError

    try:
        app()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def emit(value: Any) -> None:
    """Print one JSON document on stdout."""
    print(json.dumps(value, indent=2, default=str))


@app.command()
def search(
    space: Annotated[str, typer.Argument(help="A space file, or the name of a shipped one.")],
    name: Annotated[str | None, typer.Option(help="Name of the search; the space's own.")] = None,
    storage: StorageOption = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster; else $RAY_ADDRESS, else this machine.")
    ] = None,
    tracking_uri: Annotated[
        str | None, typer.Option(help="MLflow server; a database in the storage folder.")
    ] = None,
    overrides: Overrides = [],  # noqa: B006 (typer reads it, nobody writes it)
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a begun search.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count the points and show the budgets.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Search a space for the best model and system."""
    from thriftlm.search.space import load_space

    found = load_space(space, overrides)
    if dry_run:
        from thriftlm.review.dry_run import describe_space, show_space

        described = describe_space(found)
        emit(described) if as_json else show_space(described)
        return
    from thriftlm.review.session import Sitting
    from thriftlm.search.storage import storage as storage_at

    place = storage_at(storage)
    sitting = Sitting(
        space=found,
        source=space,
        storage=place,
        name=name or found.name,
        tracking_uri=tracking_uri or place.tracking_uri,
        address=address,
        resume=resume,
    )
    sys.exit(_hold(sitting, as_json))


def _hold(sitting: Any, as_json: bool) -> int:
    from rich.console import Console

    from thriftlm.review import session
    from thriftlm.review.live import LiveView
    from thriftlm.review.report import show

    console = Console(highlight=False, stderr=as_json)
    console.print(f"storage  {sitting.folder}", soft_wrap=True)
    found = session.answered(sitting)
    if found is None:
        with LiveView(sitting.space) as view:
            found = session.hold(sitting, view)
    if as_json:
        emit(found.model_dump(mode="json", exclude={"trials": {"__all__": {"point"}}}))
    else:
        show(found, sitting, console)
    if found.status == "interrupted":
        return 130
    return 0 if found.best is not None else 1


@app.command()
def train(
    run: Annotated[Path, typer.Argument(help="A run file, such as the best.yaml of a search.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder of checkpoints; under the storage folder.")
    ] = None,
    storage: StorageOption = None,
    overrides: Overrides = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Train one run, without Ray; go on where it stopped. Under torchrun with several workers."""
    from thriftlm.config_file import ConfigFile
    from thriftlm.review.single_run import train_alone
    from thriftlm.search.storage import storage as storage_at
    from thriftlm.spec import RunSpec

    spec = ConfigFile.read(run, overrides).parse(RunSpec)
    place = storage_at(storage)
    folder = (output or place.runs / f"{run.stem}-{spec.trial_id}").resolve()
    summary = train_alone(spec, cache=place.data, output=folder, quiet=as_json)
    if summary is None:  # not the first rank
        return
    if as_json:
        emit(summary)
    if summary["status"] == "stopped":
        sys.exit(130)
    sys.exit(0 if summary["status"] == "done" else 1)


@app.command()
def models(as_json: Json = False) -> None:
    """List the published shapes, with what they count."""
    from thriftlm.review.listings import model_rows, show_models

    rows = model_rows()
    emit(rows) if as_json else show_models(rows)


@app.command()
def gpus(as_json: Json = False) -> None:
    """List the hardware of the catalog, with its prices and their age."""
    from thriftlm.review.listings import gpu_rows, show_gpus

    rows = gpu_rows()
    emit(rows) if as_json else show_gpus(rows)


@app.command()
def spaces(as_json: Json = False) -> None:
    """List the shipped search spaces."""
    from thriftlm.review.listings import show_spaces, space_rows

    rows = space_rows()
    emit(rows) if as_json else show_spaces(rows)


@app.command()
def doctor(storage: StorageOption = None, as_json: Json = False) -> None:
    """Show what this machine can run, and how fast its arithmetic and memory are."""
    from thriftlm.review.doctor import examine, show_examination
    from thriftlm.search.storage import storage as storage_at

    found = examine(storage_at(storage))
    emit(found) if as_json else show_examination(found)


data = typer.Typer(help="Token shards: build them ahead, check their integrity.")
app.add_typer(data, name="data")


@data.command("build")
def data_build(
    corpus: Annotated[str, typer.Option(help="Built-in name, or path or glob.")] = "python-stdlib",
    tokenizer: Annotated[str, typer.Option(help="bpe:N, a path or a hub name.")] = "bpe:4096",
    storage: StorageOption = None,
    as_json: Json = False,
) -> None:
    """Build the token shards of a corpus, or find them built."""
    from thriftlm.review.listings import build_shards
    from thriftlm.search.storage import storage as storage_at

    found = build_shards(corpus, tokenizer, storage_at(storage).data)
    emit(found) if as_json else print("\n".join(f"{k:<14} {v}" for k, v in found.items()))


@data.command("verify")
def data_verify(folder: Annotated[Path, typer.Argument(help="A folder of shards.")]) -> None:
    """Compare every shard with its checksum."""
    from thriftlm.training.shards import Shards

    Shards.open(folder).verify()
    print(f"{folder}: whole")
