"""`thriftlm data build` and `data verify` as a user meets them."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from thriftlm.training.shards import Shards


@pytest.fixture
def corpora(tmp_path: Path) -> Path:
    """Parquet and JSONL, 80 documents each."""
    texts = [f"document {number} " + "some words and more " * (number % 9) for number in range(80)]
    pq.write_table(pa.table({"content": texts}), tmp_path / "web.parquet")
    lines = (json.dumps({"text": text.upper()}) + "\n" for text in texts)
    (tmp_path / "code.jsonl").write_text("".join(lines))
    return tmp_path


BUILD = ("data", "build", "--tokenizer", "bpe:300", "--validation-fraction", "0.1")


def test_a_parquet_corpus_is_built_once_and_described(corpora: Path, thriftlm) -> None:
    code, out, err = thriftlm(*BUILD, "--corpus", "web.parquet#content", "--json")
    found = json.loads(out)
    assert (code, found["built"], found["documents"]) == (0, True, 80)
    assert err.splitlines() == ["reading corpus", "training tokenizer", "tokenizing"]
    shards = Shards.open(Path(found["folder"]))
    assert found["train_tokens"] == found["unique_tokens"] == shards.n_tokens("train")
    code, out, _ = thriftlm(*BUILD, "--corpus", "web.parquet#content")
    assert code == 0
    assert "nothing: they were there" in out
    assert found["folder"] in out
    assert f"{found['train_tokens']:,} to train on" in out


def test_a_mixture_shows_each_part(corpora: Path, thriftlm) -> None:
    mixture = "0.75 web.parquet#content + 0.25 code.jsonl"
    code, out, _ = thriftlm(*BUILD, "--corpus", mixture, "--json")
    found = json.loads(out)
    assert (code, found["folder"], found["documents"]) == (0, None, 160)
    assert [(part["weight"], part["corpus"]) for part in found["parts"]] == [
        (0.25, "code.jsonl"),
        (0.75, "web.parquet#content"),
    ]
    code, out, _ = thriftlm(*BUILD, "--corpus", mixture)
    assert code == 0
    for part in found["parts"]:
        assert f"{part['weight']:g} {part['corpus']}" in out
        assert part["folder"] in out
    assert f"{found['unique_tokens']:,} tokens" in out


def test_the_data_of_a_run_file_are_built_by_processes(corpora: Path, thriftlm) -> None:
    (corpora / "run.yaml").write_text(
        "model: {n_layers: 1, d_model: 32, n_heads: 1, d_ff: 64}\ntokens: 4096\n"
        "optim: {batch_tokens: 128}\n"
        "data:\n  corpus: {web.parquet#content: 3, code.jsonl: 1}\n"
        "  tokenizer: bpe:300\n  seq_len: 16\n  validation_fraction: 0.1\n  max_bytes: 6000\n"
    )
    code, out, err = thriftlm("data", "build", "--run", "run.yaml", "--processes", "2", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["corpus"] == ("0.25 code.jsonl + 0.75 web.parquet#content")
    assert 0 < found["documents"] < 160
    (corpora / "run.yaml").write_text((corpora / "run.yaml").read_text().replace("3,", "-3,"))
    code, _, err = thriftlm("data", "build", "--run", "run.yaml")
    assert code == 2
    assert "run.yaml:5: " in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--corpus", "web.parquet"), "no column 'text', it has content; name the one"),
        (("--corpus", "1 a.txt + 1 a.txt"), "'a.txt' is there twice"),
        (("--corpus", "hf://a/b?subset=c"), "hf:// takes ?config="),
        (("--max-bytes", "0"), "max_bytes"),
        (("--processes", "0"), "--processes"),
        (("--tokenizer", "bpe:3"), "needs N of at least 257"),
    ],
)
def test_bad_input_is_one_line(corpora: Path, thriftlm, options, message: str) -> None:
    code, out, err = thriftlm("data", "build", *options)
    said = [line for line in err.splitlines() if line not in {"reading corpus"}]
    assert (code, out, len(said)) == (2, "", 1)
    assert message in said[0]


@pytest.fixture
def folder(corpora: Path, thriftlm) -> Path:
    _, out, _ = thriftlm(*BUILD, "--corpus", "code.jsonl", "--json")
    return Path(json.loads(out)["folder"])


def test_whole_shards_are_said_to_be(folder: Path, thriftlm) -> None:
    code, out, err = thriftlm("data", "verify", str(folder))
    assert (code, err.splitlines()) == (0, ["reading"])
    assert out.startswith(f"{folder}: whole: 2 files, ")
    code, out, _ = thriftlm("data", "verify", str(folder), "--json")
    found = json.loads(out)
    assert (code, found["status"], found["damage"]) == (0, "whole", [])


def test_every_damaged_file_is_named_with_what_was_expected(folder: Path, thriftlm) -> None:
    train, validation = folder / "train-00000.arrow", folder / "validation-00000.arrow"
    changed = bytearray(train.read_bytes())
    changed[len(changed) // 2] ^= 1
    train.write_bytes(changed)
    size = validation.stat().st_size
    validation.write_bytes(validation.read_bytes()[:-9])
    (folder / "tokenizer.json").unlink()
    code, out, _ = thriftlm("data", "verify", str(folder))
    lines = out.splitlines()
    assert (code, len(lines)) == (1, 4)
    assert lines[0].startswith(f"{train}: damaged: expected sha256 ")
    assert lines[1] == f"{validation}: damaged: expected {size} bytes, found {size - 9} bytes"
    assert lines[2].startswith(f"{folder}/tokenizer.json: damaged: expected a tokenizer with ")
    assert lines[3] == f"delete {folder} and build it again"
    code, out, _ = thriftlm("data", "verify", str(folder), "--json")
    found = json.loads(out)
    assert (code, found["status"]) == (1, "damaged")
    assert [one["file"] for one in found["damage"]] == [
        "train-00000.arrow", "validation-00000.arrow", "tokenizer.json",
    ]  # fmt: skip


def test_what_is_no_folder_of_shards_is_bad_input(folder: Path, thriftlm, tmp_path: Path) -> None:
    assert thriftlm("data", "verify", str(tmp_path / "nowhere"))[0] == 2
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"version": 99}))
    code, _, err = thriftlm("data", "verify", str(folder))
    assert code == 2
    assert "version 99" in err
    (folder / "meta.json").write_text("{")
    code, out, _ = thriftlm("data", "verify", str(folder), "--json")
    assert (code, json.loads(out)["damage"][0]["file"]) == (1, "meta.json")
