"""A dynamic cache's layers: latents that grow with the text, and the last tokens exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ..errors import EigenAttnError
from .context import CacheContext
from .sight import Encode, Far, Near, Sight
from .store import Store

# Tokens of the last update that stay exact beyond the window, so that they can be taken back without loss (chosen: far
# more than assisted decoding drafts at a time).
ROLLBACK = 128
# Tokens encoded at a time (chosen): encoding is many small operations, which cost one token about as much as all of
# these. It divides the tokens that a store grows by, which so has no more room for them.
BLOCK = 32


class LatentLayer(CacheLayerMixin):
    """Grows with the text: rows of latents, plain or packed, and exact `window_keys`, `window_values`.

    After an update of T tokens it holds latents of all but the last `window` tokens, and the last `window + T` tokens
    exactly, T being counted up to `ROLLBACK`: so `crop` takes back what the last update brought without loss. Where
    `crop` takes back more, tokens that left the window are known by their latents alone. Once transformers has asked
    for it (`activate_past_recording`), all that came since the last `crop` stays exact, and nothing slides out of sight
    before the next. Tokens of the window may be encoded ahead, some at a time; nobody sees that.

    Args:
        context: what it shares with the cache's other layers.
        layer_idx: its place among them.
        window: exact tokens, W.
        sliding_window: tokens visible at all, in a layer with sliding-window attention.
    """

    is_compileable = False
    is_croppable = True
    block = BLOCK  # tokens encoded at a time

    def __init__(self, context: CacheContext, layer_idx: int, window: int, sliding_window: int | None = None) -> None:
        super().__init__()
        self.context, self.layer_idx = context, layer_idx
        self.window = window
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.window_keys = self.window_values = torch.empty(0)  # nothing yet
        self.stores: tuple[Store, ...] = ()
        self.shown: tuple[Tensor, ...] = ()
        self.left = 0  # rows of tokens that left the window; behind them is what was encoded ahead
        self.dropped = 0  # tokens that slid out of sight
        self.record_past = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        # Copies, for a slice would keep the whole prompt's keys alive.
        self.window_keys, self.window_values = key_states[:, :, :0].clone(), value_states[:, :, :0].clone()
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
        """Add keys and values [B, G, T, D] and return what the current queries may look at.

        Args:
            encode: maps exact keys and values to what is stored of them.
            position_ids: positions [B or 1, T].

        Returns:
            What they may look at, and nothing: transformers takes a pair.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.stores = tuple(Store(empty) for empty in encode(self.window_keys, self.window_values))
            self._show()
        if self.context.begin(self.layer_idx):
            self.context.write(self.get_seq_length(), position_ids, len(key_states))
        new, seen = key_states.shape[-2], self._tokens_held()
        if not self.record_past:  # of exact tokens the last ones stay, and those that come
            self._keep_exact(self.window)
        held = self.window_keys.shape[-2]
        exact = seen - held  # column of the first exact token
        near_keys = torch.cat([self.window_keys, key_states], dim=-2) if held else key_states
        near_values = torch.cat([self.window_values, value_states], dim=-2) if held else value_states
        encoded = len(self.stores[0])
        self.left += max(seen + new - self.window - self._tokens_left(), 0)
        if self.left > encoded:
            first = self._tokens_left() - (self.left - encoded) - exact
            some = slice(first, first - encoded + -(-self.left // self.block) * self.block)
            self._append(encode(near_keys[:, :, some], near_values[:, :, some]))
        self._show()
        near = Near(near_keys, near_values, exact) if self.window else None
        positions = self.context.memoised(
            ("positions", self.dropped, seen + new, self.device),
            lambda: self.context.positions(self.dropped, seen + new, self.device),
        )
        sight = Sight(Far(self.shown, self._columns_held()), near, seen, seen + new, positions)
        if self.window:
            self.window_keys, self.window_values = near_keys, near_values
            if new > ROLLBACK and not self.record_past:
                self._keep_exact(self.window + ROLLBACK)
                # A slice would keep the whole prompt's keys alive.
                self.window_keys, self.window_values = self.window_keys.clone(), self.window_values.clone()
        if not self.record_past:
            self._slide(seen + new)
        return sight, None

    def _keep_exact(self, tokens: int) -> None:
        """Keep no more than the last exact tokens."""
        over = self.window_keys.shape[-2] - tokens
        if over > 0:
            self.window_keys, self.window_values = self.window_keys[:, :, over:], self.window_values[:, :, over:]

    def activate_past_recording(self) -> None:
        """Called before decoding with an assistant, which takes its drafts back."""
        self.record_past = True

    def _tokens_left(self) -> int:
        """Tokens that have left the window."""
        return self.left

    def _tokens_held(self) -> int:
        """Tokens held in one form or the other: the mask's columns before the current tokens."""
        if not self.is_initialized:
            return 0
        left, exact = self._tokens_left(), self.window_keys.shape[-2]
        return left + min(exact, self.window) if left else exact

    def _columns_held(self) -> Tensor | None:
        return None

    def _append(self, rows: tuple[Tensor, ...]) -> None:
        for store, each in zip(self.stores, rows, strict=True):
            store.append(each)

    def _crop_left(self, left: int) -> None:
        self.left = left
        for store in self.stores:
            store.crop(left)
        self._show()

    def _show(self) -> None:
        """Rows of tokens that left the window, also under the names that transformers looks at."""
        self.shown = tuple(store.first(self.left) for store in self.stores)
        self.keys, self.values = self.shown[0], self.shown[-1]

    def _slide(self, held: int) -> None:
        """Drop what no later query will see."""
        if self.sliding_window is None:
            return
        past = max(held - (self.sliding_window - 1), 0)
        self.dropped += past
        for store in self.stores:
            store.drop_first(past)
        self.left = max(self.left - past, 0)
        self._show()
        if self.window:
            self._keep_exact(held - past)

    def get_seq_length(self) -> int:
        return self.dropped + self._tokens_held()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._tokens_held() + query_length, self.dropped

    def get_max_length(self) -> int:
        return -1 if self.sliding_window is None else self.sliding_window

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens (a negative number, as transformers passes it)."""
        removed = -int(tokens_to_remove)  # some versions of transformers pass a tensor
        if removed < 0:
            raise EigenAttnError(f"crop takes a negative number of tokens to remove, not {tokens_to_remove}.")
        if not self.is_initialized:
            return
        remaining = max(self._tokens_held() - removed, 0)
        if removed and self.dropped and remaining < self.get_max_length() - 1:
            raise EigenAttnError(
                "tokens have slid out of this layer's sight, and taking later ones back would need them again: keep "
                "the text within the sliding window, or start a new cache."
            )
        exact = max(self.window_keys.shape[-2] - removed, 0)
        self._crop_left(min(max(remaining - self.window, remaining - exact, 0), self._tokens_left()))
        kept = slice(max(exact - self.window, 0) if self.record_past else 0, exact)
        self.window_keys, self.window_values = self.window_keys[:, :, kept], self.window_values[:, :, kept]
        self._slide(remaining)

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        return [*(store.rows for store in self.stores), self.window_keys, self.window_values]

    def _map(self, change: Callable[[Tensor], Tensor], batch: bool = True) -> None:
        if not self.is_initialized:
            return
        for store in self.stores:
            store.map(change)
        self._show()
        self.window_keys, self.window_values = change(self.window_keys), change(self.window_values)
        if batch and self.layer_idx == self.context.owner:
            self.context.map(change)

    def reset(self) -> None:
        self.keys = self.values = None
        self.window_keys = self.window_values = torch.empty(0)
        self.stores = self.shown = ()
        self.is_initialized, self.left, self.dropped = False, 0, 0
        if self.layer_idx == self.context.owner:
            self.context.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices, ...])

    def offload(self) -> None:
        self._map(lambda x: x.to("cpu", non_blocking=True), batch=False)

    def prefetch(self) -> None:
        self._map(lambda x: x.to(self.device, non_blocking=True), batch=False)
