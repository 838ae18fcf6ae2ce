"""What a row of the table of families says: how one model type lays out its attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .absorbed import Absorbed


def _kv_heads(config: Any) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one model type lays out its attention. The defaults are Llama's.

    Attributes of the attention module may be dotted names, such as `config.clip_qkv`.

    Args:
        title: what people call the models.
        attention: class name of the attention module in transformers; modules are found by it, not by path.
        qkv: names of the query, key and value projections, or one name if they are fused. Where a module has no value
            projection, the keys' makes both.
        fused: how the rows of a fused projection are ordered. `blocks`: all queries, all keys, all values. `grouped`:
            for each KV head its query heads, its key, its value. A function of the configuration where a family has
            both.
        output: name of the output projection.
        positions: `rotary`, `learned` (added to the embeddings, so attention sees none), `alibi` or `none`; a function
            of the configuration where a family has several.
        interleaved: rotary pairs are neighbours (0, 1), (2, 3) ..., not halves.
        angles: how the rotary module lays angles out (`eigenattn.models.rotary.ANGLES`).
        backwards: rotation is by negative angles.
        rotary: name of the rotary module of the decoder or of the attention, or a function of a module above the
            attention, and of the attention, that gives it if it is there.
        notes_positions: the decoder layers hand no positions to attention: they are noted where angles are made.
        rotary_switch: attribute of the attention module, or a function of it, that says whether this layer rotates at
            all.
        norms: names of the norms on queries and keys, which stand between projection and rotation.
        norm_on: what the norms are given: `heads_first` [B, H, T, D], `heads` [B, T, H, D] or `width` [B, T, H * D];
            or `rotated`, [B, H, T, D] after rotation.
        value_norm: name of a norm on values [B, T, G, D], if any.
        clip: attribute of the attention module that clamps queries, keys and values, if any; it follows norms on width.
        scale: attribute of the attention module, or a function of it, that multiplies the scores.
        query_scale: a function of the attention module, and of what it is called with, that gives factors [B or 1, T]
            of the queries, by their positions.
        softcap: attribute of the attention module with the cap on scores, if any.
        sinks: attribute of the attention module with a logit a head that takes its share of the softmax, if any.
        gate: what the output of the heads is multiplied with: name of its projection, or `query` where the queries'
            projection gives, head by head, queries and gates.
        gate_function: of `torch.nn.functional`, which the gate's projection goes through.
        output_norm: name of a norm on the output of all heads, before its projection.
        dropout: attribute of the attention module with the dropout of attention weights (a number or a module).
        output_dropout: name of the dropout (a number or a module) that follows the output projection, if any.
        absorbed: of multi-head latent attention, how it is projected, in the place of `qkv`; `kv_heads` is 1 then, and
            values are keys.
        reads: attribute of the attention module that says whether the layer reads the keys and values of an earlier one
            and has none of its own, if a family has such layers. The earlier one hands them on in `shared_kv_states`.
        both_directions: in which layers tokens of an image see each other in both directions, if in any: `all`, or
            `sliding`. The mask says so where there is one; engines that build none go by this.
        bias_argument: name under which a bias on the scores (ALiBi) is passed, if any.
        mask_true_is_masked: a boolean mask is True where attention is forbidden.
        adds_residual: the attention adds the residual stream, its second positional argument, to its output.
        feed_forward: for tensor parallelism, where transformers has no plan: the projections of a layer's feed-forward
            network that widen, and the one that narrows again.
        kv_heads: number of KV heads, `G`, from the configuration.
        head_dim: head dimension, `D`, from the configuration.
        note: what a user of the family has to know, for `docs/families.md`.
    """

    title: str
    attention: str
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    fused: str | Callable[[Any], str] | None = None
    output: str = "o_proj"
    positions: str | Callable[[Any], str] = "rotary"
    interleaved: bool = False
    angles: str = "twice"
    backwards: bool = False
    rotary: str | Callable[[Any, Any], Any] = "rotary_emb"
    notes_positions: bool = False
    rotary_switch: str | Callable[[Any], bool] | None = None
    norms: tuple[str, str] | None = None
    norm_on: str = "heads_first"
    value_norm: str | None = None
    clip: str | None = None
    scale: str | Callable[[Any], float] = "scaling"
    query_scale: Callable[[Any, dict[str, Any]], Tensor | None] | None = None
    softcap: str | None = None
    sinks: str | None = None
    gate: str | None = None
    gate_function: str = "sigmoid"
    output_norm: str | None = None
    dropout: str = "attention_dropout"
    output_dropout: str | None = None
    absorbed: Absorbed | None = None
    reads: str | None = None
    both_directions: str | None = None
    bias_argument: str | None = None
    mask_true_is_masked: bool = False
    adds_residual: bool = False
    feed_forward: tuple[tuple[str, ...], str] | None = None
    kv_heads: Callable[[Any], int] = _kv_heads
    head_dim: Callable[[Any], int] = _head_dim
    note: str = ""

    def positions_of(self, config: Any) -> str:
        """`rotary`, `learned`, `alibi` or `none`, for a model with this configuration."""
        return self.positions if isinstance(self.positions, str) else self.positions(config)

    def fused_in(self, config: Any) -> str | None:
        """How the rows of a fused projection are ordered, for a model with this configuration; None for three."""
        return self.fused(config) if callable(self.fused) else self.fused

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of all projections but the output's."""
        return self.qkv if self.absorbed is None else self.absorbed.projections
