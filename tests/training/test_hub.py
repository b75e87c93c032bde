"""hf:// corpora: the real `datasets` over a folder, and what a hub that cannot be reached means."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from thriftlm.corpora import hub_corpus
from thriftlm.spec import DataSpec, InputError
from thriftlm.training import hub
from thriftlm.training.corpus import documents, survey
from thriftlm.training.shards import build

COMMIT, LATER = "0123456789abcdef" * 2 + "01234567", "f" * 40


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A dataset as the hub holds it: two configurations, two splits, several files."""
    folder = tmp_path / "dataset"
    rows = [{"text": f"document {number} " + "word " * number, "n": number} for number in range(40)]
    for name, part in (("train-0", rows[:25]), ("train-1", rows[25:]), ("test-0", rows[:2])):
        (folder / "small").mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(part), folder / "small" / f"{name}.parquet")
    (folder / "lines").mkdir()
    pq.write_table(pa.table({"body": ["one", "", "two"]}), folder / "lines" / "train.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: small\n  default: true\n  data_files:\n"
        '  - {split: train, path: "small/train-*"}\n  - {split: test, path: "small/test-*"}\n'
        '- config_name: lines\n  data_files: "lines/*.parquet"\n---\n'
    )
    return folder


def test_config_split_and_column_choose_what_streams(dataset: Path) -> None:
    assert len(list(documents(f"hf://{dataset}"))) == 40
    assert [text for _, text in documents(f"hf://{dataset}?split=test&config=small")] == [
        "document 0 ",
        "document 1 word ",
    ]
    lines = list(documents(f"hf://{dataset}?config=lines&column=body"))
    assert [tuple(line) for line in lines] == [("train:1", "one"), ("train:3", "two")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("?column=body", "no column 'body', it has text, n; name the one"),
        ("?column=n", "column 'n' holds int in row 1; the text must be a string column"),
        ("?split=validation", r"Bad split: validation. Available splits: \['train', 'test'\]"),
        ("?config=big", r"BuilderConfig 'big' not found. Available: \['small', 'lines'\]"),
    ],
)
def test_what_the_dataset_has_not_is_said_with_what_it_has(
    dataset: Path, options: str, message: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        survey(f"hf://{dataset}{options}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ("hf://", "hf:// needs OWNER/NAME"),
        ("hf://a/b/c", "hf:// needs OWNER/NAME"),
        (
            "hf://a/b?subset=x",
            r"takes \?config=...&split=...&column=...&revision=..., got 'subset'",
        ),
        ("hf://a/b?config=", "got 'config'"),
    ],
)
def test_a_malformed_name_is_refused_before_anything_is_asked(corpus: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataSpec(corpus=corpus)


def test_a_folder_becomes_the_shards_of_its_files(dataset: Path, tmp_path: Path) -> None:
    fields = {"tokenizer": "bpe:300", "seq_len": 16, "validation_fraction": 0.2}
    streamed = build(DataSpec(corpus=f"hf://{dataset}", **fields), tmp_path / "cache")
    files = build(DataSpec(corpus=f"{dataset}/small/train-*", **fields), tmp_path / "cache")
    assert streamed.path != files.path  # their documents have other names
    assert streamed.meta.splits == files.meta.splits
    assert build(DataSpec(corpus=f"hf://{dataset}", **fields), tmp_path / "cache").path == (
        streamed.path
    )


def test_a_commit_is_the_identity_and_nothing_is_read_for_it(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def commit_of(named: object) -> str:
        asked.append(repr(named))
        return [COMMIT, LATER][len(asked) - 1]

    def opened(named: hub.HubCorpus) -> object:
        loads.append(named.revision)
        return load(named._replace(dataset=str(dataset), revision=None))

    loads: list[str | None] = []
    load = hub._opened
    monkeypatch.setattr(hub, "_commit_of", commit_of)
    monkeypatch.setattr(hub, "_opened", opened)
    fields = {"tokenizer": "bpe:300", "seq_len": 16, "validation_fraction": 0.2}
    first = build(DataSpec(corpus="hf://owner/name", **fields), tmp_path)
    assert loads == [COMMIT, COMMIT]  # once for the tokenizer, once for the tokens
    assert first.meta.splits["train"].documents + first.meta.splits["validation"].documents == 40
    again = build(DataSpec(corpus="hf://owner/name", **fields), tmp_path)
    named = build(DataSpec(corpus=f"hf://owner/name?revision={COMMIT}", **fields), tmp_path)
    assert again.path == named.path == first.path
    assert (len(asked), len(loads)) == (1, 2)  # what the hub said is kept, nothing was read
    limited = build(DataSpec(corpus="hf://owner/name", max_bytes=2000, **fields), tmp_path)
    assert limited.path != first.path
    assert limited.n_tokens("train") < first.n_tokens("train")
    other = build(DataSpec(corpus="hf://owner/name?revision=main", **fields), tmp_path)
    assert (len(asked), other.path == first.path) == (2, False)
    assert hub_corpus(other.meta.corpus).revision == LATER


def test_a_hub_that_does_not_answer_is_one_line_and_a_commit_needs_none(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from thriftlm.spec import DataSpec, InputError\n"
        "from thriftlm.training.shards import build\n"
        "try: build(DataSpec(corpus=sys.argv[1]), Path(sys.argv[2]))\n"
        "except InputError as error: print(error)"
    )
    for corpus in ("hf://nobody/nothing", f"hf://nobody/nothing?revision={COMMIT}"):
        run = subprocess.run(
            [sys.executable, "-c", code, corpus, str(tmp_path / "cache")],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONPATH": ":".join(sys.path), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        )
        assert run.stdout.startswith(f"data.corpus '{corpus}': datasets cannot read it (")
        assert "revision=" in run.stdout
        assert run.stdout.count("\n") == 1
    assert not list((tmp_path / "cache").glob("[!.]*"))


def test_a_note_of_another_cache_is_not_taken(tmp_path: Path) -> None:
    note = tmp_path / "cache" / f".revision-{hub.digest(['a/b', None])}.json"
    note.parent.mkdir()
    note.write_text(json.dumps({"commit": COMMIT}))
    assert hub.pinned("hf://a/b?config=c d", note.parent) == (
        f"hf://a/b?config=c+d&split=train&column=text&revision={COMMIT}"
    )
    assert hub_corpus(hub.pinned("hf://a/b?config=c d", note.parent)).config == "c d"
