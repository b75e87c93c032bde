"""Derived fields of `optim` that read `system` and `data`: a batch that follows from what fits."""

import math

import pytest

from thriftlm.search.spaces.space import load_space
from thriftlm.spec import InputError

BATCH = "batch_tokens: {derive: micro_batch*n_gpus*seq_len}"
BASE = f"""\
name: tiny
data: {{corpus: python-stdlib, tokenizer: "bpe:512", seq_len: [128, 256]}}
training_budget: {{usd: 1}}
search_budget: {{trials: 8}}
search: {{algorithm: grid, fidelity: {{max_tokens: 1e6}}}}
space:
  model: {{n_layers: 2, d_model: 64, n_heads: 2}}
  optim: {{{BATCH}}}
  system: {{n_gpus: [1, 4], strategy: ddp, micro_batch: [2, 8]}}
"""


@pytest.fixture
def space(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def load(old="", new=""):
        assert old in BASE
        (tmp_path / "s.yaml").write_text(BASE.replace(old, new, 1))
        return load_space("s.yaml")

    return load


def test_a_batch_follows_from_system_and_data(space):
    counts = space("micro_batch*n", "3 * micro_batch * n").count()
    assert counts.valid == counts.distinct == 8
    batches = {
        (run.data.seq_len, run.system.n_gpus, run.system.micro_batch): run.optim.batch_tokens
        for run in counts.runs
    }
    assert batches == {point: 3 * math.prod(point) for point in batches}
    assert {run.grad_accum for run in counts.runs} == {3}


def test_what_is_derived_from_a_derived_batch_follows_too(space):
    found = space(BATCH, f"{BATCH}, grad_clip: {{derive: batch_tokens/1024}}")
    for run in found.count().runs:
        assert run.optim.grad_clip == run.optim.batch_tokens / 1024


def test_a_field_that_has_no_value_rejects_the_point(space):
    with pytest.raises(InputError) as error:
        space("micro_batch*n_gpus", "gpus_per_node")
    message = "derive: gpus_per_node*seq_len needs gpus_per_node, which has no value"
    assert message in str(error.value)


def test_a_derived_field_of_the_system_is_read_after_it_is_computed(space):
    counts = space("n_gpus: [1, 4]", "n_gpus: {derive: micro_batch//2}").count()
    assert {run.system.n_gpus for run in counts.runs} == {1, 4}
    for run in counts.runs:
        micro_batch = run.system.micro_batch
        assert run.optim.batch_tokens == micro_batch * (micro_batch // 2) * run.data.seq_len


@pytest.mark.parametrize(
    ("line", "old", "new", "message"),
    [
        (7, "n_heads: 2", "n_heads: {derive: seq_len/64}", "model.n_heads: no numeric field 'seq"),
        (
            8,
            "micro_batch*",
            "micro_batc*",
            "optim.batch_tokens: no numeric field 'micro_batc' here",
        ),
        (8, "micro_batch*", "d_model*", "optim.batch_tokens: no numeric field 'd_model' here"),
        (8, "micro_batch*", "attention*", "batch_tokens: no numeric field 'attention' here"),
        (8, "micro_batch*", "batch_tokens*", "space.optim: derived fields in a circle"),
        (9, "[2, 8]", "{derive: batch_tokens//128}", "micro_batch: no numeric field 'batch_tok"),
    ],
)
def test_unknown_names_and_circles_are_one_error_with_its_place(space, line, old, new, message):
    with pytest.raises(InputError) as error:
        space(old, new)
    assert str(error.value).startswith(f"s.yaml:{line}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
