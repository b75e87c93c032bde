"""Corpora mixed by weight: their shards, and which of them each sequence comes from."""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import partial
from itertools import chain
from math import lcm
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from thriftlm import corpora
from thriftlm.spec import DataSpec, InputError, digest
from thriftlm.training import shards as shards_module
from thriftlm.training.corpus import Survey
from thriftlm.training.shard_files import replace
from thriftlm.training.shards import OnProgress, Shards, lock, storage_errors, surveyed
from thriftlm.training.sources import SplitName
from thriftlm.training.tokenizer import train_bpe

MOST_TURNS = 10_000
"""Longest cycle of turns: weights are met to a ten-thousandth, simple fractions exactly."""


class Turn(NamedTuple):
    """Whose turn it is, and how often it was before."""

    source: int
    """Number of the corpus."""
    before: int
    """Sequences that came from it before."""


class Turns:
    """Which corpus each sequence of a run comes from: a fixed cycle, so any place is known at once.

    After any number of sequences, each corpus has given its share of them to within one. (Quota
    method of Balinski and Young, 1975: of the corpora that stay within their quota rounded up, the
    one that would fall below its quota rounded down first.)

    Args:
        weights: shares that sum to 1.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.shares = whole_shares(weights)
        self.cycle = sum(self.shares)
        given = [0] * len(self.shares)
        turns = []
        for place in range(1, self.cycle + 1):
            within = [
                number
                for number, share in enumerate(self.shares)
                if given[number] * self.cycle < share * place
            ]
            # A share falls due when `given + 1` of it is its quota; the whole quota rounds up.
            chosen = min(
                within, key=lambda n: (-(-(given[n] + 1) * self.cycle // self.shares[n]), n)
            )
            turns.append(Turn(chosen, given[chosen]))
            given[chosen] += 1
        self._turns = turns

    def at(self, place: int) -> Turn:
        """The turn of a sequence, counted from 0 over the whole run."""
        cycles, within = divmod(place, self.cycle)
        source, before = self._turns[within]
        return Turn(source, cycles * self.shares[source] + before)


def whole_shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Turns of each corpus in a cycle: exact for simple fractions, else by largest remainder."""
    exact = [Fraction(weight).limit_denominator(MOST_TURNS) for weight in weights]
    cycle = lcm(*(share.denominator for share in exact))
    if cycle <= MOST_TURNS and sum(exact) == 1:
        return tuple(int(share * cycle) for share in exact)
    quotas = np.array(weights) / sum(weights) * MOST_TURNS
    found = np.floor(quotas).astype(int)
    short = MOST_TURNS - found.sum()
    found[np.argsort(found - quotas, kind="stable")[:short]] += 1
    return tuple(found.tolist())


class Mixture:
    """The shards of a run: of one corpus, or of several with one tokenizer.

    Args:
        parts: shards by corpus.
        weights: shares of the sequences, which sum to 1.
    """

    def __init__(self, parts: Sequence[Shards], weights: Sequence[float]) -> None:
        self.parts = tuple(parts)
        self.weights = tuple(weights)
        self.turns = Turns(weights)

    @classmethod
    def of(cls, shards: Shards) -> Self:
        """One corpus alone."""
        return cls([shards], [1.0])

    @property
    def vocab(self) -> int:
        """Ids of the tokenizer; a model's vocabulary must not be smaller."""
        return self.parts[0].vocab

    @property
    def end_id(self) -> int:
        """Id that ends a document."""
        return self.parts[0].meta.end_id

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer.json."""
        return self.parts[0].tokenizer_path

    @property
    def unique_tokens(self) -> int:
        """Training tokens until the first corpus begins again; of one corpus all it has."""
        pairs = zip(self.parts, self.weights, strict=True)
        return int(min(part.unique_tokens / weight for part, weight in pairs))

    def bytes_per_token(self, split: SplitName) -> float:
        """UTF-8 bytes of text per token of a split, mixed by weight."""
        pairs = zip(self.parts, self.weights, strict=True)
        return sum(weight * part.bytes_per_token(split) for part, weight in pairs)


def build(
    data: DataSpec, cache: Path, on_progress: OnProgress | None = None, processes: int = 1
) -> Mixture:
    """The shards of each corpus of a run: those in the cache, or built now.

    `bpe:N` is trained on all corpora together: each gives its training texts, at most its weight's
    share of `TOKENIZER_BYTES`. The shards of a corpus depend on the tokenizer and not on the
    weights.

    Args:
        data: what to build.
        cache: folder for shards; created when missing.
        on_progress: called with a stage and the fraction of it that is done.
        processes: how many encode, see `encode_in_order`.

    Raises:
        InputError: as of `shards.build`.
    """
    named = corpora.shares(data.corpus)
    parts = [data.model_copy(update={"corpus": name}) for name, _ in named]
    weights = [weight for _, weight in named]
    if len(parts) > 1 and data.tokenizer.startswith("bpe:"):
        path = _common_tokenizer(data, parts, weights, cache, on_progress)
        parts = [part.model_copy(update={"tokenizer": str(path)}) for part in parts]
    built = [shards_module.build(part, cache, on_progress, processes) for part in parts]
    return Mixture(built, weights)


def _common_tokenizer(
    data: DataSpec,
    parts: Sequence[DataSpec],
    weights: Sequence[float],
    cache: Path,
    on_progress: OnProgress | None,
) -> Path:
    """The `bpe:N` of a mixture, from the cache or trained now."""
    report = on_progress or (lambda stage, fraction: None)
    try:
        vocab = data.bpe_vocab or 0
    except ValueError as error:
        raise InputError(f"data.{error}") from error
    report("reading corpus", 0.0)
    with storage_errors(cache):
        known = [surveyed(part, cache) for part in parts]
        shares = [
            [facts.fingerprint, weight] for (_, facts), weight in zip(known, weights, strict=True)
        ]
        name = f"tokenizer-{digest([vocab, data.validation_fraction, shares])}"
        path = cache / f"{name}.json"
        if not path.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with lock(cache, name, report):
                if not path.exists():
                    texts = _mixed_texts(known, weights, report)
                    replace(path, train_bpe(texts, vocab).to_str())
    return path


def _mixed_texts(
    known: Sequence[tuple[DataSpec, Survey]], weights: Sequence[float], report: OnProgress
) -> Iterator[str]:
    tell = partial(report, "training tokenizer")
    return chain.from_iterable(
        shards_module.training_texts(
            part, facts, max(1, int(weight * shards_module.TOKENIZER_BYTES)), tell
        )
        for (part, facts), weight in zip(known, weights, strict=True)
    )
