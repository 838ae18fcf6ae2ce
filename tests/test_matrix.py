"""Every combination generates: family, bits, eviction, fine-tuned."""

import copy
import functools

import pytest
import torch
from helpers import generate
from tiny import tiny, tokens

from eigenattn import EigenAttentionConfig, EigenCache, compress
from eigenattn.cache.rules import EVICTION_RULES
from eigenattn.finetuning import FinetuneConfig, finetune

# peft still reads an attribute that transformers retires.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

PROMPT = tokens(2, 48)
# Tokens asked for, and those held after six more, of which SnapKV evicts none.
BUDGETS = {name: 40 if name == "snapkv" else 16 for name in EVICTION_RULES}
EVICTION = {None: {}} | {name: {"evict": name, "budget": budget} for name, budget in BUDGETS.items()}
KEPT = {None: 53} | BUDGETS | {"snapkv": 45}


@functools.cache
def compressed(name, bits, window):
    model = tiny(name)
    size = {"kv_ratio": 0.5, "ranks": "uniform"} if bits is None else {"coded": True, "kv_ratio": bits / 16}
    config = EigenAttentionConfig(**size, rank_multiple=4, window=window)
    compress(model, [tokens(4, 40, seed=3)], config, provenance={"base_model": "base"})
    return model


@functools.cache
def tuned(name, bits, window):
    quick = FinetuneConfig(steps=1, batch_size=2, validate_every=1, lora_rank=4, lora_alpha=4)
    model = copy.deepcopy(compressed(name, bits, window))
    return finetune(model, tokens(2, 40), tokens(1, 40, seed=7), quick, baseline=tiny(name))[0].eval()


@pytest.mark.parametrize("evict", EVICTION)
@pytest.mark.parametrize("finetuned", [False, True], ids=["plain", "tuned"])
@pytest.mark.parametrize("bits", [None, 3])
@pytest.mark.parametrize(("name", "window"), [("llama", 4), ("llama", 0), ("opt", 4), ("mpt", 0), ("qwen3", 4)])
def test_generates(name, window, bits, finetuned, evict):
    model = (tuned if finetuned else compressed)(name, bits, window)
    cache = EigenCache(model.config, **EVICTION[evict])
    with torch.no_grad():
        ids = generate(model, PROMPT, length=6, past_key_values=cache, use_cache=True)
    assert ids.shape == (2, 54)
    assert cache.get_seq_length() == 53
    assert cache.kept_tokens == KEPT[evict]
    held = cache.layers[0].keys
    assert (held.dtype == torch.uint8) == (bits is not None)
    assert held.shape[-2] == cache.kept_tokens - window
    again = model(ids[:, -1:], past_key_values=cache).logits
    assert again.isfinite().all()
