"""One attention layer of a model, whatever its family: projections, rotary positions, and the shapes of its maps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..cache.codebook import DEGREE
from ..cache.layout import SIDES, Layout
from .families import Family
from .maps import MAPS, QUANTISERS, LatentMaps, side_of
from .placement import execution_device
from .projections import Heads, Projection, is_plain, like, matrix_of, split_heads


class AttentionLayer(LatentMaps):
    """What an attention module is made of, and what it projects.

    Args:
        original: the attention module of a transformers model, whose projections and norms are taken over.
        family: its row of the table.
        config: configuration of the (text) model.
        rotary: the model's own rotary module, asked for the angles of cached keys; None without rotary positions.
    """

    def __init__(self, original: Any, family: Family, config: Any, rotary: nn.Module | None) -> None:
        nn.Module.__init__(self)
        self.family = family
        self.config = config
        self.layer_idx: int = original.layer_idx
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = family.kv_heads(config)
        self.head_dim: int = family.head_dim(config)
        self.layout = Layout.full(self.kv_heads, self.head_dim)
        self.part = (0, 1)  # which of how many processes this is, that share the heads
        # Dimensions a head that the query, key and value projections give.
        self.projected: tuple[int, int, int] = (self.head_dim, self.head_dim, self.head_dim)
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
        self._rotary: tuple[nn.Module, ...] = (rotary,) if rotary is not None and switched_on else ()
        for name in (*family.qkv, family.output, *(family.norms or ()), family.output_dropout):
            if name is not None and getattr(original, name, None) is not None:
                setattr(self, name, getattr(original, name))
        for name in (*MAPS, *QUANTISERS):
            self.register_parameter(name, None)
        self.train(original.training)

    def extra_repr(self) -> str:
        latents = "; ".join(
            f"{' and '.join(latent.sides)} of {latent.heads}: rank {latent.rank}"
            + (f" ({latent.widths} bits)" if latent.widths else "")
            for latent in self.layout.latents
        )
        sizes = f"heads={self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}"
        return f"{sizes}, latents: {latents}, window={self.layout.window}"

    @property
    def rotates(self) -> bool:
        """Whether this layer turns queries and keys by rotary positions."""
        return bool(self._rotary)

    @property
    def normalises(self) -> bool:
        """Whether norms stand between the projections of queries and keys and what attention sees."""
        return self.family.norms is not None and hasattr(self, self.family.norms[1])

    @property
    def rotary_module(self) -> nn.Module:
        """The model's own rotary module, of a layer that rotates."""
        return self._rotary[0]

    @property
    def rotates_far(self) -> bool:
        """Whether keys are rotated when they are attended to: what is cached of them comes before rotation."""
        return self.rotates and (self.layout.window > 0 or self.key_decoder is not None)

    @property
    def folds(self) -> Heads[bool]:
        """Whether the maps of queries, keys and values can be folded into their projections."""
        free = not self.clip and not self.layout.at_run_time
        plain = free and not self.normalises
        return Heads(query=plain and not self.rotates, key=plain, value=free)

    @property
    def output_projection(self) -> Projection:
        """The projection that follows attention; a quantised one may be any module."""
        return getattr(self, self.family.output)

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states, and so of maps: quantised projections give what the model was loaded in."""
        output = self.output_projection
        return output.weight.dtype if is_plain(output) else self.config.dtype or torch.get_default_dtype()

    def output_weight(self) -> Tensor:
        """The matrix [C, H * D] of the output projection, quantised or not."""
        output, size = self.output_projection, self.heads * self.head_dim
        return matrix_of(output, size, device=execution_device(output), dtype=self.dtype)

    def allocate(self, layout: Layout, centred: bool) -> None:
        """Take the shapes that a layout asks for, folded, with values left empty: what a loader then fills.

        Args:
            layout: what the cache is to hold; a side that is stored as it is stays untouched.
            centred: whether the bases have means, which fold into biases.
        """
        self.layout = layout
        d, folds = self.head_dim, self.folds
        small = {side: not layout.of(side).verbatim for side in SIDES}
        rank_k, rank_v = (layout.of(side).rank for side in SIDES)
        self.projected = (
            rank_k if folds.query else d,
            rank_k if folds.key else d,
            rank_v if folds.value else d,
        )
        if not layout.at_run_time:
            self._resize_projections(centred and small["key"], centred and small["value"])
        needed = {
            "key_encoder": small["key"] and not folds.key,
            "key_decoder": small["key"] and not folds.query,
            "key_mean": small["key"] and centred and (self.rotates or not folds.key),
            "value_encoder": small["value"] and not folds.value,
            "value_decoder": small["value"] and layout.at_run_time,
            "value_mean": small["value"] and centred and not folds.value,
            **{f"{latent.sides[0]}_levels": latent.widths is not None for latent in layout.latents},
        }
        output = self.output_projection
        factory = {"device": execution_device(output), "dtype": self.dtype}
        for name in (name for name, need in needed.items() if need):
            latent = layout.of(side_of(name))
            channels = layout.count(latent) * latent.rank
            if name in QUANTISERS:
                shape: tuple[int, ...] = (channels, DEGREE + 1)
            else:
                shape = (self.kv_heads * d,) if name.endswith("mean") else (channels, latent.heads * d)
            setattr(self, name, nn.Parameter(torch.empty(shape, **factory)))

    def take_part(self, rank: int, size: int) -> None:
        """Compute with the heads of one of `size` processes only, whose maps and projections are split so."""
        self.part = (rank, size)
        self.heads, self.kv_heads = self.heads // size, self.kv_heads // size
        self.layout = self.layout.split(size)

    def own_heads(self, x: Tensor, heads: int) -> Tensor:
        """This process's share of something a head [B, heads, ...], where it was given for the heads of all."""
        return x if x.shape[1] == heads else x.narrow(1, self.part[0] * heads, heads)

    def _resize_projections(self, offset_k: bool, offset_v: bool) -> None:
        """Empty projections of the folded sizes; `offset_k` and `offset_v` say whether means give biases."""
        family, hidden = self.family, self.config.hidden_size
        rows = [n * size for n, size in zip((self.heads, self.kv_heads, self.kv_heads), self.projected, strict=True)]
        offsets = [False, offset_k and self.folds.key, offset_v and self.folds.value]
        if family.fused:
            rows, offsets = [sum(rows)], [any(offsets)]
        shapes = [(out_features, hidden) for out_features in rows] + [
            (hidden, self.heads * self.layout.of("value").rank)
        ]
        names = [*family.qkv, family.output]
        for name, (out_features, in_features), offset in zip(names, shapes, [*offsets, offset_v], strict=True):
            old = getattr(self, name)
            bias, factory = old.bias is not None or offset, {"device": old.weight.device, "dtype": old.weight.dtype}
            setattr(self, name, like(old, out_features, in_features, bias, **factory))

    def project(self, hidden_states: Tensor) -> Heads[Tensor]:
        """Queries [B, H, T, *], keys and values [B, G, T, *], after norms and clipping, before rotation."""
        family = self.family
        lead = hidden_states.shape[:-1]
        flat = [getattr(self, name)(hidden_states) for name in family.qkv]
        if self.clip:
            flat = [x.clamp(-self.clip, self.clip) for x in flat]
        if family.fused:
            processes = self.part[1] if family.fused == "blocks" else 1  # then all heads come here
            counts = self.heads * processes, self.kv_heads * processes
            parts = split_heads(flat[0], self.projected, *counts, family.fused)
        else:
            flat[:2] = self._normalised(flat[0], flat[1], "width")
            parts = Heads(*(x.view(*lead, -1, size) for x, size in zip(flat, self.projected, strict=True)))
        parts = Heads(*self._normalised(parts.query, parts.key, "heads"), parts.value)
        parts = Heads(*(x.transpose(1, 2) for x in parts))
        parts = Heads(*self._normalised(parts.query, parts.key, "heads_first"), parts.value)
        counts = self.heads, self.kv_heads, self.kv_heads
        return Heads(*(self.own_heads(x, count) for x, count in zip(parts, counts, strict=True)))

    def _normalised(self, query: Tensor, key: Tensor, where: str) -> tuple[Tensor, Tensor]:
        """After their norms, if that is where those stand."""
        norms = self.family.norms
        if norms is None or self.family.norm_on != where or not self.normalises:
            return query, key
        return getattr(self, norms[0])(query), getattr(self, norms[1])(key)

    def angles(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions [B or 1, S], from the model's own rotary module."""
        arguments = (self.layer_type,) if self.family.rotary_by_layer_type else ()
        cos, sin = self.rotary_module(x, positions, *arguments)
        return cos.to(x.device), sin.to(x.device)  # the module may be on another device
