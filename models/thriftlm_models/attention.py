"""Causal attention kernels by name, each pinned to one implementation of torch's SDPA.

Shapes are suffixes: B batch, T tokens, H query heads, K key and value heads, D width of a head.
"""
# ruff: noqa: N803 (shape suffixes are upper case)

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]

BACKENDS: dict[str, SDPBackend] = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
}
"""SDPA backend behind each name."""

SWITCHES: dict[SDPBackend, Callable[[], bool]] = {
    SDPBackend.MATH: cuda.math_sdp_enabled,
    SDPBackend.FLASH_ATTENTION: cuda.flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: cuda.mem_efficient_sdp_enabled,
    SDPBackend.CUDNN_ATTENTION: cuda.cudnn_sdp_enabled,
}
"""Whether SDPA may choose a backend, on any device in spite of the module's name."""


def pinned(name: str) -> AbstractContextManager[object]:
    """Context in which SDPA runs the named kernel or raises.

    Entering costs 20 microseconds, a second entry inside the first 2: the decoder enters once per
    forward pass. The kernels enter too, so that what runs outside of a forward pass (recomputation
    in backward, for one) is pinned as well.
    """
    enabled = [backend for backend, is_enabled in SWITCHES.items() if is_enabled()]
    return nullcontext() if enabled == [BACKENDS[name]] else sdpa_kernel([BACKENDS[name]])


def math_attention(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> Tensor:
    """Attention output (B, H, T, D) by plain matrix products; holds all T x T scores."""
    with pinned("math"):
        return causal_sdpa(q_BHTD, k_BKTD, v_BKTD)


def flash_attention(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> Tensor:
    """Attention output (B, H, T, D) by FlashAttention-2; on CPU by torch's own flash kernel."""
    with pinned("flash"):
        return causal_sdpa(q_BHTD, k_BKTD, v_BKTD)


def causal_sdpa(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> Tensor:
    """Attention output (B, H, T, D), causal, scaled by 1/sqrt(D); query heads share key heads."""
    # math and flash take fewer key heads themselves, on CPU and on CUDA.
    return F.scaled_dot_product_attention(q_BHTD, k_BKTD, v_BKTD, is_causal=True, enable_gqa=True)


KERNELS: dict[str, Kernel] = {"math": math_attention, "flash": flash_attention}
"""Attention kernels by name."""


def kernel(name: str) -> Kernel:
    """The kernel of that name.

    Raises:
        ValueError: no such kernel; names those there are.
    """
    if name not in KERNELS:
        raise ValueError(f"unknown attention kernel '{name}'; known: {', '.join(KERNELS)}")
    return KERNELS[name]


def check_kernel(name: str, device_type: str, dtype: torch.dtype, head_dim: int = 64) -> None:
    """Nothing, once the kernel ran forward and backward on two tokens of that device and dtype.

    `dtype` is what attention computes in: bfloat16 under bf16 autocast.

    Raises:
        ValueError: it cannot run there; says why, and which kernels can.
    """
    run = kernel(name)
    reason = why_not(run, device_type, dtype, head_dim)
    if reason is None:
        return
    can = ", ".join(available_kernels(device_type, dtype, head_dim)) or "none"
    raise ValueError(
        f"attention kernel {name} cannot run on {device_type} in {dtype} with head_dim {head_dim}: "
        f"{reason}; what can run there: {can}"
    )


def available_kernels(device_type: str, dtype: torch.dtype, head_dim: int = 64) -> tuple[str, ...]:
    """Names of the kernels that run on that device in that dtype, found by running each once."""
    return tuple(
        name for name, run in KERNELS.items() if why_not(run, device_type, dtype, head_dim) is None
    )


def why_not(run: Kernel, device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """First line of the error that the kernel gives there, None if it runs."""
    try:
        q, k, v = (
            torch.zeros(1, heads, 2, head_dim, device=device_type, dtype=dtype, requires_grad=True)
            for heads in (2, 1, 1)
        )
        torch.autograd.backward(run(q, k, v).sum())
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        # AssertionError is what torch raises for a device that it was not built for.
        return str(error).partition("\n")[0]
    return None
