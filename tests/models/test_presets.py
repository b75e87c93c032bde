"""Every published shape to the integer, and Apple's rule."""

import pytest

from thriftlm_models.config import ModelSpec
from thriftlm_models.counts import stored_params
from thriftlm_models.presets import apple_shape, presets

# Apple: arXiv 2410.19456 Table 2. MobileLLM and LS: released checkpoints. TinyLlama-120M is what
# lit_gpt's own model holds. Depth sweep: Table 11 prints millions, these are the integers behind
# them (test_counts holds them to the print). Others: config.json of the release, counted by its
# own code.
PUBLISHED_PARAMS = {
    "apple-100m": 130_569_920,
    "apple-500m": 526_550_016,
    "apple-1b": 970_458_240,
    "apple-2b": 1_969_027_008,
    "tinyllama-1.1b": 1_100_048_384,
    "tinyllama-120m": 121_129_728,
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
    "smollm2-1.7b": 1_711_376_384,
    "smollm3-3b": 3_075_098_624,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "llama-3.2-1b": 1_235_814_400,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    "mobilellm-r1-140m": 140_248_512,
    "mobilellm-r1-360m": 359_431_168,
    "mobilellm-r1-950m": 949_685_760,
    "gpt2-124m": 124_439_808,
    "mobilellm-125m-depth4": 163_196_160,
    "mobilellm-125m-depth6": 142_619_648,
    "mobilellm-125m-depth8": 138_099_584,
    "mobilellm-125m-depth12": 134_105_856,
    "mobilellm-125m-depth18": 132_406_400,
    "mobilellm-125m-depth24": 132_443_712,
    "mobilellm-125m-depth30": 135_035_392,
    "mobilellm-125m-depth42": 134_681_792,
    "mobilellm-125m-depth62": 134_331_264,
    "mobilellm-350m-depth5": 387_995_648,
    "mobilellm-350m-depth10": 381_451_776,
    "mobilellm-350m-depth12": 379_947_392,
    "mobilellm-350m-depth15": 386_702_080,
    "mobilellm-350m-depth19": 376_352_640,
    "mobilellm-350m-depth24": 373_867_520,
    "mobilellm-350m-depth28": 371_152_320,
    "mobilellm-350m-depth32": 380_363_648,
    "mobilellm-350m-depth46": 374_806_272,
    "mobilellm-350m-depth66": 376_261_760,
}


def test_every_preset_is_in_the_table() -> None:
    assert presets().keys() == PUBLISHED_PARAMS.keys()


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
    assert ModelSpec.model_validate_json(model.model_dump_json()) == model


@pytest.mark.parametrize("size", ["125m", "350m", "600m", "1b", "1.5b"])
def test_default_d_ff_is_the_rule_of_mobilellm(size: str) -> None:
    fields = presets()[f"mobilellm-{size}"]
    shape = {key: fields[key] for key in ("n_layers", "d_model", "n_heads", "vocab")}
    assert ModelSpec.model_validate(shape).d_ff == fields["d_ff"]


@pytest.mark.parametrize(
    ("billions", "blocks", "width"), [(0.1, 9, 896), (0.5, 15, 1536), (1, 19, 1920), (2, 24, 2496)]
)
def test_apples_rule_gives_its_table(billions: float, blocks: int, width: int) -> None:
    # Table 2 has 832 for 100M (864 in print); the rule gives 865.6, which rounds to 896.
    shape = apple_shape(billions)
    assert (shape["n_layers"], shape["d_model"]) == (blocks, width)
    model = ModelSpec(preset=f"apple:{billions:g}B")
    assert (model.n_layers, model.d_model) == (blocks, width)


def test_apples_rule_is_a_preset_in_millions_too() -> None:
    fields = ModelSpec(preset="apple:500M").model_dump(exclude={"preset"})
    assert fields == ModelSpec(preset="apple-500m").model_dump(exclude={"preset"})
    with pytest.raises(ValueError, match="unknown model preset 'apple:500'"):
        ModelSpec(preset="apple:500")


def test_layers_of_published_families_have_their_positions_and_reach() -> None:
    smollm3 = ModelSpec(preset="smollm3-3b")
    nope = [layer for layer, base in enumerate(smollm3.block_rope_base) if base == 0]
    assert nope == list(range(3, 36, 4))
    gemma = ModelSpec(preset="gemma-3-1b")
    full = [layer for layer, kind in enumerate(gemma.block_attention) if kind == "full"]
    assert full == [5, 11, 17, 23]
    assert {gemma.block_rope_base[layer] for layer in full} == {1e6}
