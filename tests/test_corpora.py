"""Names of corpora and mixtures, and ids that older runs have."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from thriftlm import corpora
from thriftlm.spec import ADDED_FIELDS, DataSpec, RunSpec

RUN = {"model": {"preset": "mobilellm-125m"}, "tokens": 32_768}


def run(**data: object) -> RunSpec:
    return RunSpec.model_validate(RUN | {"data": {"seq_len": 128} | data})


def test_recipes_of_before_the_new_fields_keep_their_ids() -> None:
    # As printed by the version that had four fields.
    assert (run().recipe_id, run().trial_id) == ("c88a8c0d72d7", "50a19c2437aa")
    own = run(corpus="a/*.txt", tokenizer="x/t.json")
    assert (own.recipe_id, own.trial_id) == ("26e218fc5227", "dd748b2d0d9a")
    assert run(packing="stream", document_mask=False, max_bytes=None).recipe_id == "c88a8c0d72d7"


@pytest.mark.parametrize(
    "changed", [{"packing": "best_fit"}, {"document_mask": True}, {"max_bytes": 1000}]
)
def test_each_new_field_counts_where_it_says_something(changed: dict) -> None:
    assert set(changed) <= ADDED_FIELDS
    assert run(**changed).recipe_id != run().recipe_id
    assert RunSpec.model_validate_json(run(**changed).model_dump_json()) == run(**changed)


def test_a_mixture_has_one_spelling_and_one_id() -> None:
    expected = "0.3 code/*.parquet + 0.7 hf://owner/name?config=x"
    for given in (
        {"hf://owner/name?config=x": 7, "code/*.parquet": 3},
        {"code/*.parquet": 0.3, "hf://owner/name?config=x": 0.7},
        "7 hf://owner/name?config=x + 3 code/*.parquet",
        expected,
    ):
        assert DataSpec.model_validate({"corpus": given}).corpus == expected
    assert run(corpus={"b": 1, "a": 1}).recipe_id == run(corpus="2 a + 2 b").recipe_id
    assert DataSpec.model_validate({"corpus": {"a.txt": 5}}).corpus == "a.txt"
    thirds = DataSpec.model_validate({"corpus": {"a": 1, "b": 2}}).corpus
    assert DataSpec(corpus=thirds).corpus == thirds
    assert corpora.shares(thirds) == (("a", pytest.approx(1 / 3)), ("b", pytest.approx(2 / 3)))


@pytest.mark.parametrize("plain", ["2 b", "a + b", "c++ + rust", "1 a + b", "python-stdlib"])
def test_what_is_no_mixture_is_a_plain_corpus(plain: str) -> None:
    assert DataSpec(corpus=plain).corpus == plain
    assert corpora.shares(plain) == ((plain, 1.0),)


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ({"a": 1, "b": 0}, "at least 0.0001 of the weights' sum: 'b' has 0 of 1"),
        ({"a": 1, "b": -1}, "'b' has -1"),
        ({"a": 1, "b": float("inf")}, "'a' has 1 of inf"),
        ({"a": 1, "b": 1e-6}, "'b' has 1e-06 of 1"),
        ({"a": 1, "b": "much"}, "maps each corpus to its weight, got 'much'"),
        ({}, "a mixture needs a corpus"),
        ("1 a + 2 a", "'a' is there twice"),
        ("0 a + 0 b", "'a' has 0"),
        ("1 a + 2 hf://", "hf:// needs OWNER/NAME"),
    ],
)
def test_a_bad_mixture_is_refused(corpus: object, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataSpec.model_validate({"corpus": corpus})


def test_relative_parts_of_a_mixture_are_anchored_and_shown_without_folders(tmp_path: Path) -> None:
    data = DataSpec(corpus="1 texts/a.txt + 1 python-stdlib + 2 hf://x/y + 4 /abs/b.parquet#body")
    moved = data.anchored(tmp_path)
    assert corpora.shares(moved.corpus) == (
        ("/abs/b.parquet#body", 0.5),
        (f"{tmp_path}/texts/a.txt", 0.125),
        ("hf://x/y", 0.25),
        ("python-stdlib", 0.125),
    )
    assert corpora.label(moved.corpus) == (
        "0.125 a.txt + 0.5 b.parquet#body + 0.25 hf://x/y + 0.125 python-stdlib"
    )
    assert corpora.label("/home/someone/a.txt") == "a.txt"
