"""Text from a decoder, token by token.

Shapes are suffixes: B batch, T tokens, V vocabulary.
"""
# ruff: noqa: N803, N806 (shape suffixes are upper case)

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from thriftlm_models.cache import Cache
from thriftlm_models.decoder import Decoder


@torch.no_grad()
def generate(
    decoder: Decoder,
    tokens_BT: Tensor,
    n_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    use_cache: bool = True,
) -> Iterator[Tensor]:
    """The `n_tokens` tokens that follow `tokens_BT`, one (B,) at a time.

    Temperature 0 takes the likeliest token. Above, tokens are drawn with logits divided by it, from
    the smallest set whose probabilities reach `top_p` (nucleus sampling, arXiv 1904.09751). The
    same seed draws the same tokens. Without the cache every token runs the whole sequence again.

    Raises:
        ValueError: an empty prompt, a negative temperature, `top_p` outside of (0, 1], or more
            tokens than the model has learned positions.
    """
    _check(decoder, tokens_BT, n_tokens, temperature, top_p)
    generator = torch.Generator(device=tokens_BT.device).manual_seed(seed)
    cache = Cache(decoder.spec) if use_cache else None
    new_BT = tokens_BT
    for _ in range(n_tokens):
        logits_BV = decoder(new_BT, cache=cache, last_only=True)[:, -1].float()
        next_B = _pick(logits_BV, temperature, top_p, generator)
        yield next_B
        new_BT = next_B[:, None] if use_cache else torch.cat((new_BT, next_B[:, None]), dim=1)


def _check(
    decoder: Decoder, tokens_BT: Tensor, n_tokens: int, temperature: float, top_p: float
) -> None:
    if not tokens_BT.shape[1]:
        raise ValueError("generation needs at least one token to start from, got none")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a number of at least 0, got {temperature:g}")
    if (highest := int(tokens_BT.max())) >= decoder.spec.vocab:
        raise ValueError(
            f"the prompt has token {highest}, the model {decoder.spec.vocab} tokens: the tokenizer "
            "is not the one it was trained with"
        )
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie above 0 and at most at 1, got {top_p:g}")
    longest, wanted = decoder.spec.max_positions, tokens_BT.shape[1] + n_tokens
    if longest is not None and wanted > longest:
        raise ValueError(
            f"prompt and new tokens must fit into {longest} learned positions, got "
            f"{tokens_BT.shape[1]} + {n_tokens}; ask for fewer"
        )


def _pick(
    logits_BV: Tensor, temperature: float, top_p: float, generator: torch.Generator
) -> Tensor:
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    sorted_BV, order_BV = (logits_BV / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    before_BV = sorted_BV.cumsum(dim=-1) - sorted_BV  # the likeliest token always stays
    kept_BV = sorted_BV.masked_fill(before_BV >= top_p, 0.0)
    drawn_B1 = torch.multinomial(kept_BV, 1, generator=generator)
    return order_BV.gather(1, drawn_B1)[:, 0]
