"""What a decoder is: its shape, every field with its meaning. No torch here."""

from math import isfinite
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from thriftlm_models.presets import preset

Sharing = Literal["none", "immediate", "repeat_all_over", "reverse"]
AttentionKind = Literal["full", "sliding", "none"]
Activation = Literal["swiglu", "geglu", "gelu", "relu", "relu2"]
DEFAULT_ROPE_BASE = 10_000.0
DEFAULT_MUP_WIDTH = 256
LLAMA3_FIELDS = ("low_freq_factor", "high_freq_factor", "original_context")
GATED = frozenset(("swiglu", "geglu"))
"""Activations whose feed-forward layer has a gate beside the up projection: three matrices."""


class Spec(BaseModel):
    """Base of every specification: frozen, typos refused, field docstrings become help."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class RopeScaling(Spec):
    """Stretched rotary frequencies of the blocks with full attention, for a longer context.

    Sliding blocks never look further than their window and keep theirs.
    """

    kind: Literal["linear", "llama3"]
    """`linear` divides every frequency by `factor`; `llama3` only the slow ones (Llama 3.1)."""
    factor: PositiveFloat
    """How many times longer the context gets."""
    low_freq_factor: PositiveFloat = 1.0
    """llama3: wavelengths above `original_context` / this are divided by the whole factor."""
    high_freq_factor: PositiveFloat = 4.0
    """llama3: wavelengths below `original_context` / this are left alone."""
    original_context: PositiveInt = 8192
    """llama3: tokens that the unstretched frequencies were trained for."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                "low_freq_factor must be below high_freq_factor: "
                f"{self.low_freq_factor:g} is not below {self.high_freq_factor:g}"
            )
        return self


class ModelSpec(Spec):
    """Shape of a pre-norm decoder.

    A `preset` fills what is not given. Of what remains, `n_kv_heads` follows `n_heads`, `head_dim`
    is `d_model / n_heads`, `d_ff` is LLaMA's rule (8/3 of `d_model`, up to a multiple of 256), and
    `repeats` is 1 without sharing, else 2. After construction every field has its value. Patterns
    are repeated over the distinct blocks and cut at the last.

    Raises:
        ValueError: unknown preset; `n_kv_heads` does not divide `n_heads`; no `head_dim` and
            `n_heads` does not divide `d_model`; odd `head_dim` with rotary positions; `repeats`
            without sharing; a field that needs another which is not given.
    """

    preset: str | None = None
    """Name of the published shape this one started from, or `apple:350M` for Apple's rule."""
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
    """Inner width of the feed-forward layer."""
    vocab: PositiveInt
    """Rows of the embedding table. In a run it follows the tokenizer unless it is given."""
    tie_embeddings: bool = True
    """Whether the output head is the input embedding."""
    scale_embedding: bool = False
    """Whether embeddings are multiplied by sqrt(d_model) when they enter (Gemma)."""
    activation: Activation = "swiglu"
    """Feed-forward nonlinearity; `swiglu` and `geglu` are gated. GELU is the tanh form."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm, or LayerNorm with a bias (GPT-2)."""
    norm_eps: PositiveFloat = 1e-5
    """Added to the mean square, or to the variance, in every norm."""
    post_norm: bool = False
    """Whether what attention and feed-forward layer add is normalised as well (Gemma 3)."""
    qk_norm: Literal["none", "learned", "unlearned"] = "none"
    """RMSNorm of each query and key head, with a gain (Qwen3) or without (MobileLLM-R1)."""
    bias: bool = False
    """Whether the linear layers of the blocks have a bias (GPT-2)."""
    attention_pattern: tuple[AttentionKind, ...] = Field(default=("full",), min_length=1)
    """What each block attends to: all before it, the last `window` tokens, or nothing.

    A list, or its words in one text, so that a search can choose: `sliding sliding full`.
    """
    window: PositiveInt | None = None
    """Tokens that a sliding block sees, its own included."""
    positions: Literal["rope", "learned"] = "rope"
    """Rotary positions, or a learned table of `max_positions` rows (GPT-2)."""
    max_positions: PositiveInt | None = None
    """Longest sequence of a model with learned positions."""
    rope_base: float = Field(default=DEFAULT_ROPE_BASE, gt=1, allow_inf_nan=False)
    """Base of the rotary position frequencies, where `rope_pattern` gives none."""
    rope_pattern: tuple[float, ...] = ()
    """Rotary base block by block, where 0 is no positions (NoPE); empty: `rope_base` everywhere.

    A list, or its words in one text: `1e4 1e4 0`.
    """
    rope_scaling: RopeScaling | None = None
    """Stretched frequencies of blocks with full attention."""
    init: Literal["gpt2", "mobilellm", "tinyllama"] = "gpt2"
    """Initial weights, see `thriftlm_models.initial`."""
    parametrization: Literal["standard", "mup"] = "standard"
    """`mup` keeps the best learning rate the same over widths (arXiv 2203.03466)."""
    mup_base_width: PositiveInt = DEFAULT_MUP_WIDTH
    """Width at which `mup` is the standard parametrization, for heads of 64; unused without it."""

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
        if self.sharing == "none" and self.repeats != 1:
            raise ValueError(
                f"repeats is {self.repeats} but sharing is none: set sharing to immediate, "
                "repeat_all_over or reverse, or leave repeats out"
            )
        self._check_attention()
        self._check_positions()
        return self

    def _check_attention(self) -> None:
        if "sliding" in self.attention_pattern and self.window is None:
            raise ValueError("window is required where attention_pattern has sliding: give tokens")

    def _check_positions(self) -> None:
        if self.positions == "learned":
            if self.max_positions is None:
                raise ValueError("max_positions is required with positions: learned")
            if self.rope_pattern or self.rope_scaling:
                raise ValueError("rope_pattern and rope_scaling need positions: rope, got learned")
            return
        if self.max_positions is not None:
            raise ValueError(
                f"max_positions belongs to positions: learned, got {self.max_positions} with rope, "
                "which has no end; leave it out"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        if not all(base == 0 or (base > 1 and isfinite(base)) for base in self.rope_pattern):
            raise ValueError(
                "rope_pattern takes bases above 1, or 0 for no positions; got "
                f"{list(self.rope_pattern)}"
            )

    @property
    def schedule(self) -> tuple[int, ...]:
        """Index of the distinct block that each executed layer uses, in order of execution."""
        return sharing_schedule(self.n_layers, self.sharing, self.repeats)

    @property
    def block_attention(self) -> tuple[AttentionKind, ...]:
        """What each distinct block attends to."""
        pattern = self.attention_pattern
        return tuple(pattern[block % len(pattern)] for block in range(self.n_layers))

    @property
    def block_rope_base(self) -> tuple[float, ...]:
        """Rotary base of each distinct block; 0 where it has no rotary positions."""
        pattern = self.rope_pattern or (0.0 if self.positions == "learned" else self.rope_base,)
        return tuple(pattern[block % len(pattern)] for block in range(self.n_layers))

    @property
    def width_factor(self) -> float:
        """How many times wider than `mup_base_width` under muP; 1 otherwise."""
        return self.d_model / self.mup_base_width if self.parametrization == "mup" else 1.0


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
    return canonical(fields)


def canonical(fields: dict[str, Any]) -> dict[str, Any]:
    """The same model with one spelling: what changes nothing is left out.

    So that two ways to write a model are one run, which is paid for once. What has the wrong type
    stays, for pydantic to name.
    """
    found = fields | {
        name: spelled(fields[name], as_number)
        for name, as_number in (("attention_pattern", False), ("rope_pattern", True))
        if name in fields
    }
    attention, rope = found.get("attention_pattern", ("full",)), found.get("rope_pattern", ())
    if isinstance(attention, tuple) and "sliding" not in attention:
        found.pop("window", None)
    if found.get("parametrization", "standard") == "standard":
        found.pop("mup_base_width", None)
    if found.get("positions") == "learned":
        found.pop("rope_base", None)
    elif isinstance(rope, tuple) and (bases := [base for base in rope if base > 1]):
        found["rope_base"] = bases[-1]
        if len(rope) == len(bases) == 1:
            found.pop("rope_pattern")
    scaling = found.get("rope_scaling")
    if isinstance(scaling, dict) and scaling.get("kind") == "linear":
        found["rope_scaling"] = {k: v for k, v in scaling.items() if k not in LLAMA3_FIELDS}
    return found


def spelled(pattern: Any, as_numbers: bool) -> Any:
    """A pattern, which may be words in one text, as the fewest entries that repeat to it."""
    words = pattern.split() if isinstance(pattern, str) else pattern
    if not isinstance(words, list | tuple):
        return pattern
    if as_numbers:
        try:
            words = [float(word) for word in words]
        except (TypeError, ValueError):
            return pattern
    length = len(words)
    periods = (p for p in range(1, length) if length % p == 0)
    fewest = next((p for p in periods if words[:p] * (length // p) == words), length)
    return tuple(words[:fewest])


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
