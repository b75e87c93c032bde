"""Shapes of a model of a given size: Apple's rule, step by step."""

import math
from bisect import bisect_left
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from typing import Any

from thriftlm.planning.scaling_laws import Counts
from thriftlm.spec import InputError
from thriftlm_models.config import ModelSpec
from thriftlm_models.counts import non_embedding_params, stored_params
from thriftlm_models.presets import apple_shape

SMALLEST, LARGEST, STEP = 1e-3, 200.0, 1.01
"""Billions of parameters that the rule is asked for, and their ratio from one to the next."""
FF_MULTIPLE = 64
"""Of the feed-forward width, which Apple leaves odd: matrices that tensor cores like."""


@dataclass(frozen=True)
class Shape:
    """A model of Apple's rule; counted when asked, since most are not."""

    d_model: int
    n_layers: int
    vocab: int

    @cached_property
    def model(self) -> ModelSpec:
        """Heads of 64, untied embeddings, feed-forward width 2.7 times the width, to 64."""
        fields: dict[str, Any] = {
            "n_heads": self.d_model // 64,
            "head_dim": 64,
            "d_ff": round(2.7 * self.d_model / FF_MULTIPLE) * FF_MULTIPLE,
            "tie_embeddings": False,
        }
        return ModelSpec.model_validate(asdict(self) | fields)

    @cached_property
    def stored_params(self) -> int:
        """Of all matrices and norms."""
        return stored_params(self.model)

    @cached_property
    def non_embedding_params(self) -> int:
        """Without embedding and output head."""
        return non_embedding_params(self.model)

    def n_params(self, counts: Counts) -> int:
        """What a law calls N."""
        return self.stored_params if counts == "all" else self.non_embedding_params


@cache
def ladder(vocab: int) -> tuple[Shape, ...]:
    """All shapes of Apple's rule (arXiv 2410.19456, Figure 5), small to large.

    Width and depth are those of `apple:1B` and the like; the rest is what `Shape` says.
    """
    found: dict[Shape, None] = {}
    billions = SMALLEST
    while billions <= LARGEST:
        fields = apple_shape(billions)
        found[Shape(fields["d_model"], fields["n_layers"], vocab)] = None
        billions *= STEP
    return tuple(found)


def nearest(n_params: float, vocab: int, counts: Counts) -> Shape:
    """The shape whose N is nearest in ratio.

    Raises:
        InputError: the rule has no model so small or so large.
    """
    shapes = ladder(vocab)
    least, most = (shapes[i].n_params(counts) for i in (0, -1))
    if not least / 1.3 <= n_params <= most * 1.3:
        raise InputError(
            f"a model must have {least:,} to {most:.3g} parameters at a vocabulary of {vocab:,}, "
            f"the plan asks for {n_params:,.0f}; change the budget"
            + (" or take a smaller --tokenizer" if n_params < least else "")
        )
    i = bisect_left(shapes, n_params, key=lambda shape: shape.n_params(counts))
    return min(
        shapes[max(0, i - 1) : i + 1],
        key=lambda shape: abs(math.log(shape.n_params(counts) / n_params)),
    )
