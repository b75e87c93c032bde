"""The folder that holds token shards: Arrow files, their metadata, writing and mapping them."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from thriftlm.spec import InputError, Spec
from thriftlm.training.sources import SplitName

FORMAT_VERSION = 1
CHUNK_TOKENS = 1 << 22
"""Tokens in one record batch; only the last of a split has fewer."""
FILE_CHUNKS = 32
"""Record batches in one file."""
META = "meta.json"
TOKENIZER = "tokenizer.json"
SPLITS: tuple[SplitName, ...] = ("train", "validation")

Dtype = Literal["uint16", "uint32"]
TokenChunk = NDArray[np.uint16] | NDArray[np.uint32]


class ShardFile(Spec):
    """One Arrow file."""

    name: str
    """Name in the folder."""
    size_bytes: int
    """Its length."""
    sha256: str
    """Hash of its content."""


class SplitMeta(Spec):
    """One split on disk."""

    tokens: int
    """Tokens, with one end token per document."""
    text_bytes: int
    """UTF-8 bytes of the text behind them."""
    documents: int
    """Documents."""
    files: tuple[ShardFile, ...]
    """Its files, in order."""


class ShardsMeta(Spec):
    """What a folder of shards holds, as its meta.json says."""

    version: int
    """Version of this layout."""
    corpus: str
    """Corpus as it was given."""
    corpus_fingerprint: str
    """Hash over the documents."""
    tokenizer: str
    """Tokenizer as it was given; the tokenizer itself lies beside as tokenizer.json."""
    validation_fraction: float
    """Share of documents held out."""
    vocab: int
    """Ids the tokenizer has."""
    end_id: int
    """Id that ends a document."""
    dtype: Dtype
    """Type of one token."""
    chunk_tokens: int
    """Tokens in a record batch."""
    splits: dict[SplitName, SplitMeta]
    """Training and validation."""


class TokenArray:
    """The tokens of one split, in memory-mapped chunks of equal length (the last may be shorter).

    Args:
        chunks: read-only views into the files.
        chunk_tokens: tokens in each chunk but the last.
    """

    def __init__(self, chunks: list[TokenChunk], chunk_tokens: int) -> None:
        self.chunks = chunks
        self.chunk_tokens = chunk_tokens
        self._tokens = sum(len(chunk) for chunk in chunks)

    def __len__(self) -> int:
        return self._tokens

    def gather(self, starts: Iterable[int], length: int) -> NDArray[np.int64]:
        """The windows of `length` tokens from each start, copied, as (windows, length).

        Raises:
            IndexError: a window does not lie inside the split.
        """
        begins = [int(start) for start in starts]
        if begins and (min(begins) < 0 or max(begins) + length > len(self)):
            raise IndexError(f"a window of {length} tokens leaves the {len(self)} tokens there are")
        rows = np.empty((len(begins), length), np.int64)
        for row, begin in zip(rows, begins, strict=True):
            self.copy(begin, row)
        return rows

    def copy(self, begin: int, row: NDArray[np.int64]) -> None:
        """Fill a row with the tokens from `begin` on, which lie inside the split."""
        filled = 0
        while filled < len(row):
            chunk, offset = divmod(begin + filled, self.chunk_tokens)
            part = self.chunks[chunk][offset : offset + len(row) - filled]
            row[filled : filled + len(part)] = part
            filled += len(part)


class SplitWriter:
    """Writes the tokens of one split in record batches of `CHUNK_TOKENS`."""

    def __init__(self, folder: Path, split: SplitName, dtype: Dtype) -> None:
        self.text_bytes = 0
        self.documents = 0
        self._folder = folder
        self._split = split
        self._buffer: TokenChunk = np.empty(CHUNK_TOKENS, dtype)
        self._filled = 0  # of the buffer
        self._chunks = 0
        self._names: list[str] = []
        self._arrow: Any = None  # pyarrow is untyped

    def add(self, tokens: TokenChunk) -> None:
        """Append tokens."""
        while len(tokens):
            part = tokens[: CHUNK_TOKENS - self._filled]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            tokens = tokens[len(part) :]
            if self._filled == CHUNK_TOKENS:
                self._write_chunk()

    def finish(self) -> SplitMeta:
        """Write what is left; what lies on disk then. The writer is spent."""
        tokens = self._chunks * CHUNK_TOKENS + self._filled
        if self._filled:
            self._write_chunk()
        self._close_file()
        files = tuple(_finished(self._folder / name) for name in self._names)
        return SplitMeta(
            tokens=tokens, text_bytes=self.text_bytes, documents=self.documents, files=files
        )

    def _write_chunk(self) -> None:
        tokens = pa.array(self._buffer[: self._filled])
        batch = pa.record_batch([tokens], names=["tokens"])
        if self._chunks % FILE_CHUNKS == 0:
            self._close_file()
            self._names.append(f"{self._split}-{len(self._names):05}.arrow")
            self._arrow = pa.ipc.new_file(self._folder / self._names[-1], batch.schema)
        self._arrow.write_batch(batch)
        self._chunks += 1
        self._filled = 0

    def _close_file(self) -> None:
        if self._arrow is not None:
            self._arrow.close()
            self._arrow = None


def _finished(path: Path) -> ShardFile:
    sync(path)
    return ShardFile(name=path.name, size_bytes=path.stat().st_size, sha256=sha256_of(path))


def map_split(path: Path, meta: ShardsMeta, name: SplitName) -> TokenArray:
    """The tokens of a split, mapped.

    Raises:
        InputError: a file is missing, or is not what the metadata says.
    """
    files = meta.splits[name].files
    chunks = [chunk for file in files for chunk in _map_file(path / file.name, file.size_bytes)]
    tokens = TokenArray(chunks, meta.chunk_tokens)
    if len(tokens) != meta.splits[name].tokens:
        raise damaged(path, f"{len(tokens)} {name} tokens instead of {meta.splits[name].tokens}")
    return tokens


def _map_file(path: Path, size_bytes: int) -> list[TokenChunk]:
    try:
        found_bytes = path.stat().st_size
        if found_bytes != size_bytes:
            raise damaged(path, f"it has {found_bytes} bytes instead of {size_bytes}")
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
    except (OSError, pa.ArrowInvalid) as error:
        raise damaged(path, str(error)) from error
    return [batch.column(0).to_numpy(zero_copy_only=True) for batch in batches]


def damaged(path: Path, what: str) -> InputError:
    """The error for a file or folder of shards that is not as it was written."""
    folder = path if path.is_dir() else path.parent
    return InputError(f"{path}: damaged token shards: {what}; delete {folder} to have it rebuilt")


def write_synced(path: Path, text: str) -> None:
    """Write a text file, on disk when this returns."""
    path.write_text(text, encoding="utf-8")
    sync(path)


def replace(path: Path, text: str) -> None:
    """Write a text file whole or not at all, whoever else writes it; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}")
    write_synced(new, text)
    new.replace(path)


def sync(path: Path) -> None:
    """Put a file, or the entries of a folder, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
