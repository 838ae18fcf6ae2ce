"""`EigenAttention`: one attention module for every family, in low rank."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import EigenAttnError
from ..kernels import BACKENDS
from ..kernels.reference import causal_mask
from ..kernels.sdpa import widen
from .families import Family
from .projections import Heads, like, split_heads
from .rotary import key_positions, rotate

# A side at full rank needs none of these. Maps are stored as [G * R, D] and means as [G * D], so that tensor
# parallelism can split them by head.
MAPS = ("key_encoder", "key_decoder", "key_mean", "value_encoder", "value_decoder", "value_mean")


class EigenAttention(nn.Module):
    """Attention whose keys and values are cached as latents (arXiv 2408.05646, section 4).

    At full rank it computes what the original does. At a lower rank keys and values have an encoder and a decoder
    (`MAPS`), which are parameters applied at run time, or are folded into the projections where nothing stands between:

    - keys: `z = (k - mean) @ E` is cached; with rotary positions `k_hat = mean + z @ U` is formed for all cached keys,
      each rotated to its own position; without, `q @ U.T` meets `z` in the small space, and `q . mean`, equal for
      every key, is dropped by the softmax.
    - values: `z = (v - mean) @ E` is cached; attention sums latents, and its output is `mean + sum @ U`.

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
        for name in MAPS:
            self.register_parameter(name, None)
        self.observer: Callable[[EigenAttention, Heads], None] | None = None
        self.train(original.training)

    def extra_repr(self) -> str:
        return (
            f"heads={self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}, "
            f"rank_k={self.rank_k}, rank_v={self.rank_v}"
        )

    @property
    def rotates(self) -> bool:
        """Whether this layer turns queries and keys by rotary positions."""
        return self._rotary is not None

    @property
    def normalises(self) -> bool:
        """Whether norms stand between the projections of queries and keys and what attention sees."""
        return self.family.norms is not None and hasattr(self, self.family.norms[1])

    @property
    def folds(self) -> Heads:
        """Whether the maps of queries, keys and values can be folded into their projections."""
        plain = not self.clip and not self.normalises
        return Heads(query=plain and not self.rotates, key=plain, value=not self.clip)

    @property
    def output_projection(self) -> nn.Module:
        """The projection that follows attention."""
        return getattr(self, self.family.output)

    def allocate(self, rank_k: int, rank_v: int, centred: bool) -> None:
        """Take the shapes that ranks ask for, folded, with values left empty: what a loader then fills.

        Args:
            rank_k, rank_v: ranks of keys and of values; the head dimension means untouched.
            centred: whether the bases have means, which fold into biases.
        """
        d, folds = self.head_dim, self.folds
        self.rank_k, self.rank_v = rank_k, rank_v
        small_k, small_v = rank_k < d, rank_v < d
        self.projected = (
            rank_k if folds.query else d,
            rank_k if folds.key else d,
            rank_v if folds.value else d,
        )
        old = getattr(self, self.family.qkv[0])
        factory = {"device": old.weight.device, "dtype": old.weight.dtype}
        rows = [n * size for n, size in zip((self.heads, self.kv_heads, self.kv_heads), self.projected, strict=True)]
        offsets = [False, centred and small_k and folds.key, centred and small_v and folds.value]
        if self.family.fused:
            rows, offsets = [sum(rows)], [any(offsets)]
        hidden = self.config.hidden_size
        for name, out_features, offset in zip(self.family.qkv, rows, offsets, strict=True):
            old = getattr(self, name)
            setattr(self, name, like(old, out_features, hidden, old.bias is not None or offset, **factory))
        old, offset = self.output_projection, centred and small_v
        new = like(old, hidden, self.heads * rank_v, old.bias is not None or offset, **factory)
        setattr(self, self.family.output, new)
        kept = {
            "key_encoder": small_k and not folds.key,
            "key_decoder": small_k and not folds.query,
            "key_mean": small_k and centred and (self.rotates or not folds.key),
            "value_encoder": small_v and not folds.value,
            "value_mean": small_v and centred and not folds.value,
        }
        for name in (name for name, keep in kept.items() if keep):
            rank = rank_k if name.startswith("key") else rank_v
            shape = (self.kv_heads * d,) if name.endswith("mean") else (self.kv_heads * rank, d)
            setattr(self, name, nn.Parameter(torch.empty(shape, **factory)))

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
            parts = split_heads(flat[0], self.projected, self.heads, self.kv_heads, family.fused)
        else:
            parts = Heads(*(x.view(*lead, -1, size) for x, size in zip(flat, self.projected, strict=True)))
        if self.normalises and family.norm_on == "heads":
            parts = Heads(*self._normalised(*parts[:2]), parts.value)
        parts = Heads(*(x.transpose(1, 2) for x in parts))
        if self.normalises and family.norm_on == "heads_first":
            parts = Heads(*self._normalised(*parts[:2]), parts.value)
        return parts

    def _normalised(self, query: Tensor, key: Tensor) -> list[Tensor]:
        return [getattr(self, name)(x) for name, x in zip(self.family.norms, (query, key), strict=True)]

    def _by_head(self, name: str) -> Tensor:
        """A run-time map as [G, R, D], or a mean as [G, 1, D]."""
        stored = getattr(self, name)
        if stored.dim() == 1:
            return stored.view(-1, 1, self.head_dim)
        return stored.view(-1, self.rank_k if name.startswith("key") else self.rank_v, self.head_dim)

    def _encode(self, x: Tensor, side: str) -> Tensor:
        """Keys or values [B, G, T, D] to latents [B, G, T, R]; latents already, or full rank, pass."""
        if getattr(self, f"{side}_encoder") is None:
            return x
        if getattr(self, f"{side}_mean") is not None:
            x = x - self._by_head(f"{side}_mean")
        return x @ self._by_head(f"{side}_encoder").transpose(-1, -2)

    def _angles(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        arguments = (self.layer_type,) if self.family.rotary_by_layer_type else ()
        return self._rotary[0](x, positions, *arguments)

    def forward(self, hidden_states: Tensor, *args: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As the original's: the output [B, T, C] and the attention weights, where the backend gives them."""
        family = self.family
        if kwargs.get("cache") is not None:
            raise EigenAttnError("continuous batching has a paged cache for full-rank heads only: use `generate`.")
        cache = kwargs.get(family.cache_argument)
        q, k, v = self.project(hidden_states)  # [B, H, T, *], [B, G, T, *] twice
        if self.observer is not None:
            self.observer(self, Heads(q, k, v))
        k, v = self._encode(k, "key"), self._encode(v, "value")
        decodes_keys = self.rotates and self.key_decoder is not None
        if self.rotates:
            q = rotate(q, *kwargs["position_embeddings"], family.interleaved)
            if not decodes_keys:
                k = rotate(k, *kwargs["position_embeddings"], family.interleaved)
        elif self.key_decoder is not None:
            grouped = q.unflatten(1, (-1, self.num_key_value_groups))  # [B, G, H/G, T, D]
            q = (grouped @ self._by_head("key_decoder").transpose(-1, -2).unsqueeze(1)).flatten(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        if decodes_keys:
            k = k @ self._by_head("key_decoder")  # [B, G, S, D]
            if self.key_mean is not None:
                k = k + self._by_head("key_mean")
            length = k.shape[-2] if cache is None else cache.get_seq_length(self.layer_idx)
            positions = key_positions(kwargs["position_ids"], k.shape[-2], length)
            k = rotate(k, *self._angles(k, positions), family.interleaved)
        out, weights = self._attend(q, k, v, kwargs)  # [B, H, T, *]
        if self.value_decoder is not None:
            grouped = out.unflatten(1, (-1, self.num_key_value_groups))
            out = (grouped @ self._by_head("value_decoder").unsqueeze(1)).flatten(1, 2)
            if self.value_mean is not None:
                out = out + self._by_head("value_mean").repeat_interleave(self.num_key_value_groups, dim=0)
        out = self.output_projection(out.transpose(1, 2).flatten(2))
        if family.output_dropout is not None:
            out = getattr(self, family.output_dropout)(out)
        if family.adds_residual:
            residual = args[0]
            out = residual + nn.functional.dropout(out, self.config.hidden_dropout, self.training)
        return out, weights

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        # Falcon asks its attention for weights whatever the backend; the others have transformers collect them.
        implementation = "eager" if kwargs.get("output_attentions") else self.config._attn_implementation
        mask = self._mask(q, k, kwargs)
        dropout = self.dropout if self.training else 0.0
        if implementation in BACKENDS:
            return BACKENDS[implementation](
                q, k, v, mask=mask, scale=self.scaling, dropout=dropout, softcap=self.softcap
            )
        # FlashAttention, FlexAttention and kernels from the hub take one head size for all three.
        size, size_v = max(q.shape[-1], v.shape[-1]), v.shape[-1]
        consumed = {"attention_mask", "position_embeddings", "output_attentions", self.family.cache_argument}
        options = {name: value for name, value in kwargs.items() if name not in consumed}
        options |= {"dropout": dropout, "scaling": self.scaling, "sliding_window": self.sliding_window}
        if self.softcap is not None:
            options["softcap"] = self.softcap
        attend = ALL_ATTENTION_FUNCTIONS[implementation]
        out, weights = attend(self, widen(q, size), widen(k, size), widen(v, size), mask, **options)
        return out.transpose(1, 2)[..., :size_v], weights

    def _mask(self, q: Tensor, k: Tensor, kwargs: dict[str, Any]) -> Any:
        """The mask as the backends take it, with the family's bias on the scores added."""
        mask = kwargs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 4:
            bias = self._bias(k, kwargs)
            if bias is None or mask is not None:
                return mask  # none, or one that only the backend asked for understands (FlexAttention's block mask)
            return (
                bias
                if q.shape[-2] == 1
                else bias.masked_fill(~causal_mask(q.shape[-2], k.shape[-2], q.device), torch.finfo(bias.dtype).min)
            )
        mask = mask[..., : k.shape[-2]]
        if mask.dtype == torch.bool and self.family.mask_true_is_masked:
            mask = ~mask
        bias = self._bias(k, kwargs)
        if bias is None:
            return mask
        if mask.dtype == torch.bool:
            return bias.masked_fill(~mask, torch.finfo(bias.dtype).min)
        return bias + mask

    def _bias(self, k: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """A bias on the scores, [1 or B, H, 1, S], or None."""
        bias = kwargs.get(self.family.bias_argument) if self.family.bias_argument else None
        # MPT gives [H, 1, longest] for all rows, BLOOM [B * H, 1, S].
        return None if bias is None else bias.view(-1, self.heads, 1, bias.shape[-1])[..., -k.shape[-2] :].to(k.dtype)


@functools.cache
def eigen_class(original: type[nn.Module]) -> type[EigenAttention]:
    """A subclass of both: transformers collects attention weights by the original class."""
    return type(f"Eigen{original.__name__}", (EigenAttention, original), {})
