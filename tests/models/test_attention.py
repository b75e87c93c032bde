"""Every kernel against attention written out in fp64, and the check before step 1."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from thriftlm_models import kernels
from thriftlm_models.attention import (
    KERNELS,
    SWITCHES,
    _block_mask,
    available_kernels,
    check_kernel,
    kernel,
    pinned,
)
from thriftlm_models.config import ModelSpec
from thriftlm_models.kernels import REQUIREMENTS, Target, why_not

BATCH, TOKENS, HEAD_DIM = 2, 37, 24
SCALE = 0.3
ON_CPU = available_kernels("cpu", torch.float32, HEAD_DIM, windowed=True)
ON_CUDA = [name for name in KERNELS if name != "math"]


def model(**changed: object) -> ModelSpec:
    shape = {"n_layers": 2, "d_model": 128, "n_heads": 2, "vocab": 10}
    return ModelSpec.model_validate(shape | changed)


def reference(
    q: Tensor, k: Tensor, v: Tensor, window: int | None = None, scale: float = SCALE
) -> Tensor:
    """Causal attention with each query head looking at key head h // group."""
    group = q.shape[1] // k.shape[1]
    distance = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
    hidden = (distance < 0) | (distance >= (window or q.shape[2]))
    outputs = []
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // group].mT * scale
        weights = scores.masked_fill(hidden.to(scores.device), -math.inf).softmax(-1)
        outputs.append(weights @ v[:, head // group])
    return torch.stack(outputs, dim=1)


def inputs(heads: int, kv_heads: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(heads)
    shapes = [(BATCH, n, TOKENS, HEAD_DIM) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def with_gradients(attend: object, given: list[Tensor], window: int | None) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in given]
    output = attend(*leaves, window, SCALE)  # type: ignore[operator]
    slope = torch.linspace(-1, 1, output.numel(), dtype=torch.float64, device=output.device)
    output.backward(slope.view(output.shape).to(output.dtype))
    return [output.detach()] + [leaf.grad for leaf in leaves if leaf.grad is not None]


def conforms(
    name: str, given: list[Tensor], window: int | None, dtype: torch.dtype, tolerance: float
) -> None:
    expected = with_gradients(reference, [tensor.double() for tensor in given], window)
    measured = with_gradients(kernel(name), given, window)
    assert len(measured) == 4
    for want, got in zip(expected, measured, strict=True):
        assert got.dtype == dtype
        assert (got.double() - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("window", [None, 2, 8, 100])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
class TestConformance:
    """Every kernel that this machine can run, forward and backward."""

    @pytest.mark.parametrize("name", ON_CPU)
    @pytest.mark.parametrize(
        ("dtype", "tolerance"),
        [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)],
        ids=["fp32", "bf16"],
    )
    def test_on_cpu(
        self,
        name: str,
        heads: int,
        kv_heads: int,
        window: int | None,
        dtype: torch.dtype,
        tolerance: float,
    ) -> None:
        conforms(name, inputs(heads, kv_heads, dtype), window, dtype, tolerance)

    @pytest.mark.gpu
    @pytest.mark.parametrize("name", ON_CUDA)
    def test_on_cuda(self, name: str, heads: int, kv_heads: int, window: int | None) -> None:
        windowed = window is not None
        if name not in available_kernels("cuda", torch.bfloat16, HEAD_DIM, windowed):
            pytest.skip(f"{name} cannot run on this device")
        given = [tensor.cuda() for tensor in inputs(heads, kv_heads, torch.bfloat16)]
        conforms(name, given, window, torch.bfloat16, 3e-2)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 1, 8])
def test_the_mask_of_flex_is_the_one_of_the_reference(window: int | None) -> None:
    # Its backward pass needs CUDA; what is ours in it, the mask, can be seen in a forward pass.
    q, k, v = inputs(6, 2, torch.float32)
    mask = _block_mask(TOKENS, window, "cpu")
    got = flex_attention(q, k, v, block_mask=mask, scale=SCALE, enable_gqa=True)
    assert torch.allclose(got, reference(q, k, v, window), atol=1e-5)


@pytest.mark.parametrize("name", ON_CPU)
def test_strided_heads_give_what_contiguous_ones_give(name: str) -> None:
    q, k, v = inputs(4, 2, torch.float32)
    strided = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (q, k, v)]
    assert torch.equal(kernel(name)(*strided, None, SCALE), kernel(name)(q, k, v, None, SCALE))


@pytest.mark.parametrize("outer", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_the_name_decides_what_runs_whatever_is_enabled_outside(outer: SDPBackend) -> None:
    q, k, v = (tensor.requires_grad_() for tensor in inputs(4, 2, torch.float32))
    with sdpa_kernel([outer]):
        flash = kernel("flash")(q, k, v, None, SCALE)
        plain = kernel("math")(q, k, v, None, SCALE)
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


def test_this_cpu_runs_two_kernels() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert available_kernels("cpu", dtype) == ("math", "flash")
        check_kernel("flash", "cpu", dtype, model())


def test_what_cannot_run_is_refused_before_step_1_with_what_can() -> None:
    assert available_kernels("cpu", torch.int64) == ()
    with pytest.raises(ValueError, match=r"flash cannot run on cpu .*int64.*can run there: none"):
        check_kernel("flash", "cpu", torch.int64, model())
    for name in set(KERNELS) - {"math", "flash"}:
        with pytest.raises(ValueError, match=r"it runs on CUDA alone; .* there: math, flash$"):
            check_kernel(name, "cpu", torch.float32, model())


def test_a_model_without_attention_needs_no_kernel() -> None:
    check_kernel("fa3", "cpu", torch.float32, model(attention_pattern=["none"]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_device_is_refused_with_the_reason() -> None:
    # "not compiled with CUDA" by a CPU build of torch, "no NVIDIA driver" by the other.
    message = r"flash cannot run on cuda .*(CUDA|NVIDIA).*can run there: none"
    with pytest.raises(ValueError, match=message):
        check_kernel("flash", "cuda", torch.bfloat16, model())


@pytest.mark.gpu
def test_flash_on_cuda_needs_half_precision() -> None:
    assert {"math", "flash", "efficient", "flex"} <= set(available_kernels("cuda", torch.bfloat16))
    with pytest.raises(ValueError, match="set precision to amp_bf16; what can run there: math"):
        check_kernel("flash", "cuda", torch.float32, model())


def test_an_unknown_kernel_names_the_known() -> None:
    with pytest.raises(ValueError, match="unknown attention kernel 'fast'; known: math, flash"):
        check_kernel("fast", "cpu", torch.float32, model())


def test_every_kernel_says_what_it_needs() -> None:
    assert KERNELS.keys() == REQUIREMENTS.keys()


V100, T4, A100, L4, H100, B200 = (
    Target("cuda", capability, in_bf16=True) for capability in (7.0, 7.5, 8.0, 8.9, 9.0, 10.0)
)
CPU = Target("cpu", None, in_bf16=True)
H100_FP32, T4_FP32 = Target("cuda", 9.0, in_bf16=False), Target("cuda", 7.5, in_bf16=False)


@pytest.mark.parametrize(
    ("target", "runs"),
    [
        (CPU, "math flash"),
        (V100, "math"),
        (T4, "math"),
        (T4_FP32, "math efficient flex"),
        (A100, "math flash efficient cudnn flex fa2"),
        (L4, "math flash efficient cudnn flex fa2"),
        (H100, "math flash efficient cudnn flex fa2 fa3 fa4"),
        (H100_FP32, "math efficient flex"),
        (B200, "math flash efficient cudnn flex fa2 fa4"),
        (Target("cuda", None, in_bf16=True), ""),
    ],
)
def test_what_runs_on_a_gpu_is_known_without_it(target: Target, runs: str) -> None:
    found = [name for name in KERNELS if why_not(name, target, 64, windowed=False) is None]
    assert found == runs.split()


WINDOWED = {"attention_pattern": ["full", "sliding"], "window": 8}


@pytest.mark.parametrize(
    ("name", "target", "shape", "message"),
    [
        ("fa3", A100, {}, "needs compute capability 9.0 to 9.0, this is 8.0"),
        ("flash", T4, {}, "needs compute capability 8.0 or higher, this is 7.5"),
        ("efficient", T4, {}, "bf16 from compute capability 8.0 on, this is 7.5: set precision"),
        ("flash", H100_FP32, {}, "set precision to amp_bf16; .*: math, efficient, flex$"),
        ("fa4", H100, {"head_dim": 256}, "heads of at most 128, head_dim is 256"),
        ("flex", H100, {"head_dim": 8}, "heads of at least 16, head_dim is 8"),
        ("flash", H100, WINDOWED | {"head_dim": 20}, "must be a multiple of 8, it is 20"),
        ("cudnn", H100, WINDOWED, "it has no sliding windows; what can run there: math, flash,"),
    ],
)
def test_a_target_refuses_with_the_reason_and_what_it_can_run(
    name: str, target: Target, shape: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.check(name, model(**shape), "there", target)
