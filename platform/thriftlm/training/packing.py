"""How a split becomes sequences: windows through the stream, or documents packed by best fit."""

from bisect import bisect_left, insort
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from thriftlm.training.shard_files import TokenArray, damaged, sync
from thriftlm.training.shards import Shards, lock, storage_errors
from thriftlm.training.sources import SplitName

Int = NDArray[np.int64]


class Sequences(Protocol):
    """Sequences of `seq_len` inputs and one more target, by number."""

    def __len__(self) -> int:
        """How many there are."""

    def copy(self, number: int, row: Int) -> None:
        """Write the tokens of one sequence into a row of `seq_len + 1`."""

    def real_targets(self, number: int) -> int:
        """Targets of a sequence that are no padding."""


class Windows:
    """Windows of `seq_len` inputs through a split, none overlapping.

    The last target of one is the first input of the next.

    Raises:
        ValueError: the split is shorter than one sequence.
    """

    def __init__(self, tokens: TokenArray, seq_len: int) -> None:
        self._tokens = tokens
        self._seq_len = seq_len
        self._windows = (len(tokens) - 1) // seq_len
        if self._windows < 1:
            raise ValueError(
                f"the split has {len(tokens)} tokens, one sequence needs seq_len + 1 = "
                f"{seq_len + 1}"
            )

    def __len__(self) -> int:
        return self._windows

    def copy(self, number: int, row: Int) -> None:
        """Write the tokens of one window into a row of `seq_len + 1`."""
        self._tokens.copy(number * self._seq_len, row)

    def real_targets(self, number: int) -> int:
        """All of them: a window has no padding."""
        return self._seq_len


class Plan(NamedTuple):
    """Which pieces of a split make up each sequence."""

    pieces: Int
    """(pieces, 2): first token and length of each piece, those of a sequence in a row."""
    rows: Int
    """(sequences + 1,): first piece of each sequence, and the number of pieces."""


class Packed:
    """Documents packed by best fit: each whole in one sequence where it fits there.

    A document longer than a sequence is cut into full ones, each beginning with the last target of
    the one before, and a rest. What a sequence has left is filled with end tokens, which the
    decoder takes for padding. Documents that are an end token alone are left out.
    """

    def __init__(self, tokens: TokenArray, plan: Plan, end_id: int) -> None:
        self._tokens, self._plan, self._end_id = tokens, plan, end_id

    def __len__(self) -> int:
        return len(self._plan.rows) - 1

    def copy(self, number: int, row: Int) -> None:
        """Write the tokens of one sequence, and its padding, into a row of `seq_len + 1`."""
        filled = 0
        for begin, length in self._pieces(number).tolist():
            self._tokens.copy(begin, row[filled : filled + length])
            filled += length
        row[filled:] = self._end_id

    def real_targets(self, number: int) -> int:
        """Targets of a sequence that are no padding: all its tokens but the first."""
        return int(self._pieces(number)[:, 1].sum()) - 1

    def _pieces(self, number: int) -> Int:
        first, end = self._plan.rows[number : number + 2]
        return self._plan.pieces[first:end]


def sequences(shards: Shards, split: SplitName, seq_len: int, packing: str) -> Sequences:
    """The sequences of a split.

    The plan of `best_fit` is computed once and kept beside the shards, from where it is mapped;
    computing it takes some 100 bytes of memory a document.

    Raises:
        ValueError: a split shorter than one sequence.
        InputError: the plan cannot be written, or what is kept is none.
    """
    if packing == "stream":
        return Windows(shards.tokens(split), seq_len)
    names = [shards.path / f"best_fit-{split}-{seq_len}-{part}.npy" for part in Plan._fields]
    cache = shards.path.parent
    if not names[-1].exists():
        with storage_errors(cache), lock(cache, f"{shards.path.name}-{seq_len}"):
            if not names[-1].exists():
                found = plan(shards.tokens(split), shards.meta.end_id, seq_len)
                for name, array in zip(names, found, strict=True):
                    _save(name, array)
    try:
        kept = Plan(*(np.load(name, mmap_mode="r") for name in names))
    except (OSError, ValueError) as error:
        raise damaged(names[0], f"no plan of sequences: {error}") from error
    return Packed(shards.tokens(split), kept, shards.meta.end_id)


def _save(path: Path, array: Int) -> None:
    new = path.with_name(f".{path.name}")
    with new.open("wb") as file:
        np.save(file, array)
    sync(new)
    new.replace(path)


def plan(tokens: TokenArray, end_id: int, seq_len: int) -> Plan:
    """The plan of a split by best-fit decreasing (arXiv 2404.10830, algorithm 1)."""
    begins, lengths = pieces(tokens, end_id, seq_len)
    bins = best_fit(lengths, seq_len + 1)
    order = np.lexsort((begins, bins))
    firsts = np.flatnonzero(np.diff(bins[order], prepend=-1))
    found = np.stack((begins[order], lengths[order]), axis=1)
    return Plan(found, np.append(firsts, len(bins)))


def pieces(tokens: TokenArray, end_id: int, seq_len: int) -> tuple[Int, Int]:
    """First token and length of what stays together: documents, or full sequences and a rest."""
    offsets = np.cumsum([0, *(len(chunk) for chunk in tokens.chunks)])
    ends = np.concatenate(
        [
            np.flatnonzero(chunk == end_id) + offset + 1
            for chunk, offset in zip(tokens.chunks, offsets, strict=False)
        ]
    )
    begins = np.append(0, ends[:-1])
    counts = -(-(ends - begins - 1) // seq_len)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    found = np.repeat(begins, counts) + number * seq_len
    return found, np.minimum(seq_len + 1, np.repeat(ends, counts) - found)


def best_fit(lengths: Int, capacity: int) -> Int:
    """The bin of each length by best-fit decreasing.

    Longest first, each into the bin with the least space that still holds it, or a new one. Equal
    lengths are placed together: those that share a bin in succession, then the next bin of that
    space, which is what one by one comes to.
    """
    bins = np.empty(len(lengths), np.int64)
    order = np.argsort(-lengths, kind="stable")
    edges = np.flatnonzero(np.diff(lengths[order], prepend=0, append=0)).tolist()
    space: dict[int, list[Int]] = {}  # bins by the space they have left
    spaces: list[int] = []  # its keys in order
    opened = 0

    def leave(found: Int, left: int) -> None:
        if left and len(found):
            if left not in space:
                space[left] = []
                insort(spaces, left)
            space[left].append(found)

    for first, end in pairwise(edges):
        length = int(lengths[order[first]])
        while first < end:
            place = bisect_left(spaces, length)
            if place < len(spaces):
                room = spaces.pop(place)
                found = np.concatenate(space.pop(room))
            else:
                room = capacity
                found = np.arange(opened, opened + -(-(end - first) // (room // length)))
                opened += len(found)
            each = room // length
            used = min(len(found), -(-(end - first) // each))
            count = min(end - first, used * each)
            bins[order[first : first + count]] = np.repeat(found[:used], each)[:count]
            in_last = count - (used - 1) * each
            leave(found[: used - 1], room - each * length)
            leave(found[used - 1 : used], room - in_last * length)
            leave(found[used:], room)
            first += count  # noqa: PLW2901  the run is placed part by part
    return bins
