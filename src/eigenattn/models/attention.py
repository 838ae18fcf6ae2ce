"""`EigenAttention`: one attention module for every family, in low rank."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..cache.codebook import DEGREE
from ..cache.packing import Widths
from ..config import ALONE, Sharing
from ..errors import EigenAttnError
from ..kernels.reference import add_mask, causal_mask
from .families import Family
from .latents import attend_to_latents
from .maps import MAPS, QUANTISERS, LatentMaps, side_of
from .placement import execution_device
from .projections import Heads, like, split_heads
from .rotary import key_positions, once_a_pass
from .windowed import attend_with_window


class EigenAttention(LatentMaps):
    """Attention whose keys and values are cached as latents (arXiv 2408.05646, section 4).

    At full rank it computes what the original does. At a lower rank keys and values have an encoder and a decoder
    (`MAPS`), which are parameters applied at run time, or are folded into the projections where nothing stands between:

    - keys: `z = (k - mean) @ E` is cached; with rotary positions `k_hat = mean + z @ U` is formed for all cached keys,
      each rotated to its own position; without, `q @ U.T` meets `z` in the small space, and `q . mean`, equal for
      every key, is dropped by the softmax.
    - values: `z = (v - mean) @ E` is cached; attention sums latents, and its output is `mean + sum @ U`.

    With a window W the last W tokens are kept exactly, and nothing is folded: see `eigenattn.models.windowed`.

    N neighbouring KV heads may share one latent (`sharing`): it is made of all their vectors, and every head decodes
    its own vectors from the whole of it. A token's keys and values may share one, too (`joint`). Nothing is
    folded then either.

    Latents may be quantised, each channel by a static quantiser of its own (`QUANTISERS`): the cache then holds
    packed codes, and attention the latents that codes stand for, with a cache or without.

    Args:
        original: the attention module of a transformers model, whose projections and norms are taken over.
        family: its row of the table.
        config: configuration of the (text) model.
        rotary: the model's own rotary module, asked for the angles of cached keys; None without rotary positions.
    """

    is_causal = True

    def __init__(self, original: nn.Module, family: Family, config: Any, rotary: nn.Module | None) -> None:
        nn.Module.__init__(self)
        self.family = family
        self.config = config
        self.layer_idx: int = original.layer_idx
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = family.kv_heads(config)
        self.head_dim: int = family.head_dim(config)
        self.rank_k = self.rank_v = self.head_dim
        self.sharing = ALONE
        self.part = (0, 1)  # which of how many processes this is, that share the heads
        self.projected = (self.head_dim,) * 3  # dimensions a head that the q, k and v projections give
        self.num_key_value_groups = self.heads // self.kv_heads  # transformers' attention functions read this name
        self.scaling: float = getattr(original, family.scale)
        # Only FlashAttention reads it, others have it in the mask. Some modules leave it to the configuration.
        self.sliding_window: int | None = getattr(original, "sliding_window", getattr(config, "sliding_window", None))
        self.layer_type: str | None = getattr(original, "layer_type", None)
        self.softcap: float | None = getattr(original, family.softcap) if family.softcap else None
        self.clip: float | None = getattr(original, family.clip) if family.clip else None
        dropout = getattr(original, family.dropout)
        self.dropout: float = dropout.p if isinstance(dropout, nn.Dropout) else dropout
        switched_on = family.rotary_switch is None or bool(getattr(original, family.rotary_switch))
        # Inside a tuple the rotary module is held without being registered a second time.
        self._rotary = (rotary,) if rotary is not None and switched_on else None
        for name in (*family.qkv, family.output, *(family.norms or ()), family.output_dropout):
            if name is not None and getattr(original, name, None) is not None:
                setattr(self, name, getattr(original, name))
        for name in (*MAPS, *QUANTISERS):
            self.register_parameter(name, None)
        self.window = 0
        self.widths_k: Widths | None = None  # of quantised latents
        self.widths_v: Widths | None = None
        self.observer: Callable[[EigenAttention, Heads, dict[str, Any]], None] | None = None
        self.train(original.training)

    def extra_repr(self) -> str:
        text = (
            f"heads={self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}, "
            f"rank_k={self.rank_k}, rank_v={self.rank_v}, window={self.window}"
        )
        if self.widths_k is not None:
            text += f", widths_k={tuple(self.widths_k)}, widths_v={tuple(self.widths_v)}"
        return text

    @property
    def rotates(self) -> bool:
        """Whether this layer turns queries and keys by rotary positions."""
        return self._rotary is not None

    @property
    def normalises(self) -> bool:
        """Whether norms stand between the projections of queries and keys and what attention sees."""
        return self.family.norms is not None and hasattr(self, self.family.norms[1])

    @property
    def keeps_projections(self) -> bool:
        """Whether all maps are applied at run time, and the projections stay the original's."""
        return self.window > 0 or self.sharing.together > 1 or self.joint

    @property
    def folds(self) -> Heads:
        """Whether the maps of queries, keys and values can be folded into their projections."""
        free = not self.clip and not self.keeps_projections
        plain = free and not self.normalises
        return Heads(query=plain and not self.rotates, key=plain, value=free)

    @property
    def output_projection(self) -> nn.Module:
        """The projection that follows attention."""
        return getattr(self, self.family.output)

    def allocate(
        self,
        rank_k: int,
        rank_v: int,
        centred: bool,
        window: int,
        widths_k: Widths | None = None,
        widths_v: Widths | None = None,
        sharing: Sharing = ALONE,
    ) -> None:
        """Take the shapes that ranks ask for, folded, with values left empty: what a loader then fills.

        Args:
            rank_k, rank_v: ranks of keys and of values; full rank means untouched, unless it is quantised. Where
                `rank_v` is 0, keys and values share latents of rank `rank_k`.
            centred: whether the bases have means, which fold into biases.
            window: exact tokens, W; with a window the projections keep their shapes.
            widths_k, widths_v: of quantised latents; both or none.
            sharing: KV heads that share a latent, N.
        """
        self.sharing = sharing
        self.rank_k, self.rank_v, self.window = rank_k, rank_v, window
        self.widths_k, self.widths_v = widths_k, widths_v
        d, folds = self.head_dim, self.folds
        small_k = rank_k < self.latent_dim("key") or self.joint or widths_k is not None
        small_v = rank_v < self.latent_dim("value") or widths_v is not None
        self.projected = (
            rank_k if folds.query else d,
            rank_k if folds.key else d,
            rank_v if folds.value else d,
        )
        if not self.keeps_projections:
            self._resize_projections(centred and small_k, centred and small_v)
        kept = {
            "key_encoder": small_k and not folds.key,
            "key_decoder": small_k and not folds.query,
            "key_mean": small_k and centred and (self.rotates or not folds.key),
            "value_encoder": small_v and not folds.value,
            "value_decoder": small_v and self.keeps_projections,
            "value_mean": small_v and centred and not folds.value,
            **{name: widths_k is not None and (name.startswith("key") or not self.joint) for name in QUANTISERS},
        }
        output = self.output_projection
        factory = {"device": execution_device(output), "dtype": output.weight.dtype}
        for name in (name for name, keep in kept.items() if keep):
            side = side_of(name)
            channels = self.latent_heads(side) * self.rank_of(side)
            if name in QUANTISERS:
                shape: tuple[int, ...] = (channels, DEGREE + 1)
            else:
                shape = (self.kv_heads * d,) if name.endswith("mean") else (channels, self.latent_dim(side))
            setattr(self, name, nn.Parameter(torch.empty(shape, **factory)))

    def take_part(self, rank: int, size: int) -> None:
        """Compute with the heads of one of `size` processes only, whose maps and projections are split so."""
        self.part = (rank, size)
        self.heads, self.kv_heads = self.heads // size, self.kv_heads // size

    def _own(self, x: Tensor, heads: int) -> Tensor:
        """This process's share of something a head [B, heads, ...], where it was given for the heads of all."""
        return x if x.shape[1] == heads else x.narrow(1, self.part[0] * heads, heads)

    def _resize_projections(self, offset_k: bool, offset_v: bool) -> None:
        """Empty projections of the folded sizes; `offset_k` and `offset_v` say whether means give biases."""
        family, hidden = self.family, self.config.hidden_size
        rows = [n * size for n, size in zip((self.heads, self.kv_heads, self.kv_heads), self.projected, strict=True)]
        offsets = [False, offset_k and self.folds.key, offset_v and self.folds.value]
        if family.fused:
            rows, offsets = [sum(rows)], [any(offsets)]
        shapes = [(out_features, hidden) for out_features in rows] + [(hidden, self.heads * self.rank_v)]
        names = [*family.qkv, family.output]
        for name, (out_features, in_features), offset in zip(names, shapes, [*offsets, offset_v], strict=True):
            old = getattr(self, name)
            factory = {"device": old.weight.device, "dtype": old.weight.dtype}
            setattr(self, name, like(old, out_features, in_features, old.bias is not None or offset, **factory))

    def project(self, hidden_states: Tensor) -> Heads:
        """Queries [B, H, T, *], keys and values [B, G, T, *], after norms and clipping, before rotation."""
        family = self.family
        lead = hidden_states.shape[:-1]
        flat = [getattr(self, name)(hidden_states) for name in family.qkv]
        if self.clip:
            flat = [x.clamp(-self.clip, self.clip) for x in flat]
        if self.normalises and family.norm_on == "width":
            flat[:2] = self._normalised(*flat[:2])
        if family.fused:
            processes = self.part[1] if family.fused == "blocks" else 1  # then all heads come here
            counts = self.heads * processes, self.kv_heads * processes
            parts = split_heads(flat[0], self.projected, *counts, family.fused)
        else:
            parts = Heads(*(x.view(*lead, -1, size) for x, size in zip(flat, self.projected, strict=True)))
        if self.normalises and family.norm_on == "heads":
            parts = Heads(*self._normalised(*parts[:2]), parts.value)
        parts = Heads(*(x.transpose(1, 2) for x in parts))
        if self.normalises and family.norm_on == "heads_first":
            parts = Heads(*self._normalised(*parts[:2]), parts.value)
        counts = self.heads, self.kv_heads, self.kv_heads
        return Heads(*(self._own(x, count) for x, count in zip(parts, counts, strict=True)))

    def _normalised(self, query: Tensor, key: Tensor) -> list[Tensor]:
        return [getattr(self, name)(x) for name, x in zip(self.family.norms, (query, key), strict=True)]

    def angles(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions [B or 1, S], from the model's own rotary module."""
        arguments = (self.layer_type,) if self.family.rotary_by_layer_type else ()
        cos, sin = self._rotary[0](x, positions, *arguments)
        return cos.to(x.device), sin.to(x.device)  # the module may be on another device

    def key_angles(self, x: Tensor, position_ids: Tensor, cached: int, length: int | Tensor) -> tuple[Tensor, Tensor]:
        """`angles` of cached keys [B or 1, S, width], shared by the layers of a pass; arguments as `key_positions`."""

        def compute() -> tuple[Tensor, Tensor]:
            return self.angles(x, key_positions(position_ids, cached, length))

        return once_a_pass(position_ids, self.layer_idx, ("angles", cached, self.layer_type), compute)

    def forward(self, hidden_states: Tensor, *args: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As the original's: the output [B, T, C] and the attention weights, where the backend gives them."""
        family = self.family
        if kwargs.get("cache") is not None:
            raise EigenAttnError("continuous batching has a paged cache for full-rank heads only: use `generate`.")
        cache = kwargs.get(family.cache_argument)
        heads = self.project(hidden_states)  # [B, H, T, *], [B, G, T, *] twice
        if self.observer is not None:
            self.observer(self, heads, kwargs)
        if self.window:
            out, weights = attend_with_window(self, heads, cache, kwargs)
        else:
            out, weights = attend_to_latents(self, heads, cache, kwargs)
        out = self.output_projection(out.transpose(1, 2).flatten(2))
        if family.output_dropout is not None:
            out = getattr(self, family.output_dropout)(out)
        if family.adds_residual:
            out = args[0] + nn.functional.dropout(out, self.config.hidden_dropout, self.training)
        return out, weights

    def implementation_for(self, kwargs: dict[str, Any]) -> str:
        """Name of the attention backend to use."""
        # Falcon asks its attention for weights whatever the backend; the others have transformers collect them.
        return "eager" if kwargs.get("output_attentions") else self.config._attn_implementation

    def mask_for(self, q: Tensor, keys: int, kwargs: dict[str, Any]) -> Any:
        """The mask over `keys` keys as the backends take it, with the family's bias on the scores added.

        Returns:
            [B or 1, H or 1, T, keys], boolean (True is visible) or additive, or None for causal attention. A mask only
            the backend asked for understands (FlexAttention's block mask) passes.
        """
        mask, bias = self.mask_and_bias(keys, kwargs)
        if bias is None:
            return mask
        bias = bias.to(q.dtype)
        if mask is None:
            mask = causal_mask(q.shape[-2], keys, q.device) if q.shape[-2] > 1 else bias.new_zeros(())
        return add_mask(bias, mask)

    def mask_and_bias(self, keys: int, kwargs: dict[str, Any]) -> tuple[Any, Tensor | None]:
        """The mask over `keys` keys, True visible if it is boolean, and the family's bias [B or 1, H, 1, keys]."""
        mask = kwargs.get("attention_mask")
        bias = kwargs.get(self.family.bias_argument) if self.family.bias_argument else None
        if isinstance(mask, Tensor) and mask.dim() == 4:
            mask = mask[..., :keys]
            mask = ~mask if mask.dtype == torch.bool and self.family.mask_true_is_masked else mask
        elif bias is None or mask is not None:
            return mask, None
        # MPT gives [H, 1, longest] for all rows, BLOOM [B * H, 1, keys].
        if bias is None:
            return mask, None
        bias = bias.view(-1, self.heads * self.part[1], 1, bias.shape[-1])
        return mask, self._own(bias, self.heads)[..., -keys:]


@functools.cache
def eigen_class(original: type[nn.Module]) -> type[EigenAttention]:
    """A subclass of both: transformers collects attention weights by the original class."""
    return type(f"Eigen{original.__name__}", (EigenAttention, original), {})
