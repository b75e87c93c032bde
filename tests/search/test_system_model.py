"""What a search learns of systems that it did not measure from those that it did."""

import numpy as np
import pytest

from thriftlm.planning.cases import Case
from thriftlm.search.learning.system_model import Fact, Prior, SystemModel
from thriftlm.spec import SystemSpec
from thriftlm_models.config import ModelSpec

CARDS, MICRO_BATCHES = ("A100-80GB", "H100-80GB"), (1, 2, 4, 8)
SYSTEMS = [
    SystemSpec(gpu=gpu, n_gpus=8, strategy="ddp", micro_batch=micro, cloud="aws")
    for gpu in CARDS
    for micro in MICRO_BATCHES
]
SHAPES = [
    Case(
        ModelSpec(d_model=width, n_layers=8, n_heads=width // 64, vocab=32768),
        SYSTEMS[0],
        seq_len=1024,
        batch_tokens=2**19,
    )
    for width in (256, 512, 1024)
]


@pytest.fixture
def model():
    runs_on = np.ones((len(SHAPES), len(SYSTEMS)), bool)
    return SystemModel(Prior.of(SHAPES, SYSTEMS, runs_on, None))


def measure(model, gap, pairs):
    """Measures pairs at their estimate and a gap in log speed, by shape and system."""
    for shape, system in pairs:
        log_speed = model.prior.log_speed[shape, system] + gap(shape, system)
        model.observe(Fact(shape, system), float(np.exp(log_speed)), False)


def shifts(model):
    return model.tokens_per_s() - model.prior.log_speed


def test_nothing_measured_is_what_the_estimate_says(model):
    assert (shifts(model) == 0).all()
    assert (model.costs(0).sd > 0.15).all()


def test_what_was_measured_is_known(model):
    measure(model, lambda *_: -0.4, [(1, 2)])
    costs = model.costs(1)
    assert costs.sd[2] == 0
    assert shifts(model)[1, 2] == pytest.approx(-0.4)


def test_cards_differ(model):
    measure(
        model, lambda shape, system: -0.3 if system < 4 else 0.1, [(1, 0), (1, 3), (1, 4), (1, 7)]
    )
    shift = shifts(model)[1]
    assert shift[[1, 2]] == pytest.approx(-0.3, abs=0.05)
    assert shift[[5, 6]] == pytest.approx(0.1, abs=0.05)


def test_a_trend_in_the_micro_batch_goes_on(model):
    """Measured at 1, 2 and 4, it is expected at 8; levels alone would expect their mean."""
    measure(model, lambda _, system: 0.15 * (system % 4), [(1, 0), (1, 1), (1, 2)])
    costs = shifts(model)[1]
    assert costs[3] == pytest.approx(0.45, abs=0.1)


def test_a_trend_in_the_size_of_the_model_goes_on(model):
    measure(model, lambda shape, _: 0.2 * shape, [(0, 1), (0, 2), (1, 1), (1, 2)])
    found = shifts(model)
    assert found[2, 1] > found[1, 1] + 0.08
