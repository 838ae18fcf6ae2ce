"""One row a model family: how its attention is laid out. Nothing else in the package knows a family by name.

To support another family, add a `Family` to `FAMILIES` under its `config.model_type`; the shared test suite and
`docs/families.md` pick it up from here. A model type that has no row is given that of a family whose attention runs the
same code (`eigenattn.models.recognition`).
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import EigenAttnError
from .absorbed import Absorbed
from .cache_names import cache_of
from .family import Family
from .recognition import recognised


def _latent_attention(title: str, attention: str, **others: Any) -> Family:
    """A row of multi-head latent attention: one KV head, whose values are its keys."""
    return Family(
        **{
            "title": title,
            "attention": attention,
            "absorbed": Absorbed(),
            "kv_heads": lambda config: 1,
            "head_dim": Absorbed.size,
            **others,
        }
    )


def _falcon_positions(config: Any) -> str:
    return "alibi" if config.alibi else "rotary"


def _falcon_kv_heads(config: Any) -> int:
    return config.num_kv_heads if config.new_decoder_architecture or not config.multi_query else 1


def _gpt_bigcode_kv_heads(config: Any) -> int:
    return 1 if config.multi_query else config.num_attention_heads


def _granitemoehybrid_positions(config: Any) -> str:
    return "rotary" if config.position_embedding_type == "rope" else "none"


def _olmo_hybrid_positions(config: Any) -> str:
    return "rotary" if (config.rope_parameters or {}).get("rope_theta") is not None else "none"


def _slides(attention: Any) -> bool:
    return attention.sliding_window is not None


def _slides_if_any(attention: Any) -> bool:
    return attention.sliding_window is None or attention.is_sliding


def _has_theta(attention: Any) -> bool:
    return bool(attention.config.layer_rope_theta[attention.layer_idx])


def _by_theta(decoder: Any, attention: Any) -> Any:
    theta = attention.config.layer_rope_theta[attention.layer_idx]
    found = getattr(decoder, "rotary_embs", ())
    return next((each for each in found if each.config.rope_parameters["rope_theta"] == theta), None)


def _has_angles(attention: Any) -> bool:
    config = attention.config
    return config.rope_parameters[config.layer_types[attention.layer_idx]] is not None


def _scaled_keys(attention: Any) -> float:
    return attention.scaling * attention.key_multiplier


def _ministral3_query_scale(attention: Any, arguments: dict[str, Any]) -> Tensor:
    rope, positions = attention.config.rope_parameters, arguments["position_ids"]
    past = torch.floor(positions / rope["original_max_position_embeddings"])
    return 1 + rope["llama_4_scaling_beta"] * torch.log(1 + past)


def _llama4_query_scale(attention: Any, arguments: dict[str, Any]) -> Tensor | None:
    """By the tokens that came before, padding included, in layers that do not rotate."""
    config, (layer, states) = attention.config, (attention.layer_idx, arguments["hidden_states"])
    if not config.attn_temperature_tuning or config.no_rope_layers[layer]:
        return None
    cache = cache_of(arguments)
    past = 0 if cache is None else cache.get_seq_length(layer)
    positions = torch.arange(states.shape[1], device=states.device) + past
    return torch.log1p(torch.floor((positions[None].float() + 1) / config.floor_scale)) * config.attn_scale + 1


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
        softcap="attn_logit_softcapping",
        both_directions="all",
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
    ),
    "falcon": Family(
        title="Falcon",
        attention="FalconAttention",
        qkv=("query_key_value",),
        fused="grouped",
        output="dense",
        positions=_falcon_positions,
        scale="inv_norm_factor",
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
    "gemma": Family(title="Gemma", attention="GemmaAttention"),
    "gemma3n_text": Family(
        title="Gemma 3n (text)",
        attention="Gemma3nTextAttention",
        norms=("q_norm", "k_norm"),
        norm_on="heads",
        value_norm="v_norm",
        reads="is_kv_shared_layer",
        note="Its last layers read the cache of earlier ones, as the original's do.",
    ),
    "gemma4_text": Family(
        title="Gemma 4 (text)",
        attention="Gemma4TextAttention",
        norms=("q_norm", "k_norm"),
        norm_on="heads",
        value_norm="v_norm",
        reads="is_kv_shared_layer",
        both_directions="sliding",
        note="Head sizes and KV heads differ by layer. Some layers make values by the keys' projection, and the last "
        "ones may read the cache of earlier ones, as the original's do.",
    ),
    "qwen2_moe": Family(title="Qwen 1.5 MoE, Qwen 2 MoE", attention="Qwen2MoeAttention"),
    "qwen3_next": Family(
        title="Qwen 3 Next",
        attention="Qwen3NextAttention",
        norms=("q_norm", "k_norm"),
        norm_on="heads",
        gate="query",
        note="Layers with linear attention stay as they are.",
    ),
    "qwen3_5_text": Family(
        title="Qwen 3.5 (text)",
        attention="Qwen3_5Attention",
        norms=("q_norm", "k_norm"),
        norm_on="heads",
        gate="query",
        note="Layers with linear attention stay as they are.",
    ),
    "qwen3_5_moe_text": Family(
        title="Qwen 3.5 MoE (text)",
        attention="Qwen3_5MoeAttention",
        norms=("q_norm", "k_norm"),
        norm_on="heads",
        gate="query",
        note="Layers with linear attention stay as they are.",
    ),
    "qwen2_5_vl_text": Family(title="Qwen 2.5 VL (text)", attention="Qwen2_5_VLAttention"),
    "qwen3_vl_text": Family(title="Qwen 3 VL (text)", attention="Qwen3VLTextAttention", norms=("q_norm", "k_norm")),
    "gpt_oss": Family(title="gpt-oss", attention="GptOssAttention", angles="once", sinks="sinks"),
    "granite_swa": Family(
        title="Granite with sliding windows",
        attention="GraniteSWAAttention",
        rotary=_by_theta,
        rotary_switch=_has_theta,
        sinks="sinks",
    ),
    "flint": Family(
        title="Flint",
        attention="FlintAttention",
        norms=("q_norm", "k_norm"),
        norm_on="heads",
        rotary_switch=_slides,
        sinks="sinks",
    ),
    "ministral": Family(title="Ministral", attention="MinistralAttention"),
    "ministral3": Family(title="Ministral 3", attention="Ministral3Attention", query_scale=_ministral3_query_scale),
    "llama4_text": Family(
        title="Llama 4 (text)",
        attention="Llama4TextAttention",
        interleaved=True,
        angles="complex",
        notes_positions=True,
        rotary_switch="use_rope",
        norms=("qk_norm", "qk_norm"),
        norm_on="rotated",
        query_scale=_llama4_query_scale,
    ),
    "glm": Family(title="GLM-4 9B", attention="GlmAttention", interleaved=True, angles="of_pairs"),
    "glm4": Family(title="GLM-4 0414", attention="Glm4Attention", interleaved=True, angles="of_pairs"),
    "glm4v_text": Family(title="GLM-4.1V, 4.6V Flash (text)", attention="Glm4vTextAttention", interleaved=True),
    "glm4v_moe_text": Family(title="GLM-4.5V, 4.6V (text)", attention="Glm4vMoeTextAttention"),
    "glm4_moe": Family(
        title="GLM-4.5, 4.6, 4.7", attention="Glm4MoeAttention", norms=("q_norm", "k_norm"), norm_on="heads"
    ),
    "helium": Family(title="Helium", attention="HeliumAttention", interleaved=True, angles="of_pairs"),
    "ernie4_5": Family(title="ERNIE 4.5", attention="Ernie4_5Attention", interleaved=True, angles="of_pairs"),
    "minimax_m2": Family(
        title="MiniMax M2", attention="MiniMaxM2Attention", norms=("q_norm", "k_norm"), norm_on="width"
    ),
    "seed_oss": Family(title="Seed-OSS", attention="SeedOssAttention", output_dropout="residual_dropout"),
    "starcoder2": Family(title="StarCoder 2", attention="Starcoder2Attention", output_dropout="residual_dropout"),
    "olmo": Family(title="OLMo", attention="OlmoAttention", clip="config.clip_qkv"),
    "olmo3": Family(title="OLMo 3", attention="Olmo3Attention", norms=("q_norm", "k_norm"), norm_on="width"),
    "olmoe": Family(
        title="OLMoE", attention="OlmoeAttention", norms=("q_norm", "k_norm"), norm_on="width", clip="config.clip_qkv"
    ),
    "olmo_hybrid": Family(
        title="OLMo hybrid",
        attention="OlmoHybridAttention",
        positions=_olmo_hybrid_positions,
        norms=("q_norm", "k_norm"),
        norm_on="width",
        note="Layers with linear attention stay as they are.",
    ),
    "exaone4": Family(
        title="EXAONE 4",
        attention="Exaone4Attention",
        norms=("q_norm", "k_norm"),
        rotary_switch=_slides_if_any,
    ),
    "cohere2": Family(
        title="Command R7B, Command A", attention="Cohere2Attention", interleaved=True, rotary_switch=_slides
    ),
    "cohere2_moe": Family(
        title="Command A MoE",
        attention="Cohere2MoeAttention",
        interleaved=True,
        rotary_switch=lambda attention: _slides(attention) or attention.force_rope,
    ),
    "cohere_compass_text": Family(
        title="Cohere Compass (text)", attention="CohereCompassAttention", rotary_switch=_has_angles
    ),
    "hunyuan_v1_dense": Family(
        title="Hunyuan V1",
        attention="HunYuanDenseV1Attention",
        norms=("query_layernorm", "key_layernorm"),
        norm_on="rotated",
    ),
    "nanochat": Family(
        title="nanochat",
        attention="NanoChatAttention",
        backwards=True,
        norms=("q_norm", "k_norm"),
        norm_on="rotated",
    ),
    "granitemoehybrid": Family(
        title="Granite 4",
        attention="GraniteMoeHybridAttention",
        notes_positions=True,
        positions=_granitemoehybrid_positions,
        note="Mamba layers stay as they are.",
    ),
    "nemotron": Family(title="Nemotron, Minitron", attention="NemotronAttention"),
    "nemotron_h": Family(
        title="Nemotron H, Nemotron 3",
        attention="NemotronHAttention",
        positions="none",
        note="Mamba layers stay as they are.",
    ),
    "bamba": Family(title="Bamba", attention="BambaAttention", note="Mamba layers stay as they are."),
    "jamba": Family(title="Jamba", attention="JambaAttention", positions="none", note="Mamba layers stay as they are."),
    "lfm2": Family(
        title="LFM2",
        attention="Lfm2Attention",
        output="out_proj",
        norms=("q_layernorm", "k_layernorm"),
        norm_on="heads",
        note="Layers with convolutions stay as they are.",
    ),
    "lfm2_moe": Family(
        title="LFM2 MoE",
        attention="Lfm2MoeAttention",
        output="out_proj",
        rotary="pos_emb",
        norms=("q_layernorm", "k_layernorm"),
        norm_on="heads",
        note="Layers with convolutions stay as they are.",
    ),
    "lfm3": Family(
        title="LFM3",
        attention="Lfm3Attention",
        norms=("q_norm", "k_norm"),
        norm_on="heads",
        gate="g_proj",
        note="Layers with convolutions stay as they are.",
    ),
    "falcon_h1": Family(
        title="Falcon H1",
        attention="FalconH1Attention",
        scale=_scaled_keys,
        note="The Mamba half of each layer stays as it is.",
    ),
    "phi": Family(
        title="Phi-1, Phi-1.5, Phi-2",
        attention="PhiAttention",
        output="dense",
        norms=("q_layernorm", "k_layernorm"),
    ),
    "persimmon": Family(
        title="Persimmon",
        attention="PersimmonAttention",
        qkv=("query_key_value",),
        fused="grouped",
        output="dense",
        norms=("q_layernorm", "k_layernorm"),
        norm_on="heads",
    ),
    "apertus": Family(title="Apertus", attention="ApertusAttention", norms=("q_norm", "k_norm")),
    "afmoe": Family(
        title="Trinity",
        attention="AfmoeAttention",
        norms=("q_norm", "k_norm"),
        norm_on="heads",
        rotary_switch="is_local_attention",
        gate="gate_proj",
    ),
    "laguna": Family(
        title="Laguna",
        attention="LagunaAttention",
        norms=("q_norm", "k_norm"),
        norm_on="heads",
        gate="g_proj",
        gate_function="softplus",
    ),
    "bitnet": Family(title="BitNet b1.58", attention="BitNetAttention", output_norm="attn_sub_norm"),
    "dbrx": Family(
        title="DBRX",
        attention="DbrxAttention",
        qkv=("Wqkv",),
        fused="blocks",
        output="out_proj",
        clip="clip_qkv",
    ),
    "gpt_bigcode": Family(
        title="StarCoder, SantaCoder",
        attention="GPTBigCodeAttention",
        qkv=("c_attn",),
        fused=lambda config: "blocks" if config.multi_query else "grouped",
        output="c_proj",
        positions="learned",
        dropout="attn_dropout",
        output_dropout="resid_dropout",
        kv_heads=_gpt_bigcode_kv_heads,
    ),
    "deepseek_v2": _latent_attention(
        "DeepSeek V2, V2 Lite",
        "DeepseekV2Attention",
        absorbed=Absorbed(pairs=True),
        angles="complex_halves",
    ),
    "deepseek_v3": _latent_attention("DeepSeek V3, R1", "DeepseekV3Attention"),
    "axk1": _latent_attention("A.X K1", "AXK1Attention"),
    "minicpm3": _latent_attention("MiniCPM3", "MiniCPM3Attention", absorbed=Absorbed(pairs=False)),
    "kimi_linear": _latent_attention(
        "Kimi Linear",
        "KimiLinearAttention",
        absorbed=Absorbed(pairs=False),
        positions="none",
        note="Layers with linear attention stay as they are.",
    ),
    "bailing_hybrid": _latent_attention(
        "Ling 3",
        "BailingHybridAttention",
        absorbed=Absorbed(pairs=True),
        gate="g_proj",
        note="Layers with linear attention stay as they are.",
    ),
}


# Reasons why model types are refused that are known.
REASONS: dict[str, tuple[str, ...]] = {
    "its attention looks at tokens that an index of its own chooses": (
        "axk2",
        "deepseek_v32",
        "deepseek_v4",
        "dots3_note_text",
        "glm_moe_dsa",
        "hy_v4",
        "minimax_m3_vl_text",
        "qwen4_exp_text",
    ),
    "convolutions stand between its projections and attention": ("inkling_text", "inkling2_text", "zaya"),
    "its layers have two attention modules each": ("longcat_flash",),
    "its values have another head size than its keys": ("mimo_v2_flash",),
    "its output gate has a bias of each head": ("beam",),
    "attention weights of two heads are taken from each other": ("diffllama",),
    "its mask hangs on the values": ("doge",),
    "experts make its queries": ("jetmoe",),
    "its layers are run several times, each with a cache of its own": ("hrm_text",),
    "its layers share one attention module": ("zamba", "zamba2"),
    "its cache is of a kind of its own": ("minimax",),
    "its angles are made inside its attention": ("codegen", "gptj"),
    "its mask is made inside its attention": ("gpt_neo",),
    "its projections differ by codebook": ("moshi",),
    "its attention leaves a bias to be added later": ("gpt_neox_japanese",),
    "what it makes of padding, which differs, reaches later tokens": ("recurrent_gemma",),
    "it reads the cache of another model, for which it drafts, and has none": (
        "gemma4_assistant",
        "gemma4_unified_assistant",
    ),
    "it has no attention": ("falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm"),
}
REFUSED = {model_type: reason for reason, types in REASONS.items() for model_type in types}


def family_of(config: Any) -> Family:
    """The row for a model's configuration.

    Raises:
        EigenAttnError: if the model type is not in the table, nor recognised as one that is.
    """
    text = config if config.model_type in REFUSED else config.get_text_config(decoder=True)
    model_type = text.model_type
    family = FAMILIES.get(model_type) or _recognised(type(text))
    if family is None:
        reason = REFUSED.get(model_type)
        if reason is not None:
            raise EigenAttnError(f"model type {model_type!r} is not supported: {reason}.")
        raise EigenAttnError(
            f"model type {model_type!r} is not supported: it has no row in eigenattn/models/families.py, and its "
            "attention is not that of a type that has one. docs/families.md lists those that are."
        )
    return family


def turns_keys(config: Any) -> bool:
    """Whether positions turn keys after they are cached, in some layer of a model with this configuration.

    Raises:
        EigenAttnError: see `family_of`.
    """
    family = family_of(config)
    return family.absorbed is not None or family.positions_of(config.get_text_config(decoder=True)) == "rotary"


@functools.cache
def _recognised(config: Any) -> Family | None:
    if config.model_type in REFUSED:
        return None
    found = recognised(config, {name: family.attention for name, family in FAMILIES.items()})
    if found is None:
        return None
    family = FAMILIES[found[0]]
    return replace(family, title=f"{config.model_type}, as {family.title}", attention=found[1], note="")
