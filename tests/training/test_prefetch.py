"""Batches read ahead: the same ones, errors where they are waited for, no thread left."""

import json
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from thriftlm.spec import DataSpec
from thriftlm.training.batches import Batches
from thriftlm.training.mixture import Mixture
from thriftlm.training.prefetch import AHEAD, Prefetch
from thriftlm.training.shards import build

CPU = torch.device("cpu")
SEQ_LEN = 8


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "batches"]


class Counted(Batches):
    """Batches that count what was read, and fail at a step."""

    reads = 0
    fails_at: int | None = None

    def at(self, step: int) -> Iterator[Tensor]:
        for batch in super().at(step):
            if step == self.fails_at:
                raise OSError(5, "Input/output error")
            self.reads += 1
            yield batch


@pytest.fixture
def batches(tmp_path: Path) -> Counted:
    rng = random.Random(0)
    with (tmp_path / "a.jsonl").open("w") as file:
        for _ in range(30):
            file.write(json.dumps({"text": "".join(rng.choices("abcdefgh \n", k=60))}) + "\n")
    data = DataSpec(corpus=str(tmp_path / "a.jsonl"), tokenizer="bpe:257", seq_len=SEQ_LEN)
    mixture = Mixture.of(build(data, tmp_path))
    return Counted(
        mixture, seq_len=SEQ_LEN, batch_sequences=12, micro_batch=3, rank=0, world_size=2, seed=0
    )


def equal(got: Iterator[Tensor], expected: Iterator[Tensor]) -> bool:
    pairs = list(zip(got, expected, strict=True))
    return len(pairs) == 2 and all(torch.equal(a, b) for a, b in pairs)


def test_the_batches_are_the_same_in_any_order_of_steps(batches: Counted) -> None:
    ahead = Prefetch(batches, 40, CPU)
    for step in [*range(10), 25, 26, 3, 4, 4, 39, 40, 41]:
        assert equal(ahead.at(step), Batches.at(batches, step)), step
    ahead.close()
    assert not threads()


def test_a_step_that_was_left_in_its_middle_begins_anew(batches: Counted) -> None:
    ahead = Prefetch(batches, 40, CPU)
    next(ahead.at(0))
    assert equal(ahead.at(0), Batches.at(batches, 0))
    ahead.close()


def test_no_more_than_a_few_are_read_ahead_and_none_beyond_the_end(batches: Counted) -> None:
    ahead = Prefetch(batches, 40, CPU)
    list(ahead.at(0))
    for _ in range(20):
        threading.Event().wait(0.01)
    assert batches.reads <= 2 + AHEAD + 1  # one is in the thread's hand
    for step in range(1, 40):
        list(ahead.at(step))
    assert batches.reads == 80
    ahead.close()


def test_an_error_of_the_thread_is_raised_where_it_is_waited_for(batches: Counted) -> None:
    batches.fails_at = 3
    ahead = Prefetch(batches, 40, CPU)
    for step in range(3):
        list(ahead.at(step))
    with pytest.raises(OSError, match="Input/output error"):
        list(ahead.at(3))
    assert not threads()
    batches.fails_at = None
    assert equal(ahead.at(3), Batches.at(batches, 3))
    ahead.close()
    assert not threads()


def test_closing_in_the_middle_ends_the_thread_and_twice_is_once(batches: Counted) -> None:
    ahead = Prefetch(batches, 10_000, CPU)
    list(ahead.at(0))
    assert threads() == ["batches"]
    ahead.close()
    ahead.close()
    assert not threads()
