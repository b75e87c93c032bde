"""The decoder that `ModelSpec` describes.

Shapes are suffixes: B batch, T tokens, D model width, H query heads, K key and value heads,
C width of a head, F feed-forward width, V vocabulary, S tokens in a cache.
"""
# ruff: noqa: N803, N806 (shape suffixes are upper case)

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thriftlm_models.attention import documents_for, kernel, pinned
from thriftlm_models.cache import Cache, CachedLayer
from thriftlm_models.config import GATED, ModelSpec
from thriftlm_models.documents import Documents, Packing
from thriftlm_models.initial import init_weights
from thriftlm_models.loss import linear_cross_entropy
from thriftlm_models.recomputation import with_recomputation
from thriftlm_models.rotation import Rotation

MUP_HEAD_DIM = 64
"""Head width at which muP's attention scale 1/C is the usual 1/sqrt(C)."""
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def attention_scale(model: ModelSpec) -> float:
    """Factor of the attention scores: 1/sqrt(C), under muP sqrt(64)/C (arXiv 2203.03466, 4.1)."""
    if model.parametrization == "mup":
        return math.sqrt(MUP_HEAD_DIM) / model.head_dim
    return 1 / math.sqrt(model.head_dim)


def make_norm(model: ModelSpec) -> nn.Module:
    """A norm over the width, as the model has them."""
    kind = nn.RMSNorm if model.norm == "rms" else nn.LayerNorm
    return kind(model.d_model, eps=model.norm_eps)


class Attention(nn.Module):
    """Causal grouped-query attention with the positions and the reach of its block."""

    def __init__(self, model: ModelSpec, block: int, attention: str) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads = model.n_heads, model.n_kv_heads
        self.head_dim = model.head_dim
        self.scale = attention_scale(model)
        self.window = model.window if model.block_attention[block] == "sliding" else None
        self.kernel = kernel(attention)
        all_heads = model.n_heads + 2 * model.n_kv_heads
        self.qkv = nn.Linear(model.d_model, all_heads * model.head_dim, bias=model.bias)
        self.out = nn.Linear(model.n_heads * model.head_dim, model.d_model, bias=model.bias)
        self.normalises_heads = model.qk_norm != "none"
        if self.normalises_heads:
            has_gain = model.qk_norm == "learned"
            self.q_norm, self.k_norm = (
                nn.RMSNorm(model.head_dim, eps=model.norm_eps, elementwise_affine=has_gain)
                for _ in range(2)
            )

    def forward(
        self,
        x_BTD: Tensor,
        rotate: Rotation | None,
        cached: CachedLayer | None,
        documents: Documents | None,
    ) -> Tensor:
        """What attention adds to the residual stream, (B, T, D)."""
        heads_BTHC = self.qkv(x_BTD).unflatten(-1, (-1, self.head_dim))
        qk_BTHC, v_BTKC = heads_BTHC.tensor_split([self.n_heads + self.n_kv_heads], dim=2)
        if self.normalises_heads:
            q_BTHC, k_BTKC = qk_BTHC.tensor_split([self.n_heads], dim=2)
            qk_BTHC = torch.cat((self.q_norm(q_BTHC), self.k_norm(k_BTKC)), dim=2)
        if rotate is not None:
            qk_BTHC = rotate(qk_BTHC)
        q_BTHC, k_BTKC = qk_BTHC.tensor_split([self.n_heads], dim=2)
        q_BHTC, k_BKTC, v_BKTC = (x.transpose(1, 2) for x in (q_BTHC, k_BTKC, v_BTKC))
        attended_BHTC = self.attend(q_BHTC, k_BKTC, v_BKTC, cached, documents)
        result: Tensor = self.out(attended_BHTC.transpose(1, 2).flatten(2))
        return result

    def attend(
        self,
        q_BHTC: Tensor,
        k_BKTC: Tensor,
        v_BKTC: Tensor,
        cached: CachedLayer | None,
        documents: Documents | None,
    ) -> Tensor:
        """Attention output (B, H, T, C), over what the cache holds too."""
        if cached is None or cached.is_empty:
            if cached is not None:
                cached.append(k_BKTC, v_BKTC, self.window)
            return self.kernel(q_BHTC, k_BKTC, v_BKTC, self.window, self.scale, documents)
        # One new token, which sees all that the slot still holds.
        k_BKSC, v_BKSC = cached.append(k_BKTC, v_BKTC, self.window)
        return F.scaled_dot_product_attention(
            q_BHTC, k_BKSC, v_BKSC, scale=self.scale, enable_gqa=True
        )


class FeedForward(nn.Module):
    """down(f(up(x))), or gated: down(f(gate(x)) * up(x)) with gate and up in one matrix."""

    def __init__(self, model: ModelSpec) -> None:
        super().__init__()
        self.is_gated = model.activation in GATED
        self.activate = ACTIVATIONS[model.activation]
        if self.is_gated:
            self.gate_up = nn.Linear(model.d_model, 2 * model.d_ff, bias=model.bias)
        else:
            self.up = nn.Linear(model.d_model, model.d_ff, bias=model.bias)
        self.down = nn.Linear(model.d_ff, model.d_model, bias=model.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """What the feed-forward layer adds to the residual stream, (B, T, D)."""
        if self.is_gated:
            gate_BTF, up_BTF = self.gate_up(x_BTD).chunk(2, dim=-1)
            inner_BTF = self.activate(gate_BTF) * up_BTF
        else:
            inner_BTF = self.activate(self.up(x_BTD))
        result: Tensor = self.down(inner_BTF)
        return result


class Block(nn.Module):
    """One pre-norm decoder block, the distinct block number `block` of the model."""

    def __init__(self, model: ModelSpec, block: int, attention: str) -> None:
        super().__init__()
        self.attends = model.block_attention[block] != "none"
        if self.attends:
            self.attention_norm = make_norm(model)
            self.attention = Attention(model, block, attention)
            self.attention_post_norm = make_norm(model) if model.post_norm else nn.Identity()
        self.feed_forward_norm = make_norm(model)
        self.feed_forward = FeedForward(model)
        self.feed_forward_post_norm = make_norm(model) if model.post_norm else nn.Identity()
        self.run: Callable[..., Tensor] | None = None

    def set_execution(self, act_ckpt: str, compiled: bool) -> None:
        """Choose what backward keeps (`recomputation`), and whether torch.compile runs the block.

        Inside of `forward`, because hooks that gather weights stand around it: neither is
        checkpointing to gather twice nor the compiler to look into hooks.
        """
        run = with_recomputation(self.compute, act_ckpt)
        self.run = torch.compile(run) if compiled else run

    def forward(
        self,
        x_BTD: Tensor,
        rotate: Rotation | None,
        cached: CachedLayer | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """The residual stream after this block, (B, T, D)."""
        run = self.run or self.compute
        return run(x_BTD, rotate, cached, documents)

    def compute(
        self,
        x_BTD: Tensor,
        rotate: Rotation | None,
        cached: CachedLayer | None,
        documents: Documents | None,
    ) -> Tensor:
        """What `forward` gives, plainly."""
        if self.attends:
            added_BTD = self.attention(self.attention_norm(x_BTD), rotate, cached, documents)
            x_BTD = x_BTD + self.attention_post_norm(added_BTD)
        added_BTD = self.feed_forward(self.feed_forward_norm(x_BTD))
        result: Tensor = x_BTD + self.feed_forward_post_norm(added_BTD)
        return result


class Decoder(nn.Module):
    """A language model; call `init_weights` before use.

    `blocks` holds the distinct blocks and `forward` runs them in `model.schedule` order, so a
    shared block is one module, stored once and called several times. Embedding table, positions and
    output head are parameters of the decoder itself, not of children: a tied table is used twice in
    `forward`, and FSDP and ZeRO-3 keep a module's own parameters gathered while it runs.

    Args:
        model: its shape.
        attention: name of the kernel.
        packing: how its sequences are made of documents; None where that plays no part.

    Raises:
        ValueError: unknown attention kernel.
    """

    def __init__(
        self, model: ModelSpec, attention: str = "flash", packing: Packing | None = None
    ) -> None:
        super().__init__()
        self.spec = model
        self.attention = attention
        self.packing = packing
        self.embedding = nn.Parameter(torch.empty(model.vocab, model.d_model))
        if model.positions == "learned":
            self.positions = nn.Parameter(torch.empty(model.max_positions or 0, model.d_model))
        self.blocks = nn.ModuleList(
            Block(model, block, attention) for block in range(model.n_layers)
        )
        self.norm = make_norm(model)
        if not model.tie_embeddings:
            self.head = nn.Parameter(torch.empty(model.vocab, model.d_model))

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor | None = None,
        cache: Cache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Mean cross-entropy in nats per token, an fp32 scalar; without targets, logits (B, T, V).

        The loss never holds all logits; `targets_BT` are the tokens that follow `tokens_BT`. With a
        `cache`, `tokens_BT` are the tokens after those that it holds: any number into an empty one,
        one at a time after that. `last_only` gives the logits of the last token, (B, 1, V).

        Raises:
            ValueError: more tokens than learned positions, or several into a cache in use.
        """
        hidden_BTD = self.hidden(tokens_BT, cache)
        if self.spec.parametrization == "mup":
            hidden_BTD = hidden_BTD / self.spec.width_factor
        head_VD = self.embedding if self.spec.tie_embeddings else self.head
        if targets_BT is not None and self.packing is not None:
            targets_N = self.packing.counted(tokens_BT, targets_BT).flatten()
            loss = linear_cross_entropy(hidden_BTD.flatten(0, 1), head_VD, targets_N, True)
            return loss / self.packing.real_share
        if targets_BT is not None:
            return linear_cross_entropy(hidden_BTD.flatten(0, 1), head_VD, targets_BT.flatten())
        return F.linear(hidden_BTD[:, -1:] if last_only else hidden_BTD, head_VD)

    def hidden(self, tokens_BT: Tensor, cache: Cache | None = None) -> Tensor:
        """Normalised output of the last block, (B, T, D); to be called from `forward` only."""
        past = 0 if cache is None else cache.advance(tokens_BT.shape[1])
        documents = self.documents(tokens_BT) if cache is None else None
        x_BTD = self.embed(tokens_BT, past, documents)
        rotations = self.rotations(tokens_BT, past)
        slots: Sequence[CachedLayer | None]
        slots = [None] * len(self.spec.schedule) if cache is None else cache.layers
        # A single new token needs no mask and runs on whatever SDPA chooses.
        with pinned(self.attention) if past == 0 else nullcontext():
            for index, slot in zip(self.spec.schedule, slots, strict=True):
                x_BTD = self.blocks[index](x_BTD, rotations[index], slot, documents)
        result: Tensor = self.norm(x_BTD)
        return result

    def documents(self, tokens_BT: Tensor) -> Documents | None:
        """The documents that attention stays inside, None where it does not."""
        if self.packing is None or not self.packing.document_mask:
            return None
        windows = {
            self.spec.window if kind == "sliding" else None
            for kind in self.spec.block_attention
            if kind != "none"
        }
        return documents_for(self.attention, tokens_BT, self.packing.end_id, windows)

    def embed(self, tokens_BT: Tensor, past: int, documents: Documents | None = None) -> Tensor:
        """What enters the first block, (B, T, D); learned positions begin anew in each document."""
        x_BTD = F.embedding(tokens_BT, self.embedding)
        if self.spec.scale_embedding:
            x_BTD = x_BTD * math.sqrt(self.spec.d_model)
        if self.spec.positions == "learned":
            end = past + tokens_BT.shape[1]
            if end > len(self.positions):
                raise ValueError(
                    f"the model has {len(self.positions)} learned positions, the sequence {end} "
                    "tokens; shorten it or set max_positions"
                )
            if documents is None:
                return x_BTD + self.positions[past:end]
            x_BTD = x_BTD + F.embedding(documents.position_BT, self.positions)
        return x_BTD

    def rotations(self, tokens_BT: Tensor, past: int) -> list[Rotation | None]:
        """The rotation of each distinct block, one object for all blocks that turn alike."""
        spec = self.spec
        kinds = [
            (base, spec.rope_scaling if kind == "full" else None)
            for base, kind in zip(spec.block_rope_base, spec.block_attention, strict=True)
        ]
        made = {
            (base, scaling): Rotation(
                past, tokens_BT.shape[1], spec.head_dim, base, tokens_BT.device, scaling
            )
            for base, scaling in dict.fromkeys(kinds)
            if base
        }
        return [made.get(kind) for kind in kinds]

    def set_execution(self, act_ckpt: str, compiled: bool) -> None:
        """Choose how blocks run: what backward keeps, and whether they are compiled."""
        for block in self.blocks:
            assert isinstance(block, Block)
            block.set_execution(act_ckpt, compiled)

    def init_weights(self, seed: int) -> None:
        """Fills every parameter, the same for a seed on every device; call before sharding."""
        init_weights(self, self.spec, seed)
