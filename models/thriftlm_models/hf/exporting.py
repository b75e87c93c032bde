"""Decoders as Hugging Face models, in classes that compute exactly the same.

What Hugging Face's configuration cannot say is folded into the weights, which rounds them once:
muP's factors, scaled embeddings, and the 1 that Gemma adds to its gains.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thriftlm_models.config import GATED, ModelSpec
from thriftlm_models.counts import stored_params
from thriftlm_models.decoder import Decoder, attention_scale
from thriftlm_models.hf.families import ACTIVATIONS, FAMILIES, LAYER_TYPES, SCALING, parts

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class HfModel:
    """A model as Hugging Face has it."""

    config: dict[str, Any]
    """Contents of config.json."""
    weights: dict[str, Tensor]
    """By the names of the class; they may share memory with each other and with the decoder."""
    notes: tuple[str, ...]
    """Sentences for a model card: how this differs from the decoder that was trained."""

    @property
    def architecture(self) -> str:
        """The transformers class."""
        return str(self.config["architectures"][0])


def to_hf(decoder: Decoder, *, context: int = 2048) -> HfModel:
    """The decoder as the first Hugging Face class that computes its logits.

    Blocks are unrolled in the order in which they run. `context` is the length that the
    configuration states; with learned positions that is `max_positions`.

    Raises:
        ValueError: no class computes the model; names the fields in which the closest differs.
    """
    spec = decoder.spec
    model_type = _model_type(spec)
    family = FAMILIES[model_type]
    state = {name: parameter.detach() for name, parameter in decoder.named_parameters()}
    weights = dict(parts(spec, family, spec.schedule, _folded(spec, model_type, state)))
    if family.added_to_gain:
        gains = {name: gain for name, gain in weights.items() if "norm" in name}
        weights |= {name: gain - family.added_to_gain for name, gain in gains.items()}
    config = {
        "architectures": [family.architecture],
        "model_type": model_type,
        "dtype": str(decoder.embedding.dtype).removeprefix("torch."),
        **{theirs: getattr(spec, ours) for ours, theirs in family.fields.items()},
        family.activation: ACTIVATIONS[spec.activation][0],
        **dict.fromkeys(TOKENS),  # the defaults may lie outside of this vocabulary
        **(_gpt2_config(spec) if model_type == "gpt2" else _config(spec, model_type, context)),
    }
    return HfModel(config, weights, _notes(spec, model_type, weights))


def save(
    decoder: Decoder,
    folder: Path,
    *,
    context: int,
    dtype: torch.dtype | None = None,
    token_ids: Mapping[str, Any] | None = None,
) -> HfModel:
    """What was written to `folder`: config.json and model.safetensors, for transformers to load.

    `dtype` is that of the weights in the file; without it they keep theirs. `token_ids` has the
    configuration's `bos_token_id`, `eos_token_id`, `pad_token_id`. For `context` see `to_hf`.

    Raises:
        ValueError: no Hugging Face class computes the model.
    """
    from safetensors.torch import save_file

    model = to_hf(decoder, context=context)
    dtype = decoder.embedding.dtype if dtype is None else dtype
    # A copy of each: safetensors takes neither views nor a tensor twice.
    weights = {
        name: tensor.to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)
        for name, tensor in model.weights.items()
    }
    dtype_name = str(dtype).removeprefix("torch.")
    config = model.config | {"dtype": dtype_name} | dict(token_ids or {})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return replace(model, config=config, weights=weights)


def _model_type(spec: ModelSpec) -> str:
    misfits = {model_type: _misfits(spec, model_type) for model_type in FAMILIES}
    closest = min(misfits, key=lambda model_type: len(misfits[model_type]))
    if misfits[closest]:
        fields = ", ".join(f"{name}: {getattr(spec, name)}" for name in misfits[closest])
        raise ValueError(
            "a Hugging Face export needs a transformers class that computes the model: the "
            f"closest, {FAMILIES[closest].architecture}, cannot with {fields}; train without, or "
            "use the checkpoint with thriftlm_models"
        )
    return closest


def _misfits(spec: ModelSpec, model_type: str) -> list[str]:
    """Fields of the spec that the class cannot compute."""
    is_gpt2, is_gemma = model_type == "gpt2", model_type == "gemma3_text"
    norms_heads = model_type in ("qwen3", "gemma3_text")
    turns = set(zip(spec.block_attention, spec.block_rope_base, strict=True))
    kinds = {kind for kind, _ in turns}
    bases = {base for _, base in turns if base or model_type != "smollm3"}
    reach = {"full"} if model_type in ("llama", "gpt2") else set(LAYER_TYPES)
    one_base = len(turns) == len(kinds) if is_gemma else len(bases) <= 1
    windows_turn = any(kind == "sliding" and base for kind, base in turns)
    head_dim_fits = True
    if is_gpt2:
        head_dim_fits = spec.n_heads * spec.head_dim == spec.d_model
    elif model_type in ("llama", "gemma3_text"):  # their configurations refuse it, for no need
        head_dim_fits = spec.d_model % spec.n_heads == 0
    fits = {
        "norm": spec.norm == ("layer" if is_gpt2 else "rms"),
        "positions": spec.positions == ("learned" if is_gpt2 else "rope"),
        "activation": (spec.activation in GATED) is not is_gpt2,
        "bias": spec.bias if is_gpt2 else not (spec.bias and norms_heads),
        "post_norm": spec.post_norm is is_gemma,
        "qk_norm": (spec.qk_norm != "none") is norms_heads,
        "attention_pattern": kinds <= reach,
        "rope_pattern": is_gpt2 or (0 not in bases and one_base),
        "rope_scaling": spec.rope_scaling is None or is_gemma or not windows_turn,
        "n_kv_heads": not is_gpt2 or spec.n_kv_heads == spec.n_heads,
        "head_dim": head_dim_fits,
    }
    return [name for name, is_fit in fits.items() if not is_fit]


def _folded(spec: ModelSpec, model_type: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights with which the class, which knows no factors of ours, gives the decoder's logits."""
    folded = dict(state)
    stretch = attention_scale(spec) * math.sqrt(spec.head_dim)
    scaled = ("q_norm.weight",) if spec.qk_norm != "none" else ("qkv.weight", "qkv.bias")
    for attention in (f"blocks.{block}.attention" for block in range(spec.n_layers)):
        if spec.qk_norm == "unlearned":
            gain = state["embedding"].new_ones(spec.head_dim)
            folded |= {f"{attention}.{norm}.weight": gain for norm in ("q_norm", "k_norm")}
        for name in (f"{attention}.{end}" for end in scaled if not math.isclose(stretch, 1)):
            if name in folded:
                folded[name] = folded[name].clone()
                folded[name][: spec.n_heads * spec.head_dim] *= stretch  # queries come first
    entering = math.sqrt(spec.d_model) ** (spec.scale_embedding - (model_type == "gemma3_text"))
    leaving = 1 / (spec.width_factor * (entering if spec.tie_embeddings else 1))
    factors = {"embedding": entering, "norm.weight": leaving, "norm.bias": leaving}
    for name, factor in factors.items():
        if name in folded and factor != 1:
            folded[name] = folded[name] * factor
    return folded


def _notes(spec: ModelSpec, model_type: str, weights: Mapping[str, Tensor]) -> tuple[str, ...]:
    notes = []
    if spec.sharing != "none":
        exported = sum(tensor.numel() for tensor in weights.values())
        notes.append(
            f"This model shares layers: it was trained with {spec.n_layers} distinct blocks "
            f"(sharing {spec.sharing}, {spec.repeats} repeats) and {stored_params(spec):,} "
            "parameters. Hugging Face's configuration cannot tie layers, so they are unrolled and "
            f"duplicated here: {len(spec.schedule)} layers, {exported:,} parameters, which "
            "fine-tuning would change one by one."
        )
    if spec.parametrization == "mup":
        notes.append(
            f"muP's factors are folded into the weights: logits / {spec.width_factor:g} into the "
            f"final norm, attention scores x {attention_scale(spec):g} into the queries."
        )
    if spec.scale_embedding is not (model_type == "gemma3_text"):
        notes.append("The factor of the embeddings, sqrt(d_model), is folded into the weights.")
    if spec.qk_norm == "unlearned":
        notes.append("Queries and keys are normalised without gains: those of the class are 1.")
    return tuple(notes)


def _gpt2_config(spec: ModelSpec) -> dict[str, Any]:
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return {"n_layer": len(spec.schedule), **dropout}


def _config(spec: ModelSpec, model_type: str, context: int) -> dict[str, Any]:
    kinds = [spec.block_attention[block] for block in spec.schedule]
    slides = "sliding" in kinds
    config: dict[str, Any] = {"num_hidden_layers": len(kinds), "max_position_embeddings": context}
    if model_type in ("llama", "smollm3"):
        config["mlp_bias"] = spec.bias
    if model_type != "llama":
        config["layer_types"] = [LAYER_TYPES[kind] for kind in kinds]
        config["sliding_window"] = spec.window if slides else None
    if model_type in ("qwen3", "smollm3"):
        config["use_sliding_window"] = slides
    if model_type == "smollm3":
        config["no_rope_layers"] = [int(spec.block_rope_base[block] > 0) for block in spec.schedule]
    if model_type == "gemma3_text":
        config["query_pre_attn_scalar"] = spec.head_dim
        config["rope_local_base_freq"] = _base(spec, ("sliding",))
        if not slides:  # the mask of sliding layers is made all the same
            config["sliding_window"] = context
    # Rotary settings have the names of transformers 4: 5 converts them, 4 overlooks the new ones.
    full = ("full",) if model_type == "gemma3_text" else ("full", "sliding")
    return config | {"rope_theta": _base(spec, full), "rope_scaling": _rope_scaling(spec)}


def _base(spec: ModelSpec, kinds: tuple[str, ...]) -> float:
    """Rotary base of the blocks of these kinds; `rope_base` where none turns."""
    turns = zip(spec.block_attention, spec.block_rope_base, strict=True)
    return next((base for kind, base in turns if kind in kinds and base), spec.rope_base)


def _rope_scaling(spec: ModelSpec) -> dict[str, Any] | None:
    if (scaling := spec.rope_scaling) is None:
        return None
    fields = SCALING if scaling.kind == "llama3" else {"factor": "factor"}
    theirs = {theirs: getattr(scaling, ours) for ours, theirs in fields.items()}
    return {"rope_type": scaling.kind, **theirs}
