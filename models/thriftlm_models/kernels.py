"""Which attention kernel can run where, as published by its makers. No torch, no device needed.

So a search over rented GPUs refuses an impossible pair on a laptop. `attention.check_kernel` adds
what only the machine itself can say, by running the kernel there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from thriftlm_models.config import ModelSpec


@dataclass(frozen=True)
class Target:
    """Where attention would run, and in which arithmetic."""

    device: Literal["cpu", "cuda"]
    """Kind of device."""
    compute_capability: float | None
    """CUDA compute capability, 8.0 for an A100; None on the CPU, and where it is not known."""
    in_bf16: bool
    """Whether attention computes in bf16: under amp_bf16 it does."""


@dataclass(frozen=True)
class Requirement:
    """What a kernel needs."""

    on_cpu: bool = False
    """Whether it has a CPU implementation."""
    oldest: float = 0.0
    """Lowest compute capability."""
    newest: float = float("inf")
    """Highest compute capability."""
    bf16_from: float = 0.0
    """Lowest compute capability on which it computes in bf16."""
    fp32_on_cuda: bool = False
    """Whether it computes in fp32 there."""
    min_head_dim: int = 1
    """Narrowest head."""
    max_head_dim: int | None = None
    """Widest head."""
    windowed_head_multiple: int | None = 1
    """What the width of heads must be a multiple of with sliding windows or a document mask; None
    is no windows."""
    document_mask: bool = True
    """Whether its attention can stay inside documents, by a mask or by their lengths."""
    package: str | None = None
    """What must be installed beside torch."""


REQUIREMENTS: dict[str, Requirement] = {
    "math": Requirement(on_cpu=True, fp32_on_cuda=True),
    # SDPA's kernels, torch 2.13: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp. Flash pads
    # heads to a multiple of 8, but not in `varlen_attn`, through which windows and documents go.
    "flash": Requirement(on_cpu=True, oldest=8.0, max_head_dim=256, windowed_head_multiple=8),
    "efficient": Requirement(oldest=5.0, bf16_from=8.0, fp32_on_cuda=True),
    "cudnn": Requirement(
        oldest=8.0, max_head_dim=128, windowed_head_multiple=None, document_mask=False
    ),
    # Triton: inductor compiles no bf16 below 8.0, and flex takes no head below 16.
    "flex": Requirement(oldest=7.0, bf16_from=8.0, fp32_on_cuda=True, min_head_dim=16),
    "fa2": Requirement(oldest=8.0, max_head_dim=256, package="flash-attn"),
    # torch/nn/attention/_fa3.py and _fa4.py, torch 2.13: majors 9, and 9 or 10.
    "fa3": Requirement(
        oldest=9.0, newest=9.0, max_head_dim=256, windowed_head_multiple=8, package="flash-attn-3"
    ),
    "fa4": Requirement(
        oldest=9.0, newest=10.3, max_head_dim=128, windowed_head_multiple=8, package="flash-attn-4"
    ),
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


def why_not(
    name: str, target: Target, head_dim: int, windowed: bool, document_mask: bool = False
) -> str | None:
    """Why the kernel cannot run on the target by what its makers say; None where it can."""
    needs = requirement(name)
    if target.device == "cpu":
        return None if needs.on_cpu else "it runs on CUDA alone"
    return _why_not_device(needs, target) or _why_not_heads(
        needs, head_dim, windowed, document_mask
    )


def _why_not_device(needs: Requirement, target: Target) -> str | None:
    capability = target.compute_capability
    if capability is None:
        return "the GPU's compute capability is not known"
    if not needs.oldest <= capability <= needs.newest:
        most = f" to {needs.newest:.1f}" if needs.newest < float("inf") else " or higher"
        return f"it needs compute capability {needs.oldest:.1f}{most}, this is {capability:.1f}"
    if not target.in_bf16 and not needs.fp32_on_cuda:
        return "it computes in bf16 alone there: set precision to amp_bf16"
    if target.in_bf16 and capability < needs.bf16_from:
        return (
            f"it computes in bf16 from compute capability {needs.bf16_from:.1f} on, this is "
            f"{capability:.1f}: set precision to fp32"
        )
    return None


def _why_not_heads(
    needs: Requirement, head_dim: int, windowed: bool, document_mask: bool
) -> str | None:
    if head_dim < needs.min_head_dim:
        return f"it takes heads of at least {needs.min_head_dim}, head_dim is {head_dim}"
    if needs.max_head_dim is not None and head_dim > needs.max_head_dim:
        return f"it takes heads of at most {needs.max_head_dim}, head_dim is {head_dim}"
    if windowed and needs.windowed_head_multiple is None:
        return "it has no sliding windows"
    if document_mask and not needs.document_mask:
        return "it cannot keep attention inside documents: set data.document_mask to false"
    if (windowed or document_mask) and head_dim % (needs.windowed_head_multiple or 1):
        what = "sliding windows" if windowed else "a document mask"
        return (
            f"with {what} head_dim must be a multiple of {needs.windowed_head_multiple}, it is "
            f"{head_dim}"
        )
    return None


def check(
    name: str, model: ModelSpec, where: str, target: Target, document_mask: bool = False
) -> None:
    """Nothing, where the kernel can run the model's attention by what its makers say.

    Raises:
        ValueError: unknown kernel, or it cannot; says why, and which kernels can.
    """
    windowed = "sliding" in model.block_attention
    refuse_unless_runs(
        name,
        model,
        where,
        lambda other: why_not(other, target, model.head_dim, windowed, document_mask),
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
        f"attention kernel {name} cannot run {where}: {reason}; what can run there: {can}"
    )
