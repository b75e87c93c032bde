"""Decoders against the classes of transformers that they become, and that they come from."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from thriftlm_models.config import ModelSpec
from thriftlm_models.counts import applied_params, stored_params
from thriftlm_models.decoder import Decoder
from thriftlm_models.hf import from_pretrained, save, spec_from_config, to_hf
from thriftlm_models.presets import presets

TOLERANCE = 1e-4
SHAPE = {
    "n_layers": 3, "d_model": 48, "n_heads": 6, "n_kv_heads": 2, "head_dim": 12,
    "d_ff": 80, "vocab": 131,
}  # fmt: skip
LLAMA3 = {"kind": "llama3", "factor": 8.0, "original_context": 64}
QWEN3 = {"qk_norm": "learned", "norm_eps": 1e-6, "rope_base": 1e6}
SMOLLM3 = {"rope_pattern": [5e6, 5e6, 0.0], "norm_eps": 1e-6}
GEMMA3 = {
    "post_norm": True, "qk_norm": "learned", "activation": "geglu", "scale_embedding": True,
    "attention_pattern": ["sliding", "sliding", "full"], "window": 9,
    "rope_pattern": [1e4, 1e4, 1e6], "norm_eps": 1e-6,
}  # fmt: skip
GPT2 = {
    "norm": "layer", "bias": True, "activation": "gelu", "positions": "learned",
    "max_positions": 64, "n_kv_heads": 6, "head_dim": 8, "norm_eps": 1e-2,
}  # fmt: skip
EXPORTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama untied": ("Llama", {"tie_embeddings": False}),
    "llama llama3 scaling": ("Llama", {"rope_scaling": LLAMA3, "rope_base": 5e5}),
    "llama linear scaling": ("Llama", {"rope_scaling": {"kind": "linear", "factor": 4.0}}),
    "llama gelu, biased": ("Llama", {"activation": "geglu", "bias": True}),
    "llama scaled embedding": ("Llama", {"scale_embedding": True}),
    "llama scaled, untied": ("Llama", {"scale_embedding": True, "tie_embeddings": False}),
    "qwen3": ("Qwen3", QWEN3),
    "qwen3 untied": ("Qwen3", QWEN3 | {"tie_embeddings": False}),
    "qwen3 sliding": ("Qwen3", QWEN3 | {"attention_pattern": ["sliding", "full"], "window": 9}),
    "qwen3 without gains": ("Qwen3", QWEN3 | {"qk_norm": "unlearned"}),
    "smollm3": ("SmolLM3", SMOLLM3),
    "smollm3 untied": ("SmolLM3", SMOLLM3 | {"tie_embeddings": False}),
    "smollm3 without positions": ("SmolLM3", {"rope_pattern": [0.0]}),
    "smollm3 sliding": ("SmolLM3", {"attention_pattern": ["full", "sliding"], "window": 9}),
    "smollm3 sliding and stretched": (
        "SmolLM3",
        {
            "attention_pattern": ["full", "sliding"], "window": 9, "rope_pattern": [1e4, 0.0],
            "rope_scaling": LLAMA3,
        },
    ),
    "smollm3 for heads that do not divide": ("SmolLM3", {"n_heads": 5, "n_kv_heads": 1}),
    "gemma3": ("Gemma3", GEMMA3),
    "gemma3 untied": ("Gemma3", GEMMA3 | {"tie_embeddings": False}),
    "gemma3 stretched": ("Gemma3", GEMMA3 | {"rope_scaling": {"kind": "linear", "factor": 8.0}}),
    "gemma3 plain embedding": ("Gemma3", GEMMA3 | {"scale_embedding": False}),
    "gemma3 plain, untied": (
        "Gemma3", GEMMA3 | {"scale_embedding": False, "tie_embeddings": False},
    ),
    "gemma3 full": ("Gemma3", GEMMA3 | {"attention_pattern": ["full"], "rope_pattern": []}),
    "gemma3 sliding": ("Gemma3", GEMMA3 | {"attention_pattern": ["sliding"], "rope_pattern": []}),
    "gemma3 silu, no gains": ("Gemma3", GEMMA3 | {"activation": "swiglu", "qk_norm": "unlearned"}),
    "gpt2": ("GPT2", GPT2),
    "gpt2 untied": ("GPT2", GPT2 | {"tie_embeddings": False}),
    "gpt2 relu2": ("GPT2", GPT2 | {"activation": "relu2"}),
    "gpt2 scaled embedding": ("GPT2", GPT2 | {"scale_embedding": True}),
}  # fmt: skip
LLAMA_SHAPE = {
    "num_hidden_layers": 3, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2,
    "intermediate_size": 80, "vocab_size": 131, "rms_norm_eps": 1e-5,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
GEMMA_SHAPE = LLAMA_SHAPE | {
    "num_hidden_layers": 7, "head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 9,
}  # fmt: skip
GPT2_SHAPE = {
    "n_layer": 3, "n_embd": 48, "n_head": 6, "n_positions": 64, "vocab_size": 131,
    "layer_norm_epsilon": 1e-2, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
OLD_LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
IMPORTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA_SHAPE),
    "llama tied, wide heads": (
        "llama", LLAMA_SHAPE | {"tie_word_embeddings": True, "head_dim": 20, "rope_theta": 3e4},
    ),
    "llama llama3 scaling": (
        "llama", LLAMA_SHAPE | {"rope_theta": 5e5, "rope_scaling": OLD_LLAMA3},
    ),
    "llama rope_parameters": (
        "llama",
        LLAMA_SHAPE | {"rope_parameters": {"rope_type": "linear", "factor": 4., "rope_theta": 5e4}},
    ),
    "llama old scaling": (
        "llama", LLAMA_SHAPE | {"rope_scaling": {"type": "linear", "factor": 4.0}},
    ),
    "llama biased": ("llama", LLAMA_SHAPE | {"attention_bias": True, "mlp_bias": True}),
    "qwen3": (
        "qwen3", LLAMA_SHAPE | {"head_dim": 16, "rope_theta": 1e6, "tie_word_embeddings": True},
    ),
    "qwen3 sliding": (
        "qwen3",
        LLAMA_SHAPE
        | {"head_dim": 16, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "smollm3": ("smollm3", LLAMA_SHAPE | {"num_hidden_layers": 5, "rope_theta": 5e6}),
    "smollm3 sliding": (
        "smollm3",
        LLAMA_SHAPE
        | {"no_rope_layers": [0, 1, 1], "use_sliding_window": True, "sliding_window": 9},
    ),
    "gemma3": ("gemma3_text", GEMMA_SHAPE),
    "gemma3 old names": (
        "gemma3_text",
        GEMMA_SHAPE
        | {"rope_theta": 3e5, "rope_local_base_freq": 300.0, "sliding_window_pattern": 3},
    ),
    "gemma3 stretched": (
        "gemma3_text", GEMMA_SHAPE | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
    "gpt2": ("gpt2", GPT2_SHAPE),
    "gpt2 untied": (
        "gpt2",
        GPT2_SHAPE
        | {"tie_word_embeddings": False, "n_inner": 72, "activation_function": "gelu_pytorch_tanh"},
    ),
}  # fmt: skip


def spec(**changed: object) -> ModelSpec:
    return ModelSpec.model_validate(SHAPE | changed)


@torch.no_grad()
def randomised(module: nn.Module, neutral_gain: float = 1.0) -> None:
    """Weights far from their initial ones, gains and biases too, so that none is overlooked."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in module.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            center = 0.0 if name.endswith("bias") else neutral_gain
            parameter.copy_(center + 0.3 * drawn)
        else:
            parameter.copy_(drawn / math.sqrt(48))


def meaning(model: ModelSpec) -> dict[str, Any]:
    """What a spec says, in one way where there are several."""
    by_block = {"attention_pattern": model.block_attention, "rope_pattern": model.block_rope_base}
    return model.model_dump(exclude={"preset", "init", "rope_base"}) | by_block


def decoder_of(model: ModelSpec) -> Decoder:
    decoder = Decoder(model)
    randomised(decoder)
    return decoder


def tokens() -> Tensor:
    return torch.randint(131, (2, 48), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def loaded(folder: Path) -> tuple[Any, Tensor]:
    """The model that transformers makes of a folder, nothing amiss, and its logits."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="sdpa", dtype=torch.float32
    )
    assert not any(info.values()), info
    return model, model.eval()(tokens()).logits


@torch.no_grad()
def assert_same_logits(decoder: Decoder, logits: Tensor) -> None:
    ours = decoder(tokens())
    assert ours.std() > 0.1
    assert (ours - logits).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", EXPORTS)
def test_transformers_computes_our_logits(name: str, tmp_path: Path) -> None:
    architecture, shape = EXPORTS[name]
    decoder = decoder_of(spec(**shape))
    written = save(decoder, tmp_path, context=512)
    model, logits = loaded(tmp_path)
    assert type(model).__name__ == written.config["architectures"][0]
    assert type(model).__name__.startswith(architecture)
    assert model.config.max_position_embeddings == (64 if architecture == "GPT2" else 512)
    assert model.config.tie_word_embeddings is decoder.spec.tie_embeddings
    assert not [module for module in model.modules() if getattr(module, "p", 0.0)]  # dropout
    assert_same_logits(decoder, logits)
    assert_same_logits(from_pretrained(tmp_path), logits)


@pytest.mark.parametrize("name", IMPORTS)
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_we_compute_the_logits_of_transformers(name: str, shard: str, tmp_path: Path) -> None:
    model_type, fields = IMPORTS[name]
    config = transformers.AutoConfig.for_model(model_type, **fields)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    randomised(model, neutral_gain=0.0 if model_type == "gemma3_text" else 1.0)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors").exists() is (shard == "1GB")
    with torch.no_grad():
        logits = model.eval()(tokens()).logits
    decoder = from_pretrained(tmp_path, attention="math")
    assert decoder.attention == "math"
    assert {parameter.dtype for parameter in decoder.parameters()} == {torch.float32}
    assert_same_logits(decoder, logits)
    # The file as it was before transformers 5, with the old names of rotary settings.
    path = tmp_path / "config.json"
    path.write_text(json.dumps(fields | {"model_type": model_type, "torch_dtype": "float32"}))
    assert_same_logits(from_pretrained(tmp_path), logits)


@pytest.mark.parametrize("sharing", ["immediate", "repeat_all_over", "reverse"])
@pytest.mark.parametrize("repeats", [2, 3])
@pytest.mark.parametrize("shape", [{}, QWEN3, SMOLLM3, GEMMA3, GPT2])
def test_shared_blocks_are_unrolled_with_what_each_attends_to(
    sharing: str, repeats: int, shape: dict[str, Any], tmp_path: Path
) -> None:
    decoder = decoder_of(spec(sharing=sharing, repeats=repeats, **shape))
    written = save(decoder, tmp_path, context=512)
    model, logits = loaded(tmp_path)
    assert model.config.num_hidden_layers == 3 * repeats
    assert_same_logits(decoder, logits)
    assert f"{stored_params(decoder.spec):,}" in written.notes[0]
    assert f"{applied_params(decoder.spec):,}" in written.notes[0]
    assert sum(tensor.numel() for tensor in written.weights.values()) == applied_params(
        decoder.spec
    )
    assert f"sharing {sharing}, {repeats} repeats" in written.notes[0]


@pytest.mark.parametrize("tie_embeddings", [True, False])
@pytest.mark.parametrize(
    "shape",
    [
        {"head_dim": 64},
        {"head_dim": 12},
        {"bias": True},
        {"scale_embedding": True},
        {"qk_norm": "unlearned"},
        QWEN3 | {"head_dim": 64},
        SMOLLM3,
        GEMMA3,
        GPT2,
    ],
)
def test_mup_is_folded_exactly(tie_embeddings: bool, shape: dict[str, Any], tmp_path: Path) -> None:
    mup = {"parametrization": "mup", "mup_base_width": 16, "sharing": "reverse"}
    decoder = decoder_of(spec(**mup, **shape, tie_embeddings=tie_embeddings))
    with torch.no_grad():
        decoder.norm.weight.mul_(3)
    written = save(decoder, tmp_path, context=512)
    _, logits = loaded(tmp_path)
    assert_same_logits(decoder, logits)
    assert any("logits / 3 into" in note for note in written.notes)
    standard = decoder.spec.model_dump() | {"parametrization": "standard"}
    plain = Decoder(ModelSpec.model_validate(standard))
    plain.load_state_dict(decoder.state_dict())
    with torch.no_grad():
        assert (plain(tokens()) - logits).abs().max() > 0.1


@pytest.mark.parametrize("name", ["llama", "qwen3 sliding", "smollm3 sliding", "gemma3", "gpt2"])
def test_transformers_generates_our_tokens(name: str, tmp_path: Path) -> None:
    decoder = decoder_of(spec(**EXPORTS[name][1]))
    save(decoder, tmp_path, context=512)
    model, _ = loaded(tmp_path)
    sequence = tokens()[:, :20]
    theirs = model.generate(sequence, max_new_tokens=24, do_sample=False)
    with torch.no_grad():
        for _ in range(24):
            sequence = torch.cat((sequence, decoder(sequence)[:, -1:].argmax(dim=-1)), dim=1)
    assert torch.equal(theirs, sequence)


@pytest.mark.parametrize(
    "shape",
    [{}, {"tie_embeddings": False}, {"rope_scaling": LLAMA3}, {"bias": True}, QWEN3, SMOLLM3, GPT2],
)
def test_there_and_back_every_weight_keeps_its_bits(shape: dict[str, Any], tmp_path: Path) -> None:
    decoder = decoder_of(spec(**shape))
    assert save(decoder, tmp_path, context=512).notes == ()
    back = from_pretrained(tmp_path)
    assert meaning(back.spec) == meaning(decoder.spec)
    assert back.state_dict().keys() == decoder.state_dict().keys()
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def test_every_preset_is_described_and_understood_again() -> None:
    for name in presets():
        model = ModelSpec(preset=name)
        with torch.device("meta"):
            decoder = Decoder(model)
        config = dict(to_hf(decoder, context=4096).config)
        back = spec_from_config(
            transformers.AutoConfig.for_model(config.pop("model_type"), **config)
        )
        unrolled = {"n_layers": len(model.schedule), "sharing": "none", "repeats": 1}
        if model.qk_norm == "unlearned":
            unrolled["qk_norm"] = "learned"
        assert meaning(back) == meaning(model.model_copy(update=unrolled)), name


def test_the_file_has_the_dtype_asked_for_and_memory_of_its_own(tmp_path: Path) -> None:
    decoder = decoder_of(spec(sharing="immediate"))
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    written = save(decoder, tmp_path / "new" / "folder", context=512, dtype=torch.bfloat16)
    for tensor in written.weights.values():
        tensor.zero_()
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(tensor, before[name])
    stored = load_file(tmp_path / "new" / "folder" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "new" / "folder" / "config.json").read_text())
    assert config == written.config
    assert config["dtype"] == "bfloat16"
    assert torch.equal(stored["model.embed_tokens.weight"], before["embedding"].bfloat16())
    with safe_open(tmp_path / "new" / "folder" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_to_hf_copies_nothing_that_it_need_not() -> None:
    decoder = decoder_of(spec(sharing="immediate"))
    weights = to_hf(decoder).weights
    up, down = (weights[f"model.layers.{layer}.mlp.down_proj.weight"] for layer in (0, 1))
    assert up.data_ptr() == down.data_ptr() == decoder.blocks[0].feed_forward.down.weight.data_ptr()
    assert not any(tensor.requires_grad for tensor in weights.values())


def test_a_bad_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is neither: give a folder that exists"):
        from_pretrained(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="is neither: give a folder that exists"):
        from_pretrained("./none")
    with pytest.raises(FileNotFoundError, match=r"a folder with config\.json: .* has none"):
        from_pretrained(tmp_path)
    save(decoder_of(spec()), tmp_path, context=512)
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError, match=r"lacks model\.safetensors; save the model as"):
        from_pretrained(tmp_path)
    index = {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"lacks b\.safetensors"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="a model with model_type: None"):
        from_pretrained(tmp_path)


def rewritten(folder: Path, **changed: Tensor | None) -> None:
    """The weights again, some replaced, added, or taken out where they are None."""
    weights = load_file(folder / "model.safetensors") | changed
    kept = {name: tensor for name, tensor in weights.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors")


def test_weights_that_do_not_fit_the_config_are_named(tmp_path: Path) -> None:
    save(decoder_of(spec()), tmp_path, context=512)
    norm, other = "model.norm.weight", "model.layers.3.mlp.up_proj.weight"
    gain = load_file(tmp_path / "model.safetensors")[norm]
    rewritten(tmp_path, **{norm: None})
    with pytest.raises(ValueError, match=f"this one lacks {norm}"):
        from_pretrained(tmp_path)
    rewritten(tmp_path, **{norm: torch.ones(1)})
    with pytest.raises(ValueError, match=f"this one has other shapes of {norm}"):
        from_pretrained(tmp_path)
    rewritten(tmp_path, **{norm: gain, other: torch.ones(80, 48)})
    with pytest.raises(ValueError, match=f"this one has unexpected {other}"):
        from_pretrained(tmp_path)


def test_a_tied_model_may_store_its_head_twice_but_not_another_one(tmp_path: Path) -> None:
    decoder = decoder_of(spec())
    save(decoder, tmp_path, context=512)
    rewritten(tmp_path, **{"lm_head.weight": decoder.embedding.detach().clone()})
    assert torch.equal(from_pretrained(tmp_path).embedding, decoder.embedding)
    rewritten(tmp_path, **{"lm_head.weight": decoder.embedding.detach() + 1})
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from the embedding"):
        from_pretrained(tmp_path)


def test_buffers_and_names_of_older_checkpoints_are_taken(tmp_path: Path) -> None:
    # As openai-community/gpt2 has them.
    decoder = decoder_of(spec(**GPT2))
    weights = save(decoder, tmp_path, context=512).weights
    old = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    buffers = {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.2.attn.masked_bias": torch.ones(1)}
    save_file(old | buffers, tmp_path / "model.safetensors")
    with torch.no_grad():
        assert_same_logits(from_pretrained(tmp_path), decoder(tokens()))
    llama = decoder_of(spec())
    save(llama, tmp_path, context=512)
    rewritten(tmp_path, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)})
    assert torch.equal(from_pretrained(tmp_path).embedding, llama.embedding)


@pytest.mark.parametrize("model_type", ["llama", "mobilellm"])
@pytest.mark.parametrize("sharing", ["none", "immediate"])
def test_mobilellm_ties_and_shares_through_fields_of_its_own(
    model_type: str, sharing: str, tmp_path: Path
) -> None:
    decoder = decoder_of(spec(sharing=sharing))
    # Its own code stores distinct blocks, so the weights are those of the unshared model.
    distinct = Decoder(spec())
    distinct.load_state_dict(decoder.state_dict())
    config = save(distinct, tmp_path, context=512).config
    changed = {
        "model_type": model_type, "tie_word_embeddings": False, "share_embedding": True,
        "layer_sharing": sharing != "none", "auto_map": {"AutoConfig": "configuration_mobilellm.X"},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config | changed))
    back = from_pretrained(tmp_path)
    assert back.spec == decoder.spec
    with torch.no_grad():
        assert_same_logits(back, decoder(tokens()))
