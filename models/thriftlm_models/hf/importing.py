"""Hugging Face checkpoints as decoders, where the decoder computes exactly the same."""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from thriftlm_models.config import GATED, ModelSpec, RopeScaling
from thriftlm_models.decoder import Decoder
from thriftlm_models.hf.families import ACTIVATIONS, FAMILIES, LAYER_TYPES, SCALING, Family, parts

BUFFERS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
"""Ends of the names of constants that older checkpoints hold beside their weights."""


def from_pretrained(name_or_folder: str | Path, attention: str = "flash") -> Decoder:
    """The decoder of a checkpoint, in fp32 on the CPU.

    From a folder with config.json and safetensors or, where that is none, from the Hugging Face
    hub. Weights are read one at a time.

    Raises:
        FileNotFoundError: no such folder, or no config.json or safetensors in it.
        ValueError: a model that the decoder cannot compute, or weights that do not fit its config.
    """
    folder = _folder(name_or_folder)
    config = _read_config(folder)
    decoder = Decoder(spec_from_config(config), attention)
    with ExitStack() as stack:
        _load(decoder, FAMILIES[config.model_type], _open_files(folder, stack))
    return decoder


def spec_from_config(config: Any) -> ModelSpec:
    """The shape that a transformers configuration describes, `preset` and `init` left alone.

    Raises:
        ValueError: a model that the decoder cannot compute; names field and value.
    """
    if config.model_type not in FAMILIES:
        raise _refusal("a model", "model_type", config.model_type)
    family = FAMILIES[config.model_type]
    fields = {ours: getattr(config, theirs, None) for ours, theirs in family.fields.items()}
    fields["n_layers"] = config.num_hidden_layers
    fields["activation"] = _activation(config, family.activation)
    fields |= _gpt2_fields(config) if config.model_type == "gpt2" else _llama_fields(config)
    if getattr(config, "share_embedding", False):  # how MobileLLM ties
        fields["tie_embeddings"] = True
    if getattr(config, "layer_sharing", False):  # MobileLLM-LS
        fields |= {"sharing": "immediate", "repeats": 2}
    return ModelSpec.model_validate(fields)


def _refusal(model: str, name: str, value: object) -> ValueError:
    return ValueError(
        f"the decoder cannot compute {model} with {name}: {value}; it takes Llama (SmolLM2, "
        "TinyLlama, MobileLLM), Qwen3, SmolLM3, Gemma 3 text and GPT-2 as published"
    )


def _require(config: Any, **taken: object) -> None:
    for name, wanted in taken.items():
        value = getattr(config, name, None)
        if (value or None) != (wanted or None):  # None and False are both off
            raise _refusal(config.model_type, name, value)


def _activation(config: Any, name: str) -> str:
    theirs, is_gated = getattr(config, name), config.model_type != "gpt2"
    for ours, names in ACTIVATIONS.items():
        if (ours in GATED) is is_gated and theirs in names:
            return ours
    raise _refusal(config.model_type, name, theirs)


def _gpt2_fields(config: Any) -> dict[str, Any]:
    _require(config, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
    _require(config, add_cross_attention=False)
    inner = 4 * config.n_embd if config.n_inner is None else config.n_inner
    return {"d_ff": inner, "norm": "layer", "bias": True, "positions": "learned"}


def _llama_fields(config: Any) -> dict[str, Any]:
    """What the families that descend from Llama have beside its shape."""
    is_gemma = config.model_type == "gemma3_text"
    if is_gemma:
        _require(config, query_pre_attn_scalar=config.head_dim, use_bidirectional_attention=False)
        _require(config, final_logit_softcapping=None, attn_logit_softcapping=None)
    _require(config, attention_bias=getattr(config, "mlp_bias", False))
    return {
        "post_norm": is_gemma,
        "scale_embedding": is_gemma,
        "qk_norm": "learned" if config.model_type in ("qwen3", "gemma3_text") else "none",
        **_layer_fields(config),
    }


def _layer_fields(config: Any) -> dict[str, Any]:
    """What each layer attends to, and how it turns queries and keys."""
    layers, rope = range(config.num_hidden_layers), config.rope_parameters
    types = getattr(config, "layer_types", None) or [LAYER_TYPES["full"] for _ in layers]
    if unknown := set(types) - set(LAYER_TYPES.values()):
        raise _refusal(config.model_type, "layer_types", ", ".join(sorted(unknown)))
    kinds = ["full" if type_ == LAYER_TYPES["full"] else "sliding" for type_ in types]
    is_gemma = config.model_type == "gemma3_text"
    ropes = {kind: rope[type_] if is_gemma else rope for kind, type_ in LAYER_TYPES.items()}
    scalings = {kind: _scaling(config, ropes[kind]) for kind in ropes}
    turns = config.no_rope_layers if config.model_type == "smollm3" else [1 for _ in layers]
    turning = list(zip(kinds, turns[: len(kinds)], strict=True))
    if scalings["sliding"] is not None and ("sliding", 1) in turning:
        raise _refusal(
            config.model_type, "sliding layers and rope_type", ropes["sliding"]["rope_type"]
        )
    bases = [ropes[kind]["rope_theta"] if turn else 0.0 for kind, turn in turning]
    base = ropes["full"]["rope_theta"]
    return {
        "attention_pattern": _shortest(kinds),
        "window": config.sliding_window if "sliding" in kinds else None,
        "rope_base": base,
        "rope_pattern": () if set(bases) == {base} else _shortest(bases),
        "rope_scaling": scalings["full"],
    }


def _scaling(config: Any, rope: Mapping[str, Any]) -> RopeScaling | None:
    kind, part = rope.get("rope_type"), rope.get("partial_rotary_factor")
    if part not in (None, 1):
        raise _refusal(config.model_type, "partial_rotary_factor", part)
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise _refusal(config.model_type, "rope_type", kind)
    given = {ours: rope[theirs] for ours, theirs in SCALING.items() if theirs in rope}
    return RopeScaling.model_validate({"kind": kind, **given})


def _shortest(pattern: list[Any]) -> tuple[Any, ...]:
    """The fewest first entries that, repeated and cut, give the pattern."""
    length = len(pattern)
    periods = range(1, length + 1)
    return tuple(pattern[: next(p for p in periods if pattern[p:] == pattern[: length - p])])


def _folder(name_or_folder: str | Path) -> Path:
    folder, name = Path(name_or_folder), str(name_or_folder)
    if folder.is_dir():
        return folder
    if isinstance(name_or_folder, Path) or name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"a checkpoint is a folder or a name on the hub, {name} is neither: give a folder that "
            "exists, or a name such as HuggingFaceTB/SmolLM2-135M"
        )
    from huggingface_hub import snapshot_download

    files = ["config.json", "model*.safetensors", "model.safetensors.index.json"]
    return Path(snapshot_download(name, allow_patterns=files))


def _read_config(folder: Path) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"a checkpoint is a folder with config.json: {folder} has none")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); download it again") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold the fields of a model, got a {type(fields).__name__}")
    model_type = fields.pop("model_type", None)
    if model_type == "mobilellm":  # Llama and two fields more, in code of its own
        model_type = "llama"
    if model_type not in FAMILIES:
        raise _refusal("a model", "model_type", model_type)
    try:
        return AutoConfig.for_model(model_type, **fields)
    except (StrictDataclassError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} makes no {model_type} model: {reason}; correct it") from error


def _open_files(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """By the name of each weight, the open file that holds it."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if not (folder / names[0]).is_file() and index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    if lacking := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(
            f"a checkpoint has model.safetensors or the files of its index: {folder} lacks "
            f"{', '.join(lacking)}; save the model as safetensors"
        )
    files: list[Any] = [stack.enter_context(safe_open(folder / name, "pt")) for name in names]
    return {weight: file for file in files for weight in file.keys()}  # noqa: SIM118 (no mapping)


def _load(decoder: Decoder, family: Family, files: Mapping[str, Any]) -> None:
    """Fills the decoder; `files` are those that hold the weights, by their names."""
    spec = decoder.spec
    state = {name: parameter.detach() for name, parameter in decoder.named_parameters()}
    wanted = dict(parts(spec, family, range(spec.n_layers), state))
    stored = _stored(family, files)
    head = stored.pop("lm_head.weight", None) if spec.tie_embeddings else None
    _check_names("lacks", wanted.keys() - stored)
    _check_names("has unexpected", stored.keys() - wanted)
    shaped = {name for name, view in wanted.items() if stored[name].get_shape() == [*view.shape]}
    _check_names("has other shapes of", wanted.keys() - shaped)
    for name, view in wanted.items():
        view.copy_(stored[name][:])
        if family.added_to_gain and "norm" in name:
            view.add_(family.added_to_gain)
    if head is not None and not torch.equal(head[:].to(torch.float32), state["embedding"]):
        raise ValueError(
            "tied embeddings have no other output head: lm_head.weight differs from the embedding; "
            "set tie_word_embeddings to false in config.json, or leave that weight out"
        )


def _stored(family: Family, files: Mapping[str, Any]) -> dict[str, Any]:
    """What was stored, not yet read, by the names that the class has now."""
    # Checkpoints of the class without its output head leave the prefix out, as GPT-2's own does.
    prefix = family.layers.partition(".")[0] + "."
    return {
        name if name.startswith((prefix, "lm_head.")) else prefix + name: file.get_slice(name)
        for name, file in files.items()
        if not name.endswith(BUFFERS)
    }


def _check_names(problem: str, names: set[str]) -> None:
    if names:
        raise ValueError(
            "a checkpoint has the weights that its config.json describes, and no others: this one "
            f"{problem} {', '.join(sorted(names))}; correct one of the two"
        )
