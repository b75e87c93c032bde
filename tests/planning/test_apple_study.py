"""Apple's bottleneck study (arXiv 2410.19456) replayed by estimates, eager stack, its 2,280 points.

Its points are published as tokens/s per GPU over the normalised price (A100-40GB 1, A100-80GB 1.46,
H100 2.53), the best over all that a figure does not show. What agrees is tested below. What does
not, with what would settle it:

- DDP ahead of FSDP up to 1B on several nodes: here FSDP is ahead, because it moves gradients and
  bf16 weights in pieces that hide behind blocks, where DDP with fp32 masters moves 8 bytes a
  parameter behind two thirds of one pass. The paper does not say its precision policy; no other
  source has the pair at equal settings. A probe of both on two nodes settles it.
- H100 behind A100-80GB per normalised dollar at every count: here H100 is 8 to 22% ahead, since
  every other source has it 2.0 to 2.3 times as fast, where Apple's stack gives 1.2 to 1.6. A probe
  of the stack in question settles it; an H100 step that waits for the CPU would look like that.
- The gain of FlashAttention is 1.5 to 1.8 here against 1.6 to 3.3 there: the traffic of eager
  scores is counted, not fitted, since no other row has `math` attention.
- Absolute speed: plain Hugging Face over several GPUs runs at half of what is estimated, on one
  GPU at 80%. The interval class `plain_eager` is that wide for this reason.
- 2B on one A100-40GB ran (5,582), which needs all-bf16 state; DDP of 2B at a global batch of 1,024
  did not, which needs fp32 masters. No single policy gives both: each is tested with its own.
- 100M is cheapest on A100-80GB at 1, 2 and 64 GPUs there (the last an outlier, 62.0 against 45.9
  at 32), on A100-40GB here.
"""

import runpy
from pathlib import Path

import numpy as np
import pytest

from thriftlm.planning.cases import model_columns
from thriftlm.planning.estimate import estimate_table
from thriftlm.review.apple_study import GPUS, MODELS, SPACE, Study, published, studies
from thriftlm.review.space_estimates import estimate_space
from thriftlm.search.spaces.space import load_space
from thriftlm_models.config import ModelSpec

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FACTS = runpy.run_path(str(BENCHMARKS / "memory_facts.py"))["FACTS"]
COUNTS = (2, 4, 8, 16, 32, 64)
WINNERS = {  # Figure 2, columns 2 to 64 GPUs: where another than A100-40GB is ahead
    ("apple-100m", 2): "A100-80GB",
    ("apple-100m", 64): "A100-80GB",
    ("apple-1b", 4): "A100-80GB",
    ("apple-1b", 8): "A100-80GB",
    ("apple-2b", 8): "A100-80GB",
}


@pytest.fixture(scope="module")
def estimated():
    return estimate_space(load_space(SPACE), ["eager"])


@pytest.fixture(scope="module")
def masters(estimated):
    (study,) = studies(estimated)
    return study


@pytest.fixture(scope="module")
def pure(estimated):
    table = estimated.table | {"precision": ["bf16_true"] * len(estimated.found)}
    return Study(table, estimate_table(table), "eager")


def test_the_grid_is_the_papers(masters):
    assert len(masters) == 2280


@pytest.mark.parametrize("fact", FACTS, ids=str)
def test_memory_boundaries_under_the_policy_that_each_needs(masters, pure, fact):
    study = masters if fact.policy == "fp32 masters" else pure
    assert study.runs(**fact.fixed) is fact.ran


def test_memory_boundary_that_needs_pure_bf16(masters, pure):
    # Figure 2: 2B ran on one A100-40GB (5,582 +- 48). fp32 masters and Adam alone are 31.5 GB.
    assert pure.runs(model="apple-2b", gpu="A100-40GB", n_gpus=1)
    assert not masters.runs(model="apple-2b", gpu="A100-40GB", n_gpus=1)
    # With it DDP of 2B would have run at 1,024: the two facts are not of one policy.
    assert pure.runs(model="apple-2b", strategy="ddp", batch=1024)


def test_128_sequences_do_not_fit_even_the_smallest_model():
    # facts.md 1.2; with flash attention on 80 GB.
    shape = model_columns(ModelSpec(preset="apple-100m"), 1024)
    row = shape | {"gpu": "H100-80GB", "micro_batch": 128, "stack": "eager"}
    found = estimate_table({k: [v] * 2 for k, v in row.items()} | {"attention": ["math", "flash"]})
    assert (found.fits == 0).all()


def test_flash_attention_gains_more_for_smaller_models(masters):
    gains = []
    for model in MODELS:
        fixed = {"gpu": "A100-80GB", "n_gpus": 8, "strategy": "ddp", "micro_batch": 4}
        flash, math = (masters.best(model=model, attention=a, **fixed) for a in ("flash", "math"))
        gains.append(flash.speed / math.speed)
    assert gains == sorted(gains, reverse=True)
    assert gains[0] / gains[-1] > 1.1
    assert 1.4 < gains[-1] < 1.8  # the paper: 1.61


def test_the_papers_winners_are_those_of_its_figure():
    values = {
        (m, n): {g: mark.value for g in GPUS for mark in published(2)[m, g] if mark.x == n}
        for m in MODELS
        for n in COUNTS
    }
    winners = {cell: max(GPUS, key=lambda gpu: values[cell][gpu]) for cell in values}
    assert {cell: gpu for cell, gpu in winners.items() if gpu != "A100-40GB"} == WINNERS


def test_a100_40gb_or_the_papers_winner_is_cheapest(masters):
    cells = {
        (m, n): max(GPUS, key=lambda g: masters.best(model=m, gpu=g, n_gpus=n).value)
        for m in MODELS
        for n in COUNTS
    }
    right = [gpu in ("A100-40GB", WINNERS.get(cell)) for cell, gpu in cells.items()]
    assert len(right) == 24
    assert sum(right) >= 19


def test_fsdp_is_ahead_at_2b_on_several_nodes(masters):
    for n in (16, 32, 64):
        ddp, full, grad_op = (
            masters.best(model="apple-2b", strategy=s, n_gpus=n).value
            for s in ("ddp", "fsdp_full", "fsdp_grad_op")
        )
        assert min(full, grad_op) > ddp


def test_the_largest_batch_is_not_the_best(masters):
    for model in MODELS:
        batches = (8, 16, 32, 64, 128, 256, 512, 1024)
        values = [masters.best(model=model, strategy="ddp", batch=b).value for b in batches]
        assert batches[int(np.argmax(values))] < 256  # the paper: 128, 32, 16, 8
        assert values[-1] < max(values)


def test_where_the_estimates_disagree_with_the_paper(masters):
    # Written down as they are, so that a change of the model shows here. See the top of this file.
    fixed = {"model": "apple-500m", "n_gpus": 64}
    ddp, full = (masters.best(strategy=s, **fixed).value for s in ("ddp", "fsdp_full"))
    assert ddp < full  # the paper: 13,675 > 12,960
    h100, a100 = (
        masters.best(model="apple-1b", gpu=g, n_gpus=8).value for g in ("H100-80GB", "A100-80GB")
    )
    assert h100 > a100  # the paper: 9,877 < 11,079
    one, eight = (masters.best(model="apple-1b", gpu="A100-40GB", n_gpus=n).speed for n in (1, 8))
    assert one == pytest.approx(17_125, rel=0.3)
    assert 1.8 < eight / 11_073 < 2.3
