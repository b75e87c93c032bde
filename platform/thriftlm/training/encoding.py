"""Texts into tokens, by the threads of this process or by processes of their own.

Whoever encodes, what comes out is the same and in the same order.
"""

import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from thriftlm.spec import InputError
from thriftlm.training.shard_files import SPLITS, Dtype, TokenChunk
from thriftlm.training.sources import SplitName
from thriftlm.training.tokenizer import encode, pieces

GROUP_CHARS = 1 << 20
"""Characters that are encoded together."""
GROUPS_AHEAD = 2
"""Groups that wait for each process, so that it never does."""


class Piece(NamedTuple):
    """A document or part of one, small enough to encode at once."""

    split: SplitName
    """Where it belongs."""
    text: str
    """What is encoded."""
    last: bool
    """Whether the document ends with it."""


class Encoded(NamedTuple):
    """The tokens of a group in one split."""

    split: SplitName
    """Which one."""
    tokens: TokenChunk
    """In the order of the texts, an end token after each document."""
    text_bytes: int
    """UTF-8 bytes of the texts."""
    documents: int
    """Documents that end in the group."""


class Encoder:
    """What turns groups of pieces into tokens."""

    def __init__(self, tokenizer: Tokenizer, end_id: int, dtype: Dtype) -> None:
        self.tokenizer, self.end_id, self.dtype = tokenizer, end_id, dtype

    def __call__(self, group: list[Piece]) -> list[Encoded]:
        """The tokens of each split that the group has a piece of."""
        ids = encode(self.tokenizer, [piece.text for piece in group])
        return [
            Encoded(
                name,
                np.concatenate([self._array(one, piece) for one, piece in mine]),
                sum(len(piece.text.encode()) for _, piece in mine),
                sum(piece.last for _, piece in mine),
            )
            for name in SPLITS
            if (mine := [pair for pair in zip(ids, group, strict=True) if pair[1].split == name])
        ]

    def _array(self, ids: list[int], piece: Piece) -> TokenChunk:
        return np.array([*ids, self.end_id] if piece.last else ids, self.dtype)


def groups(parts: Iterable[tuple[SplitName, str]]) -> Iterator[list[Piece]]:
    """Pieces of documents in order, about `GROUP_CHARS` characters at a time."""
    group: list[Piece] = []
    chars = 0
    for name, text in parts:
        *heads, tail = pieces(text)
        for piece in (*(Piece(name, head, False) for head in heads), Piece(name, tail, True)):
            group.append(piece)
            chars += len(piece.text)
            if chars >= GROUP_CHARS:
                yield group
                group, chars = [], 0
    if group:
        yield group


def encode_in_order(
    encoder: Encoder, found: Iterable[list[Piece]], processes: int
) -> Generator[list[Encoded], None, None]:
    """The tokens of each group, in order; close it to end the processes early.

    One process encodes here, by all threads of the tokenizer. More are started anew (spawned), so
    that the caller's main module must be importable; each uses one thread, reads nothing and ends
    with this one. `GROUPS_AHEAD` groups a process are in memory.

    Raises:
        InputError: a process died.
    """
    if processes == 1:
        for group in found:
            yield encoder(group)
        return
    start = (encoder.tokenizer.to_str(), encoder.end_id, encoder.dtype)
    pool = ProcessPoolExecutor(processes, get_context("spawn"), _start, start)
    try:
        waiting: deque[Future[list[Encoded]]] = deque()
        for group in found:
            waiting.append(pool.submit(_encode, group))
            if len(waiting) >= GROUPS_AHEAD * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise InputError(
            f"one of the {processes} processes that encode died, most often because memory ran "
            "out; take fewer --processes"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_encoder: Encoder | None = None


def _start(tokenizer: str, end_id: int, dtype: Dtype) -> None:
    global _encoder  # noqa: PLW0603  a worker has one tokenizer for its whole life
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the builder, which ends workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = Encoder(Tokenizer.from_str(tokenizer), end_id, dtype)


def _end_with_parent() -> None:
    """A builder that is killed says no goodbye, and its workers would wait for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode(group: list[Piece]) -> list[Encoded]:
    assert _encoder is not None
    return _encoder(group)
