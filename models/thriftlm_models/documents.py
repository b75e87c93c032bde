"""Where the documents of a sequence begin, for attention that stays inside them.

Shapes are suffixes: B batch, T tokens.
"""
# ruff: noqa: N803, N806 (shape suffixes are upper case)

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

IGNORED = -100
"""Target that does not count: torch's `ignore_index`."""


@dataclass
class Packing:
    """How the sequences that a decoder sees are made of documents."""

    end_id: int
    """Token that ends a document; several in a row are padding."""
    document_mask: bool = False
    """Whether attention stays inside a document."""
    real_share: float = 1.0
    """Share of a step's targets, over all ranks, that are no padding; set by who reads the batches.

    The loss is divided by it: so it is the mean over real targets however a step is cut into
    micro-batches."""

    def counted(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """The targets, with `IGNORED` where padding follows padding or the end of a document."""
        is_padding = (tokens_BT == self.end_id) & (targets_BT == self.end_id)
        return targets_BT.masked_fill(is_padding, IGNORED)


class Documents:
    """The documents of a batch, in the form that an attention kernel takes them.

    A document begins a sequence or follows an end token, which belongs to the document before it. A
    plain object, as `Rotation` is, made anew in each forward pass: what a compiled block finds in
    it is ready.

    Args:
        tokens_BT: the batch.
        end_id: what ends a document.
    """

    def __init__(self, tokens_BT: Tensor, end_id: int) -> None:
        is_end_BT = tokens_BT == end_id
        index_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        self.number_BT = is_end_BT.cumsum(1) - is_end_BT.long()
        begins_BT = is_end_BT.roll(1, dims=1)
        begins_BT[:, 0] = True
        self.position_BT = index_T - (index_T * begins_BT).cummax(1).values
        """Tokens between a token and the beginning of its document."""
        self._begins_BT = begins_BT
        self.masks: dict[int | None, Tensor] = {}
        self.blocks: dict[int | None, BlockMask] = {}
        self.starts: Tensor | None = None

    def add_masks(self, windows: Iterable[int | None]) -> None:
        """For each window what a query sees, bool (B, 1, T, T)."""
        seq_len = self.number_BT.shape[1]
        same_BTT = self.number_BT[:, :, None] == self.number_BT[:, None, :]
        for window in windows:
            seen_BTT = same_BTT.tril()
            if window is not None and window < seq_len:
                seen_BTT = seen_BTT.triu(1 - window)
            self.masks[window] = seen_BTT[:, None]

    def add_starts(self) -> None:
        """First token of each document and the end of the last, in a batch laid end to end, int32.

        How many there are is known on the host only: one wait for the device in a forward pass.
        """
        begins = self._begins_BT.flatten().nonzero()[:, 0]
        self.starts = torch.cat((begins, begins.new_tensor([self._begins_BT.numel()]))).int()

    def add_blocks(self, windows: Iterable[int | None]) -> None:
        """For each window the block mask of flex attention."""
        number_BT = self.number_BT
        batch, seq_len = number_BT.shape
        for window in windows:
            span = seq_len if window is None else window

            def sees(
                row: Tensor, _head: Tensor, query: Tensor, key: Tensor, span: int = span
            ) -> Tensor:
                same = number_BT[row, query] == number_BT[row, key]
                return same & (query >= key) & (query - key < span)

            self.blocks[window] = create_block_mask(
                sees, batch, None, seq_len, seq_len, device=str(number_BT.device)
            )
