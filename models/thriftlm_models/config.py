"""What a decoder is, and what it costs to hold and to run. No torch here."""

from functools import cache
from importlib.resources import files
from typing import Any, Literal, Self, cast

import yaml
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, model_validator

Sharing = Literal["none", "immediate", "repeat_all_over", "reverse"]


class Spec(BaseModel):
    """Base of every specification: frozen, typos refused, field docstrings become help."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ModelSpec(Spec):
    """Shape of a LLaMA-style pre-norm decoder.

    A `preset` fills what is not given. Of what remains, `n_kv_heads` follows `n_heads`, `head_dim`
    is `d_model / n_heads`, `d_ff` is LLaMA's rule (8/3 of `d_model`, up to a multiple of 256), and
    `repeats` is 1 without sharing, else 2. After construction every field has its value.

    Raises:
        ValueError: unknown preset; `n_kv_heads` does not divide `n_heads`; no `head_dim` and
            `n_heads` does not divide `d_model`; odd `head_dim`; `repeats` without sharing.
    """

    preset: str | None = None
    """Name of the published shape this one started from."""
    n_layers: PositiveInt
    """Distinct decoder blocks, those that hold parameters."""
    sharing: Sharing = "none"
    """Order in which shared blocks run, after MobileLLM (arXiv 2402.14905, Figure 6)."""
    repeats: PositiveInt
    """How often each distinct block runs in one forward pass."""
    d_model: PositiveInt
    """Width of the residual stream."""
    n_heads: PositiveInt
    """Query heads."""
    n_kv_heads: PositiveInt
    """Key and value heads; fewer than `n_heads` is grouped-query attention."""
    head_dim: PositiveInt
    """Width of one head, independent of `d_model / n_heads`."""
    d_ff: PositiveInt
    """Inner width of the gated feed-forward layer."""
    vocab: PositiveInt
    """Rows of the embedding table. In a run it follows the tokenizer unless it is given."""
    tie_embeddings: bool = True
    """Whether the output head is the input embedding."""
    norm_eps: PositiveFloat = 1e-5
    """Added to the mean square in RMSNorm."""
    rope_base: PositiveFloat = 10_000.0
    """Base of the rotary position frequencies."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        return fill_model(given) if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_kv_heads must divide n_heads: {self.n_kv_heads} does not divide {self.n_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        if self.sharing == "none" and self.repeats != 1:
            raise ValueError(
                f"repeats is {self.repeats} but sharing is none: set sharing to immediate, "
                "repeat_all_over or reverse, or leave repeats out"
            )
        return self

    @property
    def schedule(self) -> tuple[int, ...]:
        """Index of the distinct block that each executed layer uses, in order of execution."""
        return sharing_schedule(self.n_layers, self.sharing, self.repeats)


def fill_model(given: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `ModelSpec` with preset and defaults filled in; given fields win.

    Raises:
        ValueError: unknown preset, or heads that do not divide the width.
    """
    fields: dict[str, Any] = {}
    if (name := given.get("preset")) is not None:
        fields |= preset(name)
    fields |= {key: value for key, value in given.items() if value is not None}
    # What has the wrong type is left for pydantic, which names the field.
    d_model, n_heads = fields.get("d_model"), fields.get("n_heads")
    if fields.get("sharing", "none") == "none" and given.get("repeats") is None:
        fields["repeats"] = 1  # not the repeats of a preset that shares
    fields.setdefault("repeats", 2)
    if isinstance(n_heads, int):
        fields.setdefault("n_kv_heads", n_heads)
    if isinstance(d_model, int) and d_model > 0:
        fields.setdefault("d_ff", round_up(8 * d_model / 3, 256))
        if "head_dim" not in fields and isinstance(n_heads, int) and n_heads > 0:
            if d_model % n_heads:
                raise ValueError(
                    f"n_heads must divide d_model when head_dim is not given: {n_heads} does not "
                    f"divide {d_model}; change one of them or set head_dim"
                )
            fields["head_dim"] = d_model // n_heads
    return fields


def round_up(value: float, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `value`."""
    return -int(-value // multiple) * multiple


def sharing_schedule(n_layers: int, sharing: Sharing, repeats: int) -> tuple[int, ...]:
    """Order in which `n_layers` distinct blocks run (MobileLLM, arXiv 2402.14905, Figure 6).

    For three blocks and two repeats: immediate 0,0,1,1,2,2; repeat_all_over 0,1,2,0,1,2;
    reverse 0,1,2,2,1,0. With more repeats, reverse keeps turning round.
    """
    blocks = range(n_layers)
    match sharing:
        case "none":
            return tuple(blocks)
        case "immediate":
            return tuple(block for block in blocks for _ in range(repeats))
        case "repeat_all_over":
            return tuple(blocks) * repeats
        case "reverse":
            forth, back = tuple(blocks), tuple(reversed(blocks))
            return tuple(i for turn in range(repeats) for i in (back if turn % 2 else forth))


@cache
def presets() -> dict[str, dict[str, Any]]:
    """Published shapes by name, each with its `source`, as `presets.yaml` has them."""
    text = files("thriftlm_models").joinpath("presets.yaml").read_text(encoding="utf-8")
    return cast(dict[str, dict[str, Any]], yaml.safe_load(text))


def preset(name: str) -> dict[str, Any]:
    """Model fields of a published shape.

    Raises:
        ValueError: no such preset; names the nearest.
    """
    from difflib import get_close_matches

    known = presets()
    if name not in known:
        near = get_close_matches(str(name), known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(sorted(known))}"
        raise ValueError(f"unknown model preset '{name}'; {hint}")
    return {key: value for key, value in known[name].items() if key != "source"}


def block_matmul_params(model: ModelSpec) -> int:
    """Parameters of one block that take part in matrix products (no norm gains)."""
    queries = model.n_heads * model.head_dim
    keys_values = 2 * model.n_kv_heads * model.head_dim
    attention = model.d_model * (2 * queries + keys_values)
    return attention + 3 * model.d_model * model.d_ff


def block_params(model: ModelSpec) -> int:
    """Parameters of one block, with its two RMSNorm gains."""
    return block_matmul_params(model) + 2 * model.d_model


def embedding_params(model: ModelSpec) -> int:
    """Parameters of the embedding table, and of the output head where it is not the same table."""
    return model.vocab * model.d_model * (1 if model.tie_embeddings else 2)


def stored_params(model: ModelSpec) -> int:
    """Parameters that memory, checkpoints and the optimizer hold: shared blocks count once."""
    return model.n_layers * block_params(model) + model.d_model + embedding_params(model)


def applied_params(model: ModelSpec) -> int:
    """Parameters as the forward pass applies them: a shared block counts each time it runs."""
    return len(model.schedule) * block_params(model) + model.d_model + embedding_params(model)


def non_embedding_params(model: ModelSpec) -> int:
    """Stored parameters without embedding and output head: the N of the scaling laws."""
    return stored_params(model) - embedding_params(model)


FLOP_FORMULA = "6N+attn"
"""Name under which every FLOP count and MFU of this package is stored."""


def flops_per_token(model: ModelSpec, seq_len: int) -> int:
    """Training FLOPs per token, forward and backward, by the formula named `6N+attn`.

    6 x (applied matmul parameters, output head included, input embedding excluded)
    + 12 x executed layers x heads x head_dim x seq_len, not halved for causal attention.
    TinyLlama's published 56% on A100 is this formula (56.3% at 24k tokens/s).
    """
    layers = len(model.schedule)
    matmul = layers * block_matmul_params(model) + model.vocab * model.d_model
    attention = 12 * layers * model.n_heads * model.head_dim * seq_len
    return 6 * matmul + attention


def kv_bytes_per_token(model: ModelSpec, bytes_per_value: int = 2) -> int:
    """Bytes of keys and values cached per token; every executed layer has a slot of its own."""
    return 2 * len(model.schedule) * model.n_kv_heads * model.head_dim * bytes_per_value
