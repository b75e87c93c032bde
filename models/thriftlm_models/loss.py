"""The loss of a language model without ever holding all its logits.

Shapes are suffixes: N tokens, R rows of a block of them, D model width, V vocabulary.
"""
# ruff: noqa: N803, N806 (shape suffixes are upper case)

from typing import Any

import torch
from torch import Tensor

LOGIT_BLOCK_BYTES = 64 * 2**20
"""Largest block of logits that the loss holds at once, in the dtype of the matrix products."""
SOFTMAX_BLOCK_BYTES = 4 * 2**20
"""Part of them that is in fp32 at once on the CPU, so that it stays in the processor's cache."""


def linear_cross_entropy(
    hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, has_ignored: bool = False
) -> Tensor:
    """Mean cross-entropy of `hidden @ head.T` in nats, an fp32 scalar, never holding all logits.

    With `has_ignored`, negative targets add nothing to the sum; the mean is over all N still.

    Multiplies in the dtype of autocast where that is on, softmax in fp32; fp64 stays fp64. Torch
    2.13 has a function of this name: under autocast it multiplies in fp32, and given bf16 it
    returns a bf16 loss.

    Raises:
        ValueError: no targets.
    """
    if not len(targets_N):
        raise ValueError("the loss needs at least one target, got none")
    loss: Tensor = LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_ND, head_VD, targets_N, torch.is_grad_enabled(), has_ignored
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
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        targets_N: Tensor,
        with_gradients: bool,
        has_ignored: bool,
    ) -> Tensor:
        """The mean loss; keeps the gradients of the sum."""
        ctx.n_tokens = len(targets_N)
        dtype = compute_dtype(hidden_ND)
        hidden_ND, head_VD = hidden_ND.to(dtype), head_VD.to(dtype)
        exact = torch.promote_types(dtype, torch.float32)
        loss_sum = torch.zeros((), device=hidden_ND.device, dtype=exact)
        d_hidden_ND = torch.empty_like(hidden_ND)
        d_head_VD: Tensor | None = None
        rows = max(1, LOGIT_BLOCK_BYTES // (head_VD.element_size() * len(head_VD)))
        for start in range(0, ctx.n_tokens, rows):
            block = slice(start, start + rows)
            logits_RV = hidden_ND[block] @ head_VD.T
            loss_sum += softmax_loss(logits_RV, targets_N[block], with_gradients, has_ignored)
            if with_gradients:
                torch.mm(logits_RV, head_VD, out=d_hidden_ND[block])
                added_VD = logits_RV.T @ hidden_ND[block]
                d_head_VD = added_VD.to(exact) if d_head_VD is None else d_head_VD.add_(added_VD)
        if d_head_VD is not None:
            ctx.save_for_backward(d_hidden_ND, d_head_VD)
        return loss_sum.div_(ctx.n_tokens)

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden states and head; scaled in place, so a second call raises."""
        d_hidden_ND, d_head_VD = ctx.saved_tensors
        scale = d_loss / ctx.n_tokens
        return d_hidden_ND.mul_(scale), d_head_VD.mul_(scale), None, None, None


def softmax_loss(
    logits_RV: Tensor, targets_R: Tensor, with_gradients: bool, has_ignored: bool = False
) -> Tensor:
    """Summed cross-entropy of logits, an fp32 scalar; they become their own gradient if wanted.

    The gradient is softmax - one-hot. With `has_ignored`, rows with a negative target give zero.
    """
    exact = torch.promote_types(logits_RV.dtype, torch.float32)
    loss_sum = torch.zeros((), device=logits_RV.device, dtype=exact)
    rows = len(logits_RV)
    if logits_RV.device.type == "cpu":
        rows = max(1, SOFTMAX_BLOCK_BYTES // (4 * logits_RV.shape[1]))
    for block_RV, target_R in zip(
        torch.split(logits_RV, rows), torch.split(targets_R, rows), strict=True
    ):
        target_R1 = target_R[:, None].clamp(min=0) if has_ignored else target_R[:, None]
        log_share_RV = block_RV.log_softmax(dim=-1, dtype=exact)
        log_share_R1 = log_share_RV.gather(1, target_R1)
        if has_ignored:
            log_share_R1 = log_share_R1.masked_fill(target_R[:, None] < 0, 0.0)
        loss_sum -= log_share_R1.sum()
        if with_gradients:
            share_RV = log_share_RV.exp_()
            share_RV.scatter_add_(1, target_R1, share_RV.new_full(target_R1.shape, -1.0))
            if has_ignored:
                share_RV.masked_fill_(target_R[:, None] < 0, 0.0)
            block_RV.copy_(share_RV)
    return loss_sum


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast gives matrix products on the tensor's device, else its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
