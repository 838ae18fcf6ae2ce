"""What a dynamic cache holds of one side, growing in place."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Tokens of room made at a time (chosen): growing copies all that is held, here once in so many tokens.
STEP = 64


def room_for(tokens: int) -> int:
    """Tokens that a store has room for when it has grown to hold so many."""
    return -(-tokens // STEP) * STEP


class Store:
    """Rows of tokens [B, G, n, width] in one tensor with room behind them: latents, or bytes of packed codes.

    Args:
        empty: [B, G, 0, width], of the device and dtype to be held.
    """

    def __init__(self, empty: Tensor) -> None:
        self._room = empty
        self._first = self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def rows(self) -> Tensor:
        """What is held, [B, G, n, width]: a view, good until the store is next changed."""
        return self.first(self._length)

    def first(self, tokens: int) -> Tensor:
        """The first of them, as such a view."""
        return self._room.narrow(-2, self._first, tokens)

    def append(self, new: Tensor) -> None:
        """Add rows [B, G, n, width] behind those held."""
        length = self._length + new.shape[-2]
        if torch.is_grad_enabled():
            self._room, self._first = torch.cat([self.rows, new], dim=-2), 0  # autograd may hold on to the old tensor
        else:
            frozen = self._room.is_inference() and not torch.is_inference_mode_enabled()
            if self._first + length > self._room.shape[-2] or frozen:
                b, g, _, width = new.shape
                room = self._room.new_empty(b, g, room_for(length), width)
                room.narrow(-2, 0, self._length).copy_(self.rows)
                self._room, self._first = room, 0
            self._room.narrow(-2, self._first + self._length, new.shape[-2]).copy_(new)
        self._length = length

    def drop_first(self, tokens: int) -> None:
        """Forget the first rows; their room is given up when the store next grows."""
        tokens = min(tokens, self._length)
        self._first += tokens
        self._length -= tokens

    def crop(self, length: int) -> None:
        """Forget all but the first `length` rows, and keep the room."""
        self._length = min(length, self._length)

    def keep(self, index: Tensor) -> None:
        """Forget all rows but those at an index [B, G or fewer, k], in its order, and their room."""
        b, g, room, width = self._room.shape
        index = index.repeat_interleave(g // index.shape[1], dim=1)
        places = index + self._first + room * torch.arange(b * g, device=index.device).view(b, g, 1)
        kept = self._room.flatten(0, 2).index_select(0, places.flatten()).view(b, g, index.shape[-1], width)
        self._room, self._first, self._length = kept[:, :, :0], 0, 0
        self.append(kept)

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change batch or device."""
        self._room = change(self._room)
