"""The decoder against its counts, its definition and the wrappers that training puts around it."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thriftlm_models import loss as loss_module
from thriftlm_models.config import ModelSpec
from thriftlm_models.decoder import Decoder
from thriftlm_models.loss import linear_cross_entropy
from thriftlm_models.rotation import Rotation

CPU = torch.device("cpu")
SHAPE = {
    "n_layers": 3, "d_model": 48, "n_heads": 6, "n_kv_heads": 2, "head_dim": 12,
    "d_ff": 80, "vocab": 131,
}  # fmt: skip
SHARED = {"sharing": "reverse", "repeats": 3}


def spec(**changed: object) -> ModelSpec:
    return ModelSpec.model_validate(SHAPE | changed)


def built(model: ModelSpec, seed: int = 0, attention: str = "flash") -> Decoder:
    decoder = Decoder(model, attention)
    decoder.init_weights(seed)
    return decoder


def batch(model: ModelSpec, sequences: int = 2, seq_len: int = 20) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(model.vocab, (sequences, seq_len + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_the_state_dict_has_each_tensor_once(tie_embeddings: bool) -> None:
    state = built(spec(tie_embeddings=tie_embeddings, **SHARED)).state_dict()
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)
    assert {name.split(".")[1] for name in state if name.startswith("blocks.")} == set("012")
    assert ("head" in state) is not tie_embeddings


@pytest.mark.parametrize("attention", ["math", "flash"])
def test_a_later_token_does_not_change_earlier_logits(attention: str) -> None:
    model = spec()
    decoder = built(model, attention=attention)
    tokens, _ = batch(model)
    changed = tokens.clone()
    changed[:, 12] = (changed[:, 12] + 1) % model.vocab
    before, after = decoder(tokens), decoder(changed)
    assert torch.allclose(before[:, :12], after[:, :12], atol=1e-6)
    assert not torch.allclose(before[:, 12:], after[:, 12:], atol=1e-3)


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("shape", [{}, {"tie_embeddings": False, "vocab": 300}])
def test_loss_and_gradients_are_those_of_cross_entropy_over_all_logits(
    monkeypatch: pytest.MonkeyPatch, rows: int, shape: dict[str, object]
) -> None:
    model = spec(**shape)
    monkeypatch.setattr(loss_module, "LOGIT_BLOCK_BYTES", rows * 4 * model.vocab)
    tokens, targets = batch(model)
    chunked, plain = built(model), built(model)
    loss = chunked(tokens, targets)
    expected = F.cross_entropy(plain(tokens).flatten(0, 1), targets.flatten())
    (loss / 3).backward()  # as under gradient accumulation
    (expected / 3).backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    for name, parameter in plain.named_parameters():
        got = chunked.get_parameter(name).grad
        assert torch.allclose(got, parameter.grad, atol=1e-6, rtol=1e-4), name


def test_loss_equals_torchs_linear_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head = (
        torch.randn(50, 16, generator=generator),
        torch.randn(90, 16, generator=generator),
    )
    targets = torch.randint(90, (50,), generator=generator)
    expected = F.linear_cross_entropy(hidden, head, targets)
    assert linear_cross_entropy(hidden, head, targets).item() == pytest.approx(expected.item())


def test_no_tensor_of_the_loss_is_as_large_as_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = spec(vocab=4000, n_layers=1)
    monkeypatch.setattr(loss_module, "LOGIT_BLOCK_BYTES", 8 * 4 * model.vocab)
    tokens, targets = batch(model, sequences=8, seq_len=64)
    decoder = built(model)
    with torch.profiler.profile(profile_memory=True) as profiler:
        decoder(tokens, targets).backward()
    largest = max(
        event.self_cpu_memory_usage for event in profiler.events() if event.name != "[memory]"
    )
    assert largest < tokens.numel() * model.vocab * 4 / 8


def test_bf16_autocast_gives_an_fp32_loss_near_the_fp32_one() -> None:
    model = spec(**SHARED)
    tokens, targets = batch(model)
    decoder = built(model)
    exact = decoder(tokens, targets)
    with torch.autocast("cpu", torch.bfloat16):
        loss = decoder(tokens, targets)
        logits = decoder(tokens)
    loss.backward()
    assert (loss.dtype, logits.dtype) == (torch.float32, torch.bfloat16)
    assert loss.item() == pytest.approx(exact.item(), abs=5e-3)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in decoder.parameters())


def test_loss_without_gradients_is_the_same_number() -> None:
    model = spec()
    decoder = built(model)
    with torch.no_grad():
        validation = decoder(*batch(model))
    assert validation.item() == decoder(*batch(model)).item()
    assert not validation.requires_grad


def test_a_second_backward_raises_rather_than_scaling_twice() -> None:
    model = spec()
    loss = built(model)(*batch(model))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_targets_and_an_unknown_kernel_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one target"):
        linear_cross_entropy(torch.zeros(0, 4), torch.zeros(8, 4), torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match="unknown attention kernel 'fast'; known: math, flash"):
        Decoder(spec(), attention="fast")


@pytest.mark.parametrize(
    "shape",
    [{}, SHARED, {"n_layers": 2, "d_model": 256, "d_ff": 512, "n_heads": 4, "head_dim": 64}],
)
@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_untrained_loss_is_near_ln_vocab(shape: dict[str, object], tie_embeddings: bool) -> None:
    model = spec(vocab=2000, tie_embeddings=tie_embeddings, **shape)
    loss = built(model)(*batch(model, sequences=8, seq_len=64))
    assert loss.item() == pytest.approx(math.log(model.vocab), abs=0.15)


@pytest.mark.parametrize("shape", [{}, SHARED, {"tie_embeddings": False}])
def test_building_on_meta_gives_the_weights_of_building_directly(shape: dict[str, object]) -> None:
    model = spec(**shape)
    with torch.device("meta"):
        decoder = Decoder(model)
    decoder.to_empty(device="cpu")
    decoder.init_weights(7)
    direct = built(model, seed=7)
    torch.manual_seed(123)  # the global generator plays no part
    for name, tensor in direct.state_dict().items():
        assert torch.equal(tensor, decoder.state_dict()[name]), name
    assert torch.equal(decoder(*batch(model)), direct(*batch(model)))
    assert not torch.equal(direct.embedding, built(model, seed=8).embedding)


def test_initial_weights_have_the_documented_spread() -> None:
    block = built(spec(d_model=256, **SHARED)).blocks[0]
    residual = 0.02 / math.sqrt(2 * 9)  # three blocks, three times
    assert block.attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert block.feed_forward.gate_up.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert block.attention.out.weight.std().item() == pytest.approx(residual, rel=0.03)
    assert block.feed_forward.down.weight.std().item() == pytest.approx(residual, rel=0.03)
    assert block.attention_norm.weight.eq(1).all()


def test_rotation_depends_on_distance_only() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 64, generator=generator)
    rotate = Rotation(0, 64, 64, 10_000.0, CPU)
    queries, keys = (rotate(x.expand(1, 64, 1, 64))[0, :, 0] for x in (query, key))
    scores = queries @ keys.T
    for distance in (0, 1, 17, 50):
        diagonal = scores.diagonal(-distance)
        assert torch.allclose(diagonal, diagonal[0].expand_as(diagonal), atol=1e-4)
    assert scores[0, 0].item() == pytest.approx((query @ key).item(), abs=1e-4)
    assert torch.allclose(queries.norm(dim=-1), query.norm().expand(64))


def test_rotation_is_that_of_the_definition_at_a_far_position() -> None:
    position, width, base = 2047, 8, 500_000.0
    x = torch.arange(1.0, width + 1)
    got = Rotation(0, position + 1, width, base, CPU)(x.expand(1, position + 1, 1, width))[0, -1, 0]
    for pair in range(width // 2):
        angle = position * base ** (-2 * pair / width)
        a, b = x[pair].item(), x[pair + width // 2].item()
        assert got[pair].item() == pytest.approx(
            a * math.cos(angle) - b * math.sin(angle), abs=2e-3
        )
        assert got[pair + width // 2].item() == pytest.approx(
            b * math.cos(angle) + a * math.sin(angle), abs=2e-3
        )


def test_rotation_keeps_the_dtype_and_computes_in_fp32() -> None:
    rotate = Rotation(0, 2048, 16, 10_000.0, CPU)
    x = torch.ones(1, 2048, 1, 16, dtype=torch.bfloat16)
    got = rotate(x)
    assert (rotate.cos.dtype, got.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(got, rotate(x.float()).bfloat16())


@pytest.mark.parametrize("sharing", ["immediate", "repeat_all_over", "reverse"])
def test_a_shared_model_is_its_unrolled_one_and_gradients_are_summed_over_uses(
    sharing: str,
) -> None:
    shared = built(spec(sharing=sharing, repeats=2))
    unrolled = built(spec(n_layers=6))
    schedule = shared.spec.schedule
    for layer, index in enumerate(schedule):
        unrolled.blocks[layer].load_state_dict(shared.blocks[index].state_dict())
    with torch.no_grad():
        unrolled.embedding.copy_(shared.embedding)
    tokens, targets = batch(shared.spec)
    losses = [model(tokens, targets) for model in (shared, unrolled)]
    assert losses[0].item() == losses[1].item()
    for loss in losses:
        loss.backward()
    for index, block in enumerate(shared.blocks):
        for name, parameter in block.named_parameters():
            uses = [unrolled.blocks[n] for n, i in enumerate(schedule) if i == index]
            summed = sum(use.get_parameter(name).grad for use in uses)
            assert torch.allclose(parameter.grad, summed, atol=1e-7, rtol=1e-4), name


@pytest.mark.parametrize("shape", [SHARED, {"tie_embeddings": False}])
def test_a_parameter_is_read_only_while_the_module_that_owns_it_runs(
    shape: dict[str, object],
) -> None:
    # What ZeRO-3 and FSDP do: parameters exist from before their module's forward until after it.
    model = spec(**shape)
    decoder, expected = built(model), built(model)(*batch(model))
    whole = {name: p.detach().clone() for name, p in decoder.named_parameters()}

    def partition(module: nn.Module, prefix: str) -> None:
        def gather(*_: object) -> None:
            for name, parameter in module.named_parameters(recurse=False):
                parameter.data.copy_(whole[f"{prefix}.{name}".lstrip(".")])

        def free(*_: object) -> None:
            for parameter in module.parameters(recurse=False):
                parameter.data.fill_(math.nan)

        free()
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(free)

    for prefix, module in decoder.named_modules():
        partition(module, prefix)
    with torch.no_grad():
        assert decoder(*batch(model)).item() == expected.item()
    assert decoder.embedding.isnan().all()


def test_training_on_one_batch_learns_it() -> None:
    model = spec(**SHARED)
    decoder = built(model)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
    for _ in range(60):
        loss = decoder(*batch(model))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 1.0
