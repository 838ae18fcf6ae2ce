"""One row a model family: how its attention is laid out. Nothing else in the package knows a family by name.

To support another family, add a `Family` to `FAMILIES` under its `config.model_type`; the shared test suite and
`docs/families.md` pick it up from here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import EigenAttnError


def _kv_heads(config: Any) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one model type lays out its attention. The defaults are Llama's.

    Args:
        title: what people call the models.
        attention: class name of the attention module in transformers; modules are found by it, not by path.
        qkv: names of the query, key and value projections, or one name if they are fused.
        fused: how the rows of a fused projection are ordered. `blocks`: all queries, all keys, all values. `grouped`:
            for each KV head its query heads, its key, its value.
        output: name of the output projection.
        positions: `rotary`, `learned` (added to the embeddings, so attention sees none) or `alibi`; a function of the
            configuration where a family has several.
        interleaved: rotary pairs are neighbours (0, 1), (2, 3) ..., not halves.
        rotary_switch: attribute of the attention module that says whether this layer rotates at all.
        rotary_by_layer_type: the rotary module has angles for each of the model's layer types.
        norms: names of the norms on queries and keys, which stand between projection and rotation.
        norm_on: what the norms are given: `heads_first` [B, H, T, D], `heads` [B, T, H, D] or `width` [B, T, H * D].
        clip: attribute of the attention module that clamps queries, keys and values, if any.
        scale: attribute of the attention module that multiplies the scores.
        softcap: attribute of the attention module with the cap on scores, if any.
        dropout: attribute of the attention module with the dropout of attention weights (a number or a module).
        output_dropout: name of the dropout module that follows the output projection, if the attention has it.
        cache_argument: name under which the decoder layer passes the cache.
        bias_argument: name under which a bias on the scores (ALiBi) is passed, if any.
        mask_true_is_masked: a boolean mask is True where attention is forbidden.
        adds_residual: the attention adds the residual stream, its second positional argument, to its output.
        kv_heads: number of KV heads, `G`, from the configuration.
        head_dim: head dimension, `D`, from the configuration.
    """

    title: str
    attention: str
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    fused: str | None = None
    output: str = "o_proj"
    positions: str | Callable[[Any], str] = "rotary"
    interleaved: bool = False
    rotary_switch: str | None = None
    rotary_by_layer_type: bool = False
    norms: tuple[str, str] | None = None
    norm_on: str = "heads_first"
    clip: str | None = None
    scale: str = "scaling"
    softcap: str | None = None
    dropout: str = "attention_dropout"
    output_dropout: str | None = None
    cache_argument: str = "past_key_values"
    bias_argument: str | None = None
    mask_true_is_masked: bool = False
    adds_residual: bool = False
    kv_heads: Callable[[Any], int] = _kv_heads
    head_dim: Callable[[Any], int] = _head_dim

    def positions_of(self, config: Any) -> str:
        """`rotary`, `learned` or `alibi`, for a model with this configuration."""
        return self.positions if isinstance(self.positions, str) else self.positions(config)


FAMILIES: dict[str, Family] = {
    "llama": Family(title="Llama 2, 3, 3.1, SmolLM, SmolLM2", attention="LlamaAttention"),
    "mistral": Family(title="Mistral", attention="MistralAttention"),
    "qwen2": Family(title="Qwen 2, Qwen 2.5", attention="Qwen2Attention"),
}


def family_of(config: Any) -> Family:
    """The row for a model's configuration.

    Raises:
        EigenAttnError: if the model type is not in the table.
    """
    model_type = config.get_text_config(decoder=True).model_type
    if model_type not in FAMILIES:
        raise EigenAttnError(
            f"model type {model_type!r} is not supported; the known ones are {', '.join(sorted(FAMILIES))}. "
            "To add it, write one row in eigenattn/models/families.py."
        )
    return FAMILIES[model_type]
