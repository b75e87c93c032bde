"""Rotary positions (arXiv 2104.09864).

Shapes are suffixes: B batch, T tokens, H heads, C width of a head.
"""
# ruff: noqa: N803, N806 (shape suffixes are upper case)

import math

import torch
from torch import Tensor

from thriftlm_models.config import RopeScaling


class Rotation:
    """Rotary position angles of T tokens from `start` on: `cos` and `sin`, (T, 1, C/2), fp32.

    A plain object on purpose: FSDP2 under a mixed-precision policy casts every tensor that it sees
    among a block's inputs to bf16, which rounds positions away. Made anew in each forward pass, it
    is in no state_dict and needs no care with the meta device.
    """

    def __init__(
        self,
        start: int,
        seq_len: int,
        head_dim: int,
        base: float,
        device: torch.device,
        scaling: RopeScaling | None = None,
    ) -> None:
        exponent_C = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
        frequency_C = base**-exponent_C
        if scaling is not None:
            frequency_C = scaled(frequency_C, scaling)
        position_T = torch.arange(start, start + seq_len, device=device, dtype=torch.float32)
        angle_TC = position_T[:, None] * frequency_C
        self.cos, self.sin = angle_TC.cos()[:, None], angle_TC.sin()[:, None]

    def __call__(self, x_BTHC: Tensor) -> Tensor:
        """Heads rotated by their position, in fp32 at least, in the dtype that came in."""
        promoted = torch.promote_types(x_BTHC.dtype, torch.float32)
        # Halves, not neighbouring pairs: the layout of Hugging Face checkpoints.
        first, second = x_BTHC.to(promoted).chunk(2, dim=-1)
        turned = (first * self.cos - second * self.sin, second * self.cos + first * self.sin)
        return torch.cat(turned, dim=-1).to(x_BTHC.dtype)


def scaled(frequency_C: Tensor, scaling: RopeScaling) -> Tensor:
    """Frequencies for a context `factor` times as long.

    `linear` is position interpolation (arXiv 2306.15595). `llama3` (Llama 3.1, as in its
    `apply_scaling`): wavelengths longer than `original_context / low_freq_factor` are interpolated,
    those shorter than `original_context / high_freq_factor` left, and mixed linearly in between.
    """
    slow_C = frequency_C / scaling.factor
    if scaling.kind == "linear":
        return slow_C
    turns_C = scaling.original_context * frequency_C / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept_C = ((turns_C - low) / (high - low)).clamp(0, 1)
    return kept_C * frequency_C + (1 - kept_C) * slow_C
