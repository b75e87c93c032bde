"""Token shards: a corpus as memory-mapped Arrow files, cached by content."""

import fcntl
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Self

from pydantic import ValidationError

from thriftlm.corpora import HUB
from thriftlm.spec import DataSpec, InputError, digest
from thriftlm.training.corpus import Fingerprint, Survey, documents, split, survey, text_hash
from thriftlm.training.encoding import Encoder, encode_in_order, groups
from thriftlm.training.hub import pinned
from thriftlm.training.shard_files import (
    CHUNK_TOKENS,
    FORMAT_VERSION,
    META,
    SPLITS,
    TOKENIZER,
    Dtype,
    ShardsMeta,
    SplitWriter,
    TokenArray,
    damaged,
    map_split,
    sync,
    write_synced,
)
from thriftlm.training.sources import SplitName
from thriftlm.training.tokenizer import end_id, make_tokenizer, tokenizer_identity, vocab_size

TOKENIZER_BYTES = 1 << 30
"""UTF-8 bytes of text that a tokenizer is trained on at most.

BPE holds every distinct word in memory, so that a corpus that is larger than memory cannot be
counted whole; longer ones give a sample.
"""

OnProgress = Callable[[str, float], None]


class Shards:
    """A complete folder of token shards, opened."""

    def __init__(self, path: Path, meta: ShardsMeta) -> None:
        self.path = path
        self.meta = meta
        self._tokens = {name: map_split(path, meta, name) for name in SPLITS}

    @classmethod
    def open(cls, path: Path) -> Self:
        """The shards in a folder; files are mapped, not read.

        Raises:
            InputError: not a folder of shards, of another version, or a file is missing or has
                another length than it was written with.
        """
        return cls(path, read_meta(path))

    def tokens(self, split: SplitName) -> TokenArray:
        """The tokens of a split, without a copy."""
        return self._tokens[split]

    def n_tokens(self, split: SplitName) -> int:
        """Tokens of a split, end tokens included."""
        return self.meta.splits[split].tokens

    def bytes_per_token(self, split: SplitName) -> float:
        """UTF-8 bytes of text per token of a split, end tokens included.

        Bits per byte = nats per token / ln 2 / bytes per token; exact over the whole split.
        """
        return self.meta.splits[split].text_bytes / self.meta.splits[split].tokens

    @property
    def vocab(self) -> int:
        """Ids of the tokenizer; a model's vocabulary must not be smaller."""
        return self.meta.vocab

    @property
    def unique_tokens(self) -> int:
        """Tokens in one epoch: those of the training split."""
        return self.n_tokens("train")

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer.json."""
        return self.path / TOKENIZER


def read_meta(path: Path) -> ShardsMeta:
    """What a folder of shards says that it holds.

    Raises:
        InputError: not a folder of shards, or of another version.
    """
    try:
        text = (path / META).read_text(encoding="utf-8")
    except OSError as error:
        if path.is_dir():
            raise damaged(path / META, str(error.strerror)) from error
        raise InputError(f"{path}: no token shards here: {error.strerror}") from error
    try:
        meta = ShardsMeta.model_validate_json(text)
    except ValidationError as error:
        raise damaged(path / META, "it is not the metadata of token shards") from error
    if meta.version != FORMAT_VERSION:
        raise InputError(
            f"{path}: token shards of version {meta.version}, this thriftlm reads "
            f"{FORMAT_VERSION}; build them again"
        )
    return meta


def build(
    data: DataSpec, cache: Path, on_progress: OnProgress | None = None, processes: int = 1
) -> Shards:
    """The shards of one corpus: those in the cache, or built now.

    The folder in the cache is named by the hash of the documents (of a hub's dataset: name, commit,
    options and `max_bytes`), the tokenizer and the validation fraction; a tokenizer from the hub
    counts by its name. A folder of that name is complete, since it is renamed into place: a kill
    leaves only a `.building-` folder, which the next build removes. Of several builders of the same
    shards one builds, the others wait for it. The corpus streams by: at most twice, and once more
    for `bpe:N`.

    Args:
        data: corpus (no mixture), tokenizer and fractions.
        cache: folder for shards; created when missing.
        on_progress: called with a stage and the fraction of it that is done.
        processes: how many encode, see `encode_in_order`; the shards are the same.

    Raises:
        InputError: bad corpus or tokenizer, a split shorter than one sequence, or a cache that
            cannot be written.
    """
    report = on_progress or (lambda stage, fraction: None)
    report("reading corpus", 0.0)
    with storage_errors(cache):
        data, facts = surveyed(data, cache)
        key = _key(data, facts)
        if not (cache / key).exists():
            cache.mkdir(parents=True, exist_ok=True)
            _remove_dead_builds(cache)
            with lock(cache, key, report):
                if not (cache / key).exists():
                    _build(data, facts, cache, key, report, processes)
    shards = Shards.open(cache / key)
    check_length(shards, data)
    return shards


def surveyed(data: DataSpec, cache: Path) -> tuple[DataSpec, Survey]:
    """The data with the corpus pinned to a commit where it is a hub's, and its survey.

    Raises:
        InputError: the corpus cannot be read or holds no text.
    """
    if data.corpus.startswith(HUB):
        data = data.model_copy(update={"corpus": pinned(data.corpus, cache)})
    return data, survey(data.corpus, data.max_bytes, cache)


def check_length(shards: Shards, data: DataSpec) -> None:
    """Nothing, where each split has at least one sequence: `seq_len` inputs and one more target.

    Raises:
        InputError: a split is shorter.
    """
    for name in SPLITS:
        if shards.n_tokens(name) < data.seq_len + 1:
            raise InputError(
                f"data.corpus '{data.corpus}' is too short: its {name} split has "
                f"{shards.n_tokens(name)} tokens and one sequence needs seq_len + 1 = "
                f"{data.seq_len + 1}; give more text, a smaller data.seq_len or another "
                "data.validation_fraction"
            )


def _key(data: DataSpec, facts: Survey) -> str:
    return digest(
        {
            "version": FORMAT_VERSION,
            "corpus": facts.fingerprint,
            "tokenizer": tokenizer_identity(data.tokenizer),
            "validation_fraction": data.validation_fraction,
        }
    )


def _build(
    data: DataSpec, facts: Survey, cache: Path, key: str, report: OnProgress, processes: int
) -> None:
    """Build in a folder beside the final one, then rename. The caller holds the lock of the key."""
    folder = cache / f".building-{key}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        meta = _write(data, facts, folder, report, processes)
        write_synced(folder / META, meta.model_dump_json(indent=2))
        sync(folder)
        folder.rename(cache / key)
        sync(cache)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(
    data: DataSpec, facts: Survey, folder: Path, report: OnProgress, processes: int
) -> ShardsMeta:
    texts = training_texts(data, facts, TOKENIZER_BYTES, partial(report, "training tokenizer"))
    tokenizer = make_tokenizer(data, texts)
    end, vocab = end_id(tokenizer, data.tokenizer), vocab_size(tokenizer)
    dtype: Dtype = "uint16" if vocab <= 2**16 else "uint32"
    write_synced(folder / TOKENIZER, tokenizer.to_str())
    seen = Fingerprint()
    parts = _parts(data, facts, seen, partial(report, "tokenizing"))
    writers = {name: SplitWriter(folder, name, dtype) for name in SPLITS}
    encoder = Encoder(tokenizer, end, dtype)
    with closing(encode_in_order(encoder, groups(parts), processes)) as encoded:
        for part in (part for found in encoded for part in found):
            writers[part.split].add(part.tokens)
            writers[part.split].text_bytes += part.text_bytes
            writers[part.split].documents += part.documents
    if facts.is_counted and seen.value != facts.fingerprint:
        raise InputError(f"data.corpus '{data.corpus}' changed while it was read; start again")
    return ShardsMeta(
        version=FORMAT_VERSION,
        corpus=data.corpus,
        corpus_fingerprint=facts.fingerprint,
        tokenizer=data.tokenizer,
        validation_fraction=data.validation_fraction,
        vocab=vocab,
        end_id=end,
        dtype=dtype,
        chunk_tokens=CHUNK_TOKENS,
        splits={name: writer.finish() for name, writer in writers.items()},
    )


def training_texts(
    data: DataSpec, facts: Survey, most_bytes: int, report: Callable[[float], None]
) -> Iterator[str]:
    """Texts of the training split for a tokenizer, about `most_bytes` of UTF-8 at most.

    All of them where they are fewer; else a sample by hash, or, where nobody has counted
    the corpus, those at its beginning.
    """
    one_of = max(1, -(-facts.text_bytes // most_bytes))
    taken = 0
    for name, text in _parts(data, facts, Fingerprint(), report):
        if name == "train" and (one_of == 1 or text_hash(text) % one_of == 0):
            yield text
            taken += len(text.encode())
            if taken >= most_bytes and not facts.is_counted:
                return


def _parts(
    data: DataSpec, facts: Survey, seen: Fingerprint, report: Callable[[float], None]
) -> Iterator[tuple[SplitName, str]]:
    """Split and text of every part of every document; tells every hundredth of the way."""
    whole = facts.text_bytes or data.max_bytes or 0
    done = told = 0
    for document in documents(data.corpus, data.max_bytes):
        seen.add(document)
        yield from split(document.text, facts, data.validation_fraction)
        done += len(document.text.encode())
        if whole and done - told >= whole / 100:
            told = done
            report(min(1.0, done / whole))


@contextmanager
def lock(cache: Path, key: str, report: OnProgress | None = None) -> Iterator[None]:
    """Hold the lock of a key; the system lets go of it when the process dies."""
    with (cache / f".lock-{key}").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if report is not None:
                report("waiting for another process that builds the same shards", 0.0)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_dead_builds(cache: Path) -> None:
    """Remove half-built folders whose builder is gone, that is, whose lock is free."""
    for folder in cache.glob(".building-*"):
        with (cache / folder.name.replace(".building-", ".lock-")).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def storage_errors(cache: Path) -> Iterator[None]:
    """What the system says of a cache that cannot be written, as an InputError."""
    try:
        yield
    except OSError as error:  # those of reading the corpus are InputError already
        raise InputError(
            f"cannot write token shards to {cache}: {error.strerror or error}; free space there, "
            "correct its permissions, or choose another folder"
        ) from error
