"""Documents packed by best fit, and corpora mixed by weight."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from thriftlm.spec import DataSpec, InputError
from thriftlm.training.batches import Batches, validation_batches
from thriftlm.training.mixture import Mixture, Turns, build, whole_shares
from thriftlm.training.packing import Packed, best_fit, pieces, plan, sequences
from thriftlm.training.shard_files import TokenArray
from thriftlm.training.shards import build as build_one
from thriftlm_models.documents import IGNORED, Packing

SEQ_LEN, END = 16, 0


def by_the_book(lengths: list[int], capacity: int) -> list[int]:
    """Space left in each bin by best-fit decreasing, one piece after the other."""
    left: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [space for space in left if space >= length]
        if fitting:
            left[left.index(min(fitting))] -= length
        else:
            left.append(capacity - length)
    return left


@pytest.mark.parametrize("seed", range(20))
def test_best_fit_is_the_one_by_the_book(seed: int) -> None:
    rng = random.Random(seed)
    capacity = rng.choice([7, 16, 100])
    most = rng.choice([3, capacity // 2, capacity])
    lengths = [rng.randint(1, most) for _ in range(rng.randint(1, 400))]
    bins = best_fit(np.array(lengths), capacity)
    used = np.bincount(bins, weights=lengths)
    assert sorted(capacity - used) == sorted(by_the_book(lengths, capacity))
    assert used.max() <= capacity


def documents(count: int = 60, longest: int = 60) -> list[list[int]]:
    """Documents of distinct tokens, so that a token tells where it came from; two are empty."""
    rng, found, first = random.Random(2), [], 1
    for _ in range(count):
        length = rng.randrange(longest)
        found.append([*range(first, first + length), END])
        first += length
    return [[END], *found, [END]]


def token_array(found: list[list[int]], chunk: int = 37) -> TokenArray:
    tokens = np.array([token for document in found for token in document], np.uint16)
    chunks = [tokens[first : first + chunk] for first in range(0, len(tokens), chunk)]
    return TokenArray(chunks, chunk)


def rows_of(packed: Packed) -> list[list[int]]:
    rows = np.full((len(packed), SEQ_LEN + 1), -1)
    for number, row in enumerate(rows):
        packed.copy(number, row)
    return rows.tolist()


def test_a_document_is_whole_where_it_fits_and_every_token_is_predicted_once() -> None:
    found = documents()
    tokens = token_array(found)
    packed = Packed(tokens, plan(tokens, END, SEQ_LEN), END)
    rows = rows_of(packed)
    inside = [" ".join(map(str, row)) for row in rows]
    for document in found:
        if 1 < len(document) <= SEQ_LEN + 1:
            text = " ".join(map(str, document))
            assert any(f" {text} " in f" {row} " for row in inside)
    # What is predicted within documents: each token but the first, once.
    batch = torch.tensor(rows)
    targets = Packing(END).counted(batch[:, :-1], batch[:, 1:])
    within = targets[(targets != IGNORED) & (batch[:, :-1] != END)]
    expected = Counter(token for document in found for token in document[1:])
    assert Counter(within.tolist()) == expected
    real = [packed.real_targets(number) for number in range(len(packed))]
    assert real == (targets != IGNORED).sum(1).tolist()
    assert sum(real) / (len(real) * SEQ_LEN) > 0.97


def test_pieces_of_a_long_document_are_full_sequences_and_a_rest() -> None:
    lengths = [2 * SEQ_LEN + 5, SEQ_LEN + 1, SEQ_LEN + 2, 1, 2]
    found = [[*range(1, length), END] for length in lengths]
    begins, sizes = pieces(token_array(found), END, SEQ_LEN)
    assert sizes.tolist() == [17, 17, 5, 17, 17, 2, 2]
    assert begins.tolist() == [0, 16, 32, 37, 54, 70, 73]


WEIGHTS = [
    (1.0,),
    (0.7, 0.3),
    (1 / 3, 2 / 3),
    (0.9, *[0.01] * 10),
    (0.5, 0.25, 0.125, 0.0625, 0.0625),
    (0.5 + 1e-5, 0.5 - 1e-5),
    tuple(np.random.default_rng(0).dirichlet(np.ones(6)).tolist()),
]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_prefix_has_each_weight_to_within_one_sequence(weights: tuple[float, ...]) -> None:
    turns = Turns(weights)
    given = np.zeros(len(weights), int)
    for place in range(2 * turns.cycle + 17):
        source, before = turns.at(place)
        assert before == given[source]
        given[source] += 1
        quotas = (place + 1) * np.array(turns.shares) / turns.cycle
        assert (np.abs(given - quotas) < 1).all()
    far = turns.at(10**12)  # known without what lies before
    assert far.before == pytest.approx(10**12 * weights[far.source], rel=1e-3)


def test_simple_weights_are_met_exactly_and_others_to_a_ten_thousandth() -> None:
    assert whole_shares((0.7, 0.3)) == (7, 3)
    assert whole_shares((0.333333, 0.666667)) == (1, 2)
    assert whole_shares((0.2718281828, 0.31415926, 0.4140125572)) == (2718, 3142, 4140)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three corpora whose texts can be told apart, one of them small."""
    folder = tmp_path_factory.mktemp("corpora")
    for name, count in (("a", 200), ("b", 200), ("c", 12)):
        rng = random.Random(name)
        with (folder / f"{name}.jsonl").open("w") as file:
            for _ in range(count):
                text = "".join(rng.choices(f"{name}{name.upper()} ", k=rng.randrange(20, 90)))
                file.write(json.dumps({"text": text}) + "\n")
    return folder


def data(folder: Path, weights: dict[str, float], **fields: object) -> DataSpec:
    corpus = {str(folder / f"{name}.jsonl"): weight for name, weight in weights.items()}
    given = {"tokenizer": "bpe:260", "seq_len": SEQ_LEN, "validation_fraction": 0.2} | fields
    return DataSpec.model_validate({"corpus": corpus} | given)


def batches(mixture: Mixture, **changed: object) -> Batches:
    layout = {"seq_len": SEQ_LEN, "batch_sequences": 20, "micro_batch": 20, "rank": 0}
    given = layout | {"world_size": 1, "seed": 0} | changed
    return Batches(mixture, **given)  # type: ignore[arg-type]


def letters(mixture: Mixture, row: torch.Tensor) -> str:
    """The corpus of a sequence, told by its letters."""
    from tokenizers import Tokenizer

    text = Tokenizer.from_file(str(mixture.tokenizer_path)).decode(row.tolist())
    (name,) = set(text.lower()) - {" "}
    return name


def test_sequences_of_a_mixture_come_in_its_weights(corpora: Path, tmp_path: Path) -> None:
    mixture = build(data(corpora, {"a": 0.5, "b": 0.3, "c": 0.2}), tmp_path)
    source = batches(mixture)
    for step in range(4):
        (batch,) = source.at(step)
        assert Counter(letters(mixture, row) for row in batch) == {"a": 10, "b": 6, "c": 4}
    assert (
        mixture.parts[0].tokenizer_path.read_text() == mixture.parts[2].tokenizer_path.read_text()
    )
    assert mixture.unique_tokens == int(mixture.parts[2].unique_tokens / 0.2)


def test_each_corpus_has_epochs_of_its_own(corpora: Path, tmp_path: Path) -> None:
    mixture = build(data(corpora, {"a": 0.5, "c": 0.5}), tmp_path)
    source = batches(mixture)
    epoch = source.epoch_sequences[1]
    assert epoch < 60 < source.epoch_sequences[0]
    rows: dict[str, list[tuple[int, ...]]] = {"a": [], "c": []}
    for step in range(20):
        for batch in source.at(step):
            for row in batch:
                rows[letters(mixture, row)].append(tuple(row.tolist()))
    first, second = rows["c"][:epoch], rows["c"][epoch : 2 * epoch]
    assert sorted(first) == sorted(second)
    assert first != second
    assert len(set(rows["a"])) == len(rows["a"])  # this one has not begun again


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
@pytest.mark.parametrize(("world", "micro"), [(1, 4), (2, 5), (4, 1)])
def test_a_mixture_is_the_same_however_it_is_spread(
    corpora: Path, tmp_path: Path, packing: str, world: int, micro: int
) -> None:
    mixture = build(data(corpora, {"a": 0.5, "b": 0.3, "c": 0.2}), tmp_path)
    whole = batches(mixture, packing=packing)
    for step in (7, 3):
        rows = [
            tuple(row.tolist())
            for rank in range(world)
            for batch in batches(
                mixture, rank=rank, world_size=world, micro_batch=micro, packing=packing
            ).at(step)
            for row in batch
        ]
        (together,) = whole.at(step)
        assert sorted(rows) == sorted(tuple(row.tolist()) for row in together)
        targets = Packing(mixture.end_id).counted(together[:, :-1], together[:, 1:])
        share = (targets != IGNORED).float().mean().item()
        assert whole.real_share(step) == pytest.approx(share)
        assert (share < 1) == (packing == "best_fit")


def test_shards_do_not_depend_on_the_weights_and_equal_those_alone(
    corpora: Path, tmp_path: Path
) -> None:
    one = build(data(corpora, {"a": 0.5, "b": 0.5}), tmp_path)
    path = str(one.tokenizer_path)
    two = build(data(corpora, {"a": 0.9, "b": 0.1}, tokenizer=path), tmp_path)
    alone = build_one(data(corpora, {"b": 1}, tokenizer=path), tmp_path)
    assert [part.path for part in one.parts] == [part.path for part in two.parts]
    assert alone.path == one.parts[1].path


def test_validation_takes_turns_and_begins_again_where_a_corpus_ends(
    corpora: Path, tmp_path: Path
) -> None:
    mixture = build(data(corpora, {"a": 0.5, "c": 0.5}), tmp_path)
    few, many = (
        (len(part.tokens("validation")) - 1) // SEQ_LEN for part in reversed(mixture.parts)
    )
    for tokens, expected in ((10 * SEQ_LEN, 10), (10**9, 2 * many)):
        seen = Counter(
            letters(mixture, row)
            for rank in range(3)
            for batch in validation_batches(
                mixture, seq_len=SEQ_LEN, tokens=tokens, micro_batch=4, rank=rank, world_size=3
            )
            for row in batch.tokens[: batch.sequences]
        )
        assert seen == {"a": expected // 2, "c": expected // 2}
    assert few < many
    weighted = mixture.bytes_per_token("validation")
    assert weighted == sum(part.bytes_per_token("validation") for part in mixture.parts) / 2


def test_a_plan_is_computed_once_and_mapped(
    corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (part,) = build(data(corpora, {"a": 1}), tmp_path).parts
    first = sequences(part, "train", SEQ_LEN, "best_fit")
    monkeypatch.setattr("thriftlm.training.packing.plan", None)
    again = sequences(part, "train", SEQ_LEN, "best_fit")
    assert isinstance(first, Packed)
    assert isinstance(again, Packed)
    assert rows_of(first) == rows_of(again)
    (kept,) = part.path.glob("best_fit-*-rows.npy")
    kept.write_bytes(kept.read_bytes()[:40])
    with pytest.raises(InputError, match=r"damaged token shards: no plan .*delete"):
        sequences(part, "train", SEQ_LEN, "best_fit")


def test_a_part_that_is_too_short_is_named(corpora: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"c\.jsonl' is too short: its validation split"):
        build(data(corpora, {"a": 0.5, "c": 0.5}, seq_len=400), tmp_path)
