"""Cache layers that hold the last tokens exactly and everything earlier as latents."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer, StaticLayer

from ..errors import EigenAttnError
from .store import Store

# Exact keys and values [B, G, n, D] to what is stored of them, [B, G, n, width]: latents, or bytes of packed codes.
Encode = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

# Tokens of the last update that stay exact beyond the window, so that they can be taken back without loss (chosen: more
# than assisted decoding drafts at a time).
ROLLBACK = 32


class Far(NamedTuple):
    """All tokens that some current query sees from outside its window, as stored."""

    keys: Tensor  # [B, G, F, R_k], or packed [B, G, F, bytes]
    values: Tensor  # [B, G, F, R_v], or packed [B, G, F, bytes]
    columns: Tensor | None = None  # [B, G, F], the mask's column of each row; None: row n is column n


class Near(NamedTuple):
    """The last tokens, exact and before rotation, the current ones included."""

    keys: Tensor  # [B, G, N, D]
    values: Tensor  # [B, G, N, D]
    first: int | Tensor  # mask column of the first of them; negative where a static window is not full yet
    query: int | Tensor  # mask column of the first current token


class WindowedLayer(CacheLayerMixin):
    """Grows with the text: latents `keys`, `values`, plain or packed, and exact `window_keys`, `window_values`.

    Without a window it is given latents, and holds nothing else.

    After an update of T tokens it holds latents of all but the last `window` tokens, and the last `window + T` tokens
    exactly, T being counted up to `ROLLBACK`: so `crop` takes back what the last update brought without loss. Where
    `crop` takes back more, tokens that left the window are known by their latents alone.

    Args:
        window: exact tokens, W.
        sliding_window: tokens visible at all, in a layer with sliding-window attention.
    """

    is_compileable = False
    is_croppable = True

    def __init__(self, window: int, sliding_window: int | None = None) -> None:
        super().__init__()
        self.window = window
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.window_keys: Tensor | None = None
        self.window_values: Tensor | None = None
        self._stores: tuple[Store, ...] = ()
        self.columns: Tensor | None = None
        self.dropped = 0  # tokens that slid out of sight

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.window_keys, self.window_values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, encode: Encode = lambda *rows: rows, **kwargs: Any
    ):
        """Add exact keys and values [B, G, T, D] and return what the current queries may look at: `Far`, `Near`.

        Args:
            encode: maps exact keys and values to what is stored of them; by default those are given.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._stores = tuple(Store(empty) for empty in encode(self.window_keys, self.window_values))
            self._show()
        new, held, latents = key_states.shape[-2], self.window_keys.shape[-2], self._left()
        seen = self._held_tokens()
        near_keys = torch.cat([self.window_keys, key_states], dim=-2)
        near_values = torch.cat([self.window_values, value_states], dim=-2)
        leaving = slice(latents - (seen - held), max(seen + new - self.window, latents) - (seen - held))
        if leaving.stop > leaving.start:
            self._append(encode(near_keys[:, :, leaving], near_values[:, :, leaving]))
        far, near = Far(self.keys, self.values, self.columns), Near(near_keys, near_values, seen - held, seen)
        # Copies, for a slice would keep the whole prompt's keys alive.
        kept = self.window + min(new, ROLLBACK) if self.window else 0
        last = slice(max(near_keys.shape[-2] - kept, 0), None)
        self.window_keys, self.window_values = near_keys[:, :, last].clone(), near_values[:, :, last].clone()
        if self.sliding_window is not None:
            self._slide(seen + new)
        return far, near

    def _left(self) -> int:
        """Tokens that have left the window."""
        return self.keys.shape[-2]

    def _append(self, rows: tuple[Tensor, ...]) -> None:
        for store, each in zip(self._stores, rows, strict=True):
            store.append(each)
        self._show()

    def _crop_left(self, left: int) -> None:
        for store in self._stores:
            store.crop(left)
        self._show()

    def _show(self) -> None:
        self.keys, self.values = (store.rows for store in self._stores)

    def _slide(self, held: int) -> None:
        """Drop what no later query will see."""
        past = max(held - (self.sliding_window - 1), 0)
        self.dropped += past
        for store in self._stores:
            store.drop_first(past)
        self._show()
        exact = held - past
        self.window_keys = self.window_keys[:, :, max(self.window_keys.shape[-2] - exact, 0) :]
        self.window_values = self.window_values[:, :, max(self.window_values.shape[-2] - exact, 0) :]

    def _held_tokens(self) -> int:
        """Tokens held in one form or the other: the mask's columns before the current tokens."""
        if not self.is_initialized:
            return 0
        left, exact = self._left(), self.window_keys.shape[-2]
        return left + min(exact, self.window) if left else exact

    def get_seq_length(self) -> int:
        return self.dropped + self._held_tokens()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._held_tokens() + query_length, self.dropped

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
        remaining = max(self._held_tokens() - removed, 0)
        exact = max(self.window_keys.shape[-2] - removed, 0)
        self._crop_left(min(max(remaining - self.window, remaining - exact, 0), self._left()))
        self.window_keys, self.window_values = self.window_keys[:, :, :exact], self.window_values[:, :, :exact]

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        if not self.is_initialized:
            return
        for store in self._stores:
            store.map(change)
        self._show()
        self.window_keys, self.window_values = change(self.window_keys), change(self.window_values)

    def reset(self) -> None:
        self.keys = self.values = self.window_keys = self.window_values = None
        self._stores = ()
        self.is_initialized, self.dropped = False, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices, ...])

    def offload(self) -> None:
        self._map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._map(lambda x: x.to(self.device, non_blocking=True))


class WindowedStaticLayer(StaticLayer):
    """The same in tensors of fixed size, for compiled graphs: room for latents of all tokens, and a rolling window.

    Slot j of the window is token `length - W + j`. A layer with sliding-window attention has room for all tokens too,
    and the mask hides those out of sight.
    """

    def __init__(self, window: int, max_cache_len: int, is_sliding: bool) -> None:
        super().__init__(max_cache_len=max_cache_len)
        self.is_sliding = is_sliding
        self.window = window
        self.window_keys: Tensor | None = None
        self.window_values: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, encode: Encode, **kwargs: Any):
        """As `WindowedLayer.update`."""
        if not self.is_initialized:
            initialise_static(self, *encode(key_states, value_states))
            shape = (*key_states.shape[:2], self.window, key_states.shape[-1])
            self.window_keys, self.window_values = key_states.new_zeros(shape), value_states.new_zeros(shape)
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self.window_keys)
                torch._dynamo.mark_static_address(self.window_values)
        new, start = key_states.shape[-2], self.cumulative_length.clone()
        near_keys = torch.cat([self.window_keys, key_states], dim=-2)
        near_values = torch.cat([self.window_values, value_states], dim=-2)
        keys, values = encode(near_keys[:, :, :new], near_values[:, :, :new])
        # Slots of a window that is not full yet have negative tokens. The remainder sends them to the last places,
        # which are never read: the last tokens are always in the window.
        places = (torch.arange(new, device=self.device) + start - self.window) % self.max_cache_len
        self.keys.index_copy_(2, places, keys)
        self.values.index_copy_(2, places, values)
        self.window_keys.copy_(near_keys[:, :, new:])
        self.window_values.copy_(near_values[:, :, new:])
        self.cumulative_length.add_(new)
        return Far(self.keys, self.values), Near(near_keys, near_values, start - self.window, start)

    def reset(self) -> None:
        super().reset()
        if self.is_initialized:
            self.window_keys.zero_()
            self.window_values.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        if self.is_initialized:
            self.window_keys = self.window_keys.index_select(0, beam_idx.to(self.window_keys.device))
            self.window_values = self.window_values.index_select(0, beam_idx.to(self.window_values.device))


def initialise_static(layer: StaticLayer, keys: Tensor, values: Tensor) -> None:
    """Give a layer of a static cache its tensors.

    transformers takes it that there are as many heads of values as of keys, [B, heads, n, width] of what is stored.
    """
    layer.lazy_initialization(keys, values)
    if values.shape[1] != keys.shape[1]:
        layer.values = layer.values.new_zeros(*values.shape[:2], *layer.values.shape[2:])
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(layer.values)


def with_window(cache: Any, layer_idx: int, window: int, sliding_window: int | None) -> None:
    """Make one layer of a transformers cache a windowed one, the first time it is met.

    Args:
        window: exact tokens, W.
        sliding_window: tokens visible at all to the layer, or None.

    Raises:
        EigenAttnError: if the layer is of a kind that cannot hold a window, or holds tokens already.
    """
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= layer_idx:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[layer_idx]
    if isinstance(layer, (WindowedLayer, WindowedStaticLayer)):
        return
    if layer.is_initialized:
        raise EigenAttnError("this cache was filled by another model: pass a new one.")
    if isinstance(layer, StaticLayer):
        longest = max(each.get_max_length() for each in cache.layers)
        if sliding_window is not None and longest == sliding_window and all(cache.is_sliding):
            raise EigenAttnError(
                "a static cache in which every layer slides has no room for latents: use a dynamic cache."
            )
        cache.layers[layer_idx] = WindowedStaticLayer(window, longest, layer.is_sliding)
        return
    if type(layer).__name__ not in ("DynamicLayer", "DynamicSlidingWindowLayer"):
        raise EigenAttnError(
            f"a cache of {type(layer).__name__} cannot hold the exact window: use a dynamic or a static cache "
            "(quantised latents, which compressing with bits_per_element gives, are held by both)."
        )
    sliding = layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
    slides = sliding is not None or sliding_window is not None
    evicts = getattr(cache, "eviction", None) is not None and not slides
    cache.layers[layer_idx] = cache.evicting_layer(window) if evicts else WindowedLayer(window, sliding)


def prepare(cache: Any, layer_idx: int, rows: tuple[Tensor, Tensor]) -> None:
    """Prepare a layer of transformers' caches for a layer's latents: they cannot all hold them by themselves.

    Args:
        rows: what is to be stored of keys and values, [B, G/N, T, width] each.

    Raises:
        EigenAttnError: if codes would be quantised again, or groups of a scale do not fit latents of any length.
    """
    layer = cache.layers[layer_idx] if layer_idx < len(getattr(cache, "layers", ())) else None
    if isinstance(layer, StaticLayer) and not layer.is_initialized:
        initialise_static(layer, *rows)
    name = type(layer).__name__
    if "Quantized" not in name:
        return
    if rows[0].dtype == torch.uint8:
        raise EigenAttnError(f"the latents are quantised already, and {name} would do it again: use a dynamic cache.")
    if not rows[1].shape[-1]:
        raise EigenAttnError(f"{name} cannot hold latents that keys and values share: use a dynamic cache.")
    group = getattr(layer, "q_group_size", 1)
    sizes = [row.shape[1] * row.shape[-1] for row in rows]  # elements of a token
    if any(size % group for size in sizes):
        raise EigenAttnError(
            f"{name} quantises {group} elements together, and a token's latents are of {sizes[0]} and {sizes[1]}: pass "
            f"a q_group_size that divides both, such as {math.gcd(*sizes, group)}, or compress with bits_per_element."
        )
