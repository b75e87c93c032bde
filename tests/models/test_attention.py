"""Every kernel against attention written out in fp64, and the check before step 1."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from thriftlm_models.attention import (
    KERNELS,
    SWITCHES,
    available_kernels,
    check_kernel,
    kernel,
    pinned,
)

BATCH, TOKENS, HEAD_DIM = 2, 37, 24


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention with each query head looking at key head h // group."""
    group = q.shape[1] // k.shape[1]
    outputs = []
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // group].mT / math.sqrt(q.shape[-1])
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        outputs.append(weights @ v[:, head // group])
    return torch.stack(outputs, dim=1)


def inputs(heads: int, kv_heads: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(heads)
    shapes = [(BATCH, n, TOKENS, HEAD_DIM) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def with_gradients(attend: object, given: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in given]
    output = attend(*leaves)  # type: ignore[operator]
    slope = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape)
    output.backward(slope.to(output.dtype))
    return [output.detach()] + [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"]
)
class TestConformance:
    def test_output_and_gradients(
        self, name: str, heads: int, kv_heads: int, dtype: torch.dtype, tolerance: float
    ) -> None:
        given = inputs(heads, kv_heads, dtype)
        expected = with_gradients(reference, [tensor.double() for tensor in given])
        measured = with_gradients(kernel(name), given)
        for want, got in zip(expected, measured, strict=True):
            assert got.dtype == dtype
            assert (got.double() - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("name", KERNELS)
def test_strided_heads_give_what_contiguous_ones_give(name: str) -> None:
    q, k, v = inputs(4, 2, torch.float32)
    strided = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (q, k, v)]
    assert torch.equal(kernel(name)(*strided), kernel(name)(q, k, v))


@pytest.mark.parametrize("outer", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_the_name_decides_what_runs_whatever_is_enabled_outside(outer: SDPBackend) -> None:
    q, k, v = (tensor.requires_grad_() for tensor in inputs(4, 2, torch.float32))
    with sdpa_kernel([outer]):
        flash, plain = kernel("flash")(q, k, v), kernel("math")(q, k, v)
    assert "Flash" in flash.grad_fn.name()  # type: ignore[union-attr]
    assert "Flash" not in plain.grad_fn.name()  # type: ignore[union-attr]


def test_pinning_ends_with_the_context_and_nests() -> None:
    def enabled() -> list[bool]:
        return [is_enabled() for is_enabled in SWITCHES.values()]

    before = enabled()
    with pinned("flash"):
        inside = enabled()
        with pinned("flash"):
            assert enabled() == inside
        with pinned("math"):
            assert enabled() != inside
        assert enabled() == inside
    assert sum(inside) == 1
    assert enabled() == before


def test_this_cpu_runs_both_kernels() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert available_kernels("cpu", dtype) == ("math", "flash")
        check_kernel("flash", "cpu", dtype)


def test_what_cannot_run_is_refused_before_step_1_with_what_can() -> None:
    assert available_kernels("cpu", torch.int64) == ()
    with pytest.raises(ValueError, match=r"flash cannot run on cpu .*int64.*can run there: none"):
        check_kernel("flash", "cpu", torch.int64)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_device_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"flash cannot run on cuda .*CUDA.*can run there: none"):
        check_kernel("flash", "cuda", torch.bfloat16)


@pytest.mark.gpu
def test_flash_on_cuda_needs_half_precision() -> None:
    assert available_kernels("cuda", torch.bfloat16) == ("math", "flash")
    with pytest.raises(ValueError, match="what can run there: math"):
        check_kernel("flash", "cuda", torch.float32)


def test_an_unknown_kernel_names_the_known() -> None:
    with pytest.raises(ValueError, match="unknown attention kernel 'fast'; known: math, flash"):
        check_kernel("fast", "cpu", torch.float32)
