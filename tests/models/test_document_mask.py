"""Attention that stays inside documents, and padding that does not count."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from thriftlm_models import kernels
from thriftlm_models.attention import available_kernels, check_kernel, documents_for, kernel
from thriftlm_models.config import ModelSpec
from thriftlm_models.decoder import Decoder
from thriftlm_models.documents import IGNORED, Documents, Packing
from thriftlm_models.kernels import Target
from thriftlm_models.loss import linear_cross_entropy

END, SCALE, HEAD_DIM = 3, 0.3, 24
LENGTHS = ((5, 1, 9, 4), (19,), (1, 1, 2, 15), (18, 1))
"""Tokens of the documents of each sequence, end tokens included; the last of each has none."""
ON_CPU = available_kernels("cpu", torch.float32, HEAD_DIM, windowed=True, document_mask=True)
SHAPE = {
    "n_layers": 3, "d_model": 48, "n_heads": 6, "n_kv_heads": 2, "head_dim": 12,
    "d_ff": 80, "vocab": 131,
}  # fmt: skip
MODELS = {
    "rotary": {},
    "learned positions": {"positions": "learned", "max_positions": 32},
    "sliding windows": {"attention_pattern": ["sliding", "full"], "window": 4},
    "no positions": {"rope_pattern": [10_000, 0], "attention_pattern": ["full", "none"]},
    "shared": {"sharing": "reverse", "repeats": 3},
}  # fmt: skip


def tokens() -> Tensor:
    """Sequences of documents of random tokens."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for lengths in LENGTHS:
        row = torch.randint(4, 131, (sum(lengths),), generator=generator)
        row[torch.tensor(lengths).cumsum(0)[:-1] - 1] = END
        rows.append(row)
    return torch.stack(rows)


def spans() -> list[tuple[int, int, int]]:
    """Row, first token and end of every document."""
    found = []
    for row, lengths in enumerate(LENGTHS):
        ends = torch.tensor(lengths).cumsum(0).tolist()
        found += [(row, end - n, end) for n, end in zip(lengths, ends, strict=True)]
    return found


def heads(n_heads: int, n_kv_heads: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n_heads)
    shapes = [(len(LENGTHS), n, 19, HEAD_DIM) for n in (n_heads, n_kv_heads, n_kv_heads)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def one_by_one(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Each document by itself, written out."""
    output, group = torch.zeros_like(q), q.shape[1] // k.shape[1]
    for row, begin, end in spans():
        own = slice(begin, end)
        distance = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
        hidden = ((distance < 0) | (distance >= (window or 99))).to(q.device)
        for head in range(q.shape[1]):
            scores = q[row, head, own] @ k[row, head // group, own].mT * SCALE
            weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
            output[row, head, own] = weights @ v[row, head // group, own]
    return output


def with_gradients(attend: object, given: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in given]
    output = attend(*leaves)  # type: ignore[operator]
    slope = torch.linspace(-1, 1, output.numel(), dtype=torch.float64, device=output.device)
    output.backward(slope.view(output.shape).to(output.dtype))
    return [output.detach()] + [leaf.grad for leaf in leaves if leaf.grad is not None]


def conforms(name: str, given: list[Tensor], window: int | None, tolerance: float) -> None:
    documents = documents_for(name, tokens().to(given[0].device), END, [window])
    expected = with_gradients(
        lambda q, k, v: one_by_one(q, k, v, window), [tensor.double() for tensor in given]
    )
    measured = with_gradients(
        lambda q, k, v: kernel(name)(q, k, v, window, SCALE, documents), given
    )
    assert len(measured) == 4
    for want, got in zip(expected, measured, strict=True):
        assert (got.double() - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("window", [None, 2, 8, 100])
@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(4, 4), (6, 2), (4, 1)])
class TestConformance:
    """Every kernel against each document by itself, forward and backward."""

    @pytest.mark.parametrize("name", ON_CPU)
    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)]
    )
    def test_on_cpu(
        self,
        name: str,
        n_heads: int,
        n_kv_heads: int,
        window: int | None,
        dtype: torch.dtype,
        tolerance: float,
    ) -> None:
        conforms(name, heads(n_heads, n_kv_heads, dtype), window, tolerance)

    @pytest.mark.gpu
    @pytest.mark.parametrize("name", [name for name in kernels.REQUIREMENTS if name != "cudnn"])
    def test_on_cuda(self, name: str, n_heads: int, n_kv_heads: int, window: int | None) -> None:
        windowed = window is not None
        if name not in available_kernels("cuda", torch.bfloat16, HEAD_DIM, windowed, True):
            pytest.skip(f"{name} cannot run on this device")
        given = [tensor.cuda() for tensor in heads(n_heads, n_kv_heads, torch.bfloat16)]
        conforms(name, given, window, 3e-2)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 1, 8])
def test_the_block_mask_of_flex_is_the_one_of_the_documents(window: int | None) -> None:
    # Its backward pass needs CUDA; what is ours in it, the mask, can be seen in a forward pass.
    q, k, v = heads(6, 2, torch.float32)
    documents = documents_for("flex", tokens(), END, [window])
    mask = documents.blocks[window]
    got = flex_attention(q, k, v, block_mask=mask, scale=SCALE, enable_gqa=True)
    assert torch.allclose(got, one_by_one(q, k, v, window), atol=1e-5)


def test_documents_are_counted_from_their_end_tokens() -> None:
    documents = Documents(tokens(), END)
    documents.add_starts()
    assert documents.starts is not None
    assert documents.starts.dtype == torch.int32
    assert documents.starts.tolist() == [19 * row + begin for row, begin, _ in spans()] + [4 * 19]
    for row, begin, end in spans():
        assert documents.position_BT[row, begin:end].tolist() == list(range(end - begin))
        assert len(documents.number_BT[row, begin:end].unique()) == 1


def test_both_kernels_of_this_cpu_can_and_cudnn_is_refused_before_anything_is_rented() -> None:
    assert available_kernels("cpu", torch.float32, document_mask=True) == ("math", "flash")
    check_kernel("flash", "cpu", torch.bfloat16, ModelSpec.model_validate(SHAPE), True)
    h100, model = Target("cuda", 9.0, in_bf16=True), ModelSpec.model_validate(SHAPE)
    kernels.check("cudnn", model, "there", h100)
    with pytest.raises(ValueError, match=r"inside documents: set data\.document_mask to false; "):
        kernels.check("cudnn", model, "there", h100, document_mask=True)
    with pytest.raises(ValueError, match=r"a document mask head_dim must be a multiple of 8, .*12"):
        kernels.check("flash", model, "there", h100, document_mask=True)
    kernels.check("efficient", model, "there", h100, document_mask=True)


def built(name: str, attention: str, packing: Packing | None) -> Decoder:
    decoder = Decoder(ModelSpec.model_validate(SHAPE | MODELS[name]), attention, packing)
    decoder.init_weights(0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)  # so that attention says something before it is trained
    return decoder


@pytest.mark.parametrize("attention", ON_CPU)
@pytest.mark.parametrize("name", MODELS)
def test_a_document_in_a_sequence_has_the_logits_it_has_alone(name: str, attention: str) -> None:
    masked = built(name, attention, Packing(END, document_mask=True))
    plain = built(name, attention, None)
    together, leaking = masked(tokens()), plain(tokens())
    for row, begin, end in spans():
        alone = plain(tokens()[row : row + 1, begin:end])[0]
        assert torch.allclose(together[row, begin:end], alone, atol=1e-5)
        if begin > 1:  # an end token after another one alone sees nothing new
            assert not torch.allclose(leaking[row, begin:end], alone, atol=1e-3)


@pytest.mark.parametrize("attention", ON_CPU)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_a_sequence_are_those_of_its_documents(name: str, attention: str) -> None:
    packing = Packing(END, document_mask=True)
    masked, alone = built(name, attention, packing), built(name, attention, None)
    inputs = tokens()
    targets = inputs.roll(-1, dims=1)
    masked(inputs, targets).backward()
    counted = packing.counted(inputs, targets)  # documents without a token count as padding
    for row, begin, end in spans():
        logits = alone(inputs[row : row + 1, begin:end])[0]
        loss = F.cross_entropy(logits, counted[row, begin:end], reduction="sum")
        (loss / inputs.numel()).backward()
    for key, parameter in alone.named_parameters():
        got = masked.get_parameter(key).grad
        assert torch.allclose(got, parameter.grad, atol=1e-6, rtol=1e-4), key


def padded() -> Tensor:
    """Sequences whose documents all end, with padding behind them."""
    row = torch.tensor([7, 8, 9, END, 11, END, END, END, END])
    return torch.stack((row, torch.tensor([5, 6, 7, 8, 9, 10, 11, 12, END])))


def test_padding_is_left_out_of_loss_and_gradient() -> None:
    packing = Packing(END)
    counted = packing.counted(padded()[:, :-1], padded()[:, 1:])
    assert counted.tolist()[0] == [8, 9, END, 11, END, *[IGNORED] * 3]
    assert counted.tolist()[1] == padded()[1, 1:].tolist()
    packing.real_share = 13 / 16
    ours, plain = built("rotary", "flash", packing), built("rotary", "flash", None)
    loss = ours(padded()[:, :-1], padded()[:, 1:])
    logits = plain(padded()[:, :-1]).flatten(0, 1)
    expected = F.cross_entropy(logits, counted.flatten(), ignore_index=IGNORED)
    (loss / 2).backward()
    (expected / 2).backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    for key, parameter in plain.named_parameters():
        got = ours.get_parameter(key).grad
        assert torch.allclose(got, parameter.grad, atol=1e-6, rtol=1e-4), key


def test_micro_batches_add_up_to_the_mean_over_real_targets() -> None:
    packing = Packing(END, real_share=13 / 16)
    model = built("rotary", "flash", packing)
    whole = model(padded()[:, :-1], padded()[:, 1:])
    parts = [model(row[None, :-1], row[None, 1:]) for row in padded()]
    assert whole.item() == pytest.approx(sum(part.item() for part in parts) / 2, rel=1e-6)


def test_only_ignored_targets_give_no_loss_and_no_gradient() -> None:
    hidden, head = torch.randn(4, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
    loss = linear_cross_entropy(hidden, head, torch.full((4,), IGNORED), has_ignored=True)
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad is not None
    assert not hidden.grad.any()
