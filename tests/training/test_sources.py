"""Files of a corpus by format: Parquet, compressed JSONL, named fields."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from thriftlm.spec import InputError
from thriftlm.training import sources
from thriftlm.training.corpus import documents, survey


def parquet(path: Path, texts: list[str | None], group: int = 3, **columns: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"text": pa.array(texts, pa.string()), **columns})
    pq.write_table(table, path, row_group_size=group)
    return path


def found(corpus: object) -> list[tuple[str, str]]:
    return [tuple(document) for document in documents(str(corpus))]


def test_parquet_gives_a_document_a_row_in_order(tmp_path: Path) -> None:
    parquet(tmp_path / "b" / "0.parquet", ["one", None, " \n", "zwölf", "x"], n=[1, 2, 3, 4, 5])
    parquet(tmp_path / "a.parquet", ["first"])
    expected = [("b/0.parquet:1", "one"), ("b/0.parquet:4", "zwölf"), ("b/0.parquet:5", "x")]
    for corpus in (tmp_path, tmp_path / "**" / "*.parquet"):
        assert found(corpus) == [("a.parquet:1", "first"), *expected]
    assert found(tmp_path / "b" / "0.parquet") == [(n[2:], text) for n, text in expected]


@pytest.mark.parametrize("kind", ["large_string", "string_view", "dictionary"])
def test_every_kind_of_string_column_is_text(tmp_path: Path, kind: str) -> None:
    column = pa.array(["one", "two", "one"])
    cast = {"large_string": pa.large_string(), "string_view": pa.string_view()}.get(kind)
    table = pa.table({"text": column.dictionary_encode() if cast is None else column.cast(cast)})
    pq.write_table(table, tmp_path / "a.parquet")
    assert [text for _, text in found(tmp_path / "a.parquet")] == ["one", "two", "one"]


def test_a_field_is_named_after_a_hash_sign(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", ["no"], content=["yes"])
    (tmp_path / "b.jsonl").write_text('{"content": "line", "text": "no"}\n')
    assert [text for _, text in found(f"{tmp_path}#content")] == ["yes", "line"]
    assert [text for _, text in found(f"{tmp_path}/*.parquet#content")] == ["yes"]
    (tmp_path / "notes#draft").write_text("a file of that name")
    assert found(tmp_path / "notes#draft") == [("notes#draft", "a file of that name")]


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ("a.parquet#body", r"no column 'body', it has text, n; name the one.*'PATH#COLUMN'$"),
        ("a.parquet#n", "column 'n' is int64; the text must be a string column$"),
        ("cut.parquet", r"cut\.parquet: Parquet magic bytes not found"),
        ("a.jsonl.gz", r"a\.jsonl\.gz:2: the fields are \['body'\]; .* \"text\" string$"),
        ("cut.jsonl.gz", r"cut\.jsonl\.gz: cannot be read: "),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, corpus: str, message: str) -> None:
    whole = parquet(tmp_path / "a.parquet", ["one"], n=[1]).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:-20])
    lines = "".join(json.dumps({"text": f"{number} {number**9}"}) + "\n" for number in range(9999))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "fine"}\n{"body": "x"}\n'))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(lines.encode())[:-1000])
    with pytest.raises(InputError, match=message) as error:
        survey(str(tmp_path / corpus))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".json.gz"])
def test_compressed_jsonl_is_read_by_line(tmp_path: Path, suffix: str) -> None:
    content = '{"text": "one"}\n\n{"text": "zwölf"}\n'.encode()
    codec = "gzip" if suffix.endswith("gz") else "zstd"
    with pa.CompressedOutputStream(str(tmp_path / f"a{suffix}"), codec) as file:
        file.write(content)
    expected = [(f"a{suffix}:1", "one"), (f"a{suffix}:3", "zwölf")]
    assert found(tmp_path) == found(tmp_path / f"a{suffix}") == expected


def test_a_large_parquet_file_is_never_in_memory_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[str | None] = [f"{number} " + "x" * 10_000 for number in range(3000)]
    path = parquet(tmp_path / "a.parquet", texts, group=300)  # 3 of 30 MB a group
    monkeypatch.setattr(sources, "ROWS", 100)
    start, most = pa.total_allocated_bytes(), 0
    for _ in documents(str(path)):
        most = max(most, pa.total_allocated_bytes() - start)
    assert most < 9_000_000


def test_max_bytes_ends_with_the_document_that_reaches_it(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", ["abcd", "éé", "x", "y"])
    for limit, count in ((1, 1), (4, 1), (5, 2), (8, 2), (9, 3), (100, 4)):
        assert len(list(documents(str(path), limit))) == count, limit
    assert survey(str(path), 8).fingerprint == survey(str(path), 5).fingerprint
    assert survey(str(path), 8).text_bytes == 8
