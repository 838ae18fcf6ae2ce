"""Cache layers that hold latents, and the last tokens exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer, StaticLayer

from ..errors import EigenAttnError
from .context import CacheContext
from .store import Store

# Keys and values [B, G, n, D] to what is stored of them, one tensor a latent: [B, G/N, n, width].
Encode = Callable[[Tensor, Tensor], tuple[Tensor, ...]]

# Tokens of the last update that stay exact beyond the window, so that they can be taken back without loss (chosen: more
# than assisted decoding drafts at a time).
ROLLBACK = 32


class Far(NamedTuple):
    """All tokens that some current query sees from outside its window."""

    rows: tuple[Tensor, ...]  # as stored, one tensor a latent: [B, G/N, F, R], or packed [B, G/N, F, bytes]
    columns: Tensor | None = None  # [B, heads, F], the mask's column of each row; None: row n is column n


class Near(NamedTuple):
    """The last tokens, exact and before rotation, the current ones included."""

    keys: Tensor  # [B, G, N, D]
    values: Tensor  # [B, G, N, D]
    first: int | Tensor  # mask column of the first of them; negative where a static window is not full yet


class Sight(NamedTuple):
    """What the queries of a pass may look at."""

    far: Far
    near: Near | None  # None without a window: all tokens are far
    query: int | Tensor  # mask column of the first current token
    columns: int  # of the mask
    positions: Tensor | None  # [B, columns]; None where the model has none


class LatentLayer(CacheLayerMixin):
    """Grows with the text: rows of latents, plain or packed, and exact `window_keys`, `window_values`.

    After an update of T tokens it holds latents of all but the last `window` tokens, and the last `window + T` tokens
    exactly, T being counted up to `ROLLBACK`: so `crop` takes back what the last update brought without loss. Where
    `crop` takes back more, tokens that left the window are known by their latents alone.

    Args:
        context: what it shares with the cache's other layers.
        layer_idx: its place among them.
        window: exact tokens, W.
        sliding_window: tokens visible at all, in a layer with sliding-window attention.
    """

    is_compileable = False
    is_croppable = True

    def __init__(self, context: CacheContext, layer_idx: int, window: int, sliding_window: int | None = None) -> None:
        super().__init__()
        self.context, self.layer_idx = context, layer_idx
        self.window = window
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.window_keys: Tensor | None = None
        self.window_values: Tensor | None = None
        self.stores: tuple[Store, ...] = ()
        self.dropped = 0  # tokens that slid out of sight

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.window_keys, self.window_values = key_states[:, :, :0], value_states[:, :, :0]
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
        if self.context.begin(self.layer_idx) and position_ids is not None:
            self.context.write(self.get_seq_length(), position_ids, len(key_states))
        new, held, latents = key_states.shape[-2], self.window_keys.shape[-2], self._tokens_left()
        seen = self._tokens_held()
        near_keys = torch.cat([self.window_keys, key_states], dim=-2) if held else key_states
        near_values = torch.cat([self.window_values, value_states], dim=-2) if held else value_states
        leaving = slice(latents - (seen - held), max(seen + new - self.window, latents) - (seen - held))
        if leaving.stop > leaving.start:
            self._append(encode(near_keys[:, :, leaving], near_values[:, :, leaving]))
        near = Near(near_keys, near_values, seen - held) if self.window else None
        positions = self.context.positions(self.dropped, seen + new, self.device)
        sight = Sight(Far(self._rows(), self._columns_held()), near, seen, seen + new, positions)
        if self.window:
            # Copies, for a slice would keep the whole prompt's keys alive.
            last = slice(max(near_keys.shape[-2] - self.window - min(new, ROLLBACK), 0), None)
            self.window_keys, self.window_values = near_keys[:, :, last].clone(), near_values[:, :, last].clone()
        if self.sliding_window is not None:
            self._slide(seen + new)
        return sight, None

    def _tokens_left(self) -> int:
        """Tokens that have left the window."""
        return len(self.stores[0])

    def _tokens_held(self) -> int:
        """Tokens held in one form or the other: the mask's columns before the current tokens."""
        if not self.is_initialized:
            return 0
        left, exact = self._tokens_left(), self.window_keys.shape[-2]
        return left + min(exact, self.window) if left else exact

    def _rows(self) -> tuple[Tensor, ...]:
        return tuple(store.rows for store in self.stores)

    def _columns_held(self) -> Tensor | None:
        return None

    def _append(self, rows: tuple[Tensor, ...]) -> None:
        for store, each in zip(self.stores, rows, strict=True):
            store.append(each)
        self._show()

    def _crop_left(self, left: int) -> None:
        for store in self.stores:
            store.crop(left)
        self._show()

    def _show(self) -> None:
        """Under the names that transformers looks at."""
        self.keys, self.values = self.stores[0].rows, self._rows()[-1]

    def _slide(self, held: int) -> None:
        """Drop what no later query will see."""
        past = max(held - (self.sliding_window - 1), 0)
        self.dropped += past
        for store in self.stores:
            store.drop_first(past)
        self._show()
        if self.window:
            exact = held - past
            self.window_keys = self.window_keys[:, :, max(self.window_keys.shape[-2] - exact, 0) :]
            self.window_values = self.window_values[:, :, max(self.window_values.shape[-2] - exact, 0) :]

    def get_seq_length(self) -> int:
        return self.dropped + self._tokens_held()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._tokens_held() + query_length, self.dropped

    def get_max_length(self) -> int:
        return -1 if self.sliding_window is None else self.sliding_window

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens (a negative number, as transformers passes it)."""
        removed = -tokens_to_remove
        if removed < 0:
            raise EigenAttnError(f"crop takes a negative number of tokens to remove, not {tokens_to_remove}.")
        if removed == 0 or not self.is_initialized:
            return
        if self.dropped:
            raise EigenAttnError(
                "tokens have slid out of this layer's sight, and taking later ones back would need them again: keep "
                "the text within the sliding window, or start a new cache."
            )
        remaining = max(self._tokens_held() - removed, 0)
        exact = max(self.window_keys.shape[-2] - removed, 0)
        self._crop_left(min(max(remaining - self.window, remaining - exact, 0), self._tokens_left()))
        self.window_keys, self.window_values = self.window_keys[:, :, :exact], self.window_values[:, :, :exact]

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        held = [store.rows for store in self.stores]
        return [*held, self.window_keys, self.window_values] if self.window and self.is_initialized else held

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
        self.keys = self.values = self.window_keys = self.window_values = None
        self.stores = ()
        self.is_initialized, self.dropped = False, 0
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


class StaticLatentLayer(StaticLayer):
    """The same in tensors of fixed size, for compiled graphs: room for latents of all tokens, and a rolling window.

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
        self.window_keys: Tensor | None = None
        self.window_values: Tensor | None = None

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
        if self.context.begin(self.layer_idx) and position_ids is not None:
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


def adopt(cache: Any, layer_idx: int, window: int, sliding_window: int | None) -> None:
    """Have one layer of a transformers cache hold latents, the first time it is met.

    A quantised cache of transformers stays as it is where there is no window: it quantises latents.

    Args:
        window: exact tokens, W.
        sliding_window: tokens visible at all to the layer, or None.

    Raises:
        EigenAttnError: if the layer is of a kind that cannot, or holds tokens already.
    """
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= layer_idx:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[layer_idx]
    if isinstance(layer, (LatentLayer, StaticLatentLayer)) or (is_quantised(layer) and not window):
        return
    if layer.is_initialized:
        raise EigenAttnError("this cache was filled by another model: pass a new one.")
    context = CacheContext.of(cache)
    if isinstance(layer, StaticLayer):
        longest = max(each.get_max_length() for each in cache.layers)
        if sliding_window is not None and longest == sliding_window and all(cache.is_sliding):
            raise EigenAttnError(
                "a static cache in which every layer slides has no room for latents: use a dynamic cache."
            )
        cache.layers[layer_idx] = StaticLatentLayer(context, layer_idx, window, longest, layer.is_sliding)
        return
    if type(layer).__name__ not in ("DynamicLayer", "DynamicSlidingWindowLayer"):
        raise EigenAttnError(
            f"a cache of {type(layer).__name__} cannot hold the exact window: use a dynamic or a static cache "
            "(coded latents are held by both)."
        )
    sliding = layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
    slides = sliding is not None or sliding_window is not None
    evicts = getattr(cache, "eviction", None) is not None and not slides
    make = cache.evicting_layer if evicts else LatentLayer
    cache.layers[layer_idx] = make(context, layer_idx, window, sliding)


def is_quantised(layer: Any) -> bool:
    """Whether a layer is of a quantised cache of transformers."""
    return "Quantized" in type(layer).__name__


def update_quantised(cache: Any, layer_idx: int, rows: tuple[Tensor, ...], position_ids: Tensor | None) -> Sight:
    """Add latents [B, G/N, T, R] to a quantised cache of transformers; as `LatentLayer.update`.

    Raises:
        EigenAttnError: if codes would be quantised again, or groups of a scale do not fit latents of any length.
    """
    layer, name = cache.layers[layer_idx], type(cache.layers[layer_idx]).__name__
    if rows[0].dtype == torch.uint8:
        raise EigenAttnError(f"the latents are coded already, and {name} would do it again: use a dynamic cache.")
    if len(rows) != 2:
        raise EigenAttnError(f"{name} cannot hold latents that keys and values share: use a dynamic cache.")
    group = getattr(layer, "q_group_size", 1)
    sizes = [row.shape[1] * row.shape[-1] for row in rows]  # elements of a token
    if any(size % group for size in sizes):
        raise EigenAttnError(
            f"{name} quantises {group} elements together, and a token's latents are of {sizes[0]} and {sizes[1]}: pass "
            f"a q_group_size that divides both, such as {math.gcd(*sizes, group)}, or compress with coded latents."
        )
    context, start, new = CacheContext.of(cache), layer.get_seq_length(), rows[0].shape[-2]
    if context.begin(layer_idx) and position_ids is not None:
        context.write(start, position_ids, len(rows[0]))
    held = cache.update(*rows, layer_idx)
    return Sight(Far(tuple(held)), None, start, start + new, context.positions(0, start + new, rows[0].device))
