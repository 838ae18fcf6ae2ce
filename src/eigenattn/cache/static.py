"""A static cache's layers: the same in tensors of fixed size, for compiled graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from .context import CacheContext
from .layers import BLOCK
from .sight import Encode, Far, Near, Sight


class StaticLatentLayer(StaticLayer):
    """Room for latents of all tokens, and a rolling window.

    Slot j of the window is token `length - W + j`. A layer with sliding-window attention has room for all tokens too,
    and the mask hides those out of sight.
    """

    def __init__(
        self, context: CacheContext, layer_idx: int, window: int, max_cache_len: int, is_sliding: bool
    ) -> None:
        super().__init__(max_cache_len=max_cache_len)
        self.context, self.layer_idx = context, layer_idx
        self.is_sliding = is_sliding
        self.window = window
        self.rows: tuple[Tensor, ...] = ()
        self.encoded = 0  # tokens whose rows are written, some of the window among them
        self.window_keys = self.window_values = torch.empty(0)  # nothing yet

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: what is stored of keys and values is only known with the first of them."""

    def _initialise(self, rows: tuple[Tensor, ...], keys: Tensor, values: Tensor) -> None:
        self.dtype, self.device, self.batch_size = keys.dtype, keys.device, keys.shape[0]
        self.rows = tuple(row.new_zeros(*row.shape[:2], self.max_cache_len, row.shape[-1]) for row in rows)
        self.keys, self.values = self.rows[0], self.rows[-1]
        self.cumulative_length = self.cumulative_length.to(self.device)
        if self.window:
            self.window_keys, self.window_values = (
                x.new_zeros((*x.shape[:2], self.window, x.shape[-1])) for x in (keys, values)
            )
        if not torch.compiler.is_compiling():
            for tensor in (*self.tensors(), self.cumulative_length):
                torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,
        encode: Encode,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Sight, None]:
        """As `LatentLayer.update`."""
        if not self.is_initialized:
            self._initialise(encode(key_states, value_states), key_states, value_states)
        new = key_states.shape[-2]
        # Numbers are known on a CPU alone, and there a graph may not depend on them.
        counted = not torch.compiler.is_compiling() and self.device.type == "cpu"
        start = int(self.cumulative_length) if counted else self.cumulative_length.clone()
        if self.context.begin(self.layer_idx):
            each = torch.arange(new, device=self.device) + start
            self.context.write_fixed(each, position_ids, self.batch_size, self.max_cache_len)
        near, keys, values = None, key_states, value_states
        if self.window:
            keys = torch.cat([self.window_keys, key_states], dim=-2)
            values = torch.cat([self.window_values, value_states], dim=-2)
            near = Near(keys, values, start - self.window)
        if isinstance(start, int):
            self._encode_ahead(start - self.window, new, keys, values, encode)
        else:
            # Slots of a window that is not full yet have negative tokens. The remainder sends them to the last places,
            # which are never read: the last tokens are always in the window.
            places = (torch.arange(new, device=self.device) + start - self.window) % self.max_cache_len
            for held, row in zip(self.rows, encode(keys[:, :, :new], values[:, :, :new]), strict=True):
                held.index_copy_(2, places, row)
        if near is not None:
            self.window_keys.copy_(near.keys[:, :, new:])
            self.window_values.copy_(near.values[:, :, new:])
        self.cumulative_length.add_(new)
        positions = self.context.memoised(
            ("positions", self.device), lambda: self.context.positions(0, self.max_cache_len, self.device)
        )
        return Sight(Far(self.rows), near, start, self.max_cache_len, positions), None

    def _encode_ahead(self, first: int, new: int, keys: Tensor, values: Tensor, encode: Encode) -> None:
        """Write rows of tokens up to the last that leaves the window, and some of the window's with them.

        Args:
            first: token of keys and values' first; negative where slots are empty.
            new: tokens that leave the window.
        """
        begin = max(self.encoded, first, 0)  # a compiled graph encodes what leaves, and does not count
        if begin >= first + new:
            return
        some = slice(begin - first, -(-(first + new) // BLOCK) * BLOCK - first)
        for held, row in zip(self.rows, encode(keys[:, :, some], values[:, :, some]), strict=True):
            held[:, :, begin : begin + row.shape[2]] = row
            self.encoded = begin + row.shape[2]

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        return [*self.rows, self.window_keys, self.window_values] if self.window else [*self.rows]

    def reset(self) -> None:
        if self.is_initialized:
            for tensor in (*self.tensors(), self.cumulative_length):
                tensor.zero_()
        self.encoded = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if not self.is_initialized:
            return

        def reordered(x: Tensor) -> Tensor:
            return x.index_select(0, beam_idx.to(x.device))

        self.rows = tuple(map(reordered, self.rows))
        self.keys, self.values = self.rows[0], self.rows[-1]
        if self.window:
            self.window_keys, self.window_values = reordered(self.window_keys), reordered(self.window_values)
        if self.layer_idx == self.context.owner:
            self.context.map(reordered)
