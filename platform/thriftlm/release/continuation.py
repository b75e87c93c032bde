"""What a trained model writes after a prompt: a smoke test that a person can read."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from thriftlm.release.checkpoints import TrainedModel
from thriftlm.spec import InputError
from thriftlm.training.tokenizer import END_NAMES
from thriftlm_models.generation import generate


class Sampling(NamedTuple):
    """How tokens are chosen."""

    tokens: int = 64
    """Most new tokens."""
    temperature: float = 0.0
    """0 takes the likeliest token each time."""
    top_p: float = 1.0
    """Share of the probability that is drawn from."""
    seed: int = 0
    """Seed of the draws."""
    use_cache: bool = True
    """Whether keys and values of earlier tokens are kept."""


def continue_text(
    model: TrainedModel, prompt: str, how: Sampling, on_text: Callable[[str], None]
) -> dict[str, Any]:
    """What `thriftlm generate --json` prints; `on_text` gets prompt and text in pieces.

    Ends at the end of a document. Tokens per second are measured on this machine's CPU, without
    the prompt.

    Raises:
        InputError: an empty prompt, or sampling options that make no sense.
    """
    tokenizer = model.tokenizer()
    given = tokenizer.encode(prompt, add_special_tokens=False).ids
    ends = {tokenizer.token_to_id(name) for name in END_NAMES} - {None}
    made: list[int] = []
    shown = ""
    begin = first = time.perf_counter()
    try:
        for (token,) in generate(
            model.decoder,
            torch.tensor([given], dtype=torch.int64),
            how.tokens,
            temperature=how.temperature,
            top_p=how.top_p,
            seed=how.seed,
            use_cache=how.use_cache,
        ):
            if not made:
                first = time.perf_counter()
                on_text(prompt)
            made.append(int(token))
            if made[-1] in ends:
                break
            text = tokenizer.decode(made)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character
                on_text(text[len(shown) :])
                shown = text
    except ValueError as error:
        raise InputError(str(error)) from error
    last = time.perf_counter()
    return {
        "checkpoint": str(model.path),
        "prompt": prompt,
        "text": tokenizer.decode(made),
        "prompt_tokens": len(given),
        "new_tokens": len(made),
        "ended": bool(made) and made[-1] in ends,
        "first_token_s": first - begin,
        "tokens_per_s": (len(made) - 1) / (last - first) if len(made) > 1 else None,
    }
