"""Sequences of token shards as tensors: which rank reads what at which step."""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thriftlm.training.shard_files import TokenArray
from thriftlm.training.shards import Shards


class Batches:
    """The training batches of one rank, by optimizer step.

    The training split is cut into windows of `seq_len` inputs, which do not overlap (the last
    target of one is the first input of the next). Each epoch runs through all of them in an order
    drawn from seed and epoch; an epoch may end within a batch. What a step trains on depends on
    seed, step and `batch_sequences` alone, so that resuming needs no state, and neither the number
    of ranks nor the micro batch changes it.

    Args:
        shards: where the tokens lie.
        seq_len: tokens per sequence.
        batch_sequences: sequences in one optimizer step, over all ranks.
        micro_batch: sequences of one rank in one forward pass.
        rank: this rank.
        world_size: ranks that share a step.
        seed: seed of the order.

    Raises:
        ValueError: `micro_batch x world_size` does not divide `batch_sequences`, no such rank, or
            the split is shorter than one sequence.
    """

    def __init__(
        self,
        shards: Shards,
        *,
        seq_len: int,
        batch_sequences: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        seed: int,
    ) -> None:
        if batch_sequences % (micro_batch * world_size):
            raise ValueError(
                "micro_batch x world_size must divide batch_sequences: "
                f"{micro_batch} x {world_size} does not divide {batch_sequences}"
            )
        _check_rank(rank, world_size)
        self._tokens = shards.tokens("train")
        self.windows = _windows(self._tokens, seq_len)
        self._seq_len = seq_len
        self._batch_sequences = batch_sequences
        self._micro_batch = micro_batch
        self._rank = rank
        self._world_size = world_size
        # Two: a batch may begin in one epoch and end in the next.
        self._order = lru_cache(maxsize=2)(lambda epoch: _order(self.windows, seed, epoch))

    def at(self, step: int) -> Iterator[Tensor]:
        """Micro-batches of a rank at a step (the first is 0), int64 (micro_batch, seq_len + 1).

        Inputs are `[:, :-1]`, targets `[:, 1:]`.
        """
        begin = step * self._batch_sequences
        stride = self._micro_batch * self._world_size
        for first in range(begin, begin + self._batch_sequences, stride):
            mine = first + self._rank * self._micro_batch
            windows = [self._window(place) for place in range(mine, mine + self._micro_batch)]
            yield _read(self._tokens, windows, self._seq_len)

    def _window(self, place: int) -> int:
        epoch, index = divmod(place, self.windows)
        return int(self._order(epoch)[index])


class ValidationBatch(NamedTuple):
    """One forward pass of one rank over validation sequences."""

    tokens: Tensor
    """int64 (rows, seq_len + 1), at least one row and at most `micro_batch`."""
    sequences: int
    """How many rows count: all of them, or 0 where the only row is there for company."""


def validation_batches(
    shards: Shards, *, seq_len: int, tokens: int, micro_batch: int, rank: int, world_size: int
) -> Iterator[ValidationBatch]:
    """A rank's share of the first `ceil(tokens / seq_len)` validation windows, or of all.

    Every rank gets the same number of batches, because a sharded forward pass is collective; their
    rows may differ by rank. Where a rank has nothing left, its batch is one row with
    `sequences == 0`: run it, and let it count nothing. The mean over the windows is

        sum over ranks and batches of (mean loss of the batch x sequences) / sum of sequences

    which is exact under a plain sum over ranks, and the same whatever the number of ranks is.

    Raises:
        ValueError: no such rank, or the split is shorter than one sequence.
    """
    _check_rank(rank, world_size)
    split = shards.tokens("validation")
    windows = min(-(-tokens // seq_len), _windows(split, seq_len))
    mine = range(rank, windows, world_size)
    most = -(-windows // world_size)
    for first in range(0, most, micro_batch):
        rows = mine[first : first + micro_batch]
        yield ValidationBatch(_read(split, list(rows) or [0], seq_len), len(rows))


def _windows(tokens: TokenArray, seq_len: int) -> int:
    windows = (len(tokens) - 1) // seq_len
    if windows < 1:
        raise ValueError(
            f"the split has {len(tokens)} tokens, one sequence needs seq_len + 1 = {seq_len + 1}"
        )
    return windows


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in 0..{world_size - 1}, got {rank}")


def _order(windows: int, seed: int, epoch: int) -> NDArray[np.uint32]:
    numbers = np.arange(windows, dtype=np.uint32)
    return np.random.default_rng([seed, epoch]).permutation(numbers)


def _read(tokens: TokenArray, windows: list[int], seq_len: int) -> Tensor:
    rows = tokens.gather([window * seq_len for window in windows], seq_len + 1)
    return torch.from_numpy(rows)
