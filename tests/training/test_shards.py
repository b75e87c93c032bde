import json
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from thriftlm.spec import DataSpec, InputError
from thriftlm.training.corpus import documents, split, survey
from thriftlm.training.shards import Shards, build
from thriftlm.training.sources import SplitName
from thriftlm.training.tokenizer import train_bpe, vocab_size

SPLITS: tuple[SplitName, ...] = ("train", "validation")

CHILD = """
import sys
from pathlib import Path
from thriftlm.spec import DataSpec, InputError
from thriftlm.training import encoding, shard_files, shards

encoding.GROUP_CHARS = 2000
shards.CHUNK_TOKENS = shard_files.CHUNK_TOKENS = 256

def progress(stage, fraction):
    print(f"{stage} {fraction:.2f}", flush=True)
    if stage == "tokenizing" and fraction > 0.5 and progress.hold:
        progress.hold = False
        print("holding", flush=True)
        sys.stdin.readline()

progress.hold = "hold" in sys.argv
if "limit" in sys.argv:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]),) * 2)
data = DataSpec(corpus=sys.argv[1], tokenizer="bpe:300", seq_len=16, validation_fraction=0.2)
try:
    print("built", shards.build(data, Path(sys.argv[2]), progress).path.name)
except InputError as error:
    print("refused", error)
"""


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Forty documents of random words."""
    rng, words = random.Random(0), ["alpha", "beta", "gamma", "delta", "ümlaut", "\n"]
    path = tmp_path / "corpus.jsonl"
    with path.open("w") as file:
        for number in range(40):
            text = f"{number}: " + " ".join(rng.choices(words, k=rng.randrange(20, 400)))
            file.write(json.dumps({"text": text}) + "\n")
    return path


def spec(corpus: Path, **fields: object) -> DataSpec:
    given = {"tokenizer": "bpe:300", "seq_len": 16, "validation_fraction": 0.2} | fields
    return DataSpec(corpus=str(corpus), **given)  # type: ignore[arg-type]


def all_ids(shards: Shards, name: SplitName) -> list[int]:
    tokens = shards.tokens(name)
    return [int(token) for token in tokens.gather([0], len(tokens))[0]]


def texts_of(shards: Shards, name: SplitName) -> list[str]:
    """Documents decoded from the shards."""
    tokenizer = Tokenizer.from_file(str(shards.tokenizer_path))
    found, ids = [], []
    for token in all_ids(shards, name):
        if token == shards.meta.end_id:
            found.append(tokenizer.decode(ids))
            ids = []
        else:
            ids.append(token)
    assert not ids, "the last document has its end"
    return found


def texts_in(corpus: Path, name: SplitName, fraction: float = 0.2) -> list[str]:
    facts = survey(str(corpus))
    return [
        text
        for document in documents(str(corpus))
        for side, text in split(document.text, facts, fraction)
        if side == name
    ]


def contents(cache: Path) -> dict[str, bytes]:
    files = (path for path in cache.rglob("*") if path.is_file())
    return {path.relative_to(cache).as_posix(): path.read_bytes() for path in files}


def visible(cache: Path) -> list[str]:
    kept = (".lock-", ".survey-")
    return sorted(path.name for path in cache.iterdir() if not path.name.startswith(kept))


@contextmanager
def child(corpus: Path, cache: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(corpus), str(cache), *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def read_until(process: subprocess.Popen[str], beginning: str) -> list[str]:
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line.strip())
        if line.startswith(beginning):
            return lines
    raise AssertionError(f"the process ended before '{beginning}': {lines}")


def test_shards_hold_the_documents_of_each_split(corpus: Path, tmp_path: Path) -> None:
    shards = build(spec(corpus), tmp_path / "cache")
    for name in SPLITS:
        texts = texts_in(corpus, name)
        meta = shards.meta.splits[name]
        assert texts_of(shards, name) == texts
        assert meta.documents == len(texts) > 0
        assert meta.tokens == shards.n_tokens(name) == len(shards.tokens(name))
        text_bytes = sum(len(text.encode()) for text in texts)
        assert shards.bytes_per_token(name) == text_bytes / shards.n_tokens(name)
    assert shards.unique_tokens == shards.n_tokens("train")
    assert not set(texts_of(shards, "train")) & set(texts_of(shards, "validation"))


def test_tokenizer_is_trained_on_the_training_split_alone(corpus: Path, tmp_path: Path) -> None:
    shards = build(spec(corpus), tmp_path / "cache")
    expected = train_bpe(texts_in(corpus, "train"), 300)
    assert shards.tokenizer_path.read_text() == expected.to_str()
    assert shards.vocab == vocab_size(expected)


@pytest.mark.parametrize(("chunk", "per_file"), [(7, 3), (64, 2), (1000, 1)])
def test_small_chunks_and_files_hold_the_same_tokens(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, per_file: int
) -> None:
    whole = build(spec(corpus), tmp_path / "whole")
    monkeypatch.setattr("thriftlm.training.shards.CHUNK_TOKENS", chunk)
    monkeypatch.setattr("thriftlm.training.shard_files.CHUNK_TOKENS", chunk)
    monkeypatch.setattr("thriftlm.training.shard_files.FILE_CHUNKS", per_file)
    monkeypatch.setattr("thriftlm.training.encoding.GROUP_CHARS", 100)
    cut = build(spec(corpus), tmp_path / "cut")
    monkeypatch.undo()  # what is written says how it is cut
    cut = Shards.open(cut.path)
    for name in SPLITS:
        assert all_ids(cut, name) == all_ids(whole, name)
        tokens = whole.n_tokens(name)
        assert len(cut.meta.splits[name].files) == -(-tokens // (chunk * per_file))
    starts = random.Random(1).choices(range(whole.n_tokens("train") - 50), k=100)
    rows = cut.tokens("train").gather(starts, 50)
    assert rows.dtype == np.int64
    assert np.array_equal(rows, whole.tokens("train").gather(starts, 50))


def test_long_document_is_encoded_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(f"line {number}\n" for number in range(500))
    path = tmp_path / "a.txt"
    path.write_text(text)
    monkeypatch.setattr("thriftlm.training.tokenizer.PIECE_CHARS", 100)
    monkeypatch.setattr("thriftlm.training.encoding.GROUP_CHARS", 250)
    shards = build(spec(path), tmp_path / "cache")
    assert texts_of(shards, "train") + texts_of(shards, "validation") == [
        text[: int(len(text) * 0.8)],
        text[int(len(text) * 0.8) :],
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_tokens_are_mapped_and_not_copied(corpus: Path, tmp_path: Path) -> None:
    path = build(spec(corpus), tmp_path / "cache").path
    before = pa.total_allocated_bytes()
    chunks = [chunk for name in SPLITS for chunk in Shards.open(path).tokens(name).chunks]
    assert pa.total_allocated_bytes() == before
    assert all(not chunk.flags.owndata and not chunk.flags.writeable for chunk in chunks)
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if ".arrow" in line]
    mapped = [[int(edge, 16) for edge in line.split()[0].split("-")] for line in maps]
    for chunk in chunks:
        assert any(begin <= chunk.ctypes.data < end for begin, end in mapped)


@pytest.mark.parametrize(("ids", "dtype"), [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_token_type_follows_the_vocabulary(
    corpus: Path, tmp_path: Path, ids: int, dtype: str
) -> None:
    words = ["</s>", "[UNK]", *(f"w{number}" for number in range(ids - 3)), "alpha"]
    level = models.WordLevel({word: number for number, word in enumerate(words)}, "[UNK]")
    tokenizer = Tokenizer(level)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "words.json"))
    shards = build(spec(corpus, tokenizer=str(tmp_path / "words.json")), tmp_path / "cache")
    assert (shards.vocab, shards.meta.dtype, shards.meta.end_id) == (ids, dtype, 0)
    assert shards.tokens("train").chunks[0].dtype == dtype
    assert ids - 1 in all_ids(shards, "train")  # the highest id survives


def test_builds_are_the_same_to_the_byte(corpus: Path, tmp_path: Path) -> None:
    build(spec(corpus), tmp_path / "1")
    build(spec(corpus), tmp_path / "2")
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_second_build_takes_the_cached_one(corpus: Path, tmp_path: Path) -> None:
    stages: list[str] = []
    first = build(spec(corpus), tmp_path, lambda stage, fraction: stages.append(stage))
    assert {"reading corpus", "training tokenizer", "tokenizing"} == set(stages)
    stages.clear()
    moved = corpus.rename(tmp_path / "elsewhere")  # a name changes, and with it the corpus
    assert build(spec(moved), tmp_path).path != first.path
    moved.rename(corpus)
    again = build(spec(corpus, seq_len=8), tmp_path, lambda stage, fraction: stages.append(stage))
    assert again.path == first.path
    assert stages == ["reading corpus"]


def test_whatever_changes_the_tokens_changes_the_folder(corpus: Path, tmp_path: Path) -> None:
    trained = train_bpe(["some words"], 260)
    trained.save(str(tmp_path / "t.json"))
    variants = [
        spec(corpus),
        spec(corpus, tokenizer="bpe:301"),
        spec(corpus, validation_fraction=0.3),
        spec(corpus, tokenizer=str(tmp_path / "t.json")),
    ]
    paths = {build(variant, tmp_path / "cache").path for variant in variants}
    train_bpe(["other words words"], 260).save(str(tmp_path / "t.json"))
    paths.add(build(variants[-1], tmp_path / "cache").path)
    corpus.write_text(corpus.read_text() + '{"text": "one more"}\n')
    paths.add(build(variants[0], tmp_path / "cache").path)
    assert len(paths) == 6


def test_corpus_shorter_than_a_sequence_is_refused(corpus: Path, tmp_path: Path) -> None:
    shards = build(spec(corpus), tmp_path)
    shortest = min(shards.n_tokens(name) for name in SPLITS)
    build(spec(corpus, seq_len=shortest - 1), tmp_path)
    with pytest.raises(InputError, match=rf"validation split has {shortest} tokens.*\+ 1 = "):
        build(spec(corpus, seq_len=shortest), tmp_path)


def test_killed_build_leaves_nothing_and_the_next_one_succeeds(
    corpus: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    with child(corpus, cache, "hold") as process:
        read_until(process, "holding")
        (half,) = cache.glob(".building-*")
        assert list(half.glob("train-*.arrow"))  # it had begun to write tokens
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert visible(cache) == [half.name]
    shards = build(spec(corpus), cache)
    assert visible(cache) == [shards.path.name]
    assert texts_of(shards, "train") == texts_in(corpus, "train")


def test_dead_builds_of_other_corpora_are_removed_and_live_ones_are_not(
    corpus: Path, tmp_path: Path
) -> None:
    cache, other = tmp_path / "cache", tmp_path / "other.jsonl"
    shutil.copy(corpus, other)
    dead = cache / ".building-0123456789ab"
    dead.mkdir(parents=True)
    with child(corpus, cache, "hold") as process:
        read_until(process, "holding")
        assert not dead.exists()
        (alive,) = cache.glob(".building-*")
        build(spec(other), cache)
        assert alive.exists()


def test_second_builder_waits_and_takes_what_the_first_built(corpus: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with child(corpus, cache, "hold") as first:
        read_until(first, "holding")
        with child(corpus, cache) as second:
            read_until(second, "waiting")
            first_out, _ = first.communicate("go on\n", timeout=60)
            second_out, _ = second.communicate(timeout=60)
    (name,) = visible(cache)
    assert first_out.splitlines()[-1] == second_out.splitlines()[-1] == f"built {name}"
    assert "tokenizing" not in second_out


def test_of_builders_that_start_together_one_builds(corpus: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with child(corpus, cache) as first, child(corpus, cache) as second:
        outs = [process.communicate(timeout=60)[0] for process in (first, second)]
    (name,) = visible(cache)
    assert [out.splitlines()[-1] for out in outs] == [f"built {name}"] * 2
    assert sum("tokenizing" in out for out in outs) == 1


@pytest.mark.parametrize("limit_bytes", [100, 12_000])
def test_disk_that_takes_no_more_is_an_input_error(
    corpus: Path, tmp_path: Path, limit_bytes: int
) -> None:
    cache = tmp_path / "cache"
    with child(corpus, cache, "limit", str(limit_bytes)) as process:
        out, _ = process.communicate(timeout=60)
    answer = out.splitlines()[-1]
    assert answer.startswith(f"refused cannot write token shards to {cache}: ")
    assert "File too large" in answer
    assert ("tokenizing" in out) == (limit_bytes > 10_000)  # the second fails on the tokens
    assert visible(cache) == []


def test_cache_that_cannot_be_a_folder_is_an_input_error(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for cache in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=f"cannot write token shards to {cache}: "):
            build(spec(corpus), cache)


def test_corpus_that_changes_while_it_is_read_is_refused(corpus: Path, tmp_path: Path) -> None:
    def add_a_document(stage: str, fraction: float) -> None:
        if stage == "training tokenizer" and fraction > 0.9:
            with corpus.open("a") as file:
                file.write('{"text": "late"}\n')

    with pytest.raises(InputError, match="changed while it was read"):
        build(spec(corpus), tmp_path / "cache", add_a_document)
    assert visible(tmp_path / "cache") == []


def test_interrupted_build_removes_what_it_wrote(corpus: Path, tmp_path: Path) -> None:
    def interrupt(stage: str, fraction: float) -> None:
        if stage == "tokenizing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(spec(corpus), tmp_path / "cache", interrupt)
    assert visible(tmp_path / "cache") == []


def test_damage_is_found_on_opening(corpus: Path, tmp_path: Path) -> None:
    path = build(spec(corpus), tmp_path / "cache").path
    arrow = path / "train-00000.arrow"
    whole = arrow.read_bytes()
    for content in (whole[:-100], whole + b"x", b"\0" * len(whole)):
        arrow.write_bytes(content)
        with pytest.raises(InputError, match=rf"damaged token shards: .*delete {path} "):
            build(spec(corpus), tmp_path / "cache")
    arrow.unlink()
    with pytest.raises(InputError, match=r"damaged token shards: .*No such file"):
        Shards.open(path)
    (path / "meta.json").write_text("{")
    with pytest.raises(InputError, match="not the metadata"):
        Shards.open(path)
    (path / "meta.json").unlink()
    with pytest.raises(InputError, match=r"meta\.json: damaged token shards"):
        build(spec(corpus), tmp_path / "cache")


def test_folder_that_holds_no_shards_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no token shards here"):
        Shards.open(tmp_path / "missing")
    path = build(spec(corpus), tmp_path / "cache").path
    meta = json.loads((path / "meta.json").read_text()) | {"version": 99}
    (path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match="version 99"):
        Shards.open(path)
