"""Whether a folder of token shards is as it was written."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from pydantic import ValidationError
from tokenizers import Tokenizer

from thriftlm.spec import InputError, Spec
from thriftlm.training.shard_files import META, SPLITS, TOKENIZER, ShardFile, ShardsMeta, sha256_of
from thriftlm.training.shards import read_meta
from thriftlm.training.tokenizer import vocab_size


class Damage(Spec):
    """One file that is not as it was written."""

    file: str
    """Its name in the folder."""
    expected: str
    """What it was written with."""
    found: str
    """What is there."""


class Integrity(Spec):
    """What a check of all files gave."""

    folder: str
    """Where they lie."""
    status: Literal["whole", "damaged"]
    """Whether there is damage."""
    files: int
    """Files of tokens."""
    size_bytes: int
    """Their length together, as written."""
    train_tokens: int
    """Tokens of the training split."""
    validation_tokens: int
    """Tokens of the validation split."""
    damage: tuple[Damage, ...]
    """Every file that is damaged."""


def verify(folder: Path, on_progress: Callable[[float], None] | None = None) -> Integrity:
    """Read all files of a folder of shards and compare them with what was written.

    Args:
        folder: what `data build` made.
        on_progress: called with the share of the bytes that is read.

    Raises:
        InputError: no folder of shards, or of another version.
    """
    try:
        meta = read_meta(folder)
    except InputError as error:
        if not isinstance(error.__cause__, ValidationError):
            raise
        return _unreadable(folder)
    files = [file for name in SPLITS for file in meta.splits[name].files]
    whole = sum(file.size_bytes for file in files)
    found: list[Damage] = []
    done = 0
    for file in files:
        found += _damage(folder / file.name, file)
        done += file.size_bytes
        if on_progress is not None:
            on_progress(done / max(1, whole))
    found += _tokenizer_damage(folder, meta)
    return Integrity(
        folder=str(folder),
        status="damaged" if found else "whole",
        files=len(files),
        size_bytes=whole,
        train_tokens=meta.splits["train"].tokens,
        validation_tokens=meta.splits["validation"].tokens,
        damage=tuple(found),
    )


def _unreadable(folder: Path) -> Integrity:
    damage = Damage(file=META, expected="the metadata of token shards", found="something else")
    return Integrity(
        folder=str(folder),
        status="damaged",
        files=0,
        size_bytes=0,
        train_tokens=0,
        validation_tokens=0,
        damage=(damage,),
    )


def _damage(path: Path, written: ShardFile) -> Iterator[Damage]:
    try:
        size = path.stat().st_size
        if size != written.size_bytes:
            expected, found = f"{written.size_bytes} bytes", f"{size} bytes"
        elif (content := sha256_of(path)) != written.sha256:
            expected, found = f"sha256 {written.sha256}", f"sha256 {content}"
        else:
            return
    except OSError as error:
        expected, found = f"{written.size_bytes} bytes", str(error.strerror)
    yield Damage(file=written.name, expected=expected, found=found)


def _tokenizer_damage(folder: Path, meta: ShardsMeta) -> Iterator[Damage]:
    expected = f"a tokenizer with {meta.vocab} ids"
    try:
        vocab = vocab_size(Tokenizer.from_buffer((folder / TOKENIZER).read_bytes()))
    except OSError as error:
        yield Damage(file=TOKENIZER, expected=expected, found=str(error.strerror))
    except ValueError as error:
        yield Damage(file=TOKENIZER, expected=expected, found=f"no tokenizer: {error}")
    else:
        if vocab != meta.vocab:
            yield Damage(file=TOKENIZER, expected=expected, found=f"one with {vocab}")
