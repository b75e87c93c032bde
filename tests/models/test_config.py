"""Shapes and counts against published numbers, and what ModelSpec refuses."""

import pytest
from pydantic import ValidationError

from thriftlm_models.config import (
    ModelSpec,
    applied_params,
    embedding_params,
    flops_per_token,
    kv_bytes_per_token,
    non_embedding_params,
    presets,
    sharing_schedule,
    stored_params,
)

# Apple: arXiv 2410.19456 Table 2. MobileLLM and LS: released checkpoints. Others: config.json of
# the release, counted by its own code.
PUBLISHED_PARAMS = {
    "apple-100m": 130_569_920,
    "apple-500m": 526_550_016,
    "apple-1b": 970_458_240,
    "apple-2b": 1_969_027_008,
    "tinyllama-1.1b": 1_100_048_384,
    "litellama-460m": 461_685_760,
    "mobilellm-125m": 124_635_456,
    "mobilellm-350m": 345_355_200,
    "mobilellm-600m": 603_188_352,
    "mobilellm-1b": 1_005_461_760,
    "mobilellm-1.5b": 1_511_188_800,
    "mobilellm-ls-125m": 124_635_456,
    "mobilellm-ls-350m": 345_355_200,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
}


def tiny(**changed: object) -> ModelSpec:
    return ModelSpec.model_validate(
        {"n_layers": 3, "d_model": 64, "n_heads": 4, "vocab": 100} | changed
    )


@pytest.mark.parametrize(("name", "published"), PUBLISHED_PARAMS.items())
def test_stored_params_equal_the_published_integer(name: str, published: int) -> None:
    assert stored_params(ModelSpec(preset=name)) == published


def test_untying_mobilellm_gives_the_count_of_a_loader_that_misreads_its_config() -> None:
    assert stored_params(ModelSpec(preset="mobilellm-1.5b", tie_embeddings=False)) == 1_562_388_800


@pytest.mark.parametrize("name", presets())
def test_preset_has_a_source_and_survives_a_round_trip(name: str) -> None:
    model = ModelSpec(preset=name)
    assert presets()[name]["source"]
    assert ModelSpec.model_validate(model.model_dump()) == model


@pytest.mark.parametrize(
    ("name", "d_ff"), [(name, presets()[name]["d_ff"]) for name in presets() if "mobile" in name]
)
def test_default_d_ff_is_the_rule_of_mobilellm(name: str, d_ff: int) -> None:
    d_model = presets()[name]["d_model"]
    assert tiny(d_model=d_model, n_heads=d_model // 64).d_ff == d_ff


@pytest.mark.parametrize(
    ("sharing", "repeats", "order"),
    [
        ("none", 1, "012"),
        ("immediate", 1, "012"),
        ("immediate", 2, "001122"),
        ("immediate", 3, "000111222"),
        ("immediate", 4, "000011112222"),
        ("repeat_all_over", 1, "012"),
        ("repeat_all_over", 2, "012012"),
        ("repeat_all_over", 3, "012012012"),
        ("repeat_all_over", 4, "012012012012"),
        ("reverse", 1, "012"),
        ("reverse", 2, "012210"),
        ("reverse", 3, "012210012"),
        ("reverse", 4, "012210012210"),
    ],
)
def test_schedule_is_figure_6_of_mobilellm(sharing: str, repeats: int, order: str) -> None:
    assert sharing_schedule(3, sharing, repeats) == tuple(map(int, order))  # type: ignore[arg-type]
    assert tiny(sharing=sharing, repeats=repeats).schedule == tuple(map(int, order))


@pytest.mark.parametrize("sharing", ["immediate", "repeat_all_over", "reverse"])
@pytest.mark.parametrize("repeats", [2, 3, 4])
def test_sharing_stores_less_and_computes_the_same(sharing: str, repeats: int) -> None:
    shared = tiny(sharing=sharing, repeats=repeats)
    unrolled = tiny(n_layers=3 * repeats)
    assert stored_params(shared) == stored_params(tiny()) < stored_params(unrolled)
    assert applied_params(shared) == applied_params(unrolled) == stored_params(unrolled)
    assert flops_per_token(shared, 128) == flops_per_token(unrolled, 128)
    assert kv_bytes_per_token(shared) == kv_bytes_per_token(unrolled)


def test_tinyllama_reproduces_its_published_utilisation() -> None:
    # 24k tokens/s on one A100 (312 TFLOP/s in bf16) is published as 56%.
    utilisation = 24_000 * flops_per_token(ModelSpec(preset="tinyllama-1.1b"), 2048) / 312e12
    assert utilisation == pytest.approx(0.563, abs=0.001)


def test_the_tied_table_counts_once() -> None:
    tied, untied = tiny(), tiny(tie_embeddings=False)
    assert stored_params(untied) - stored_params(tied) == 100 * 64
    assert embedding_params(untied) == 2 * embedding_params(tied)
    assert non_embedding_params(tied) == non_embedding_params(untied)


def test_given_fields_win_over_the_preset() -> None:
    model = ModelSpec(preset="mobilellm-125m", n_layers=12)
    assert (model.n_layers, model.d_model) == (12, 576)
    assert ModelSpec(preset="mobilellm-ls-125m", sharing="none").repeats == 1
    assert ModelSpec(preset="mobilellm-125m", sharing="reverse").repeats == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"preset": "mobilelm-125m"}, "unknown model preset 'mobilelm-125m'; did you mean"),
        ({"preset": "zzz"}, "known: apple-100m"),
        ({"n_heads": 6, "n_kv_heads": 4, "head_dim": 16}, "4 does not divide 6"),
        ({"n_heads": 5}, "5 does not divide 64; change one of them or set head_dim"),
        ({"head_dim": 15}, "head_dim must be even for rotary positions, got 15"),
        ({"repeats": 2}, "repeats is 2 but sharing is none"),
        ({"repeats": 0}, "repeats\n  Input should be greater than 0"),
        ({"n_layers": 0}, "n_layers\n  Input should be greater than 0"),
        ({"sharing": "imediate"}, "sharing\n  Input should be 'none', 'immediate'"),
        ({"n_layer": 3}, "n_layer\n  Extra inputs are not permitted"),
    ],
)
def test_bad_shapes_are_refused_with_rule_and_value(
    changed: dict[str, object], message: str
) -> None:
    with pytest.raises(ValidationError) as error:
        tiny(**changed)
    assert message in str(error.value)


def test_head_dim_is_independent_of_the_width() -> None:
    assert tiny(n_heads=5, head_dim=16).head_dim == 16
