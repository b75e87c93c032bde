"""The `data` commands: token shards built ahead, and their integrity."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thriftlm.review.options import Json, StorageOption

if TYPE_CHECKING:
    from thriftlm.spec import DataSpec
    from thriftlm.training.mixture import Mixture
    from thriftlm.training.shards import OnProgress, Shards

data = typer.Typer(help="Build token shards ahead, or check their integrity.")


@data.command("build")
def build(
    corpus: Annotated[
        str,
        typer.Option(
            metavar="CORPUS",
            help="python-stdlib; path or glob of text, JSONL or Parquet (#field names the text's); "
            "hf://OWNER/NAME?config=C&split=S; or a mixture, '0.7 A + 0.3 B'.",
        ),
    ] = "python-stdlib",
    tokenizer: Annotated[
        str,
        typer.Option(
            metavar="TOKENIZER",
            help="bpe:N (trained on the corpus), path of a tokenizer.json, or a hub name.",
        ),
    ] = "bpe:4096",
    validation_fraction: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of the documents to hold out.")
    ] = 0.02,
    max_bytes: Annotated[
        int | None,
        typer.Option(metavar="N", help="Bytes of text to take of each corpus. Default: all."),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Take corpus and all from this run file instead."),
    ] = None,
    processes: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Processes that tokenize. Default: this one alone, by a thread a core.",
        ),
    ] = 1,
    storage: StorageOption = None,
    as_json: Json = False,
) -> None:
    """Build the token shards of a corpus, or find them built."""
    from thriftlm.config_file import ConfigFile
    from thriftlm.search.history.storage import storage as storage_at
    from thriftlm.spec import DataSpec, RunSpec
    from thriftlm.training.mixture import build as build_all

    if run is not None:
        wanted = ConfigFile.read(run).parse(RunSpec).data
    else:
        given: dict[str, Any] = {"corpus": corpus, "tokenizer": tokenizer, "max_bytes": max_bytes}
        given |= {"validation_fraction": validation_fraction, "seq_len": 1}
        wanted = ConfigFile("data build", given).parse(DataSpec)
    begin = time.perf_counter()
    stages: list[str] = []
    with told(stages) as tell:
        mixture = build_all(wanted, storage_at(storage).data, tell, processes)
    found = described(wanted, mixture)
    found |= {"seconds": round(time.perf_counter() - begin, 1), "built": "tokenizing" in stages}
    print(json.dumps(found, indent=2)) if as_json else show(found)


@data.command("verify")
def verify(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder of shards.")],
    as_json: Json = False,
) -> None:
    """Compare every shard with its checksum; exit code 1 where one is damaged."""
    from thriftlm.training.integrity import verify as examine

    with told([]) as tell:
        found = examine(folder, lambda done: tell("reading", done))
    if as_json:
        print(found.model_dump_json(indent=2))
    elif found.status == "whole":
        print(
            f"{folder}: whole: {found.files} files, {found.size_bytes:,} bytes, "
            f"{found.train_tokens + found.validation_tokens:,} tokens"
        )
    for damage in () if as_json else found.damage:
        print(f"{folder}/{damage.file}: damaged: expected {damage.expected}, found {damage.found}")
    if found.status == "damaged":
        if not as_json:
            print(f"delete {folder} and build it again")
        raise typer.Exit(1)


@contextmanager
def told(stages: list[str]) -> Iterator["OnProgress"]:
    """A listener to progress: a line that changes on a terminal, a line a stage elsewhere."""
    from thriftlm.review.tables import plain_console

    console = plain_console(sys.stderr)
    with console.status("reading") as status:

        def tell(stage: str, done: float) -> None:
            if console.is_terminal:
                status.update(f"{stage} {done:.0%}")
            elif stage not in stages:
                console.print(stage)
            stages.append(stage) if stage not in stages else None

        yield tell


def described(wanted: "DataSpec", mixture: "Mixture") -> dict[str, Any]:
    """What the shards of a corpus or mixture hold, and where they lie."""
    parts = [
        described_part(part) | {"weight": weight}
        for part, weight in zip(mixture.parts, mixture.weights, strict=True)
    ]
    counts = ("documents", "train_tokens", "validation_tokens")
    return {
        "corpus": wanted.corpus,
        "folder": parts[0]["folder"] if len(parts) == 1 else None,
        "tokenizer": wanted.tokenizer,
        "vocab": mixture.vocab,
        **{name: sum(part[name] for part in parts) for name in counts},
        "unique_tokens": mixture.unique_tokens,
        "bytes_per_token": round(mixture.bytes_per_token("train"), 3),
        "parts": parts,
    }


def described_part(shards: "Shards") -> dict[str, Any]:
    """What one folder of shards holds."""
    splits = shards.meta.splits
    return {
        "corpus": shards.meta.corpus,
        "folder": str(shards.path),
        "documents": sum(split.documents for split in splits.values()),
        "train_tokens": splits["train"].tokens,
        "validation_tokens": splits["validation"].tokens,
        "bytes_per_token": round(shards.bytes_per_token("train"), 3),
        "text_bytes": sum(split.text_bytes for split in splits.values()),
    }


def show(found: dict[str, Any]) -> None:
    """Print what was built."""
    parts = found["parts"]
    text_bytes = sum(part["text_bytes"] for part in parts)
    lines = {
        "tokenizer": f"{found['tokenizer']}, {found['vocab']:,} ids",
        "documents": f"{found['documents']:,}, {text_bytes:,} bytes",
        "tokens": f"{found['train_tokens']:,} to train on, {found['validation_tokens']:,} held out",
        "bytes a token": f"{found['bytes_per_token']}",
    }
    if len(parts) > 1:
        lines["until repeats"] = f"{found['unique_tokens']:,} tokens"
    for part in parts:
        weight = f"{part['weight']:.4g} " if len(parts) > 1 else ""
        lines[f"{weight}{part['corpus']}"] = part["folder"]
    lines["took"] = f"{found['seconds']} s" if found["built"] else "nothing: they were there"
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:<{width}}  {value}")
