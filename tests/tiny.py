"""Tiny random models of every family, built in code."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from eigenattn.cache.codebook import UNIT_SCALE
from eigenattn.cache.packing import Widths, pack
from eigenattn.compression.basis import Basis, Quantiser
from eigenattn.compression.folding import compress_layer
from eigenattn.config import Sharing
from eigenattn.models.attention import EigenAttention
from eigenattn.models.conversion import convert_attention, eigen_layers

VOCABULARY = 128
HEAD_DIM = 16
COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = {
    **COMMON,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # Large weights make attention sharp, so that a wrong position or mask shows.
    "initializer_range": 0.2,
}
MHA = {**LLAMA, "num_key_value_heads": 4}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
# Channels of each width, or plain ones, of the latents of keys and of values.
WIDTHS = Widths.of({8: 3, 4: 5, 2: 3}), Widths.of({8: 2, 4: 1, 2: 6})
RANKS = 12, 8
# For models whose sides have every width between them.
WIDTHS_K, WIDTHS_V = Widths.of({8: 3, 6: 2, 4: 2, 3: 3, 2: 1}), Widths.of({8: 2, 4: 1, 2: 5, 1: 1})
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj")
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
# What is cached of a token has as many dimensions as a head of the others.
LATENT = {
    **MHA,
    "kv_lora_rank": HEAD_DIM - 4,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
    "q_lora_rank": 24,
    "first_k_dense_replace": 3,  # no layer has experts
}

# name -> (model type, configuration)
TINY: dict[str, tuple[str, dict]] = {
    "llama": ("llama", LLAMA),
    "llama-bias": ("llama", {**LLAMA, "attention_bias": True}),
    "llama3": ("llama", {**LLAMA, "rope_parameters": LLAMA3_ROPE}),
    "llama-yarn": ("llama", {**LLAMA, "rope_parameters": YARN_ROPE}),
    "mistral": ("mistral", {**LLAMA, "sliding_window": None}),
    "mistral-sliding": ("mistral", {**LLAMA, "sliding_window": 12}),
    "mistral-wide": ("mistral", {**LLAMA, "sliding_window": 400}),
    "mixtral": ("mixtral", {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen2": ("qwen2", LLAMA),
    "qwen2-sliding": (
        "qwen2",
        {
            **LLAMA,
            "use_sliding_window": True,
            "sliding_window": 12,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
    "qwen3": ("qwen3", {**LLAMA, "head_dim": HEAD_DIM}),
    "qwen3_moe": ("qwen3_moe", {**LLAMA, "head_dim": HEAD_DIM, "num_experts": 4, **EXPERTS}),
    "gemma2": (
        "gemma2",
        {
            **LLAMA,
            "head_dim": HEAD_DIM,
            "sliding_window": 12,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 2.0,
            "attn_implementation": "eager",  # the default is sdpa before transformers 5.21, without the cap
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            **LLAMA,
            "head_dim": HEAD_DIM,
            "sliding_window": 12,
            "query_pre_attn_scalar": 20,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "phi3": ("phi3", {**LLAMA, "sliding_window": None}),
    "phi3-partial": ("phi3", {**LLAMA, "partial_rotary_factor": 0.5, "sliding_window": 400}),
    "gpt_neox": ("gpt_neox", {**MHA, "rotary_pct": 0.25}),
    "gpt2": (
        "gpt2",
        {**COMMON, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512, "initializer_range": 0.2},
    ),
    "gpt2-inverse": (
        "gpt2",
        {
            **COMMON,
            "n_embd": 64,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 512,
            "initializer_range": 0.2,
            "scale_attn_by_inverse_layer_idx": True,
        },
    ),
    "opt": ("opt", {**MHA, "ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.2}),
    "opt-no-bias": ("opt", {**MHA, "ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.2, "enable_bias": False}),
    "mpt": (
        "mpt",
        {**COMMON, "d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": 512, "initializer_range": 0.2},
    ),
    "mpt-clip": (
        "mpt",
        {
            **COMMON,
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 3,
            "max_seq_len": 512,
            "initializer_range": 0.2,
            "attn_config": {"clip_qkv": 1.0},
        },
    ),
    "falcon": ("falcon", {**MHA, "num_kv_heads": 4, "multi_query": False, "new_decoder_architecture": False}),
    "falcon-multi-query": ("falcon", {**MHA, "multi_query": True, "new_decoder_architecture": False}),
    "falcon-grouped": ("falcon", {**MHA, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "falcon-alibi": ("falcon", {**MHA, "alibi": True, "multi_query": False, "bias": True, "num_kv_heads": 4}),
    "bloom": ("bloom", {**COMMON, "hidden_size": 64, "n_layer": 3, "n_head": 4, "initializer_range": 0.2}),
    "olmo2": ("olmo2", LLAMA),
    "granite": ("granite", {**LLAMA, "attention_multiplier": 0.3}),
    "smollm3": (
        "smollm3",
        {
            **LLAMA,
            "no_rope_layers": [1, 0, 1],
            "use_sliding_window": True,
            "sliding_window": 12,
            "layer_types": ["full_attention", "full_attention", "sliding_attention"],
        },
    ),
    "stablelm": ("stablelm", LLAMA),
    "stablelm-norm": ("stablelm", {**LLAMA, "qk_layernorm": True, "use_qkv_bias": True}),
    "cohere": ("cohere", {**LLAMA, "logit_scale": 1.0, "attention_bias": True}),
    "cohere-norm": ("cohere", {**LLAMA, "logit_scale": 1.0, "use_qk_norm": True}),
    "deepseek_v3": ("deepseek_v3", LATENT),
    "deepseek_v3-halves": (
        "deepseek_v3",
        {**LATENT, "q_lora_rank": None, "rope_interleave": False, "rope_parameters": YARN_ROPE, "attention_bias": True},
    ),
}
SLIDES = {**LLAMA, "head_dim": HEAD_DIM, "sliding_window": 40}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 8}
BY_TURNS = ["sliding_attention", "full_attention", "sliding_attention"]
# As `TINY`, of models that the tests of vLLM alone build: they slide, and queries see more than exact windows have.
SERVED: dict[str, tuple[str, dict]] = {
    "gemma2-served": ("gemma2", {**TINY["gemma2"][1], "sliding_window": 40}),
    "gemma3-served": (
        "gemma3_text",
        {
            **SLIDES,
            "query_pre_attn_scalar": 20,
            "layer_types": BY_TURNS,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            },
        },
    ),
    "gemma3n-served": (
        "gemma3n_text",
        {
            **SLIDES,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 8,
            "activation_sparsity_pattern": None,
        },
    ),
    "mistral-served": ("mistral", SLIDES),
    "cohere2-served": ("cohere2", {**SLIDES, "layer_types": BY_TURNS, "logit_scale": 1.0}),
    "gpt_oss-served": (
        "gpt_oss",
        {
            **SLIDES,
            "layer_types": BY_TURNS,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {**YARN_ROPE, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
        },
    ),
    "falcon_h1-served": (
        "falcon_h1",
        {**LLAMA, **MAMBA, "mamba_d_ssm": 128},
    ),
    "granitemoehybrid-served": (
        "granitemoehybrid",
        {
            **LLAMA,
            **MAMBA,
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "shared_intermediate_size": 32,
            "num_local_experts": 0,
        },
    ),
    "glm4_moe-served": (
        "glm4_moe",
        {
            **LLAMA,
            "hidden_size": 128,
            "head_dim": 32,
            "first_k_dense_replace": 2,
            "num_nextn_predict_layers": 1,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            **EXPERTS,
        },
    ),
    "jamba-served": (
        "jamba",
        {**LLAMA, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1},
    ),
    "granite_swa-served": ("granite_swa", {**SLIDES, "layer_types": BY_TURNS}),
}


def tiny(name: str, attn_implementation: str | None = None, **overrides) -> torch.nn.Module:
    """A tiny random model in evaluation mode; the same one for the same name."""
    model_type, settings = (TINY | SERVED)[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**settings, **overrides})
    backend = attn_implementation or config._attn_implementation
    model = AutoModelForCausalLM.from_config(config, attn_implementation=backend)
    for parameter_name, parameter in model.named_parameters():
        # Biases and norms start as constants, which would hide a bias or norm that is left out.
        if parameter.dim() == 1 or "norm" in parameter_name:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in parameter_name else 0.0, 0.3)
    return model.eval()


def tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    """Token ids [B, T], none of them special."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def converted(name: str = "llama", build=tiny, **overrides) -> tuple[torch.nn.Module, list[EigenAttention]]:
    """A tiny model whose attention is ours, at full rank, and its layers."""
    model = build(name, **overrides)
    convert_attention(model)
    return model, eigen_layers(model)


def some_bases(
    attention: EigenAttention,
    share: str = "1",
    sizes: Sequence[int | Widths] = RANKS,
    seed: int = 0,
    centred: bool = True,
) -> list[Basis]:
    """Arbitrary bases of a layer.

    Args:
        share: which latents are shared (`Sharing`).
        sizes: of the latents of keys and of values, ranks or widths; the first is of both where they are one, or values
            are keys.
    """
    sharing = Sharing.of(share)
    latents = (
        [(("key", "value"), sharing.keys)]
        if sharing.joint
        else [(("key",), sharing.keys), (("value",), sharing.values)]
    )
    latents = latents[: len(attention.layout.sides)]
    return [
        (random_basis if isinstance(size, int) else quantised_basis)(
            attention, size, centred, seed + 100 * place, sides, heads
        )
        for place, ((sides, heads), size) in enumerate(zip(latents, sizes, strict=False))
    ]


def compressed(
    name: str,
    window: int,
    coded: bool = False,
    share: str = "1",
    sizes: Sequence[int | Widths] | None = None,
    build: Callable[..., torch.nn.Module] = tiny,
    **overrides,
) -> torch.nn.Module:
    """A tiny model compressed by arbitrary bases.

    Args:
        name: of the tiny model.
        window: tokens of the exact window; 0 for none.
        coded: whether latents are codes, of `WIDTHS`, and not plain, of `RANKS`.
        share, sizes: as for `some_bases`; sizes by default those.
        build: makes the tiny model of a name.
        overrides: of the tiny model's configuration.
    """
    model, layers = converted(name, build, **overrides)
    for index, attention in enumerate(layers):
        compress_layer(attention, some_bases(attention, share, sizes or (WIDTHS if coded else RANKS), index), window)
    return model


def quantised_model(
    name: str = "llama",
    window: int = 6,
    widths_k: Widths = WIDTHS_K,
    widths_v: Widths = WIDTHS_V,
    dtype: torch.dtype = torch.float64,
) -> torch.nn.Module:
    """A tiny model of quantised latents, of keys and of values apart and in every width.

    In float64 rounding noise of shapes and orders stays far from the edges between codes.
    """
    model, layers = converted(name)
    for index, attention in enumerate(layers):
        compress_layer(attention, some_bases(attention, sizes=(widths_k, widths_v), seed=index), window)
    return model.to(dtype)


def write_eight_bits(base: Path, folder: Path, kind: str) -> None:
    """Write a tiny Llama as compressed-tensors has it: 8 bits a weight, and as many for activations in every pass.

    Args:
        base: its folder.
        folder: where its weights and configuration go, which may be the same.
        kind: `int` or `float`.
    """
    dtype, most = {"float": (torch.float8_e4m3fn, 448), "int": (torch.int8, 127)}[kind]
    tensors = load_file(base / "model.safetensors")
    for name in [name for name in tensors if name.endswith(tuple(f"{each}.weight" for each in PROJECTIONS))]:
        scale = tensors[name].abs().amax(1, keepdim=True) / most
        rows = tensors[name] / scale
        tensors[name] = (rows.round() if kind == "int" else rows).to(dtype)
        tensors[f"{name}_scale"] = scale
    config = json.loads((base / "config.json").read_text())
    common = {"num_bits": 8, "type": kind, "symmetric": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**common, "strategy": "channel", "dynamic": False},
                "input_activations": {**common, "strategy": "token", "dynamic": True},
            }
        },
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def random_basis(
    attention: EigenAttention,
    rank: int,
    centred: bool,
    seed: int = 0,
    sides: tuple[str, ...] = ("key",),
    heads: int = 1,
) -> Basis:
    """An arbitrary basis: at full rank its decoder undoes its encoder, whatever its mean.

    Args:
        sides, heads: whose vectors a latent is of, and of how many KV heads.
    """
    g, d = attention.kv_heads // heads, attention.head_dim * heads * len(sides)
    generator = torch.Generator().manual_seed(seed)
    encoder = torch.linalg.qr(torch.randn(g, d, d, generator=generator, dtype=torch.float64)).Q
    encoder = encoder * (0.5 + torch.rand(g, 1, d, generator=generator, dtype=torch.float64))
    decoder = torch.linalg.inv(encoder)
    mean = torch.randn(g, d, generator=generator, dtype=torch.float64) if centred else None
    key_share = torch.full((g, d), 0.5) if len(sides) > 1 else None
    return Basis(
        encoder[..., :rank],
        decoder[:, :rank],
        torch.ones(g, d),
        mean,
        sides=sides,
        heads=heads,
        key_share=key_share,
    )


def quantised_basis(
    attention: EigenAttention,
    widths: Widths,
    centred: bool,
    seed: int = 0,
    sides: tuple[str, ...] = ("key",),
    heads: int = 1,
) -> Basis:
    """An arbitrary basis of coded latents; ranges are about as wide as the tiny models' latents."""
    basis = random_basis(attention, widths.channels, centred, seed, sides, heads)
    generator = torch.Generator().manual_seed(seed + 1)
    low, high = (3 + 2 * torch.rand(2, len(basis.encoder), widths.channels, generator=generator)).unbind()
    return dataclasses.replace(basis, quantiser=Quantiser(levels_between(-low, high, widths), widths))


def levels_between(low: torch.Tensor, high: torch.Tensor, widths: Widths) -> torch.Tensor:
    """Levels [..., R, 4] from about low to about high [..., R], closer to each other in the middle than at the ends."""
    middle = torch.tensor([2 ** (bits - 1) for bits in widths.each()])
    reach = (high - low) / 2
    shape = [(low + high) / 2, 0.6 * reach / middle, 0.1 * reach / middle**2, 0.4 * reach / middle**3]
    return torch.stack(shape, dim=-1)


def packed_rows(widths: Widths, *shape: int) -> torch.Tensor:
    """What a cache might hold: random codes of all levels, and scales between a half and twice, [*shape, bytes]."""
    numbers = 2 ** torch.tensor(widths.each())
    codes = pack((torch.rand(*shape, widths.channels) * numbers).to(torch.uint8), widths)
    if not widths.scaled:
        return codes
    return torch.cat([codes, torch.randint(UNIT_SCALE - 4, UNIT_SCALE + 5, (*shape, 1), dtype=torch.uint8)], dim=-1)


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character of ASCII, so that any text has enough tokens."""
    vocabulary = {chr(code): code for code in range(VOCABULARY)}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="\x01"))
    inner.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="\x01", bos_token="\x01", eos_token="\x02", pad_token="\x00"
    )


def save_tiny(folder: Path, name: str = "llama") -> Path:
    """A tiny checkpoint with a tokenizer, as a user would have it on disk."""
    tiny(name).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder
