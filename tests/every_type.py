"""What becomes of every causal model type that transformers has, on tiny random models.

    python tests/every_type.py [TYPE ...]
    python tests/every_type.py --write [TYPE ...]

Each type is built from its default configuration, with small numbers in the place of large ones, and held to the
original: at full rank it computes the same, also with padding in front; truncated and coded, with a cache and without
one, it computes the same; it is compressed by gradients, saved and loaded. Vision models are also given a prompt with
an image, alone and beside one without. `--write` keeps the verdicts in
`docs/every_type.json`, from which `docs/generate_families.py` makes a table.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
import vision
from helpers import in_pieces, padded
from tiny import VOCABULARY, some_bases, tokens
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache, StaticCache
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

import eigenattn
from eigenattn import EigenAttentionConfig, EigenAttnError, compress
from eigenattn.cache.packing import Widths
from eigenattn.compression.folding import attach, fold
from eigenattn.models.bases_file import save_bases
from eigenattn.models.conversion import convert_attention, eigen_layers
from eigenattn.models.families import family_of

TABLE = Path(__file__).parents[1] / "docs" / "every_type.json"
LAYERS, LENGTH, WINDOW = 4, 20, 5
TOLERANCE = 1e-4  # relative to the largest logit
LARGEST = 40_000_000  # parameters, beyond which a model is not tiny

# Small numbers in the place of whatever a configuration has.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "embedding_size", "block_dim", "lru_width"), 64),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "intermediate_size_mlp"), 96
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("n_group", "topk_group", "mamba_n_groups", "n_groups", "first_k_dense_replace"), 1),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "chunk_size", "mamba_chunk_size"), 8),
    **dict.fromkeys(("linear_num_key_heads", "mamba_expand", "num_experts_per_tok", "num_kv_shared_layers"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "qk_nope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 512),
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    "head_dim": 16,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "linear_num_value_heads": 4,
    "mamba_d_ssm": 128,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "word_embed_proj_dim": 64,
    "sliding_window": 12,
    "initializer_range": 0.2,
    "init_std": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
NULLABLE = ("sliding_window", "head_dim", "bos_token_id", "eos_token_id", "pad_token_id", "num_key_value_heads")
# Of configurations that numbers alone do not make consistent.
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_group": 1, "n_group": 1, "topk_method": "greedy"},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.0, "rope_theta": 10000.0},
    },
    "gemma3n": vision.WRAPPERS["gemma3n"].settings,
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {"sliding_attention": PLAIN_ROPE, "full_attention": None},
    },
}


# Without which a configuration is none.
NEEDED: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
        }
    },
}


def default_of(model_type: str) -> Any:
    """The default configuration of a type."""
    return AutoConfig.for_model(model_type, **NEEDED.get(model_type, {}))


def small(config: Any) -> dict[str, Any]:
    """Settings that make a configuration of this kind tiny, nested ones included."""
    stored = config.to_dict()
    mapped = getattr(type(config), "attribute_map", None) or {}
    found = {
        name: value
        for name, value in SIZES.items()
        if (name in stored or name in mapped)
        and (name in NULLABLE or stored.get(mapped.get(name, name)) is not None)
        and not isinstance(stored.get(name), list | dict)
    }
    if "qk_rope_head_dim" in found and "head_dim" in found:
        found["head_dim"] = SIZES["qk_rope_head_dim"]
    if "kv_lora_rank" in found and "num_key_value_heads" in found:
        found["num_key_value_heads"] = SIZES["num_attention_heads"]
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(stored.get(name), list) and name not in mapped:
            kinds = list(dict.fromkeys(stored[name]))
            found[name] = [kinds[i % len(kinds)] for i in range(LAYERS)]
    rope = stored.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope and rope["rope_theta"] is None:
        found["rope_parameters"] = PLAIN_ROPE
    for name in vars(config):
        inner = vars(config)[name]
        if name.endswith("_config") and hasattr(inner, "to_dict") and hasattr(inner, "model_type"):
            found[name] = {**small(inner), "model_type": inner.model_type}
    return found


def merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Settings with others in their place."""
    nested = {
        name: merged(one[name], value) for name, value in other.items() if name.endswith("_config") and name in one
    }
    return {**one, **other, **nested}


def built(model_type: str, wrapped: bool = False, **overrides: Any) -> nn.Module:
    """A tiny random model in evaluation mode and double precision; the same one for the same type.

    Args:
        overrides: of its configuration.
    """
    default = default_of(model_type)
    special = vision.WRAPPERS[model_type].settings if wrapped else SPECIAL.get(model_type, {})
    config = type(default)(**merged(merged(small(default), special), overrides))
    kind = AutoModelForImageTextToText if wrapped else AutoModelForCausalLM
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model = kind.from_config(config)
    model.set_experts_implementation("eager")  # which knows double precision
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 or "norm" in name:
            nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)
        elif wrapped and not parameter.any():  # some projections of images are zeros until they are trained
            nn.init.normal_(parameter, 0.0, 0.2)
    return model.eval()


@torch.no_grad()
def doubled(model: nn.Module, run: Callable[[nn.Module], Any]) -> nn.Module:
    """A copy of a model in double precision, far from the edges between codes; itself where it does not run there."""
    with contextlib.suppress(Exception):
        copied = copy.deepcopy(model).double()
        run(copied)
        return copied
    return model


def with_bases(model: nn.Module, ranks: Any, window: int = 0, folded: bool = True) -> nn.Module:
    """A copy of a model with arbitrary bases; `ranks` of None are full ones."""
    model = copy.deepcopy(model)
    convert_attention(model)
    for index, attention in enumerate(eigen_layers(model)):
        sizes = [attention.head_dim] * 2 if ranks is None else ranks
        attach(attention, some_bases(attention, sizes=sizes, seed=index), window)
        if folded:
            fold(attention)
    return model


def error(found: Tensor, expected: Tensor) -> float:
    """The largest error, relative to the largest logit."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def cached_error(model: nn.Module, cache: Any, ids: Tensor, exact: Tensor) -> float:
    """What is lost on the way through a cache."""
    return error(in_pieces(model, ids, cache, [9, *[1] * (ids.shape[1] - 9)]), exact)


@torch.no_grad()
def failure(model: nn.Module) -> str | None:
    """What does not hold of a compressed model; None if all does."""
    ids = tokens(2, LENGTH) % 100
    exact = model(ids, use_cache=False).logits
    left, mask = padded(ids, 4)
    behind = model(left, attention_mask=mask, use_cache=False).logits[:, 4:]
    for folded, window in ((True, 0), (False, 0), (False, WINDOW)):
        full = with_bases(model, None, window, folded)
        if error(full(ids, use_cache=False).logits, exact) > TOLERANCE:
            return f"differs at full rank ({'folded' if folded else f'window {window}'})"
        if error(full(left, attention_mask=mask, use_cache=False).logits[:, 4:], behind) > TOLERANCE:
            return "differs behind padding"
    config = model.config
    pieces = [9, *[1] * (LENGTH - 9)]
    original = in_pieces(model, ids, DynamicCache(config=config), pieces)
    if error(in_pieces(full, ids, DynamicCache(config=config), pieces), original) > TOLERANCE:
        return "differs at full rank with a cache"
    own = error(original, exact)
    bound = max(TOLERANCE, 5 * own)  # of some types the original itself differs with a cache
    for what, ranks, window in (
        ("truncated", (12, 8), 0),
        ("truncated with a window", (12, 8), WINDOW),
        ("coded", (Widths.of({8: 4, 4: 4}), Widths.of({8: 3, 2: 4})), WINDOW),
    ):
        truncated = with_bases(model, ranks, window)
        changed = truncated(ids, use_cache=False).logits
        if error(changed, exact) < 1e-3:
            return f"{what} changes nothing"
        if cached_error(truncated, DynamicCache(config=config), ids, changed) > bound:
            return f"{what} differs with a cache"
    with contextlib.suppress(Exception):
        own = cached_error(model, StaticCache(config=config, max_cache_len=32), ids, exact)
        if (
            own < TOLERANCE
            and cached_error(truncated, StaticCache(config=config, max_cache_len=32), ids, changed) > bound
        ):
            return "coded differs with a static cache"
    return saved_failure(model, ids)


def predicted(model: nn.Module, prompt: vision.Prompt) -> Tensor:
    """Logits of a prompt without a cache [B, T, V]."""
    return model(prompt.ids, **prompt.arguments, use_cache=False).logits


def generated(model: nn.Module, prompt: vision.Prompt, length: int = 5, **options: Any) -> Tensor:
    """Logits of tokens behind a prompt [B, length, V], each by those before: the most likely ones, and no image's."""
    settings = {"do_sample": False, "max_new_tokens": length, "min_new_tokens": length, "pad_token_id": 0}
    settings |= {"output_logits": True, "return_dict_in_generate": True, "suppress_tokens": vision.IDS, **options}
    return torch.stack(model.generate(prompt.ids, **prompt.arguments, **settings).logits, dim=1)


@torch.no_grad()
def image_failure(model: nn.Module, name: str, what: str = "image") -> str | None:
    """What does not hold of a vision model that reads an image, or what else it may be shown; None if all does."""
    one, text = vision.prompt(name, what), vision.text_prompt(name, 9)
    both, rows = vision.together(one, text), (slice(-one.ids.shape[1], None), slice(-text.ids.shape[1], None))
    exact, answer, answers = predicted(model, one), generated(model, one), generated(model, both)
    shown = predicted(model, both)
    mirrored = {key: x.flip(-1) if x.is_floating_point() else x for key, x in one.of_images.items()}
    if error(predicted(model, one._replace(of_images=mirrored)), exact) < 1e-3:
        return f"the {what} does not count"
    for folded, window in ((True, 0), (False, WINDOW)):
        full, how = with_bases(model, None, window, folded), f"at full rank with window {window}"
        if error(predicted(full, one), exact) > TOLERANCE:
            return f"differs {how}"
        batch = predicted(full, both)
        if any(error(batch[i, seen], shown[i, seen]) > TOLERANCE for i, seen in enumerate(rows)):
            return f"differs {how} in a batch"
        if error(generated(full, one), answer) > TOLERANCE or error(generated(full, both), answers) > TOLERANCE:
            return f"generates something else {how}"
    # Of some types the original itself differs without a cache, or in a batch.
    without = max(TOLERANCE, 5 * error(generated(model, one, use_cache=False), answer))
    beside = max(TOLERANCE, 5 * error(answers[:1], answer))
    model = doubled(model, lambda model: predicted(model, one))
    coded = with_bases(model, (Widths.of({8: 4, 4: 4}), Widths.of({8: 3, 2: 4})), WINDOW)
    answer, answers = generated(coded, one), generated(coded, both)
    if error(predicted(coded, one), exact) < 1e-3:
        return "coded changes nothing"
    if error(answer[:, 0], predicted(coded, one)[:, -1]) > TOLERANCE:
        return "coded differs with a cache"
    if error(generated(coded, one, use_cache=False), answer) > without:
        return "coded differs in steps of decoding"
    if error(answers[:1], answer) > beside or error(answers[1:], generated(coded, text)) > beside:
        return "coded differs in a batch"
    static = {"cache_implementation": "static", "disable_compile": True}
    with contextlib.suppress(Exception):
        own = error(generated(model, both, **static), generated(model, both))
        if own < TOLERANCE and error(generated(coded, both, **static), answers) > TOLERANCE:
            return "coded differs with a static cache"
    return None


def saved_failure(model: nn.Module, ids: Tensor) -> str | None:
    """What goes wrong when a model is compressed by gradients, saved and loaded, whole or as bases; None if nothing."""
    original = copy.deepcopy(model)
    with torch.enable_grad():
        compress(
            model,
            [ids],
            EigenAttentionConfig(kv_ratio=0.6, basis="fisher", ranks="uniform", rank_multiple=2, window=WINDOW),
        )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        backend = model.config._attn_implementation
        loaded = type(model).from_pretrained(folder, dtype="auto", attn_implementation=backend).eval()
        loaded = loaded.to(model.dtype)  # transformers 5.24 keeps some weights in fp32 when it loads
        loaded.set_experts_implementation("eager")
        save_bases(model, f"{folder}/bases")
        eigenattn.attach(original, f"{folder}/bases")
    found, attached, expected = (each(ids, use_cache=False).logits for each in (loaded, original, model))
    if error(found, expected) > 1e-6:
        return "differs once saved and loaded"
    return None if error(attached, expected) < 1e-6 else "differs with bases attached"


def verdict(model_type: str, wrapped: bool = False) -> dict[str, str]:
    """What becomes of a type: `works`, `refused`, `fails` or `not built`, and why."""
    try:
        model = built(model_type, wrapped)
        ids = tokens(2, LENGTH) % 100
        with torch.no_grad():
            model(ids, use_cache=False)
    except Exception as reason:
        try:
            family_of(default_of(model_type))
        except EigenAttnError as refused:
            return {"verdict": "refused", "why": str(refused)}
        except Exception:
            pass
        return {"verdict": "not built", "why": f"{type(reason).__name__}: {str(reason).strip().splitlines()[:1]}"}
    try:
        family = family_of(model.config)
        convert_attention(copy.deepcopy(model))
    except EigenAttnError as refused:
        return {"verdict": "refused", "why": str(refused)}
    try:
        found = failure(doubled(model, lambda model: model(ids, use_cache=False)))
        for what in ("image", *vision.WRAPPERS[model_type].others) if wrapped else ():
            found = found or image_failure(model, model_type, what)
    except Exception as reason:
        if os.environ.get("EVERY_TYPE_RAISES"):
            raise
        found = f"{type(reason).__name__}: {str(reason).strip().splitlines()[:1]}"
    if found is not None:
        return {"verdict": "fails", "why": found}
    return {"verdict": "works", "why": f"as {family.title}"}


def names() -> Iterator[tuple[str, bool]]:
    """Every type, and whether it is asked for in its wrapper."""
    yield from ((name, False) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    yield from ((name, True) for name in vision.WRAPPERS if name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--write", action="store_true")
    chosen = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    verdicts: dict[str, dict[str, str]] = {}
    for name, wrapped in names():
        where = f"{name} (wrapper)" if wrapped else name
        if chosen.types and name not in chosen.types:
            continue
        verdicts[where] = verdict(name, wrapped)
        print(where, *verdicts[where].values(), sep=": ", flush=True)
    if chosen.write:
        if chosen.types:
            found = json.loads(TABLE.read_text(encoding="utf-8"))["types"]
            verdicts = {name: verdicts.get(name, each) for name, each in found.items()}
        table = {"transformers": transformers.__version__, "types": verdicts}
        TABLE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
