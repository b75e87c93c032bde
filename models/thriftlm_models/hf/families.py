"""The Hugging Face classes that compute our decoders, and their names for our weights and fields.

Names and layouts are those of transformers 5.23, `models/*/modeling_*.py`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from thriftlm_models.config import ModelSpec

LAYER_TYPES = {"full": "full_attention", "sliding": "sliding_attention"}
ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "swiglu": ("silu", "swish"),
    "geglu": ("gelu_pytorch_tanh", "gelu_new"),
    "gelu": ("gelu_new", "gelu_pytorch_tanh"),
    "relu": ("relu",),
    "relu2": ("relu2",),
}
"""Names in transformers; the first is the one written."""
SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_context": "original_max_position_embeddings",
}


@dataclass(frozen=True)
class Family:
    """A Hugging Face class: its names for our parameters, modules of blocks, and fields."""

    architecture: str
    modules: Mapping[str, tuple[str, ...]]
    """For a module of a block the one, or in our order those, that hold its weights there."""
    tables: Mapping[str, str]
    layers: str
    fields: Mapping[str, str]
    activation: str = "hidden_act"
    added_to_gain: float = 0.0
    """What the class adds to the gain of a norm before it multiplies."""


LLAMA = Family(
    architecture="LlamaForCausalLM",
    modules={
        "attention_norm": ("input_layernorm",),
        "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.q_norm": ("self_attn.q_norm",),
        "attention.k_norm": ("self_attn.k_norm",),
        "attention.out": ("self_attn.o_proj",),
        "feed_forward_norm": ("post_attention_layernorm",),
        "feed_forward.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
        "feed_forward.down": ("mlp.down_proj",),
    },
    tables={
        "embedding": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "head": "lm_head.weight",
    },
    layers="model.layers",
    fields={
        "vocab": "vocab_size",
        "d_model": "hidden_size",
        "d_ff": "intermediate_size",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "norm_eps": "rms_norm_eps",
        "tie_embeddings": "tie_word_embeddings",
        "bias": "attention_bias",
    },
)
GEMMA_NORMS = {
    "attention_post_norm": ("post_attention_layernorm",),
    "feed_forward_norm": ("pre_feedforward_layernorm",),
    "feed_forward_post_norm": ("post_feedforward_layernorm",),
}
FAMILIES = {
    "llama": LLAMA,
    "qwen3": replace(LLAMA, architecture="Qwen3ForCausalLM"),
    "smollm3": replace(LLAMA, architecture="SmolLM3ForCausalLM"),
    "gemma3_text": replace(
        LLAMA,
        architecture="Gemma3ForCausalLM",
        modules={**LLAMA.modules, **GEMMA_NORMS},
        activation="hidden_activation",
        added_to_gain=1.0,
    ),
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        modules={
            "attention_norm": ("ln_1",),
            "attention.qkv": ("attn.c_attn",),
            "attention.out": ("attn.c_proj",),
            "feed_forward_norm": ("ln_2",),
            "feed_forward.up": ("mlp.c_fc",),
            "feed_forward.down": ("mlp.c_proj",),
        },
        tables={
            "embedding": "transformer.wte.weight",
            "positions": "transformer.wpe.weight",
            "norm.weight": "transformer.ln_f.weight",
            "norm.bias": "transformer.ln_f.bias",
            "head": "lm_head.weight",
        },
        layers="transformer.h",
        fields={
            "vocab": "vocab_size",
            "d_model": "n_embd",
            "d_ff": "n_inner",
            "n_heads": "n_head",
            "max_positions": "n_positions",
            "norm_eps": "layer_norm_epsilon",
            "tie_embeddings": "tie_word_embeddings",
        },
        activation="activation_function",
    ),
}
"""By `model_type`; of those that compute a model, the first is its class."""


def parts(
    spec: ModelSpec, family: Family, order: Sequence[int], state: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face's name and a view, in its layout, of each weight of the blocks in `order`."""
    heads = [heads * spec.head_dim for heads in (spec.n_heads, spec.n_kv_heads, spec.n_kv_heads)]
    rows = {"attention.qkv": heads, "feed_forward.gate_up": [spec.d_ff, spec.d_ff]}
    for name, tensor in state.items():
        if name in family.tables:
            yield family.tables[name], tensor
            continue
        _, block, path = name.split(".", 2)
        module, _, kind = path.rpartition(".")
        theirs = family.modules[module]
        views = (tensor,) if len(theirs) == 1 else torch.split(tensor, rows[module])
        if family.architecture == "GPT2LMHeadModel" and tensor.ndim == 2:
            views = (tensor.T,)  # a Conv1D, inputs first
        for layer in (layer for layer, index in enumerate(order) if index == int(block)):
            for their_module, view in zip(theirs, views, strict=True):
                yield f"{family.layers}.{layer}.{their_module}.{kind}", view
