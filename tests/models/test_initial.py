"""Initial weights against the code they come from, and muP's factors."""

import math

import pytest

from thriftlm_models.config import ModelSpec
from thriftlm_models.decoder import Decoder, attention_scale
from thriftlm_models.initial import lr_factor


def stds(**changed: object) -> dict[str, float]:
    """Standard deviation of each kind of matrix."""
    shape = {
        "n_layers": 2, "d_model": 512, "n_heads": 8, "d_ff": 1024, "vocab": 4000,
        "tie_embeddings": False,
    }  # fmt: skip
    decoder = Decoder(ModelSpec.model_validate(shape | changed))
    decoder.init_weights(0)
    found = {name: p.std().item() for name, p in decoder.named_parameters() if p.ndim == 2}
    return {name.removeprefix("blocks.0.").removesuffix(".weight"): s for name, s in found.items()}


def expected(std: float, **others: float) -> dict[str, object]:
    names = ("embedding", "head", "attention.qkv", "attention.out", "feed_forward.gate_up")
    values = dict.fromkeys((*names, "feed_forward.down"), std)
    values |= {name.replace("__", "."): value for name, value in others.items()}
    return {name: pytest.approx(value, rel=0.02) for name, value in values.items()}


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        (
            {"init": "gpt2"},
            expected(0.02, attention__out=0.02 / 2, feed_forward__down=0.02 / 2),
        ),
        (
            {"init": "gpt2", "sharing": "immediate", "repeats": 8},
            expected(
                0.02,
                attention__out=0.02 / math.sqrt(32),
                feed_forward__down=0.02 / math.sqrt(32),
            ),
        ),
        ({"init": "mobilellm"}, expected(0.02)),
        (
            {"init": "tinyllama"},
            expected(
                math.sqrt(2 / 5 / 512),
                attention__out=1 / math.sqrt(512) / 2,
                feed_forward__down=1 / math.sqrt(512) / 2,
            ),
        ),
    ],
)
def test_each_init_has_the_spread_of_its_source(
    shape: dict[str, object], wanted: dict[str, object]
) -> None:
    found = stds(**shape)
    assert {name: found[name] for name in wanted} == wanted


def test_gains_start_at_one_and_biases_at_zero() -> None:
    model = ModelSpec(preset="gpt2-124m", n_layers=1, vocab=50, d_ff=64)
    decoder = Decoder(model)
    decoder.init_weights(0)
    for name, parameter in decoder.named_parameters():
        if parameter.ndim == 1:
            assert parameter.eq(0.0 if name.endswith("bias") else 1.0).all(), name


@pytest.mark.parametrize("init", ["gpt2", "mobilellm", "tinyllama"])
def test_mup_at_its_base_width_is_the_standard_parametrization(init: str) -> None:
    mup = stds(init=init, parametrization="mup", mup_base_width=512)
    assert mup == stds(init=init)


def test_mup_shrinks_matrices_of_wider_blocks_and_leaves_tables() -> None:
    base, wide = stds(), stds(parametrization="mup", mup_base_width=128)
    for name in ("attention.qkv", "attention.out", "feed_forward.gate_up", "feed_forward.down"):
        assert wide[name] == pytest.approx(base[name] / 2, rel=0.02)
    assert wide["embedding"] == base["embedding"]


def test_mup_divides_the_rate_of_matrices_in_blocks_alone() -> None:
    shape = {"n_layers": 1, "d_model": 512, "n_heads": 8, "vocab": 50}
    model = ModelSpec.model_validate(shape | {"parametrization": "mup", "mup_base_width": 128})
    factors = {name: lr_factor(name, p, model) for name, p in Decoder(model).named_parameters()}
    assert factors["blocks.0.attention.qkv.weight"] == 1 / 4
    assert factors["blocks.0.attention_norm.weight"] == factors["embedding"] == 1
    assert attention_scale(model) == 1 / 8
    wider = model.model_copy(update={"head_dim": 256})
    assert attention_scale(wider) == attention_scale(model) / 4
