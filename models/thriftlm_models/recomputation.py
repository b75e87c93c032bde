"""Activation checkpointing: what a block keeps for its backward pass, and what it runs again."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.attention.varlen  # registers an operator that is named below
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

# It warns of operations in place within a checkpointed region; a block has none.
logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)

Forward = Callable[..., Tensor]

PRODUCTS = frozenset({torch.ops.aten.mm.default, torch.ops.aten.addmm.default})
"""Matrix products of linear layers; selective checkpointing keeps every second one."""
ATTENTION = frozenset(
    {
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.torch_attn._varlen_attn.default,
    }
)
"""Attention, which costs more to run again than its output costs to keep; always kept."""


def with_recomputation(forward: Forward, act_ckpt: str) -> Forward:
    """The forward function of a block with activation checkpointing.

    `none` keeps all that backward needs. `full` keeps the block's input and runs the block again.
    `selective` keeps attention and every second matrix product and runs the rest again
    (torchtitan's per-operation policy, torchtitan/distributed/activation_checkpoint.py). The
    losses are the same: what runs again gives the same values, since nothing in a block is random.

    Raises:
        ValueError: no such way.
    """
    match act_ckpt:
        case "none":
            return forward
        case "full":
            return partial(_checkpointed, forward, {})
        case "selective":
            return partial(_checkpointed, forward, {"context_fn": _contexts})
    raise ValueError(f"act_ckpt must be none, selective or full, got '{act_ckpt}'")


def _checkpointed(forward: Forward, options: dict[str, Any], *inputs: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(*inputs)
    result: Tensor = checkpoint(
        forward, *inputs, use_reentrant=False, preserve_rng_state=False, **options
    )
    return result


def _contexts() -> Any:
    seen = {False: 0, True: 0}  # products in the forward pass and in the one that runs again

    def policy(context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        if op in PRODUCTS:
            seen[context.is_recompute] += 1
            keep = seen[context.is_recompute] % 2 == 1
        else:
            keep = op in ATTENTION
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call]
