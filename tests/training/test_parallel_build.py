"""Shards built by several processes, killed ones too, and surveys that are kept."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from thriftlm.spec import DataSpec
from thriftlm.training import corpus as corpus_module
from thriftlm.training import shards as shards_module
from thriftlm.training.corpus import survey
from thriftlm.training.shards import build

CHILD = """
import signal
import sys
from pathlib import Path
from thriftlm.spec import DataSpec, InputError
from thriftlm.training import encoding
from thriftlm.training.shards import build

encoding.GROUP_CHARS = 2000

def progress(stage, fraction):
    if stage == "tokenizing" and fraction > 0.5 and progress.hold:
        progress.hold = False
        print("holding", flush=True)
        sys.stdin.readline()

progress.hold = True
data = DataSpec(corpus=sys.argv[1], tokenizer="bpe:300", seq_len=16, validation_fraction=0.2)
if __name__ == "__main__":
    # A suite in the background may have been started with interrupts ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        print("built", build(data, Path(sys.argv[2]), progress, processes=2).path.name)
    except InputError as error:
        print("refused", error)
    except KeyboardInterrupt:
        print("interrupted")
"""


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rng, words = random.Random(0), ["alpha", "beta", "gamma", "delta", "ümlaut", "\n"]
    path = tmp_path / "corpus.jsonl"
    with path.open("w") as file:
        for number in range(60):
            text = f"{number}: " + " ".join(rng.choices(words, k=rng.randrange(20, 400)))
            file.write(json.dumps({"text": text}) + "\n")
    return path


def spec(corpus: Path, **fields: object) -> DataSpec:
    given = {"tokenizer": "bpe:300", "seq_len": 16, "validation_fraction": 0.2} | fields
    return DataSpec(corpus=str(corpus), **given)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextmanager
def held_build(corpus: Path, cache: Path) -> Iterator[subprocess.Popen[str]]:
    """A build by two processes that has written half of its tokens."""
    script = corpus.with_name("child.py")
    script.write_text(CHILD)
    process = subprocess.Popen(
        [sys.executable, str(script), str(corpus), str(cache)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "holding\n"
        assert list(cache.glob(".building-*"))
        yield process
    finally:
        process.kill()
        process.communicate()


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found = psutil.Process(process.pid).children()
    return [child for child in found if "spawn_main" in " ".join(child.cmdline())]


def eventually(is_so: Callable[[], bool]) -> bool:
    for _ in range(200):
        if is_so():
            return True
        time.sleep(0.1)
    return False


def test_any_number_of_processes_gives_the_same_bytes(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thriftlm.training.encoding.GROUP_CHARS", 3000)  # some 25 groups
    built = [
        contents(build(spec(corpus), tmp_path / str(count), processes=count).path)
        for count in (1, 2, 3)
    ]
    assert built[0] == built[1] == built[2]
    assert sum(len(content) for content in built[0].values()) > 10_000


def test_a_killed_worker_is_an_error_and_leaves_nothing(corpus: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with held_build(corpus, cache) as process:
        workers = workers_of(process)
        assert len(workers) == 2
        workers[0].kill()
        assert eventually(lambda: not any(worker.is_running() for worker in workers))
        out, _ = process.communicate("go on\n", timeout=60)
    assert out.startswith("refused one of the 2 processes that encode died, ")
    assert [path.name for path in cache.glob("[!.]*")] == []
    assert not list(cache.glob(".building-*"))


def test_a_killed_builder_takes_its_workers_along(corpus: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with held_build(corpus, cache) as process:
        workers = workers_of(process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert eventually(lambda: not any(worker.is_running() for worker in workers))
    assert not list(cache.glob("[!.]*"))
    assert build(spec(corpus), cache).path.parent == cache
    assert not list(cache.glob(".building-*"))


def test_an_interrupt_of_the_group_ends_all_without_a_trace(corpus: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with held_build(corpus, cache) as process:
        workers = workers_of(process)
        for one in [*workers, psutil.Process(process.pid)]:  # as Ctrl-C does
            one.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
        assert eventually(lambda: not any(worker.is_running() for worker in workers))
    assert out == "interrupted\n"
    assert not list(cache.glob(".building-*"))


def aged(path: Path) -> Path:
    os.utime(path, ns=(0, time.time_ns() - 10 * corpus_module.SETTLED_NS))
    return path


def test_a_corpus_is_surveyed_once_until_a_file_changes(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    read_all = corpus_module._read_all
    monkeypatch.setattr(
        corpus_module, "_read_all", lambda *given: (reads.append(str(given)), read_all(*given))[1]
    )
    cache = tmp_path / "cache"
    build(spec(corpus), cache)  # too young: a change within the clock's tick would go unseen
    assert len(reads) == 1
    aged(corpus)
    first = build(spec(corpus), cache)
    assert build(spec(corpus), cache).path == first.path
    assert len(reads) == 2
    assert survey(str(corpus), None, cache) == survey(str(corpus))
    limited = build(spec(corpus, max_bytes=20_000), cache)
    assert (limited.path == first.path, len(reads)) == (False, 4)
    corpus.write_text(corpus.read_text().replace("alpha", "alphA"))  # the same size
    aged(corpus)
    assert build(spec(corpus), cache).path != first.path


def test_a_tokenizer_of_a_long_corpus_is_trained_on_a_sample(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = survey(str(corpus))
    texts = [
        list(shards_module.training_texts(spec(corpus), facts, limit, lambda done: None))
        for limit in (facts.text_bytes, facts.text_bytes // 4)
    ]
    assert set(texts[1]) < set(texts[0])
    assert 0.1 < len(texts[1]) / len(texts[0]) < 0.5
    monkeypatch.setattr("thriftlm.training.shards.TOKENIZER_BYTES", facts.text_bytes // 4)
    sampled = build(spec(corpus), tmp_path / "cache")
    assert sampled.n_tokens("train") > 0
    uncounted = facts.model_copy(update={"is_counted": False, "text_bytes": 0})
    first = list(shards_module.training_texts(spec(corpus), uncounted, 3000, lambda done: None))
    assert first == texts[0][: len(first)]
    assert 3000 <= sum(len(text.encode()) for text in first) < 6000
