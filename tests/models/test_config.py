"""What ModelSpec fills in, and what it refuses."""

import pytest
from pydantic import ValidationError

from thriftlm_models.config import ModelSpec, sharing_schedule


def tiny(**changed: object) -> ModelSpec:
    return ModelSpec.model_validate(
        {"n_layers": 3, "d_model": 64, "n_heads": 4, "vocab": 100} | changed
    )


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
        ({"attention_pattern": []}, "Tuple should have at least 1 item"),
        ({"attention_pattern": ["local"]}, "Input should be 'full', 'sliding' or 'none'"),
        ({"attention_pattern": ["sliding"]}, "window is required where attention_pattern has"),
        ({"positions": "learned"}, "max_positions is required with positions: learned"),
        (
            {"positions": "learned", "max_positions": 8, "rope_pattern": [1e4]},
            "rope_pattern and rope_scaling need positions: rope, got learned",
        ),
        ({"max_positions": 8}, "max_positions belongs to positions: learned, got 8 with rope"),
        ({"rope_base": 0.5}, "rope_base\n  Input should be greater than 1"),
        ({"rope_base": float("inf")}, "rope_base\n  Input should be a finite number"),
        ({"preset": "apple:0.5M"}, "Apple's rule starts at apple:1M, got 0.5M"),
        ({"rope_pattern": [1e4, -1]}, "rope_pattern takes bases above 1, or 0 for no positions"),
        (
            {"rope_scaling": {"kind": "llama3", "factor": 8, "low_freq_factor": 4}},
            "low_freq_factor must be below high_freq_factor: 4 is not below 4",
        ),
        ({"rope_scaling": {"kind": "yarn", "factor": 8}}, "Input should be 'linear' or 'llama3'"),
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


def test_patterns_are_repeated_over_the_blocks_and_cut_at_the_last() -> None:
    model = tiny(
        n_layers=5, attention_pattern=["sliding", "full"], window=4, rope_pattern=[1e4, 1e6, 0]
    )
    assert model.block_attention == ("sliding", "full", "sliding", "full", "sliding")
    assert model.block_rope_base == (1e4, 1e6, 0, 1e4, 1e6)
    assert tiny(n_layers=2).block_rope_base == (1e4, 1e4)


def test_learned_positions_leave_no_block_with_rotary_ones() -> None:
    model = tiny(positions="learned", max_positions=8, head_dim=15)
    assert model.block_rope_base == (0, 0, 0)


def test_width_factor_counts_under_mup_alone() -> None:
    assert tiny(mup_base_width=16).width_factor == 1
    assert tiny(parametrization="mup", mup_base_width=16).width_factor == 4


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"window": 8}),
        ({}, {"mup_base_width": 64}),
        ({}, {"attention_pattern": ["full", "full"]}),
        ({}, {"attention_pattern": "full"}),
        ({}, {"rope_pattern": [1e4, 1e4]}),
        ({"rope_pattern": [1e4, 0]}, {"rope_pattern": "1e4 0", "rope_base": 5e5}),
        ({"rope_base": 5e5}, {"rope_pattern": [5e5]}),
        (
            {"rope_scaling": {"kind": "linear", "factor": 2}},
            {"rope_scaling": {"kind": "linear", "factor": 2, "low_freq_factor": 2}},
        ),
        (
            {"positions": "learned", "max_positions": 8},
            {"positions": "learned", "max_positions": 8, "rope_base": 5e5},
        ),
        (
            {"attention_pattern": ["sliding", "full"], "window": 8},
            {"attention_pattern": "sliding full sliding full", "window": 8},
        ),
    ],
)
def test_two_ways_to_write_a_model_are_one(
    one: dict[str, object], other: dict[str, object]
) -> None:
    assert tiny(**one) == tiny(**other)
    assert tiny(**one) == ModelSpec.model_validate(tiny(**other).model_dump())


@pytest.mark.parametrize(
    "changed",
    [
        {"window": 4, "attention_pattern": "sliding"},
        {"mup_base_width": 64, "parametrization": "mup"},
        {"rope_pattern": "1e4 5e5"},
        {"rope_scaling": {"kind": "llama3", "factor": 8, "low_freq_factor": 2}},
    ],
)
def test_what_changes_the_model_is_kept(changed: dict[str, object]) -> None:
    model = tiny(**changed)
    assert model != tiny()
    assert model.model_dump(include=set(changed)) != tiny().model_dump(include=set(changed))
