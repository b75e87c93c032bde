"""What cannot cross to or from Hugging Face is refused by name, before anything is written."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from thriftlm_models.config import ModelSpec
from thriftlm_models.decoder import Decoder
from thriftlm_models.hf import from_pretrained, save, spec_from_config, to_hf

LLAMA3 = {"kind": "llama3", "factor": 8.0, "original_context": 64}
QWEN3 = {"qk_norm": "learned"}
GEMMA3 = {
    "post_norm": True, "qk_norm": "learned", "activation": "geglu", "scale_embedding": True,
    "attention_pattern": ["sliding", "sliding", "full"], "window": 9,
    "rope_pattern": [1e4, 1e4, 1e6],
}  # fmt: skip
GPT2 = {
    "norm": "layer", "bias": True, "activation": "gelu", "positions": "learned",
    "max_positions": 64, "n_kv_heads": 6, "head_dim": 8,
}  # fmt: skip
FAMILY_SHAPES = {"qwen3": QWEN3, "gemma3_text": GEMMA3, "gpt2": GPT2}


def spec(**changed: object) -> ModelSpec:
    shape = {
        "n_layers": 3, "d_model": 48, "n_heads": 6, "n_kv_heads": 2, "head_dim": 12,
        "d_ff": 80, "vocab": 131,
    }  # fmt: skip
    return ModelSpec.model_validate(shape | changed)


@pytest.mark.parametrize(
    ("shape", "architecture", "fields"),
    [
        ({"activation": "relu2"}, "LlamaForCausalLM", "activation: relu2"),
        ({"attention_pattern": ["full", "none"]}, "LlamaForCausalLM", r"attention_pattern: \("),
        ({"norm": "layer"}, "LlamaForCausalLM", "norm: layer"),
        ({"rope_pattern": [1e4, 1e6]}, "LlamaForCausalLM", r"rope_pattern: \(10000.0, 1000000.0"),
        (QWEN3 | {"rope_pattern": [1e4, 0.0]}, "Qwen3ForCausalLM", "rope_pattern: "),
        (QWEN3 | {"bias": True}, "LlamaForCausalLM", "qk_norm: learned"),
        (GEMMA3 | {"qk_norm": "none"}, "Gemma3ForCausalLM", "qk_norm: none"),
        (GEMMA3 | {"rope_pattern": [1e4, 1e6]}, "Gemma3ForCausalLM", "rope_pattern: "),
        (GEMMA3 | {"n_heads": 5, "n_kv_heads": 1}, "Gemma3ForCausalLM", "head_dim: 12"),
        (
            {"rope_scaling": LLAMA3, "attention_pattern": ["sliding"], "window": 9},
            "SmolLM3ForCausalLM",
            "rope_scaling: ",
        ),
        (GPT2 | {"n_kv_heads": 2}, "GPT2LMHeadModel", "n_kv_heads: 2"),
        (GPT2 | {"head_dim": 12}, "GPT2LMHeadModel", "head_dim: 12"),
        (GPT2 | {"bias": False}, "GPT2LMHeadModel", "bias: False"),
    ],
)
def test_what_no_class_computes_is_not_exported(
    shape: dict[str, Any], architecture: str, fields: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"the closest, {architecture}, cannot with {fields}"):
        save(Decoder(spec(**shape)), tmp_path / "folder", context=512)
    assert not (tmp_path / "folder").exists()


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("model_type", "fields", "named"),
    [
        ("llama", {"attention_bias": True}, "llama with attention_bias: True"),
        ("llama", {"mlp_bias": True}, "llama with attention_bias: False"),
        ("llama", {"hidden_act": "relu"}, "llama with hidden_act: relu"),
        ("llama", {"rope_scaling": YARN}, "llama with rope_type: yarn"),
        ("llama", {"partial_rotary_factor": 0.5}, "llama with partial_rotary_factor: 0.5"),
        ("qwen3", {"attention_bias": True}, "qwen3 with attention_bias: True"),
        (
            "qwen3",
            {
                "rope_scaling": {"type": "linear", "factor": 2.0}, "sliding_window": 9,
                "use_sliding_window": True, "max_window_layers": 1, "layer_types": None,
            },
            "qwen3 with sliding layers and rope_type: linear",
        ),
        (
            "llama", {"layer_types": ["chunked_attention"] * 3},
            "llama with layer_types: chunked_attention",
        ),
        ("gemma3_text", {"query_pre_attn_scalar": 24}, "query_pre_attn_scalar: 24"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping: 30.0"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: 50.0"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention: True"),
        ("gemma3_text", {"attention_bias": True}, "attention_bias: True"),
        ("gpt2", {"activation_function": "gelu"}, "gpt2 with activation_function: gelu"),
        ("gpt2", {"scale_attn_weights": False}, "gpt2 with scale_attn_weights: False"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx: True"),
        ("gpt2", {"add_cross_attention": True}, "gpt2 with add_cross_attention: True"),
        ("mistral", {}, "a model with model_type: mistral; it takes Llama .SmolLM2"),
        ("gemma3", {}, "a model with model_type: gemma3; "),
    ],
)  # fmt: skip
def test_what_the_decoder_cannot_compute_is_not_loaded(
    model_type: str, fields: dict[str, Any], named: str, tmp_path: Path
) -> None:
    config = to_hf(Decoder(spec(**FAMILY_SHAPES.get(model_type, {})))).config
    changed = config | {"model_type": model_type} | fields
    (tmp_path / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=named):
        from_pretrained(tmp_path)


def test_a_configuration_object_of_another_family_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot compute a model with model_type: mistral"):
        spec_from_config(transformers.MistralConfig())
