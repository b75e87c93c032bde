import json
import random

import numpy as np
import pytest
import torch

from thriftlm.spec import DataSpec
from thriftlm.training.batches import Batches, validation_batches
from thriftlm.training.mixture import Mixture
from thriftlm.training.shard_files import TokenArray
from thriftlm.training.shards import Shards, build

SEQ_LEN = 8
LAYOUTS = [(1, 12), (1, 3), (2, 6), (2, 2), (3, 4), (4, 1), (6, 2)]
"""World sizes and micro batches that make 12 sequences."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    folder = tmp_path_factory.mktemp("shards")
    rng = random.Random(0)
    with (folder / "a.jsonl").open("w") as file:
        for _ in range(30):
            text = "".join(rng.choices("abcdefghijklmnop \n", k=60))
            file.write(json.dumps({"text": text}) + "\n")
    data = DataSpec(
        corpus=str(folder / "a.jsonl"),
        tokenizer="bpe:257",
        seq_len=SEQ_LEN,
        validation_fraction=0.2,
    )
    return build(data, folder)


def batches(
    shards: Shards, micro: int = 12, rank: int = 0, world: int = 1, seed: int = 0
) -> Batches:
    return Batches(
        Mixture.of(shards),
        seq_len=SEQ_LEN,
        batch_sequences=12,
        micro_batch=micro,
        rank=rank,
        world_size=world,
        seed=seed,
    )


def global_batch(shards: Shards, step: int, world: int, micro: int) -> set[tuple[int, ...]]:
    rows = [
        tuple(row.tolist())
        for rank in range(world)
        for batch in batches(shards, micro, rank, world).at(step)
        for row in batch
    ]
    assert len(rows) == 12
    return set(rows)


def windows(shards: Shards, split: str = "train") -> list[tuple[int, ...]]:
    tokens = shards.tokens(split)  # type: ignore[arg-type]
    count = (len(tokens) - 1) // SEQ_LEN
    rows = tokens.gather(range(0, count * SEQ_LEN, SEQ_LEN), SEQ_LEN + 1)
    return [tuple(row.tolist()) for row in rows]


def test_window_outside_the_split_is_refused() -> None:
    tokens = TokenArray([np.arange(4, dtype=np.uint16), np.arange(2, dtype=np.uint16)], 4)
    assert tokens.gather([0, 1], 5).tolist() == [[0, 1, 2, 3, 0], [1, 2, 3, 0, 1]]
    for start in (-1, 2):
        with pytest.raises(IndexError, match="leaves the 6 tokens"):
            tokens.gather([start], 5)


def test_batches_have_the_promised_shape(shards: Shards) -> None:
    micro_batches = list(batches(shards, micro=3, rank=1, world=2).at(0))
    assert [tuple(batch.shape) for batch in micro_batches] == [(3, SEQ_LEN + 1)] * 2
    assert all(batch.dtype == torch.int64 and batch.is_contiguous() for batch in micro_batches)


def test_every_window_comes_once_per_epoch_across_batch_boundaries(shards: Shards) -> None:
    expected = sorted(windows(shards))
    assert len(set(expected)) == len(expected), "windows of the test corpus can be told apart"
    source = batches(shards)
    assert source.epoch_sequences[0] == len(expected)
    assert source.epoch_sequences[0] % 12, "the epoch ends within a batch"
    rows = [tuple(row.tolist()) for step in range(60) for b in source.at(step) for row in b]
    epochs = [
        rows[first : first + source.epoch_sequences[0]]
        for first in range(0, len(rows), source.epoch_sequences[0])
    ]
    assert len(epochs) > 3
    assert all(sorted(epoch) == expected for epoch in epochs[:-1])
    assert epochs[0] != epochs[1]


def test_epoch_shorter_than_a_batch(shards: Shards) -> None:
    seq_len = (shards.n_tokens("train") - 1) // 5
    source = Batches(
        Mixture.of(shards),
        seq_len=seq_len,
        batch_sequences=12,
        micro_batch=12,
        rank=0,
        world_size=1,
        seed=0,
    )
    (batch,) = source.at(0)
    firsts = [tuple(row.tolist()) for row in batch]
    assert source.epoch_sequences[0] == 5
    assert len(set(firsts[:5])) == len(set(firsts[5:10])) == 5


@pytest.mark.parametrize(("world", "micro"), LAYOUTS)
def test_global_batch_is_the_same_however_it_is_spread(
    shards: Shards, world: int, micro: int
) -> None:
    for step in (0, 5, 29):
        assert global_batch(shards, step, world, micro) == global_batch(shards, step, 1, 12)


def test_any_step_is_there_without_the_ones_before(shards: Shards) -> None:
    running = batches(shards, micro=6, rank=1, world=2)
    in_order = [list(running.at(step)) for step in range(40)]
    for step in (39, 3, 17):
        fresh = list(batches(shards, micro=6, rank=1, world=2).at(step))
        assert all(torch.equal(a, b) for a, b in zip(fresh, in_order[step], strict=True))


def test_seed_decides_the_order(shards: Shards) -> None:
    one, same, other = (next(batches(shards, seed=seed).at(0)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_layout_that_does_not_divide_the_batch_is_refused(shards: Shards) -> None:
    with pytest.raises(ValueError, match="5 x 2 does not divide 12"):
        batches(shards, micro=5, world=2)
    with pytest.raises(ValueError, match=r"rank must be in 0\.\.1, got 2"):
        batches(shards, micro=2, rank=2, world=2)
    with pytest.raises(ValueError, match="one sequence needs"):
        next(
            validation_batches(
                Mixture.of(shards), seq_len=10**6, tokens=1, micro_batch=1, rank=0, world_size=1
            )
        )


@pytest.mark.parametrize("tokens", [1, SEQ_LEN * 7, SEQ_LEN * 7 + 1, 10**9])
@pytest.mark.parametrize(("world", "micro"), [*LAYOUTS, (7, 3), (40, 2)])
def test_validation_is_the_same_sequences_and_an_exact_mean(
    shards: Shards, tokens: int, world: int, micro: int
) -> None:
    expected = windows(shards, "validation")[: -(-tokens // SEQ_LEN)]
    ranks = [
        list(
            validation_batches(
                Mixture.of(shards),
                seq_len=SEQ_LEN,
                tokens=tokens,
                micro_batch=micro,
                rank=rank,
                world_size=world,
            )
        )
        for rank in range(world)
    ]
    assert len({len(rank) for rank in ranks}) == 1, "collectives need equally many forward passes"
    seen, weighted, sequences = [], 0.0, 0
    for batch in (batch for rank in ranks for batch in rank):
        assert 1 <= len(batch.tokens) <= micro
        assert batch.sequences in {0, len(batch.tokens)}
        seen += [tuple(row.tolist()) for row in batch.tokens[: batch.sequences]]
        weighted += float(batch.tokens.double().mean()) * batch.sequences  # a loss of its own kind
        sequences += batch.sequences
    assert sorted(seen) == sorted(expected)
    mean = torch.tensor(expected).double().mean()
    assert weighted / sequences == pytest.approx(float(mean), rel=1e-12)
