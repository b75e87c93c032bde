"""Sequences of token shards as tensors: which rank reads what at which step."""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thriftlm.training.mixture import Mixture
from thriftlm.training.packing import Windows, sequences


class Batches:
    """The training batches of one rank, by optimizer step.

    The training split of each corpus is made into sequences (`packing`). Each epoch of a corpus
    runs through all of its sequences in an order drawn from seed, epoch and corpus; it may end
    within a batch. Corpora take turns by weight (`Turns`), each with epochs of its own. What a step
    trains on depends on seed, step and `batch_sequences` alone, so that resuming needs no state,
    and neither the number of ranks nor the micro batch changes it.

    Args:
        mixture: where the tokens lie.
        seq_len: tokens per sequence.
        batch_sequences: sequences in one optimizer step, over all ranks.
        micro_batch: sequences of one rank in one forward pass.
        rank: this rank.
        world_size: ranks that share a step.
        seed: seed of the order.
        packing: how documents become sequences, `stream` or `best_fit`.

    Raises:
        ValueError: `micro_batch x world_size` does not divide `batch_sequences`, no such rank, or
            a split is shorter than one sequence.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        seq_len: int,
        batch_sequences: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        seed: int,
        packing: str = "stream",
    ) -> None:
        if batch_sequences % (micro_batch * world_size):
            raise ValueError(
                "micro_batch x world_size must divide batch_sequences: "
                f"{micro_batch} x {world_size} does not divide {batch_sequences}"
            )
        _check_rank(rank, world_size)
        self._sources = [sequences(part, "train", seq_len, packing) for part in mixture.parts]
        self._turns = mixture.turns
        self._seq_len = seq_len
        self._batch_sequences = batch_sequences
        self._micro_batch = micro_batch
        self._rank = rank
        self._world_size = world_size
        self._is_padded = packing != "stream"
        # Two of each corpus: a batch may begin in one epoch and end in the next.
        self._order = lru_cache(maxsize=2 * len(self._sources))(
            lambda source, epoch: _order(len(self._sources[source]), seed, epoch, source)
        )

    @property
    def epoch_sequences(self) -> tuple[int, ...]:
        """Sequences in one epoch of each corpus."""
        return tuple(len(source) for source in self._sources)

    @property
    def in_step(self) -> int:
        """Micro-batches of one rank in a step."""
        return self._batch_sequences // (self._micro_batch * self._world_size)

    def at(self, step: int) -> Iterator[Tensor]:
        """Micro-batches of a rank at a step (the first is 0), int64 (micro_batch, seq_len + 1).

        Inputs are `[:, :-1]`, targets `[:, 1:]`.
        """
        begin = step * self._batch_sequences
        stride = self._micro_batch * self._world_size
        for first in range(begin, begin + self._batch_sequences, stride):
            mine = first + self._rank * self._micro_batch
            rows = np.empty((self._micro_batch, self._seq_len + 1), np.int64)
            for row, place in zip(rows, range(mine, mine + self._micro_batch), strict=True):
                source, number = self._sequence(place)
                self._sources[source].copy(number, row)
            yield torch.from_numpy(rows)

    def real_share(self, step: int) -> float:
        """Share of the targets of a step, over all ranks, that are no padding."""
        if not self._is_padded:
            return 1.0
        begin = step * self._batch_sequences
        found = (self._sequence(begin + index) for index in range(self._batch_sequences))
        real = sum(self._sources[source].real_targets(number) for source, number in found)
        return real / (self._batch_sequences * self._seq_len)

    def _sequence(self, place: int) -> tuple[int, int]:
        """The corpus and the number in it of a sequence, counted over the whole run."""
        source, index = self._turns.at(place)
        epoch, within = divmod(index, len(self._sources[source]))
        return source, int(self._order(source, epoch)[within])


class ValidationBatch(NamedTuple):
    """One forward pass of one rank over validation sequences."""

    tokens: Tensor
    """int64 (rows, seq_len + 1), at least one row and at most `micro_batch`."""
    sequences: int
    """How many rows count: all of them, or 0 where the only row is there for company."""


def validation_batches(
    mixture: Mixture, *, seq_len: int, tokens: int, micro_batch: int, rank: int, world_size: int
) -> Iterator[ValidationBatch]:
    """A rank's share of the first `ceil(tokens / seq_len)` validation windows, or of all.

    Windows through the stream of documents whatever `packing` is, so that losses of runs that pack
    in different ways can be compared. Corpora take turns by weight; where one has no more windows
    while another still has, it begins again.

    Every rank gets the same number of batches, because a sharded forward pass is collective; their
    rows may differ by rank. Where a rank has nothing left, its batch is one row with
    `sequences == 0`: run it, and let it count nothing. The mean over the windows is

        sum over ranks and batches of (mean loss of the batch x sequences) / sum of sequences

    which is exact under a plain sum over ranks, and the same whatever the number of ranks is.

    Raises:
        ValueError: no such rank, or a split is shorter than one sequence.
    """
    _check_rank(rank, world_size)
    sources = [Windows(part.tokens("validation"), seq_len) for part in mixture.parts]
    pairs = zip(sources, mixture.weights, strict=True)
    windows = min(-(-tokens // seq_len), int(max(len(one) / weight for one, weight in pairs)))
    mine = range(rank, windows, world_size)
    most = -(-windows // world_size)
    for first in range(0, most, micro_batch):
        places = mine[first : first + micro_batch]
        rows = np.empty((len(places) or 1, seq_len + 1), np.int64)
        for row, place in zip(rows, places or [0], strict=True):
            source, index = mixture.turns.at(place)
            sources[source].copy(index % len(sources[source]), row)
        yield ValidationBatch(torch.from_numpy(rows), len(places))


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in 0..{world_size - 1}, got {rank}")


def _order(sequences: int, seed: int, epoch: int, source: int) -> NDArray[np.uint32]:
    # A source of 0 gives the stream that [seed, epoch] has: numpy fills up with zeros.
    numbers = np.arange(sequences, dtype=np.uint32)
    return np.random.default_rng([seed, epoch, source]).permutation(numbers)
