"""Generation with the cache against generation without it, and how tokens are drawn."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from thriftlm_models.cache import Cache
from thriftlm_models.config import ModelSpec
from thriftlm_models.decoder import Decoder
from thriftlm_models.generation import generate

SHAPES: dict[str, dict[str, object]] = {
    "plain": {},
    **{
        f"{sharing} x{repeats}": {"sharing": sharing, "repeats": repeats}
        for sharing in ("immediate", "repeat_all_over", "reverse")
        for repeats in (2, 3)
    },
    "sliding": {"attention_pattern": ["sliding", "full"], "window": 5},
    "sliding, one token": {"attention_pattern": ["sliding"], "window": 1},
    "without attention": {"attention_pattern": ["none", "full"]},
    "none at all": {"attention_pattern": ["none"]},
    "sliding, none and shared": {
        "attention_pattern": ["sliding", "none", "full"], "window": 4, "sharing": "reverse",
    },
    "no positions": {"rope_pattern": [1e4, 0]},
    "gpt2": {
        "positions": "learned", "max_positions": 64, "norm": "layer", "bias": True,
        "activation": "gelu",
    },
    "gemma": {
        "post_norm": True, "qk_norm": "learned", "scale_embedding": True, "activation": "geglu",
        "attention_pattern": ["sliding", "sliding", "full"], "window": 6,
        "rope_pattern": [1e4, 1e4, 1e6],
    },
    "llama3": {"rope_scaling": {"kind": "llama3", "factor": 8, "original_context": 32}},
    "mup": {"parametrization": "mup", "mup_base_width": 16, "qk_norm": "unlearned"},
}  # fmt: skip


def decoder(**changed: object) -> Decoder:
    shape = {
        "n_layers": 3, "d_model": 48, "n_heads": 4, "n_kv_heads": 2, "d_ff": 64, "vocab": 97,
    }  # fmt: skip
    built = Decoder(ModelSpec.model_validate(shape | changed))
    built.init_weights(0)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.ndim == 2:  # else an untrained model repeats one token
                parameter.mul_(8)
    return built


def prompt(sequences: int = 2, tokens: int = 9) -> Tensor:
    return torch.randint(97, (sequences, tokens), generator=torch.Generator().manual_seed(1))


def text(model: Decoder, n_tokens: int = 24, **how: object) -> list[list[int]]:
    made = generate(model, prompt(), n_tokens, **how)  # type: ignore[arg-type]
    return torch.stack(list(made), dim=1).tolist()


@pytest.mark.parametrize("name", SHAPES)
def test_cached_generation_is_uncached_generation_token_for_token(name: str) -> None:
    model = decoder(**SHAPES[name])
    assert text(model) == text(model, use_cache=False)
    drawn = text(model, temperature=1.0)
    assert drawn == text(model, temperature=1.0, use_cache=False)
    assert len({token for line in drawn for token in line}) > 4


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("length", [1, 3, 9])
def test_cached_logits_are_those_of_the_whole_sequence(name: str, length: int) -> None:
    model = decoder(**SHAPES[name])
    tokens = prompt(tokens=30)
    cache = Cache(model.spec)
    with torch.no_grad():
        pieces = [model(tokens[:, :length], cache=cache)]
        pieces += [model(tokens[:, i : i + 1], cache=cache) for i in range(length, 30)]
        whole = model(tokens)
    assert whole.std() > 0.1
    assert torch.allclose(torch.cat(pieces, dim=1), whole, atol=2e-5)


def test_every_executed_layer_has_a_slot_of_its_own() -> None:
    model = decoder(sharing="immediate", repeats=2)
    cache = Cache(model.spec)
    model(prompt(), cache=cache)
    keys = [layer.k_BKSC for layer in cache.layers]
    assert len(keys) == 6
    for one, other in itertools.combinations(keys, 2):
        assert one is not None
        assert other is not None
        assert not torch.equal(one, other)


def test_a_sliding_layer_keeps_no_more_than_its_window() -> None:
    model = decoder(attention_pattern=["sliding", "full", "none"], window=5)
    cache = Cache(model.spec)
    model(prompt(), cache=cache)
    model(prompt(tokens=1), cache=cache)
    sliding, full, without = (layer.k_BKSC for layer in cache.layers)
    assert sliding is not None
    assert full is not None
    assert (sliding.shape[2], full.shape[2], without) == (5, 10, None)


def test_several_tokens_into_a_cache_in_use_are_refused() -> None:
    model = decoder()
    cache = Cache(model.spec)
    model(prompt(), cache=cache)
    with pytest.raises(ValueError, match="takes one token at a time, got 9 after 9"):
        model(prompt(), cache=cache)


def test_last_only_is_the_last_of_all_logits() -> None:
    model = decoder()
    last = model(prompt(), last_only=True)
    assert last.shape == (2, 1, 97)
    assert torch.allclose(last, model(prompt())[:, -1:], atol=1e-5)


def test_a_seed_draws_the_same_and_temperature_varies_it() -> None:
    model = decoder()
    assert text(model, temperature=1.0, seed=3) == text(model, temperature=1.0, seed=3)
    assert text(model, temperature=1.0, seed=3) != text(model, temperature=1.0, seed=4)
    assert text(model, temperature=1e-6) == text(model)
    assert text(model, temperature=1.0, top_p=1e-9) == text(model)


def test_top_p_draws_from_the_nucleus_as_often_as_it_is_likely() -> None:
    model = decoder()
    first = prompt(sequences=1)
    likely = model(first)[0, -1].softmax(dim=-1).sort(descending=True)
    nucleus = int((likely.values.cumsum(0) < 0.6).sum()) + 1
    many = first.expand(20_000, -1)
    (drawn,) = generate(model, many, 1, temperature=1.0, top_p=0.6)
    assert set(drawn.tolist()) == set(likely.indices[:nucleus].tolist())
    share = (drawn == likely.indices[0]).float().mean().item()
    expected = (likely.values[0] / likely.values[:nucleus].sum()).item()
    assert share == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(
    ("tokens", "how", "message"),
    [
        (0, {}, "at least one token to start from"),
        (9, {"temperature": -1.0}, "temperature must be a number of at least 0, got -1"),
        (9, {"temperature": math.nan}, "temperature must be a number of at least 0, got nan"),
        (9, {"top_p": 0.0}, "top_p must lie above 0 and at most at 1, got 0"),
        (9, {"top_p": 1.5}, "top_p must lie above 0 and at most at 1, got 1.5"),
    ],
)
def test_bad_requests_are_refused(tokens: int, how: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(generate(decoder(), prompt(tokens=tokens), 4, **how))  # type: ignore[arg-type]


def test_a_foreign_tokenizer_is_noticed() -> None:
    with pytest.raises(ValueError, match="the prompt has token 97, the model 97 tokens"):
        next(generate(decoder(), torch.tensor([[97]]), 4))


def test_learned_positions_end() -> None:
    model = decoder(positions="learned", max_positions=12)
    with pytest.raises(ValueError, match=r"fit into 12 learned positions, got 9 \+ 4"):
        next(generate(model, prompt(), 4))
    with pytest.raises(ValueError, match="12 learned positions, the sequence 13 tokens"):
        model(prompt(tokens=13))
