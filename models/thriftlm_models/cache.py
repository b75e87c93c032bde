"""Keys and values of the tokens so far, one slot for every executed layer.

Shapes are suffixes: B batch, T new tokens, S tokens in the cache, K heads, C width of a head.
"""
# ruff: noqa: N803, N806 (shape suffixes are upper case)

import torch
from torch import Tensor

from thriftlm_models.config import ModelSpec


class CachedLayer:
    """What one executed layer remembers; a sliding one forgets what it can no longer see."""

    def __init__(self) -> None:
        self.k_BKSC: Tensor | None = None
        self.v_BKSC: Tensor | None = None

    @property
    def is_empty(self) -> bool:
        """Whether no token went in yet."""
        return self.k_BKSC is None

    def append(self, k_BKTC: Tensor, v_BKTC: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
        """Keys and values of old and new tokens, at most the last `window`."""
        if self.k_BKSC is not None and self.v_BKSC is not None:
            k_BKTC = torch.cat((self.k_BKSC, k_BKTC), dim=2)
            v_BKTC = torch.cat((self.v_BKSC, v_BKTC), dim=2)
        first = 0 if window is None else max(0, k_BKTC.shape[2] - window)
        self.k_BKSC, self.v_BKSC = k_BKTC[:, :, first:], v_BKTC[:, :, first:]
        return self.k_BKSC, self.v_BKSC


class Cache:
    """The slots of a model: a shared block has one for each time it runs.

    MobileLLM's published code has one for each distinct block, which the second call overwrites,
    and so its configurations switch the cache off.
    """

    def __init__(self, model: ModelSpec) -> None:
        self.layers = [CachedLayer() for _ in model.schedule]
        self.n_tokens = 0

    def advance(self, n_tokens: int) -> int:
        """Tokens that were in the cache before `n_tokens` more.

        Raises:
            ValueError: several tokens into a cache that is not empty.
        """
        past = self.n_tokens
        if past and n_tokens > 1:
            raise ValueError(
                f"a cache in use takes one token at a time, got {n_tokens} after {past}"
            )
        self.n_tokens += n_tokens
        return past
