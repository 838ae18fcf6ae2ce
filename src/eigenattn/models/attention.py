"""`EigenAttention`: one attention module for every family, in low rank."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..cache.adopt import adopt, is_quantised, update_quantised
from ..cache.sight import Far, Near, Sight
from ..cache.static import StaticLatentLayer
from .attend import attend
from .eviction import evict
from .forward_pass import ForwardPass
from .layer import AttentionLayer
from .projections import Heads


class EigenAttention(AttentionLayer):
    """Attention whose keys and values are cached as latents (arXiv 2408.05646, section 4).

    At full rank it computes what the original does. At a lower rank keys and values have an encoder and a decoder
    (`MAPS`), which are parameters applied at run time, or are folded into the projections where nothing stands between:

    - keys: `z = (k - mean) @ E` is cached; with rotary positions `k_hat = mean + z @ U` is formed for all cached keys,
      each rotated to its own position; without, `q @ U.T` meets `z` in the small space, and `q . mean`, equal for
      every key, is dropped by the softmax.
    - values: `z = (v - mean) @ E` is cached; attention sums latents, and its output is `mean + sum @ U`.

    With a window W the last W tokens are kept exactly, and nothing is folded. N neighbouring KV heads may share one
    latent: it is made of all their vectors, and every head decodes its own vectors from the whole of it. A token's keys
    and values may share one, too. Nothing is folded then either.

    Latents may be coded, each channel by a static quantiser of its own (`QUANTISERS`): the cache then holds packed
    codes, and attention sees the latents that codes stand for, with a cache or without.

    What a layer's cache consists of is its `layout`. The way of a token is: `forward` here, what the cache makes of it
    (`eigenattn.cache.layers`), `eigenattn.models.attend`, and in decoding `eigenattn.kernels.decoding`.
    """

    # Looks on in the middle of a pass: statistics are collected so.
    observer: Callable[[EigenAttention, Heads[Tensor], ForwardPass], None] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """As `eigen_class` made it: its class has no place in a module, which pickles look for."""
        return _empty, (type(self).__bases__[1], False), self.__dict__

    def forward(self, hidden_states: Tensor, *args: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As the original's: the output [B, T, C] and the attention weights, where the backend gives them."""
        this = ForwardPass(self, {"hidden_states": hidden_states, **kwargs})
        heads, this.gate = self.project_with_gate(hidden_states)  # [B, H, T, *], [B, G, T, *] twice
        heads = heads._replace(query=this.ready(heads.query))
        if self.observer is not None:
            self.observer(self, heads, this)
        q, k, v = heads
        sight = self._remember(this, k if self.rotates_far else this.rotated(k), v)
        if self.is_read:
            kwargs["shared_kv_states"][self.layer_type] = Shown(self, sight, q.shape[-2])
        out, weights = attend(self, this, q, sight)  # [B, H, T, *]
        evict(self, this, q, sight)
        this.end()
        if this.on_output is not None:
            this.on_output(out)
        out = self.finish(out, this.gate)
        if self.family.adds_residual:
            out = args[0] + nn.functional.dropout(out, self.config.hidden_dropout, self.training)
        return out, weights

    def _remember(self, this: ForwardPass, k: Tensor, v: Tensor) -> Sight:
        """Put keys and values [B, G, T, D] into the cache, if there is one, and give what queries may look at."""
        window, index = self.layout.window, self.layer_idx
        if this.cache is None:
            t = k.shape[-2]
            left = max(t - window, 0)
            far = Far(self.rounded(k[:, :, :left], v[:, :, :left]))
            return Sight(far, Near(k, v, 0) if window else None, 0, t, this.position_ids)
        v = v[..., :0] if self.layout.tied else v  # no cache is to hold it twice
        adopt(this.cache, index, window, self.sliding_window)
        if is_quantised(this.cache.layers[index]):
            return update_quantised(this.cache, index, self.stored(k, v), this.position_ids)
        sight, _ = this.cache.update(k, v, index, encode=self.stored, position_ids=this.position_ids)
        room = this.mask_columns
        if room is not None and room < sight.columns and isinstance(this.cache.layers[index], StaticLatentLayer):
            # The mask of the first pass was made for the layer that stood here before, with room for what slides only.
            rows = tuple(row[:, :, :room] for row in sight.far.rows)
            positions = None if sight.positions is None else sight.positions[:, :room]
            sight = sight._replace(far=Far(rows), columns=room, positions=positions)
        if self.layout.tied and sight.near is not None:
            sight = sight._replace(near=sight.near._replace(values=sight.near.keys))
        return sight


class Shown(NamedTuple):
    """What a layer hands on to later ones that read what it caches."""

    source: EigenAttention
    sight: Sight
    queries: int  # a head, of the pass


class ReadingAttention(AttentionLayer):
    """Attention over what an earlier layer caches, as in the last layers of some families: without latents of its own.

    The earlier layer hands on itself and what its queries may look at. Both have heads of one size and number, and the
    same angles.
    """

    # As for `EigenAttention`, and given the layer that is read besides.
    observer: Callable[[ReadingAttention, EigenAttention, Tensor, ForwardPass], None] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """As `EigenAttention` does."""
        return _empty, (type(self).__bases__[1], True), self.__dict__

    def forward(self, hidden_states: Tensor, *args: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As the original's: the output [B, T, C] and the attention weights, where the backend gives them."""
        source, sight, queries = kwargs["shared_kv_states"][self.layer_type]
        this = ForwardPass(source, {"hidden_states": hidden_states, **kwargs})
        q, gate = self.project_query(hidden_states)
        # Of a prompt, where only the last predictions are asked for, none but their queries come as far as this.
        sight = sight._replace(query=sight.query + queries - q.shape[-2])
        q, this.gate = this.ready(q), gate
        if self.observer is not None:
            self.observer(self, source, q, this)
        out, weights = attend(source, this, q, sight)
        if this.on_output is not None:
            this.on_output(out)
        return self.finish(out, gate), weights


@functools.cache
def eigen_class(original: type[nn.Module], reads: bool = False) -> type[EigenAttention | ReadingAttention]:
    """A subclass of both: transformers collects attention weights by the original class.

    Args:
        reads: whether it has no keys and values of its own.
    """
    ours = ReadingAttention if reads else EigenAttention
    made: Any = type(f"Eigen{original.__name__}", (ours, original), {})
    return made


def _empty(original: type[nn.Module], reads: bool) -> EigenAttention | ReadingAttention:
    """One of `eigen_class` that is to be given its state."""
    made = eigen_class(original, reads)
    return made.__new__(made)
