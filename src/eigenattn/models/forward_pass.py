"""What one layer sees of one pass: made of transformers' arguments, which go no further."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..cache.context import CacheContext
from ..cache.sight import Sight
from ..errors import EigenAttnError
from ..kernels import BACKENDS, chunked
from ..kernels.blocks import shows_future
from ..kernels.decoding import Rotary
from ..kernels.reference import add_mask, causal_mask, score_dtype
from ..kernels.sdpa import widen
from .cache_names import NAMES, cache_of
from .layer import AttentionLayer
from .memoised import memoised
from .rotary import rotate

# Under what name tensors and modules hold rows of positions.
ROWS = "_eigenattn_rows"


class ForwardPass:
    """A pass through one attention layer.

    Made anew in each layer: not every decoder layer hands unknown arguments on, and threads may share a model. What
    layers compute once for all of them is in the cache's context.

    Args:
        layer: whose pass it is.
        arguments: what the decoder layer calls its attention with.

    Raises:
        EigenAttnError: if transformers asks for what cannot be had.
    """

    def __init__(self, layer: AttentionLayer, arguments: dict[str, Any]) -> None:
        family = layer.family
        self.layer, self._arguments = layer, arguments
        self.cache: Any = cache_of(arguments)
        if self.cache is not None and not isinstance(self.cache, Cache):
            raise EigenAttnError("continuous batching has a paged cache for full-rank heads only: use `generate`.")
        self.position_ids, self._cos_sin = self._positions()
        self.gate: Tensor | None = None  # of the heads' output, [B, H, T, D or 1]
        # Is given the output of the heads [B, H, T, D], before the gate: what looks on may ask for it.
        self.on_output: Callable[[Tensor], None] | None = None
        mask: Any = arguments.get("attention_mask")
        whole = isinstance(mask, Tensor) and mask.dim() == 4  # others are of a backend's own kind
        self._mask = ~mask if whole and mask.dtype == torch.bool and family.mask_true_is_masked else mask
        self._bias: Tensor | None = arguments.get(family.bias_argument) if family.bias_argument else None
        # Falcon asks its attention for weights whatever the backend; the others have transformers collect them.
        self.asks_weights = bool(arguments.get("output_attentions"))
        self.implementation: str = "eager" if self.asks_weights else layer.config._attn_implementation
        self.dropout = layer.dropout if layer.training else 0.0
        if (layer.layout.window or self.evicts) and self.implementation not in BACKENDS:
            raise EigenAttnError(
                f"{self.implementation} cannot attend with an exact window, or where tokens are evicted: load the "
                'model with attn_implementation="sdpa".'
            )

    def observing(self, q: Tensor, sight: Sight, start: int) -> ForwardPass:
        """The pass of its queries from `start` on alone, which gives attention weights, and drops none."""
        found, mask = copy.copy(self), self.mask(q, sight.columns)
        if mask is None:
            mask = causal_mask(q.shape[-2], sight.columns, q.device, int(sight.query))[None, None]
        found._mask, found._bias = mask[:, :, start:], None
        if self._cos_sin is not None:
            cos, sin = self._cos_sin
            found._cos_sin = cos[:, start:], sin[:, start:]
        found.implementation, found.dropout = "eager", 0.0
        return found

    def _positions(self) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
        """Positions [B or 1, T], or [B or 1, T, rows], and cosines and sines of them, if the layer rotates.

        Raises:
            EigenAttnError: if it does, and is not told where to.
        """
        layer, positions, angles = self.layer, self._arguments.get("position_ids"), None
        if layer.rotates:
            angles = self._arguments.get("position_embeddings")
            if angles is not None:
                rows = rows_of(angles)
                return positions if rows is None else rows, layer.laid_out(angles)
            if positions is None:
                raise EigenAttnError(f"layer {layer.layer_idx} rotates by positions, and is called without any.")
            angles = layer.angles(self._arguments["hidden_states"], positions)
        return positions, angles

    @property
    def backend(self) -> Callable[..., tuple[Tensor, Tensor | None]]:
        """Attention over one list of keys, of a pass that does not need one by another name (`attend_at_full_rank`)."""
        return BACKENDS[self.implementation]

    @property
    def evicts(self) -> bool:
        """Whether the cache evicts tokens."""
        return getattr(self.cache, "eviction", None) is not None

    def rotated(self, x: Tensor) -> Tensor:
        """Vectors [B, heads, T, D] of the current tokens at their positions; as they are without rotary positions."""
        return x if self._cos_sin is None else rotate(x, *self._cos_sin, self.layer.family.interleaved)

    def ready(self, q: Tensor) -> Tensor:
        """Queries [B, H, T, D] that, rotated, are as they meet keys: norms and factors behind rotation are in them."""
        layer = self.layer
        if layer.normalises_rotated:
            if self._cos_sin is None:
                q = layer.normalised_query(q)
            else:
                q = self.rotated_back(layer.normalised_query(self.rotated(q)))
        scale = layer.family.query_scale
        factors = None if scale is None else scale(layer, self._arguments)
        return q if factors is None else (q * factors[:, None, :, None]).to(q.dtype)

    def rotated_back(self, x: Tensor) -> Tensor:
        """Gradients [B, heads, T, D] at rotated vectors as ones at vectors before rotation: the transpose of it."""
        if self._cos_sin is None:
            return x
        cos, sin = self._cos_sin
        return rotate(x, cos, -sin, self.layer.family.interleaved)

    def memoised(self, name: Hashable, compute: Callable[[], Any]) -> Any:
        """What `compute` gives, once for all layers of a pass with a cache."""
        return compute() if self.cache is None else CacheContext.of(self.cache).memoised(name, compute)

    def end(self) -> None:
        """Let go of what only this pass needs."""
        if self.cache is not None:
            CacheContext.of(self.cache).end(self.layer.layer_idx)

    def angles(self, sight: Sight, first: int = 0) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the columns in sight, from the first that is asked for, [B or 1, columns, width]."""
        assert self._cos_sin is not None  # the layer rotates
        cos, sin = self._cos_sin
        if sight.columns == cos.shape[-2]:  # all are this pass's own
            return cos[:, first:], sin[:, first:]
        name = ("angles", sight.columns, first, self.layer.layer_type, id(self.layer.rotary_module), cos.device)
        return self.memoised(name, lambda: self.layer.angles(cos, self.positions(sight)[:, first:]))

    def angles_of_chunk(self, sight: Sight, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The same of columns start .. stop - 1 of many, of which no other is asked for."""
        assert self._cos_sin is not None  # the layer rotates
        if sight.columns in (self._cos_sin[0].shape[-2], min(sight.columns, chunked.CHUNK)):
            cos, sin = self.angles(sight)
            return cos[:, start:stop], sin[:, start:stop]
        positions = self.positions(sight)
        # Some kinds of scaling go by the last position of what they are asked for.
        last = positions.amax().expand(len(positions), 1, *positions.shape[2:])
        cos, sin = self.layer.angles(self._cos_sin[0], torch.cat([positions[:, start:stop], last], dim=1))
        return cos[:, :-1], sin[:, :-1]

    def positions(self, sight: Sight) -> Tensor:
        """Positions of all columns in sight, [B, columns] or [B, columns, rows].

        Raises:
            EigenAttnError: if the model gives none.
        """
        if sight.positions is None:
            raise EigenAttnError("this model calls its attention without position_ids, which cached keys rotate by.")
        return sight.positions

    def query_position(self, sight: Sight) -> Tensor:
        """The position of each row's one query, [B or 1] or [B or 1, rows], as those of the columns in sight."""
        positions, columns = self.position_ids, self.positions(sight)
        assert positions is not None  # those of the columns came of it
        found = positions[:, -1]
        # Tokens of a text have the same position in all rows.
        return found if found.dim() == columns.dim() - 1 else found.unsqueeze(-1).expand(-1, columns.shape[-1])

    def mask(self, q: Tensor, keys: int) -> Any:
        """The mask over columns 0 .. keys - 1 as backends take it, with the family's bias on the scores added.

        Returns:
            [B or 1, H or 1, T, keys], boolean (True is visible) or additive, or None for causal attention. A mask only
            the backend asked for understands (FlexAttention's block mask) passes.
        """
        mask, bias = self.mask_and_bias(keys)
        if bias is None:
            return mask
        bias = bias.to(score_dtype(q.dtype))  # bf16 does not tell far columns apart
        if mask is None:
            mask = causal_mask(q.shape[-2], keys, q.device) if q.shape[-2] > 1 else bias.new_zeros(())
        return add_mask(bias, mask)

    def whole_mask(self, q: Tensor) -> Tensor:
        """The mask of a pass without a cache, [B or 1, H or 1, T, T], also where the model leaves it out."""
        t = q.shape[-2]
        mask = self.mask(q, t)
        return causal_mask(t, t, q.device)[None, None] if mask is None else mask

    def mask_and_bias(self, keys: int) -> tuple[Any, Tensor | None]:
        """The mask over columns, True visible if it is boolean, and the family's bias [B or 1, H, 1, keys]."""
        mask, bias, layer = self._mask, self._bias, self.layer
        if mask is None and not layer.is_causal:  # the first tokens, of which each sees each, or a single one
            hidden = self._arguments["hidden_states"]
            t = hidden.shape[1]
            mask = (torch.arange(keys, device=hidden.device) < t).expand(1, 1, t, keys) if t > 1 else None
        if isinstance(mask, Tensor) and mask.dim() == 4:
            mask = mask[..., :keys]
        elif mask is not None:
            return mask, None
        if bias is None:
            return mask, None
        # MPT gives [H, 1, longest] for all rows, BLOOM [B * H, 1, keys].
        bias = bias.view(-1, layer.heads * layer.part[1], 1, bias.shape[-1])
        return mask, layer.own_heads(bias, layer.heads)[..., -keys:]

    @property
    def mask_columns(self) -> int | None:
        """How many columns the model's mask has; None without one."""
        return self._mask.shape[-1] if isinstance(self._mask, Tensor) else None

    def first_token(self, q: Tensor, seen: int) -> Tensor:
        """The first column [B or 1] that is no left padding: the first one that the last query sees."""
        mask, _ = self.mask_and_bias(seen)
        if mask is None:
            return torch.zeros(1, dtype=torch.int64, device=q.device)
        last = mask[:, 0, -1]
        if last.dtype != torch.bool:
            last = last > torch.finfo(last.dtype).min / 2  # ALiBi may have been added to it
        return last.int().argmax(-1)

    def is_step(self, q: Tensor, sight: Sight) -> bool:
        """Whether the pass is a step of decoding: one query a row, over a cache."""
        if q.shape[-2] > 1 or self.cache is None or torch.is_grad_enabled() or not self._any_way:
            return False
        if not self.layer.rotates_far:
            return True
        if self.frequencies is None:
            return False
        # Which row of positions each pair turns by is asked of the model, which is not for a graph.
        return sight.positions is None or sight.positions.dim() == 2 or not torch.compiler.is_compiling()

    def is_in_parts(self, q: Tensor, sight: Sight) -> bool:
        """Whether queries [B, H, T, *] are to meet exact keys and chunks of far ones in parts."""
        if q.shape[-2] == 1 or torch.is_grad_enabled() or not self._any_way:
            return False
        # Of short texts there is one part without a window, and eager attention gives weights, asked or not.
        if sight.columns <= chunked.CHUNK and (sight.near is None or self.implementation == "eager"):
            return False
        if torch.compiler.is_compiling() or self.evicts:  # what evicts looks at attention weights
            return False
        return not shows_future(self.mask_and_bias(sight.columns)[0], int(sight.query))

    @property
    def _any_way(self) -> bool:
        """Whether any way to attend will do: without attention weights, dropout, or masks of a backend's own kind."""
        mask, layer = self._mask, self.layer
        if self.dropout or (mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 4)):
            return False
        if self.implementation == "eager":
            # A must for what has soft caps or ALiBi as an argument, and else a wish for the weights.
            must = layer.softcap is not None or layer.family.bias_argument is not None or layer.family.sinks is not None
            return must and not (self.asks_weights or getattr(layer.config, "output_attentions", False))
        return self.implementation == "sdpa"

    @property
    def frequencies(self) -> Tensor | None:
        """The model's own inverse frequencies, as they are in this pass: some kinds of scaling change them."""
        return getattr(self.layer.rotary_module, f"{self._prefix}inv_freq", None)

    @property
    def _prefix(self) -> str:
        return f"{self.layer.layer_type}_" if self.layer.by_layer_type else ""

    def rotary(self, sight: Sight, device: torch.device) -> Rotary:
        """Rotary positions for a step of decoding."""
        layer, module, positions = self.layer, self.layer.rotary_module, self.positions(sight)
        rows = None
        if positions.dim() == 3:
            name = f"_eigenattn_row_of_pair_{self._prefix}{device}"
            rows = memoised(module, name, [], lambda: layer.row_of_pair(positions).to(device))
        frequencies, scaling = self.frequencies, float(getattr(module, f"{self._prefix}attention_scaling", 1.0))
        backwards, interleaved = layer.family.backwards, layer.family.interleaved
        assert frequencies is not None  # `is_step`
        return memoised(
            module,
            f"_eigenattn_rotary_{self._prefix}{device}{'' if rows is None else '_in_rows'}",
            [frequencies, scaling],
            lambda: Rotary(
                -frequencies.to(device) if backwards else frequencies.to(device), scaling, interleaved, rows
            ),
        )

    def attend_at_full_rank(self, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> tuple[Tensor, Tensor | None]:
        """Attention over one list of keys by whatever the model was loaded with.

        Args:
            q: [B, H, T, K]; k: [B, G, S, K]; v: [B, G, S, V].

        Returns:
            The output [B, H, T, V], and the weights [B, H, T, S] where the backend gives them.
        """
        layer = self.layer
        if self.implementation in BACKENDS:
            return self.backend(q, k, v, mask=mask, dropout=self.dropout, **layer.scoring)
        if layer.sink_logits is not None:
            raise EigenAttnError(
                f"{self.implementation} takes sinks in ways of its own: load the model with "
                'attn_implementation="eager".'
            )
        # FlashAttention, FlexAttention and kernels from the hub take one head size for all three.
        size, size_v = max(q.shape[-1], v.shape[-1]), v.shape[-1]
        consumed = {"attention_mask", "position_embeddings", "output_attentions", *NAMES}
        options = {name: value for name, value in self._arguments.items() if name not in consumed}
        options |= {"dropout": self.dropout, "scaling": layer.scaling, "sliding_window": layer.sliding_window}
        if layer.softcap is not None:
            options["softcap"] = layer.softcap
        attend = ALL_ATTENTION_FUNCTIONS[self.implementation]
        out, weights = attend(layer, widen(q, size), widen(k, size), widen(v, size), mask, **options)
        return out.transpose(1, 2)[..., :size_v], weights


def rows_of(angles: Any) -> Tensor | None:
    """The positions that a rotary module was given for some angles, [B or 1, T] or [B or 1, T, rows], if noted."""
    return getattr(_first(angles), ROWS, None)


def _first(angles: Any) -> Tensor:
    return angles if isinstance(angles, Tensor) else angles[0]


def note_rows(rotary: nn.Module) -> None:
    """Have a rotary module note the positions that it is given, in several rows where they differ.

    Attention is not given them: those in images are of the time, of the height and of the width.
    """
    if ROWS not in vars(rotary):
        setattr(rotary, ROWS, True)
        rotary.register_forward_hook(_note, with_kwargs=True)


def _note(rotary: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], angles: Any) -> None:
    positions = args[1] if len(args) > 1 else kwargs["position_ids"]
    if positions.dim() == 3:
        alike = not torch.compiler.is_compiling() and bool((positions == positions[:1]).all())
        positions = positions[0] if alike else positions.movedim(0, -1)
    setattr(_first(angles), ROWS, positions)
