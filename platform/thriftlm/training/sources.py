"""The files of a corpus, and the documents in a file, by its format."""

import glob
import io
import json
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from thriftlm.corpora import BUILT_IN_CORPORA
from thriftlm.spec import InputError

SplitName = Literal["train", "validation"]

STDLIB_SUFFIXES = frozenset({".py", ".txt", ".rst", ".md"})
STDLIB_SKIPPED = frozenset({"site-packages", "dist-packages", "ensurepip", "__pycache__"})
JSONL_SUFFIXES = frozenset({".jsonl", ".ndjson"})
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
COMPRESSED_JSONL_SUFFIXES = JSONL_SUFFIXES | {".json"}
"""Before .gz and .zst, where published corpora call their JSONL files .json too."""
PARQUET_SUFFIX = ".parquet"
FOLDER_SUFFIXES = (
    STDLIB_SUFFIXES
    | JSONL_SUFFIXES
    | frozenset({PARQUET_SUFFIX})
    | frozenset({".c", ".cc", ".cpp", ".css", ".go", ".h", ".hpp", ".html", ".java", ".jl", ".js"})
    | frozenset({".kt", ".org", ".php", ".r", ".rb", ".rs", ".scala", ".sh", ".sql", ".swift"})
    | frozenset({".tex", ".text", ".ts"})
)
"""What a folder given as corpus contributes, with compressed JSONL; a file or a glob takes whatever
it names."""
ROWS = 1024
"""Rows of a Parquet file that are in memory at once."""


class Document(NamedTuple):
    """One text of a corpus."""

    name: str
    """Path below the corpus' root, with `:line` or `:row` for a part of a file."""
    text: str
    """Never blank, always encodable as UTF-8."""


class Source(NamedTuple):
    """One file of a corpus."""

    name: str
    """Path below the corpus' root."""
    path: Path
    """Where it lies."""


def find_sources(path: str) -> list[Source]:
    """The files of a corpus in order of name.

    Raises:
        InputError: there are none.
    """
    if path in BUILT_IN_CORPORA:
        root = Path(sysconfig.get_path("stdlib"))
        return _below(root, lambda found: found.suffix.lower() in STDLIB_SUFFIXES, STDLIB_SKIPPED)
    place = Path(path).expanduser()
    if place.is_file():
        return [Source(place.name, place)]
    if place.is_dir():
        found = _below(place, _is_wanted, frozenset({"__pycache__"}))
        return found or _nothing(f"data.corpus '{path}' is a folder without text files")
    if glob.has_magic(path):
        return _matching(place) or _nothing(f"data.corpus '{path}' matches no file")
    near = get_close_matches(path, BUILT_IN_CORPORA, n=1)
    hint = "; did you mean 'python-stdlib'?" if near else ""
    return _nothing(f"data.corpus '{path}' does not exist{hint}")


def read(source: Source, field: str, skip_undecodable: bool) -> Iterator[Document]:
    """The documents of a file, blank ones too.

    Parquet is read by `ROWS` rows of a row group, JSONL by line, and any other file whole.

    Args:
        source: the file.
        field: column of Parquet, or field of JSONL, that holds the text.
        skip_undecodable: leave a file that is no UTF-8 out instead of raising.

    Raises:
        InputError: it cannot be read, or is not what its name says.
    """
    compression = COMPRESSIONS.get(source.path.suffix.lower())
    try:
        if source.path.suffix.lower() == PARQUET_SUFFIX:
            yield from _rows(source, field)
        elif _is_jsonl(source.path):
            yield from _lines(source, field, compression)
        else:
            yield Document(source.name, source.path.read_bytes().decode())
    except UnicodeDecodeError as error:
        if not skip_undecodable:
            raise InputError(
                f"{source.path}: not UTF-8 text (byte {error.start}); convert it or leave it out "
                "of data.corpus"
            ) from error
    except pa.ArrowInvalid as error:
        raise InputError(
            f"{source.path}: {_first_line(error)}; leave it out or repair it"
        ) from error
    except OSError as error:  # pyarrow's have no strerror
        reason = error.strerror or _first_line(error)
        raise InputError(f"{source.path}: cannot be read: {reason}") from error


def _is_jsonl(path: Path) -> bool:
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS:
        return Path(path.stem).suffix.lower() in COMPRESSED_JSONL_SUFFIXES
    return suffix in JSONL_SUFFIXES


def _is_wanted(path: Path) -> bool:
    return path.suffix.lower() in FOLDER_SUFFIXES or _is_jsonl(path)


def _nothing(what: str) -> NoReturn:
    raise InputError(
        f"{what}; give python-stdlib, hf://OWNER/NAME, or the path or glob of text, JSONL or "
        f"Parquet files (relative ones start at {Path.cwd()})"
    )


def _below(root: Path, is_wanted: Callable[[Path], bool], skipped: frozenset[str]) -> list[Source]:
    found = []
    for parent, folders, names in os.walk(root, onerror=_unreadable):
        folders[:] = [name for name in folders if name not in skipped and name[0] != "."]
        paths = (Path(parent, name) for name in names if name[0] != ".")
        found += [path for path in paths if is_wanted(path)]
    return _named(found, root)


def _matching(pattern: Path) -> list[Source]:
    parts = pattern.parts
    plain = next(count for count, part in enumerate(parts) if glob.has_magic(part))
    matches = {Path(match) for match in glob.iglob(str(pattern), recursive=True)}
    return _named((path for path in matches if path.is_file()), Path(*parts[:plain]))


def _named(paths: Iterable[Path], root: Path) -> list[Source]:
    return sorted(Source(path.relative_to(root).as_posix(), path) for path in paths)


def _unreadable(error: OSError) -> NoReturn:
    raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


def _rows(source: Source, column: str) -> Iterator[Document]:
    with pq.ParquetFile(source.path) as file:
        _check_column(file.schema_arrow, column, source.path)
        batches = (
            batch
            for group in range(file.num_row_groups)
            for batch in file.iter_batches(ROWS, row_groups=[group], columns=[column])
        )
        texts = (text for batch in batches for text in batch.column(0).to_pylist())
        for number, text in enumerate(texts, start=1):
            yield Document(f"{source.name}:{number}", text or "")


def _check_column(schema: pa.Schema, column: str, path: Path) -> None:
    if column not in schema.names:
        raise InputError(
            f"{path}: no column '{column}', it has {', '.join(schema.names)}; name the one with "
            "the text as data.corpus 'PATH#COLUMN'"
        )
    kind = schema.field(column).type
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    if not any(check(plain) for check in is_text):
        raise InputError(f"{path}: column '{column}' is {kind}; the text must be a string column")


def _lines(source: Source, field: str, compression: str | None) -> Iterator[Document]:
    with _opened(source.path, compression) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                place = f"{source.path}:{number}"
                yield Document(f"{source.name}:{number}", _text(line, field, place))


def _opened(path: Path, compression: str | None) -> Any:
    if compression is None:
        return path.open("rb")
    return io.BufferedReader(pa.input_stream(str(path), compression=compression))


def _text(line: bytes, field: str, place: str) -> str:
    expected = f'each line of JSONL must be an object with a "{field}" string'
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:  # also bytes that are no UTF-8
        raise InputError(f"{place}: no valid JSON ({error}); {expected}") from error
    if not isinstance(value, dict):
        raise InputError(f"{place}: a JSON {type(value).__name__}; {expected}")
    if field not in value:
        raise InputError(f"{place}: the fields are {sorted(value)}; {expected}")
    text = value[field]
    if not isinstance(text, str):
        raise InputError(f'{place}: "{field}" is a JSON {type(text).__name__}; {expected}')
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, UTF-8 cannot
        raise InputError(f'{place}: "{field}" is no valid Unicode ({error.reason})') from error
    return text
