"""A static cache's layers: the same in tensors of fixed size, for compiled graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from .context import CacheContext
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
        self.window_keys = self.window_values = torch.empty(0)  # nothing yet

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: what is stored of keys and values is only known with the first of them."""

    def _initialise(self, rows: tuple[Tensor, ...], keys: Tensor, values: Tensor) -> None:
        self.dtype, self.device, self.batch_size = keys.dtype, keys.device, keys.shape[0]
        self.rows = tuple(row.new_zeros(*row.shape[:2], self.max_cache_len, row.shape[-1]) for row in rows)
        self.keys, self.values = self.rows[0], self.rows[-1]
        self.cumulative_length = self.cumulative_length.to(self.device)
        if self.window:
            shape = (*keys.shape[:2], self.window, keys.shape[-1])
            self.window_keys, self.window_values = keys.new_zeros(shape), values.new_zeros(shape)
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
        new, start = key_states.shape[-2], self.cumulative_length.clone()
        each = torch.arange(new, device=self.device) + start
        if self.context.begin(self.layer_idx):
            self.context.write_fixed(each, position_ids, self.batch_size, self.max_cache_len)
        near, keys, values = None, key_states, value_states
        if self.window:
            near_keys = torch.cat([self.window_keys, key_states], dim=-2)
            near_values = torch.cat([self.window_values, value_states], dim=-2)
            near, keys, values = Near(near_keys, near_values, start - self.window), near_keys, near_values
            # Slots of a window that is not full yet have negative tokens. The remainder sends them to the last places,
            # which are never read: the last tokens are always in the window.
            each = (each - self.window) % self.max_cache_len
        for held, row in zip(self.rows, encode(keys[:, :, :new], values[:, :, :new]), strict=True):
            held.index_copy_(2, each, row)
        if near is not None:
            self.window_keys.copy_(near.keys[:, :, new:])
            self.window_values.copy_(near.values[:, :, new:])
        self.cumulative_length.add_(new)
        positions = self.context.positions(0, self.max_cache_len, self.device)
        return Sight(Far(self.rows), near, start, self.max_cache_len, positions), None

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        return [*self.rows, self.window_keys, self.window_values] if self.window else [*self.rows]

    def reset(self) -> None:
        if self.is_initialized:
            for tensor in (*self.tensors(), self.cumulative_length):
                tensor.zero_()

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
