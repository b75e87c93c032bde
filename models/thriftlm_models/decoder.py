"""The decoder that `ModelSpec` describes: RMSNorm, rotary positions, grouped queries, SwiGLU.

Shapes are suffixes: B batch, T tokens, D model width, H query heads, K key and value heads,
C width of a head, F feed-forward width, V vocabulary, N = B x T.
"""
# ruff: noqa: N803, N806 (shape suffixes are upper case)

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thriftlm_models.attention import kernel, pinned
from thriftlm_models.config import ModelSpec

INIT_STD = 0.02
"""Standard deviation of initial weights, as in GPT-2."""
LOGIT_CHUNK_BYTES = 64 * 2**20
"""Largest block of fp32 logits that the loss holds at once."""


class Rotation:
    """Rotary position angles of T tokens: `cos` and `sin`, (T, 1, C/2), fp32.

    A plain object on purpose: FSDP2 under a mixed-precision policy casts every tensor that it sees
    among a block's inputs to bf16, which rounds positions away. Made anew in each forward pass, it
    is in no state_dict and needs no care with the meta device.
    """

    def __init__(self, seq_len: int, head_dim: int, base: float, device: torch.device) -> None:
        exponent_C = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
        position_T = torch.arange(seq_len, device=device, dtype=torch.float32)
        angle_TC = position_T[:, None] * base**-exponent_C
        self.cos, self.sin = angle_TC.cos()[:, None], angle_TC.sin()[:, None]

    def __call__(self, x_BTHC: Tensor) -> Tensor:
        """Heads rotated by their position, computed in fp32, in the dtype that came in."""
        # Halves, not neighbouring pairs: the layout of Hugging Face checkpoints.
        first, second = x_BTHC.float().chunk(2, dim=-1)
        turned = (first * self.cos - second * self.sin, second * self.cos + first * self.sin)
        return torch.cat(turned, dim=-1).to(x_BTHC.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, model: ModelSpec, attention: str) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads = model.n_heads, model.n_kv_heads
        self.head_dim = model.head_dim
        self.kernel = kernel(attention)
        all_heads = model.n_heads + 2 * model.n_kv_heads
        self.qkv = nn.Linear(model.d_model, all_heads * model.head_dim, bias=False)
        self.out = nn.Linear(model.n_heads * model.head_dim, model.d_model, bias=False)

    def forward(self, x_BTD: Tensor, rotate: Rotation) -> Tensor:
        """What attention adds to the residual stream, (B, T, D)."""
        heads_BTHC = self.qkv(x_BTD).unflatten(-1, (-1, self.head_dim))
        qk_BTHC, v_BTKC = heads_BTHC.tensor_split([self.n_heads + self.n_kv_heads], dim=2)
        q_BTHC, k_BTKC = rotate(qk_BTHC).tensor_split([self.n_heads], dim=2)
        attended_BHTC = self.kernel(
            q_BTHC.transpose(1, 2), k_BTKC.transpose(1, 2), v_BTKC.transpose(1, 2)
        )
        result: Tensor = self.out(attended_BHTC.transpose(1, 2).flatten(2))
        return result


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), gate and up in one matrix."""

    def __init__(self, model: ModelSpec) -> None:
        super().__init__()
        self.gate_up = nn.Linear(model.d_model, 2 * model.d_ff, bias=False)
        self.down = nn.Linear(model.d_ff, model.d_model, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """What the feed-forward layer adds to the residual stream, (B, T, D)."""
        gate_BTF, up_BTF = self.gate_up(x_BTD).chunk(2, dim=-1)
        result: Tensor = self.down(F.silu(gate_BTF) * up_BTF)
        return result


class Block(nn.Module):
    """One pre-norm decoder block."""

    def __init__(self, model: ModelSpec, attention: str) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(model.d_model, eps=model.norm_eps)
        self.attention = Attention(model, attention)
        self.feed_forward_norm = nn.RMSNorm(model.d_model, eps=model.norm_eps)
        self.feed_forward = FeedForward(model)

    def forward(self, x_BTD: Tensor, rotate: Rotation) -> Tensor:
        """The residual stream after this block, (B, T, D)."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rotate)
        result: Tensor = x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD))
        return result


class Decoder(nn.Module):
    """A language model; call `init_weights` before use.

    `blocks` holds the distinct blocks and `forward` runs them in `model.schedule` order, so a
    shared block is one module, stored once and called several times. Embedding table and output
    head are parameters of the decoder itself, not of children: a tied table is used twice in
    `forward`, and FSDP and ZeRO-3 keep a module's own parameters gathered while it runs.

    Raises:
        ValueError: unknown attention kernel.
    """

    def __init__(self, model: ModelSpec, attention: str = "flash") -> None:
        super().__init__()
        self.spec = model
        self.attention = attention
        self.embedding = nn.Parameter(torch.empty(model.vocab, model.d_model))
        self.blocks = nn.ModuleList(Block(model, attention) for _ in range(model.n_layers))
        self.norm = nn.RMSNorm(model.d_model, eps=model.norm_eps)
        if not model.tie_embeddings:
            self.head = nn.Parameter(torch.empty(model.vocab, model.d_model))

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """Mean cross-entropy in nats per token, an fp32 scalar; without targets, logits (B, T, V).

        The loss never holds all logits; `targets_BT` are the tokens that follow `tokens_BT`.
        """
        hidden_BTD = self.hidden(tokens_BT)
        head_VD = self.embedding if self.spec.tie_embeddings else self.head
        if targets_BT is None:
            return F.linear(hidden_BTD, head_VD)
        return linear_cross_entropy(hidden_BTD.flatten(0, 1), head_VD, targets_BT.flatten())

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """Normalised output of the last block, (B, T, D); to be called from `forward` only."""
        spec = self.spec
        rotate = Rotation(tokens_BT.shape[1], spec.head_dim, spec.rope_base, tokens_BT.device)
        x_BTD = F.embedding(tokens_BT, self.embedding)
        with pinned(self.attention):
            for index in spec.schedule:
                x_BTD = self.blocks[index](x_BTD, rotate)
        result: Tensor = self.norm(x_BTD)
        return result

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fills every parameter, the same for a seed on every device; call before sharding.

        Normal with standard deviation 0.02; matrices that write to the residual stream have it
        divided by sqrt(2 x executed layers), as in GPT-2; norm gains are 1.
        """
        generator = torch.Generator().manual_seed(seed)  # on CPU whatever the device
        residual_std = INIT_STD / math.sqrt(2 * len(self.spec.schedule))
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
                continue
            std = residual_std if name.endswith(("out.weight", "down.weight")) else INIT_STD
            drawn = torch.empty(parameter.shape, device="cpu", dtype=torch.float32)
            parameter.copy_(drawn.normal_(0.0, std, generator=generator))


def linear_cross_entropy(hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Mean cross-entropy of `hidden @ head.T` in nats, an fp32 scalar, never holding all logits.

    Multiplies in the dtype of autocast where that is on, softmax in fp32. Torch 2.13 has a function
    of this name: under autocast it multiplies in fp32, and given bf16 it returns a bf16 loss.

    Raises:
        ValueError: no targets.
    """
    if not len(targets_N):
        raise ValueError("the loss needs at least one target, got none")
    loss: Tensor = LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_ND, head_VD, targets_N, torch.is_grad_enabled()
    )
    return loss


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy over blocks of R rows, with the gradients made in the forward pass.

    So every logit is computed once, not twice as with recomputation, and backward needs no
    parameter that FSDP or ZeRO-3 may have freed by then. It holds an fp32 gradient of the head
    until backward. No second derivatives, and no second backward through one graph.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, with_gradients: bool
    ) -> Tensor:
        """The mean loss; keeps the gradients of the sum."""
        ctx.n_tokens = len(targets_N)
        dtype = compute_dtype(hidden_ND)
        hidden_ND, head_VD = hidden_ND.to(dtype), head_VD.to(dtype)
        loss_sum = torch.zeros((), device=hidden_ND.device, dtype=torch.float32)
        if with_gradients:
            d_hidden_ND = torch.empty_like(hidden_ND)
            d_head_VD = torch.zeros_like(head_VD, dtype=torch.float32)
        rows = max(1, LOGIT_CHUNK_BYTES // (4 * len(head_VD)))
        for start in range(0, ctx.n_tokens, rows):
            block = slice(start, start + rows)
            logits_RV = (hidden_ND[block] @ head_VD.T).float()
            norm_R1 = logits_RV.logsumexp(dim=-1, keepdim=True)
            target_R1 = targets_N[block, None]
            loss_sum += (norm_R1 - logits_RV.gather(1, target_R1)).sum()
            if with_gradients:
                # softmax - one-hot, in the memory of the logits
                d_logits_RV = logits_RV.sub_(norm_R1).exp_()
                d_logits_RV.scatter_add_(1, target_R1, torch.full_like(norm_R1, -1.0))
                d_logits_RV = d_logits_RV.to(dtype)
                torch.mm(d_logits_RV, head_VD, out=d_hidden_ND[block])
                d_head_VD += d_logits_RV.T @ hidden_ND[block]
        if with_gradients:
            ctx.save_for_backward(d_hidden_ND, d_head_VD)
        return loss_sum.div_(ctx.n_tokens)

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden states and head; scaled in place, so a second call raises."""
        d_hidden_ND, d_head_VD = ctx.saved_tensors
        scale = d_loss / ctx.n_tokens
        return d_hidden_ND.mul_(scale), d_head_VD.mul_(scale), None, None


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast gives matrix products on the tensor's device, else its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
