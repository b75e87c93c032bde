"""Causal attention kernels by name, each pinned to one implementation: it runs or it raises.

Shapes are suffixes: B batch, T tokens, H query heads, K key and value heads, N = B x T,
C width of a head.
"""
# ruff: noqa: N803, N806 (shape suffixes are upper case)

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends import cuda
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    current_flash_attention_impl,
    restore_flash_attention_impl,
    sdpa_kernel,
)
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn

from thriftlm_models import kernels
from thriftlm_models.config import ModelSpec
from thriftlm_models.documents import Documents
from thriftlm_models.kernels import Target


class Kernel(Protocol):
    """Causal attention; `window` is how many tokens a query sees, its own included.

    With `documents`, prepared for the kernel by `documents_for`, it sees its own document alone.
    """

    def __call__(
        self,
        q_BHTC: Tensor,
        k_BKTC: Tensor,
        v_BKTC: Tensor,
        window: int | None,
        scale: float,
        documents: Documents | None = None,
    ) -> Tensor:
        """Attention output (B, H, T, C); scores are multiplied by `scale`."""


BACKENDS: dict[str, SDPBackend] = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "fa3": SDPBackend.FLASH_ATTENTION,
    "fa4": SDPBackend.FLASH_ATTENTION,
}
"""SDPA backend behind each name; `flex` and `fa2` are no part of SDPA."""

FLASH_IMPLEMENTATIONS: dict[str, str | None] = {"flash": None, "fa3": "FA3", "fa4": "FA4"}
"""What torch's registry must have active for SDPA's flash backend; None is its own FA2."""

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
    in backward, for one) is pinned as well. The flash implementation stays active afterwards,
    because backward needs it. Within torch.compile nothing is entered: the choice is made while the
    graph is traced, inside of the decoder's context, and switches are nothing that a graph holds.
    """
    if name not in BACKENDS or torch.compiler.is_compiling():
        return nullcontext()
    if name in FLASH_IMPLEMENTATIONS:
        _activate(FLASH_IMPLEMENTATIONS[name])
    enabled = [backend for backend, is_enabled in SWITCHES.items() if is_enabled()]
    return nullcontext() if enabled == [BACKENDS[name]] else sdpa_kernel([BACKENDS[name]])


def _activate(implementation: str | None) -> None:
    if current_flash_attention_impl() == implementation:
        return
    if implementation is None:
        restore_flash_attention_impl()
    else:
        activate_flash_attention_impl(implementation)


def math_attention(
    q_BHTC: Tensor,
    k_BKTC: Tensor,
    v_BKTC: Tensor,
    window: int | None,
    scale: float,
    documents: Documents | None = None,
) -> Tensor:
    """Plain matrix products; holds all T x T scores."""
    with pinned("math"):
        return _sdpa(q_BHTC, k_BKTC, v_BKTC, window, scale, documents)


def flash_attention(
    q_BHTC: Tensor,
    k_BKTC: Tensor,
    v_BKTC: Tensor,
    window: int | None,
    scale: float,
    documents: Documents | None = None,
) -> Tensor:
    """FlashAttention-2; on CPU torch's own flash kernel."""
    return _flash("flash", q_BHTC, k_BKTC, v_BKTC, window, scale, documents)


def fa3_attention(
    q_BHTC: Tensor,
    k_BKTC: Tensor,
    v_BKTC: Tensor,
    window: int | None,
    scale: float,
    documents: Documents | None = None,
) -> Tensor:
    """FlashAttention-3, through torch's registry."""
    return _flash("fa3", q_BHTC, k_BKTC, v_BKTC, window, scale, documents)


def fa4_attention(
    q_BHTC: Tensor,
    k_BKTC: Tensor,
    v_BKTC: Tensor,
    window: int | None,
    scale: float,
    documents: Documents | None = None,
) -> Tensor:
    """FlashAttention-4, through torch's registry."""
    return _flash("fa4", q_BHTC, k_BKTC, v_BKTC, window, scale, documents)


def efficient_attention(
    q_BHTC: Tensor,
    k_BKTC: Tensor,
    v_BKTC: Tensor,
    window: int | None,
    scale: float,
    documents: Documents | None = None,
) -> Tensor:
    """The memory-efficient kernel of xFormers inside SDPA; it takes no fewer key heads itself."""
    group = q_BHTC.shape[1] // k_BKTC.shape[1]
    k_BHTC, v_BHTC = (x.repeat_interleave(group, dim=1) for x in (k_BKTC, v_BKTC))
    with pinned("efficient"):
        return _sdpa(q_BHTC, k_BHTC, v_BHTC, window, scale, documents)


def cudnn_attention(
    q_BHTC: Tensor,
    k_BKTC: Tensor,
    v_BKTC: Tensor,
    window: int | None,
    scale: float,
    documents: Documents | None = None,
) -> Tensor:
    """NVIDIA's cuDNN kernel inside SDPA."""
    with pinned("cudnn"):
        return _sdpa(q_BHTC, k_BKTC, v_BKTC, window, scale, documents)


def flex_kernel(
    q_BHTC: Tensor,
    k_BKTC: Tensor,
    v_BKTC: Tensor,
    window: int | None,
    scale: float,
    documents: Documents | None = None,
) -> Tensor:
    """FlexAttention, compiled; it has no backward pass on CPU."""
    if documents is None:
        mask = _block_mask(q_BHTC.shape[2], window, str(q_BHTC.device))
    else:
        mask = documents.blocks[window]
    run = _compiled_flex()
    return run(q_BHTC, k_BKTC, v_BKTC, block_mask=mask, scale=scale, enable_gqa=True)


def fa2_attention(
    q_BHTC: Tensor,
    k_BKTC: Tensor,
    v_BKTC: Tensor,
    window: int | None,
    scale: float,
    documents: Documents | None = None,
) -> Tensor:
    """FlashAttention-2 of the package flash-attn."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    if documents is not None:
        seq_len, starts = q_BHTC.shape[2], documents.starts
        attended_NHC: Tensor = flash_attn_varlen_func(
            *(_end_to_end(x) for x in (q_BHTC, k_BKTC, v_BKTC)),
            cu_seqlens_q=starts,
            cu_seqlens_k=starts,
            max_seqlen_q=seq_len,
            max_seqlen_k=seq_len,
            softmax_scale=scale,
            causal=True,
            window_size=_left_right(window),
        )
        return _in_rows(attended_NHC, q_BHTC)
    q_BTHC, k_BTKC, v_BTKC = (x.transpose(1, 2) for x in (q_BHTC, k_BKTC, v_BKTC))
    attended_BTHC: Tensor = flash_attn_func(
        q_BTHC, k_BTKC, v_BTKC, softmax_scale=scale, causal=True, window_size=_left_right(window)
    )
    return attended_BTHC.transpose(1, 2)


KERNELS: dict[str, Kernel] = {
    "math": math_attention,
    "flash": flash_attention,
    "efficient": efficient_attention,
    "cudnn": cudnn_attention,
    "flex": flex_kernel,
    "fa2": fa2_attention,
    "fa3": fa3_attention,
    "fa4": fa4_attention,
}
"""Attention kernels by name; what each needs is in `kernels.REQUIREMENTS`."""


def _sdpa(
    q_BHTC: Tensor,
    k_BKTC: Tensor,
    v_BKTC: Tensor,
    window: int | None,
    scale: float,
    documents: Documents | None = None,
) -> Tensor:
    # math, flash and cuDNN take fewer key heads themselves, on CPU and on CUDA.
    seq_len = q_BHTC.shape[2]
    mask = None if documents is None else documents.masks[window]
    if documents is None and window is not None and window < seq_len:
        mask = q_BHTC.new_ones(seq_len, seq_len, dtype=torch.bool).tril().triu(1 - window)
    return F.scaled_dot_product_attention(
        q_BHTC,
        k_BKTC,
        v_BKTC,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=True,
    )


def _flash(
    name: str,
    q_BHTC: Tensor,
    k_BKTC: Tensor,
    v_BKTC: Tensor,
    window: int | None,
    scale: float,
    documents: Documents | None,
) -> Tensor:
    with pinned(name):
        if not q_BHTC.is_cuda or (window is None and documents is None):
            return _sdpa(q_BHTC, k_BKTC, v_BKTC, window, scale, documents)
        # On CUDA flash takes no mask, and SDPA passes no window on; this entry to it does.
        batch, _, seq_len, _ = q_BHTC.shape
        starts = None if documents is None else documents.starts
        if starts is None:
            starts = torch.arange(batch + 1, device=q_BHTC.device, dtype=torch.int32) * seq_len
        q_NHC, k_NKC, v_NKC = (_end_to_end(x) for x in (q_BHTC, k_BKTC, v_BKTC))
        attended_NHC = cast(
            Tensor,
            varlen_attn(
                q_NHC,
                k_NKC,
                v_NKC,
                starts,
                starts,
                seq_len,
                seq_len,
                scale=scale,
                window_size=_left_right(window),
                enable_gqa=True,
            ),
        )
        return _in_rows(attended_NHC, q_BHTC)


def _end_to_end(x_BHTC: Tensor) -> Tensor:
    """The tokens of all sequences in a row, (N, H, C)."""
    return x_BHTC.transpose(1, 2).flatten(0, 1)


def _in_rows(attended_NHC: Tensor, q_BHTC: Tensor) -> Tensor:
    """What `_end_to_end` laid out, (B, H, T, C) again."""
    batch, heads, seq_len, head_dim = q_BHTC.shape
    return attended_NHC.view(batch, seq_len, heads, head_dim).transpose(1, 2)


def _left_right(window: int | None) -> tuple[int, int]:
    """The window as flash attention has it: tokens before and after a query; -1 is all."""
    return (-1, 0) if window is None else (window - 1, 0)


@lru_cache(maxsize=32)
def _block_mask(seq_len: int, window: int | None, device: str) -> BlockMask:
    span = seq_len if window is None else window

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < span)

    return create_block_mask(sees, None, None, seq_len, seq_len, device=device)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


def documents_for(
    name: str, tokens_BT: Tensor, end_id: int, windows: Iterable[int | None]
) -> Documents:
    """The documents of a batch as the kernel takes them, for blocks with these windows."""
    found = Documents(tokens_BT, end_id)
    if name == "flex":
        found.add_blocks(windows)
    elif name == "fa2" or (name in FLASH_IMPLEMENTATIONS and tokens_BT.is_cuda):
        found.add_starts()
    else:
        found.add_masks(windows)
    return found


def kernel(name: str) -> Kernel:
    """The kernel of that name.

    Raises:
        ValueError: no such kernel; names those there are.
    """
    kernels.requirement(name)
    return KERNELS[name]


def check_kernel(
    name: str, device_type: str, dtype: torch.dtype, model: ModelSpec, document_mask: bool = False
) -> None:
    """Nothing, once the kernel ran forward and backward on two tokens of that device and dtype.

    `dtype` is what attention computes in: bfloat16 under bf16 autocast.

    Raises:
        ValueError: it cannot run there; says why, and which kernels can.
    """
    windowed = "sliding" in model.block_attention
    kernels.refuse_unless_runs(
        name,
        model,
        f"on {device_type} in {dtype}",
        lambda other: why_not(other, device_type, dtype, model.head_dim, windowed, document_mask),
    )


def available_kernels(
    device_type: str,
    dtype: torch.dtype,
    head_dim: int = 64,
    windowed: bool = False,
    document_mask: bool = False,
) -> tuple[str, ...]:
    """Names of the kernels that run on that device in that dtype, found by running each once."""
    return tuple(
        name
        for name in KERNELS
        if why_not(name, device_type, dtype, head_dim, windowed, document_mask) is None
    )


def why_not(
    name: str,
    device_type: str,
    dtype: torch.dtype,
    head_dim: int,
    windowed: bool,
    document_mask: bool = False,
) -> str | None:
    """Why the kernel does not run there, None if it does: by its requirements, then by running."""
    window = 1 if windowed else None
    try:
        target = _target(device_type, dtype)
        reason = kernels.why_not(name, target, head_dim, windowed, document_mask)
        if reason is not None:
            return reason
        q, k, v = (
            torch.zeros(1, heads, 2, head_dim, device=device_type, dtype=dtype, requires_grad=True)
            for heads in (2, 1, 1)
        )
        documents = None
        if document_mask:
            tokens = torch.zeros(1, 2, device=device_type, dtype=torch.int64)
            documents = documents_for(name, tokens, 0, [window])
        attended = KERNELS[name](q, k, v, window, head_dim**-0.5, documents)
        torch.autograd.backward(attended.sum())
    except ModuleNotFoundError as error:
        return f"install {kernels.requirement(name).package} first ({error})"
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        # AssertionError is what torch raises for a device that it was not built for.
        return str(error).partition("\n")[0]
    return None


def _target(device_type: str, dtype: torch.dtype) -> Target:
    in_bf16 = dtype == torch.bfloat16
    if device_type != "cuda":
        return Target("cpu", None, in_bf16)
    major, minor = torch.cuda.get_device_capability()
    return Target("cuda", major + minor / 10, in_bf16)
