"""The bound on estimated memory: what does not fit is no point of the space."""

import pytest
import yaml

from thriftlm.planning.estimate import memory_fractions
from thriftlm.search.spaces.space import Rejected, load_space

BASE = """\
name: tiny
data: {seq_len: 2048}
training_budget: {usd: 1}
search_budget: {trials: 8}
search: {algorithm: random, fidelity: {min_tokens: 100000000, max_tokens: 1e9}}
space:
  model: {preset: tinyllama-1.1b}
  optim: {batch_tokens: 1048576, lr: [1e-3, 2e-3]}
  system:
    gpu: [A100-40GB, A100-80GB]
    micro_batch: [1, 8, 64]
    precision: amp_bf16
    n_gpus: 8
    strategy: ddp
"""


@pytest.fixture
def space(tmp_path):
    def make(**changes):
        path = tmp_path / "s.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(BASE) | changes, sort_keys=False))
        return load_space(path)

    return make


def test_what_does_not_fit_is_removed_and_counted(space):
    before = space().count()
    bounded = space(constraints={"memory_fraction": {"max": 0.6}})
    after = bounded.count()
    needed = memory_fractions(before.runs)
    assert before.valid == 12
    assert after.runs == tuple(
        run for run, share in zip(before.runs, needed, strict=True) if share <= 0.6
    )
    assert after.rejected == {"memory_fraction above 0.6": int((needed > 0.6).sum())}
    assert 0 < len(after.runs) < 12
    point = {"system.gpu": "A100-40GB", "system.micro_batch": 64, "optim.lr": 1e-3}
    found = bounded.resolve(point, 0)
    assert isinstance(found, Rejected)
    assert found.detail.endswith(" on A100-40GB")


def test_a_cpu_that_was_not_measured_is_kept_with_a_warning(space):
    changes = {"model": {"n_layers": [1, 2], "d_model": 64, "n_heads": 2}, "optim": {}}
    changes["system"] = {"micro_batch": 2}
    bounded = space(space=changes, constraints={"memory_fraction": {"max": 0.5}})
    assert bounded.count().rejected == {}
    assert any("not measured" in warning for warning in bounded.warnings())
