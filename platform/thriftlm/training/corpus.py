"""Documents of a corpus in a fixed order, and which of them are held out for validation."""

import hashlib
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from thriftlm.corpora import BUILT_IN_CORPORA, HUB, hub_corpus, path_and_field
from thriftlm.spec import InputError, Spec, digest
from thriftlm.training.hub import stream
from thriftlm.training.shard_files import replace
from thriftlm.training.sources import Document, SplitName, find_sources, read

SETTLED_NS = 2_000_000_000
"""Age from which the time of a file tells whether it has changed since: such clocks are coarse."""


class Survey(Spec):
    """What one pass over a corpus tells, or what its commit stands for."""

    fingerprint: str
    """SHA-256 over the names and texts of all documents, in order; of a hub's dataset, over its
    name, commit and options."""
    documents: int
    """Documents that are not blank; 0 where nobody has counted."""
    text_bytes: int
    """UTF-8 bytes of all texts; 0 where nobody has counted."""
    lowest_hash: int
    """Smallest text hash; 0 where not known."""
    highest_hash: int
    """Largest text hash, equal to the smallest where all texts are the same; 2^64 - 1 where not
    known."""
    is_counted: bool = True
    """Whether it comes from a pass over the corpus."""


class Fingerprint:
    """A hash over documents, added in order."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, document: Document) -> None:
        """Take a document in."""
        name = document.name.encode("utf-8", "surrogateescape")  # a file name may be no UTF-8
        self._hash.update(len(name).to_bytes(8, "big") + name + _sha256(document.text))

    @property
    def value(self) -> str:
        """Hexadecimal digits of the hash so far."""
        return self._hash.hexdigest()


def documents(corpus: str, max_bytes: int | None = None) -> Iterator[Document]:
    """The documents of a corpus, in the same order each time; blank ones are left out.

    `python-stdlib` is the library of the running interpreter, source and docs, without installed
    packages; files that are no UTF-8 (tests of codecs) are left out there and nowhere else.
    `hf://` is streamed from the hub. Otherwise a path or a glob (`**` crosses folders): a folder
    stands for all text, JSONL and Parquet files below it; JSONL (also .gz and .zst) has one object
    with a "text" field a line, Parquet a column of that name, `#content` at the end of the corpus
    names another; any other file is one document. Text files are read whole, so what is larger
    than memory belongs into JSONL or Parquet.

    Args:
        corpus: one corpus, no mixture.
        max_bytes: end with the document that reaches so many UTF-8 bytes of text.

    Raises:
        InputError: nothing is there, or it cannot be read (at once, or when the walk gets there).
    """
    if corpus.startswith(HUB):
        found = stream(corpus)
    else:
        path, field = path_and_field(corpus)
        sources = find_sources(path)
        skip = path in BUILT_IN_CORPORA
        found = (document for source in sources for document in read(source, field, skip))
    kept = (document for document in found if document.text and not document.text.isspace())
    return kept if max_bytes is None else _first(kept, max_bytes)


def _first(found: Iterable[Document], max_bytes: int) -> Iterator[Document]:
    taken = 0
    for document in found:
        yield document
        taken += len(document.text.encode())
        if taken >= max_bytes:
            return


def survey(corpus: str, max_bytes: int | None = None, cache: Path | None = None) -> Survey:
    """Fingerprint, size and range of text hashes of a corpus, in one pass over it.

    A commit on the hub is its own fingerprint and is not read. With a `cache` folder, what was
    found is kept there under name, size and time of each file, so that a corpus is read again only
    when a file has changed.

    Raises:
        InputError: the corpus cannot be read or holds no text.
    """
    if corpus.startswith(HUB):
        named = hub_corpus(corpus)
        if not named.is_local:
            fingerprint = f"hub:{digest([*named, max_bytes])}"
            return Survey(
                fingerprint=fingerprint,
                documents=0,
                text_bytes=0,
                lowest_hash=0,
                highest_hash=2**64 - 1,
                is_counted=False,
            )
    note = None if cache is None or corpus.startswith(HUB) else _note(corpus, max_bytes, cache)
    if note is not None and note.exists():
        return Survey.model_validate_json(note.read_text(encoding="utf-8"))
    found = _read_all(corpus, max_bytes)
    if note is not None and note == _note(corpus, max_bytes, note.parent):  # nothing changed since
        replace(note, found.model_dump_json())
    return found


def _note(corpus: str, max_bytes: int | None, cache: Path) -> Path | None:
    """Where the survey of the files as they are is kept; None while one is too young to tell."""
    path, field = path_and_field(corpus)
    try:
        stats = [(name, place.stat()) for name, place in find_sources(path)]
    except OSError:
        return None
    if max((stat.st_mtime_ns for _, stat in stats), default=0) > time.time_ns() - SETTLED_NS:
        return None
    root = str(Path(path).expanduser().absolute())
    files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    shown = [(name.encode("utf-8", "surrogateescape").hex(), *rest) for name, *rest in files]
    return cache / f".survey-{digest([root, field, max_bytes, shown])}.json"


def _read_all(corpus: str, max_bytes: int | None) -> Survey:
    fingerprint, count, text_bytes, lowest, highest = Fingerprint(), 0, 0, 2**64, -1
    for document in documents(corpus, max_bytes):
        fingerprint.add(document)
        count += 1
        text_bytes += len(document.text.encode())
        value = text_hash(document.text)
        lowest, highest = min(lowest, value), max(highest, value)
    if count == 0:
        raise InputError(f"data.corpus '{corpus}' holds no text: all its documents are blank")
    return Survey(
        fingerprint=fingerprint.value,
        documents=count,
        text_bytes=text_bytes,
        lowest_hash=lowest,
        highest_hash=highest,
    )


def corpus_fingerprint(corpus: str) -> str:
    """Hexadecimal SHA-256 over the names and texts of a corpus."""
    return survey(corpus).fingerprint


def text_hash(text: str) -> int:
    """First 64 bits of the SHA-256 of a text."""
    return int.from_bytes(_sha256(text)[:8], "big")


def split(text: str, facts: Survey, validation_fraction: float) -> Iterator[tuple[SplitName, str]]:
    """The parts of a document with the split each belongs to: one part, except in the last case.

    A document is held out when its text hash, as a share of 2^64, is below `validation_fraction`:
    where a document goes does not change when others are added, and equal texts go together. If
    that leaves a split empty, the document with the lowest hash is held out, or the one with the
    highest is trained on. If all texts are the same, most often because there is only one, each is
    cut: its last `validation_fraction` of characters is held out.
    """
    if facts.lowest_hash == facts.highest_hash:
        cut = max(1, int(len(text) * (1 - validation_fraction)))
        yield "train", text[:cut]
        if text[cut:]:
            yield "validation", text[cut:]
        return
    threshold = int(validation_fraction * 2**64)
    threshold = min(max(threshold, facts.lowest_hash + 1), facts.highest_hash)
    yield ("validation" if text_hash(text) < threshold else "train"), text


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
