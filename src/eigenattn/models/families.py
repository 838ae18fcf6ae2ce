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
        feed_forward: for tensor parallelism, where transformers has no plan: the projections of a layer's feed-forward
            network that widen, and the one that narrows again.
        kv_heads: number of KV heads, `G`, from the configuration.
        head_dim: head dimension, `D`, from the configuration.
        note: what a user of the family has to know, for `docs/families.md`.
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
    feed_forward: tuple[tuple[str, ...], str] | None = None
    kv_heads: Callable[[Any], int] = _kv_heads
    head_dim: Callable[[Any], int] = _head_dim
    note: str = ""

    def positions_of(self, config: Any) -> str:
        """`rotary`, `learned` or `alibi`, for a model with this configuration."""
        return self.positions if isinstance(self.positions, str) else self.positions(config)


def _falcon_positions(config: Any) -> str:
    return "alibi" if config.alibi else "rotary"


def _falcon_kv_heads(config: Any) -> int:
    return config.num_kv_heads if config.new_decoder_architecture or not config.multi_query else 1


FAMILIES: dict[str, Family] = {
    "opt": Family(
        title="OPT",
        attention="OPTAttention",
        output="out_proj",
        positions="learned",
        dropout="dropout",
        feed_forward=(("fc1",), "fc2"),
    ),
    "mpt": Family(
        title="MPT",
        attention="MptAttention",
        qkv=("Wqkv",),
        fused="blocks",
        output="out_proj",
        positions="alibi",
        clip="clip_qkv",
        scale="softmax_scale",
        dropout="attn_dropout_p",
        bias_argument="position_bias",
        feed_forward=(("ffn.up_proj",), "ffn.down_proj"),
        mask_true_is_masked=True,
        note="Clips only where the configuration sets `clip_qkv`; without it everything is folded. Its configuration "
        "has `use_cache=False` by default: without `use_cache=True` nothing is cached. "
        "Its blocks do not tell attention that weights are asked for: where the fused kernel decodes (see "
        "`eigenattn.kernels.use`), ask for them in the configuration, `output_attentions=True`.",
    ),
    "llama": Family(title="Llama 2, 3, 3.1, SmolLM, SmolLM2", attention="LlamaAttention"),
    "mistral": Family(title="Mistral", attention="MistralAttention"),
    "mixtral": Family(title="Mixtral", attention="MixtralAttention"),
    "qwen2": Family(title="Qwen 2, Qwen 2.5", attention="Qwen2Attention"),
    "qwen3": Family(title="Qwen 3", attention="Qwen3Attention", norms=("q_norm", "k_norm")),
    "qwen3_moe": Family(title="Qwen 3 MoE", attention="Qwen3MoeAttention", norms=("q_norm", "k_norm")),
    "gemma2": Family(
        title="Gemma 2",
        attention="Gemma2Attention",
        softcap="attn_logit_softcapping",
        note="Caps scores, so it needs eager attention, which is its default from transformers 5.21.",
    ),
    "gemma3_text": Family(
        title="Gemma 3 (text)",
        attention="Gemma3Attention",
        norms=("q_norm", "k_norm"),
        rotary_by_layer_type=True,
        softcap="attn_logit_softcapping",
    ),
    "phi3": Family(title="Phi-3", attention="Phi3Attention", qkv=("qkv_proj",), fused="blocks"),
    "gpt2": Family(
        title="GPT-2",
        attention="GPT2Attention",
        qkv=("c_attn",),
        fused="blocks",
        output="c_proj",
        positions="learned",
        dropout="attn_dropout",
        output_dropout="resid_dropout",
    ),
    "gpt_neox": Family(
        title="GPT-NeoX, Pythia",
        attention="GPTNeoXAttention",
        qkv=("query_key_value",),
        fused="grouped",
        output="dense",
        cache_argument="layer_past",
    ),
    "falcon": Family(
        title="Falcon",
        attention="FalconAttention",
        qkv=("query_key_value",),
        fused="grouped",
        output="dense",
        positions=_falcon_positions,
        scale="inv_norm_factor",
        cache_argument="layer_past",
        kv_heads=_falcon_kv_heads,
        note="With `alibi=True` nothing rotates, and queries are folded too. transformers has no static cache for such "
        "models. Its eager attention adds ALiBi twice, and ours once, as its sdpa does. FlashAttention is not "
        "supported: transformers has another attention class for it.",
    ),
    "bloom": Family(
        title="BLOOM",
        attention="BloomAttention",
        qkv=("query_key_value",),
        fused="grouped",
        output="dense",
        positions="alibi",
        scale="inv_norm_factor",
        cache_argument="layer_past",
        bias_argument="alibi",
        adds_residual=True,
        note="Before transformers 5.21 a static cache needs an attention mask of its own length, as `generate` gives.",
    ),
    "olmo2": Family(title="OLMo 2", attention="Olmo2Attention", norms=("q_norm", "k_norm"), norm_on="width"),
    "granite": Family(title="Granite", attention="GraniteAttention"),
    "smollm3": Family(title="SmolLM3", attention="SmolLM3Attention", rotary_switch="use_rope"),
    "cohere": Family(
        title="Command R, Command R+",
        attention="CohereAttention",
        interleaved=True,
        norms=("q_norm", "k_norm"),
        norm_on="heads",
        note="Has norms only with `use_qk_norm=True`; without them keys are folded.",
    ),
    "stablelm": Family(
        title="StableLM",
        attention="StableLmAttention",
        norms=("q_layernorm", "k_layernorm"),
        feed_forward=(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
        note="Has norms only with `qk_layernorm=True`; without them keys are folded.",
    ),
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
