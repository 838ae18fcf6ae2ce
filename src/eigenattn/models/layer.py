"""One attention layer of a model, whatever its family: projections, rotary positions, and the shapes of its maps."""

from __future__ import annotations

import inspect
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..cache.codebook import DEGREE
from ..cache.layout import SIDES, Layout
from ..errors import EigenAttnError
from .family import Family
from .maps import MAPS, QUANTISERS, LatentMaps, side_of
from .placement import execution_device
from .projections import Heads, Projection, is_plain, like, matrix_of, split_heads, weight_of
from .rotary import ANGLES


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
        self.fused = family.fused_in(config)
        self.heads, self.kv_heads, self.head_dim = head_counts(original, family, config)
        self.layout = Layout.full(self.kv_heads, self.head_dim, family.absorbed is not None)
        self.part = (0, 1)  # which of how many processes this is, that share the heads
        # Dimensions a head that the query, key and value projections give.
        self.projected: tuple[int, int, int] = (self.head_dim, self.head_dim, self.head_dim)
        self.num_key_value_groups = self.heads // self.kv_heads  # transformers' attention functions read this name
        self.scaling: float = family.scale(original) if callable(family.scale) else _value(original, family.scale)
        # Only FlashAttention reads it, others have it in the mask. Some modules leave it to the configuration.
        self.sliding_window: int | None = getattr(original, "sliding_window", getattr(config, "sliding_window", None))
        types = getattr(config, "layer_types", None)
        self.layer_type: str | None = getattr(original, "layer_type", None) or (types and types[self.layer_idx])
        self.softcap: float | None = _value(original, family.softcap)
        self.clip: float | None = _value(original, family.clip)
        dropout = getattr(original, family.dropout, 0.0)
        self.dropout: float = dropout.p if isinstance(dropout, nn.Dropout) else dropout
        # Inside a tuple the rotary module is held without being registered a second time.
        self._rotary: tuple[nn.Module, ...] = (rotary,) if rotary is not None else ()
        # Whether the rotary module has angles for each of the model's layer types.
        self.by_layer_type = rotary is not None and "layer_type" in inspect.signature(type(rotary).forward).parameters
        # Whether it takes three rows of positions and gives angles of one.
        self.takes_rows = rotary is not None and self._takes_rows()
        # Where there is no mask. transformers' attention functions read this name, too.
        self.is_causal: bool = getattr(original, "is_causal", True)
        self.is_read = False  # whether later layers read what this one caches
        names = (*family.projections, family.output, *(family.norms or ()), family.value_norm, family.output_norm)
        names = (*names, *(() if family.absorbed is None else family.absorbed.norms))
        for name in (*names, family.output_dropout, family.sinks, family.gate):
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
    def parts(self) -> tuple[int, ...] | None:
        """How many dimensions of a cached vector are of one unit, next to each other; None if all are."""
        return None if self.family.absorbed is None else self.family.absorbed.parts(self.config)

    @property
    def rotates(self) -> bool:
        """Whether this layer turns queries and keys by rotary positions."""
        return len(self._rotary) > 0

    @property
    def normalises(self) -> bool:
        """Whether norms stand between the projections of queries and keys and what attention sees."""
        return self.family.norms is not None and hasattr(self, self.family.norms[1])

    @property
    def normalises_rotated(self) -> bool:
        """Whether those norms stand behind rotation."""
        return self.family.norm_on == "rotated" and self.normalises

    @property
    def sink_logits(self) -> Tensor | None:
        """A logit of each head [H], with which the softmax is taken but for which there is no value."""
        return getattr(self, self.family.sinks) if self.family.sinks is not None else None

    @property
    def scoring(self) -> dict[str, Any]:
        """What attention over lists of keys and values asks of a layer, beside these."""
        return {"scale": self.scaling, "softcap": self.softcap, "sinks": self.sink_logits}

    @property
    def gates(self) -> bool:
        """Whether the output of the heads is multiplied with a gate."""
        gate = self.family.gate
        return gate == "query" or (gate is not None and hasattr(self, gate))

    @property
    def output_is_linear(self) -> bool:
        """Whether the layer's output is linear in what attention gives."""
        return not self.gates and self.family.output_norm is None

    @property
    def projects_alone(self) -> bool:
        """Whether attention's sums of values meet nothing but the output projection, and that only here."""
        return self.output_is_linear and self.family.sinks is None and not self.is_read

    @property
    def rotary_module(self) -> nn.Module:
        """The model's own rotary module, of a layer that rotates."""
        return self._rotary[0]

    @property
    def rotates_far(self) -> bool:
        """Whether keys are rotated when they are attended to: what is cached of them comes before rotation."""
        return self.rotates and (self.layout.window > 0 or self.key_decoder is not None)

    @property
    def decodes_keys(self) -> bool:
        """Whether keys are decoded before they meet queries: to be rotated, or as sinks need scores as they are."""
        return self.rotates_far or self.family.sinks is not None

    @property
    def folds(self) -> Heads[bool]:
        """Whether the maps of queries, keys and values can be folded into their projections."""
        free = not self.clip and not self.layout.at_run_time and not self.is_read
        plain = free and not self.normalises
        normalises_values = self.family.value_norm is not None or not self.projects_values
        return Heads(
            query=plain and not self.rotates and self.family.gate != "query" and self.family.sinks is None,
            key=plain and self.projects_values,
            value=free and not normalises_values,
        )

    @property
    def folds_output(self) -> bool:
        """Whether the decoder of values can be folded into the output projection."""
        return self.projects_alone and not self.layout.at_run_time

    @property
    def projects_values(self) -> bool:
        """Whether values have a projection, and are not made by the keys'."""
        return bool(self.fused) or hasattr(self, self.family.qkv[2])

    @property
    def projections(self) -> dict[str, nn.Module]:
        """Those that the layer has, by name; quantised ones may be any modules."""
        names = (*self.family.projections, self.family.output)
        return {name: getattr(self, name) for name in names if getattr(self, name, None) is not None}

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
        small = {side: side in layout.sides and not layout.of(side).verbatim for side in SIDES}
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
            "key_mean": small["key"] and centred and not (folds.query and folds.key),
            "value_encoder": small["value"] and not folds.value,
            "value_decoder": small["value"] and not self.folds_output,
            "value_mean": small["value"] and centred and not (folds.value and self.folds_output),
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
        family, folds = self.family, self.folds
        rows = [n * size for n, size in zip((self.heads, self.kv_heads, self.kv_heads), self.projected, strict=True)]
        offsets = Heads(False, offset_k and folds.key, offset_v and folds.value)
        if self.fused:
            changes = {family.qkv[0]: (sum(rows), any(offsets))} if any(folds) else {}
        else:
            changes = {
                name: (size, offset)
                for name, size, fold, offset in zip(family.qkv, rows, folds, offsets, strict=True)
                if fold
            }
        for name, (out_features, offset) in changes.items():
            self._resize(name, out_features, weight_of(getattr(self, name)).shape[1], offset)
        if self.folds_output:
            hidden = weight_of(self.output_projection).shape[0]
            self._resize(family.output, hidden, self.heads * self.layout.of("value").rank, offset_v)

    def _resize(self, name: str, out_features: int, in_features: int, offset: bool) -> None:
        old = getattr(self, name)
        bias, factory = old.bias is not None or offset, {"device": old.weight.device, "dtype": old.weight.dtype}
        setattr(self, name, like(old, out_features, in_features, bias, **factory))

    def project(self, hidden_states: Tensor) -> Heads[Tensor]:
        """Queries [B, H, T, *], keys and values [B, G, T, *], after norms and clipping, before rotation."""
        return self.project_with_gate(hidden_states)[0]

    def project_with_gate(self, hidden_states: Tensor) -> tuple[Heads[Tensor], Tensor | None]:
        """As `project`, and the gate [B, H, T, D or 1] of the heads' output, if there is one."""
        family, lead = self.family, hidden_states.shape[:-1]
        if family.absorbed is not None:
            return family.absorbed.project(self, hidden_states), self._gate(hidden_states)
        first, gate = self._flat_query(hidden_states)
        flat = [first, *(getattr(self, name)(hidden_states) for name in family.qkv[1:] if hasattr(self, name))]
        if not self.fused:
            flat = flat if self.projects_values else [*flat, flat[1]]
            flat[:2] = self._normalised(flat[0], flat[1], "width")
        if self.clip:
            flat = [x.clamp(-self.clip, self.clip) for x in flat]
        if self.fused:
            processes = self.part[1] if self.fused == "blocks" else 1  # then all heads come here
            counts = self.heads * processes, self.kv_heads * processes
            parts = split_heads(flat[0], self.projected, *counts, self.fused)
        else:
            parts = Heads(*(x.view(*lead, -1, size) for x, size in zip(flat, self.projected, strict=True)))
        value = parts.value if family.value_norm is None else getattr(self, family.value_norm)(parts.value)
        parts = Heads(*self._normalised(parts.query, parts.key, "heads"), value)
        parts = Heads(*(x.transpose(1, 2) for x in parts))
        parts = Heads(*self._normalised(parts.query, parts.key, "heads_first"), parts.value)
        if self.normalises_rotated:
            parts = parts._replace(key=unit(parts.key, self._norm("key")))
        counts = self.heads, self.kv_heads, self.kv_heads
        return Heads(*(self.own_heads(x, count) for x, count in zip(parts, counts, strict=True))), gate

    def project_query(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        """The queries alone, and the gate, as `project` gives them."""
        flat, gate = self._flat_query(hidden_states)
        q = flat.view(*hidden_states.shape[:-1], -1, self.head_dim)
        return (self._norm("query")(q) if self.family.norms else q).transpose(1, 2), gate

    def _flat_query(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the first projection gives, but for gates that it gives too, and the gate [B, H, T, D or 1]."""
        flat = getattr(self, self.family.qkv[0])(hidden_states)
        if self.family.gate != "query":
            return flat, self._gate(hidden_states)
        queries, gate = flat.view(*hidden_states.shape[:-1], -1, 2 * self.head_dim).chunk(2, dim=-1)
        return queries.flatten(-2), self._opened(gate)

    def _gate(self, hidden_states: Tensor) -> Tensor | None:
        """The gate [B, H, T, D or 1] that a projection of its own gives, if there is one."""
        name = self.family.gate
        if name is None or not hasattr(self, name):
            return None
        return self._opened(getattr(self, name)(hidden_states).view(*hidden_states.shape[:-1], self.heads, -1))

    def _opened(self, gate: Tensor) -> Tensor:
        """A gate [B, H, T, D or 1] of what its projection gives [B, T, H, D or 1]."""
        return getattr(nn.functional, self.family.gate_function)(gate.float()).to(gate.dtype).transpose(1, 2)

    def _norm(self, side: str) -> nn.Module:
        """The norm on queries or on keys."""
        assert self.family.norms is not None
        return getattr(self, self.family.norms[("query", "key").index(side)])

    def _normalised(self, query: Tensor, key: Tensor, where: str) -> tuple[Tensor, Tensor]:
        """After their norms, if that is where those stand."""
        if self.family.norm_on != where or not self.normalises:
            return query, key
        return self._norm("query")(query), self._norm("key")(key)

    def normalised_query(self, rotated: Tensor) -> Tensor:
        """Rotated queries [B, H, T, D] after the norms that stand behind rotation.

        Rotation leaves lengths alone, so that keys can be brought to theirs before it. What the norm on keys multiplies
        them with stays behind it, and is given to the queries instead.
        """
        weight = getattr(self._norm("key"), "weight", None)
        normalised = self._norm("query")(rotated)
        return normalised if weight is None else normalised * weight

    def finish(self, out: Tensor, gate: Tensor | None) -> Tensor:
        """The layer's output [B, T, C], of what attention gives, [B, H, T, *], and the gate [B, H, T, D or 1]."""
        family = self.family
        out = out if gate is None else out * gate
        out = out if family.absorbed is None else family.absorbed.expand(self, out)
        out = out.transpose(1, 2).flatten(2)
        if family.output_norm is not None:
            out = getattr(self, family.output_norm)(out)
        out = self.output_projection(out)
        if family.output_dropout is not None:
            dropout = getattr(self, family.output_dropout)
            share = dropout.p if isinstance(dropout, nn.Dropout) else dropout
            out = nn.functional.dropout(out, share, self.training)
        return out

    def laid_out(self, angles: Any) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B or 1, T, width] as `rotate` takes them, of what the model's rotary module gives."""
        cos, sin = ANGLES[self.family.angles](angles)
        return cos, -sin if self.family.backwards else sin

    def angles(self, x: Tensor, positions: Tensor, module: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions [B or 1, S], or [B or 1, S, rows].

        Args:
            module: computes them, in the place of the model's own rotary module, which may be without memory.
        """
        if positions.dim() == 3:
            positions = positions.movedim(-1, 0)
        elif self.takes_rows:  # and in transformers 5.17 nothing else
            positions = positions.expand(3, -1, -1)
        arguments = (self.layer_type,) if self.by_layer_type else ()
        cos, sin = self.laid_out((module or self.rotary_module)(x, positions, *arguments))
        return cos.to(x.device), sin.to(x.device)  # the module may be on another device

    def row_of_pair(self, positions: Tensor, module: nn.Module | None = None) -> Tensor:
        """Which row of positions [B or 1, S, rows] each pair of dimensions turns by, [width / 2]: in which it turns.

        Args:
            module: see `angles`.
        """
        rows = positions.shape[-1]
        # Some kinds of scaling go by the last position of what they are asked for, and are to stay as they are.
        asked = torch.cat(
            [torch.eye(rows, dtype=positions.dtype, device=positions.device), positions.amax((0, 1))[None]]
        )
        _, sin = self.angles(torch.empty(0, device=positions.device), asked.unsqueeze(0), module)
        turns = sin[0, :rows] != 0
        pairs = turns[:, 0::2] if self.family.interleaved else turns[:, : turns.shape[1] // 2]
        return pairs.to(torch.uint8).argmax(0)

    def _takes_rows(self) -> bool:
        x = torch.empty(0, device=next(self.rotary_module.buffers()).device)
        try:
            cos, _ = self.angles(x, torch.zeros(1, 2, 3, dtype=torch.int64, device=x.device))
        except (IndexError, RuntimeError, TypeError, ValueError):
            return False
        return tuple(cos.shape[:-1]) == (1, 2)


def _value(module: nn.Module, name: str | None) -> Any:
    """What a module has under a dotted name; None without a name."""
    return None if name is None else attrgetter(name)(module)


def head_counts(original: Any, family: Family, config: Any) -> tuple[int, int, int]:
    """Query heads, KV heads and dimensions a head of an attention module, which may differ by layer."""
    if family.absorbed is not None:
        return config.num_attention_heads, family.kv_heads(config), family.head_dim(config)
    head_dim = getattr(original, "head_dim", None) or family.head_dim(config)
    if family.fused_in(config):
        return config.num_attention_heads, family.kv_heads(config), head_dim
    queries, keys = (getattr(original, name, None) for name in family.qkv[:2])
    # Where layers differ, some configurations do not answer for all of them: they are asked last.
    width, rows = head_dim * (2 if family.gate == "query" else 1), getattr(queries, "out_features", None)
    heads = config.num_attention_heads if rows is None else rows // width
    if keys is None:  # it reads those of an earlier layer
        return heads, heads // original.num_key_value_groups, head_dim
    rows = getattr(keys, "out_features", None)
    return heads, family.kv_heads(config) if rows is None else rows // head_dim, head_dim


def unit(x: Tensor, norm: Any) -> Tensor:
    """Vectors [..., D] brought to a length as an RMSNorm does it, without its weights."""
    eps = next((getattr(norm, name) for name in ("eps", "variance_epsilon") if hasattr(norm, name)), None)
    if eps is None:
        raise EigenAttnError(f"{type(norm).__name__} is not an RMSNorm, which is needed behind rotation.")
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
