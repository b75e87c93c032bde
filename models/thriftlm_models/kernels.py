"""Which attention kernel can run where, as published by its makers. No torch, no device needed.

So a search over rented GPUs refuses an impossible pair on a laptop. `attention.check_kernel` adds
what only the machine itself can say, by running the kernel there.
"""

from collections.abc import Callable
from dataclasses import dataclass

from thriftlm_models.config import ModelSpec


@dataclass(frozen=True)
class Target:
    """Where attention would run, and in which arithmetic."""

    compute_capability: float | None
    """CUDA compute capability, 8.0 for an A100; None is the CPU."""
    half_precision: bool
    """Whether attention computes in bf16 or fp16: under amp_bf16 it does."""


@dataclass(frozen=True)
class Requirement:
    """What a kernel needs."""

    on_cpu: bool = False
    """Whether it has a CPU implementation."""
    oldest: float = 0.0
    """Lowest compute capability."""
    newest: float = float("inf")
    """Highest compute capability."""
    half_precision_on_cuda: bool = True
    """Whether it takes bf16 and fp16 alone there."""
    max_head_dim: int | None = None
    """Widest head."""
    has_windows: bool = True
    """Whether sliding windows are driven through it."""
    package: str | None = None
    """What must be installed beside torch."""


REQUIREMENTS: dict[str, Requirement] = {
    "math": Requirement(on_cpu=True, half_precision_on_cuda=False),
    # SDPA's FlashAttention-2: Ampere and newer (torch, sdp_utils.cpp).
    "flash": Requirement(on_cpu=True, oldest=8.0, max_head_dim=256),
    "efficient": Requirement(oldest=5.0, half_precision_on_cuda=False),
    "cudnn": Requirement(oldest=8.0, max_head_dim=128, has_windows=False),
    "flex": Requirement(oldest=7.0, half_precision_on_cuda=False),
    "fa2": Requirement(oldest=8.0, max_head_dim=256, package="flash-attn"),
    # torch/nn/attention/_fa3.py and _fa4.py, torch 2.13: majors 9, and 9 or 10.
    "fa3": Requirement(oldest=9.0, newest=9.0, max_head_dim=256, package="flash-attn-3"),
    "fa4": Requirement(oldest=9.0, newest=10.3, max_head_dim=128, package="flash-attn-4"),
}
"""Attention kernels by name."""


def requirement(name: str) -> Requirement:
    """What the kernel of that name needs.

    Raises:
        ValueError: no such kernel; names those there are.
    """
    if name not in REQUIREMENTS:
        raise ValueError(f"unknown attention kernel '{name}'; known: {', '.join(REQUIREMENTS)}")
    return REQUIREMENTS[name]


def why_not(name: str, target: Target, head_dim: int, windowed: bool) -> str | None:
    """Why the kernel cannot run on the target by what its makers say; None where it can."""
    needs = requirement(name)
    capability = target.compute_capability
    if capability is None and not needs.on_cpu:
        return "it runs on CUDA alone"
    if capability is not None:
        if not needs.oldest <= capability <= needs.newest:
            most = f" to {needs.newest:.1f}" if needs.newest < float("inf") else " or higher"
            return f"it needs compute capability {needs.oldest:.1f}{most}, this is {capability:.1f}"
        if needs.half_precision_on_cuda and not target.half_precision:
            return "it computes in bf16 alone there: set precision to amp_bf16"
    if needs.max_head_dim is not None and head_dim > needs.max_head_dim and capability is not None:
        return f"it takes heads of at most {needs.max_head_dim}, head_dim is {head_dim}"
    if windowed and not needs.has_windows:
        return "it has no sliding windows"
    return None


def check(name: str, model: ModelSpec, where: str, target: Target) -> None:
    """Nothing, where the kernel can run the model's attention by what its makers say.

    Raises:
        ValueError: unknown kernel, or it cannot; says why, and which kernels can.
    """
    windowed = "sliding" in model.block_attention
    refuse_unless_runs(
        name, model, where, lambda other: why_not(other, target, model.head_dim, windowed)
    )


def refuse_unless_runs(
    name: str, model: ModelSpec, where: str, reason_against: Callable[[str], str | None]
) -> None:
    """Nothing, where there is no reason against a kernel; `where` is how a message says the place.

    Raises:
        ValueError: unknown kernel, or there is one; says it, and which kernels can run there.
    """
    requirement(name)
    if set(model.block_attention) == {"none"} or (reason := reason_against(name)) is None:
        return
    can = ", ".join(other for other in REQUIREMENTS if reason_against(other) is None) or "none"
    raise ValueError(
        f"attention kernel {name} cannot run {where} with head_dim {model.head_dim}: {reason}; "
        f"what can run there: {can}"
    )
