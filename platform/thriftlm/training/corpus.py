"""Documents of a corpus in a fixed order, and which of them are held out for validation."""

import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

from thriftlm.spec import BUILT_IN_CORPORA, InputError

SplitName = Literal["train", "validation"]

STDLIB_SUFFIXES = frozenset({".py", ".txt", ".rst", ".md"})
STDLIB_SKIPPED = frozenset({"site-packages", "dist-packages", "ensurepip", "__pycache__"})
JSONL_SUFFIXES = frozenset({".jsonl", ".ndjson"})
FOLDER_SUFFIXES = (
    STDLIB_SUFFIXES
    | JSONL_SUFFIXES
    | frozenset({".c", ".cc", ".cpp", ".css", ".go", ".h", ".hpp", ".html", ".java", ".jl", ".js"})
    | frozenset({".kt", ".org", ".php", ".r", ".rb", ".rs", ".scala", ".sh", ".sql", ".swift"})
    | frozenset({".tex", ".text", ".ts"})
)
"""What a folder given as corpus contributes; a file or a glob takes whatever it names."""


class Document(NamedTuple):
    """One text of a corpus."""

    name: str
    """Path below the corpus' root, with `:line` for a line of JSONL."""
    text: str
    """Never blank, always encodable as UTF-8."""


class Source(NamedTuple):
    """One file of a corpus."""

    name: str
    """Path below the corpus' root."""
    path: Path
    """Where it lies."""


class Survey(NamedTuple):
    """What one pass over a corpus tells."""

    fingerprint: str
    """SHA-256 over the names and texts of all documents, in order."""
    documents: int
    """Documents that are not blank."""
    text_bytes: int
    """UTF-8 bytes of all texts."""
    lowest_hash: int
    """Smallest text hash."""
    highest_hash: int
    """Largest text hash; equal to the smallest where all texts are the same."""


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


def documents(corpus: str) -> Iterator[Document]:
    """The documents of a corpus, in the same order each time; blank ones are left out.

    `python-stdlib` is the library of the running interpreter, source and docs, without installed
    packages; files that are no UTF-8 (tests of codecs) are left out there and nowhere else.
    Otherwise a path or a glob (`**` crosses folders): a folder stands for all text and JSONL files
    below it, JSONL has one object with a "text" field a line, any other file is one document. A
    file is read whole, so what is larger than memory belongs into JSONL.

    Raises:
        InputError: nothing is there, or it cannot be read (at once, or when the walk gets there).
    """
    sources, skip_undecodable = _sources(corpus)
    return (
        document
        for source in sources
        for document in _read(source, skip_undecodable)
        if document.text and not document.text.isspace()
    )


def survey(corpus: str) -> Survey:
    """Fingerprint, size and range of text hashes of a corpus, in one pass over it.

    Raises:
        InputError: the corpus cannot be read or holds no text.
    """
    fingerprint, count, text_bytes, lowest, highest = Fingerprint(), 0, 0, 2**64, -1
    for document in documents(corpus):
        fingerprint.add(document)
        count += 1
        text_bytes += len(document.text.encode())
        value = text_hash(document.text)
        lowest, highest = min(lowest, value), max(highest, value)
    if count == 0:
        raise InputError(f"data.corpus '{corpus}' holds no text: all its documents are blank")
    return Survey(fingerprint.value, count, text_bytes, lowest, highest)


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


def _sources(corpus: str) -> tuple[list[Source], bool]:
    """The files of a corpus in order of name, and whether undecodable ones are left out."""
    if corpus in BUILT_IN_CORPORA:
        root = Path(sysconfig.get_path("stdlib"))
        return _below(root, STDLIB_SUFFIXES, STDLIB_SKIPPED), True
    path = Path(corpus).expanduser()
    if path.is_file():
        return [Source(path.name, path)], False
    if path.is_dir():
        found = _below(path, FOLDER_SUFFIXES, frozenset({"__pycache__"}))
        return found or _nothing(f"data.corpus '{corpus}' is a folder without text files"), False
    if glob.has_magic(corpus):
        return _matching(path) or _nothing(f"data.corpus '{corpus}' matches no file"), False
    near = get_close_matches(corpus, BUILT_IN_CORPORA, n=1)
    hint = "; did you mean 'python-stdlib'?" if near else ""
    return _nothing(f"data.corpus '{corpus}' does not exist{hint}"), False


def _nothing(what: str) -> NoReturn:
    raise InputError(
        f"{what}; give python-stdlib, or the path or glob of text or JSONL files "
        f"(relative ones start at {Path.cwd()})"
    )


def _below(root: Path, suffixes: Iterable[str], skipped: frozenset[str]) -> list[Source]:
    found = []
    for parent, folders, names in os.walk(root, onerror=_unreadable):
        folders[:] = [name for name in folders if name not in skipped and name[0] != "."]
        paths = (Path(parent, name) for name in names if name[0] != ".")
        found += [path for path in paths if path.suffix.lower() in suffixes]
    return _named(found, root)


def _matching(pattern: Path) -> list[Source]:
    parts = pattern.parts
    plain = next(count for count, part in enumerate(parts) if glob.has_magic(part))
    matches = {Path(match) for match in glob.iglob(str(pattern), recursive=True)}
    return _named((path for path in matches if path.is_file()), Path(*parts[:plain]))


def _named(paths: Iterable[Path], root: Path) -> list[Source]:
    return sorted(Source(path.relative_to(root).as_posix(), path) for path in paths)


def _read(source: Source, skip_undecodable: bool) -> Iterator[Document]:
    try:
        if source.path.suffix.lower() in JSONL_SUFFIXES:
            yield from _lines(source)
        else:
            yield Document(source.name, source.path.read_bytes().decode())
    except UnicodeDecodeError as error:
        if not skip_undecodable:
            raise InputError(
                f"{source.path}: not UTF-8 text (byte {error.start}); convert it or leave it out "
                "of data.corpus"
            ) from error
    except OSError as error:
        raise InputError(f"{source.path}: cannot be read: {error.strerror}") from error


def _unreadable(error: OSError) -> NoReturn:
    raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from error


def _lines(source: Source) -> Iterator[Document]:
    with source.path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield Document(f"{source.name}:{number}", _text(line, f"{source.path}:{number}"))


def _text(line: bytes, place: str) -> str:
    expected = 'each line of JSONL must be an object with a "text" string'
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:  # also bytes that are no UTF-8
        raise InputError(f"{place}: no valid JSON ({error}); {expected}") from error
    if not isinstance(value, dict):
        raise InputError(f"{place}: a JSON {type(value).__name__}; {expected}")
    if "text" not in value:
        raise InputError(f"{place}: the fields are {sorted(value)}; {expected}")
    text = value["text"]
    if not isinstance(text, str):
        raise InputError(f'{place}: "text" is a JSON {type(text).__name__}; {expected}')
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, UTF-8 cannot
        raise InputError(f'{place}: "text" is no valid Unicode ({error.reason})') from error
    return text


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
