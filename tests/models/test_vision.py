"""Vision models around a language model, with an image in the prompt."""

from __future__ import annotations

import pytest
import torch
import transformers
import vision
from every_type import LENGTH, TOLERANCE, built, error, generated, image_failure, predicted, with_bases
from tiny import tokens
from transformers import AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

import eigenattn
from eigenattn import EigenAttentionConfig, compress, kernels
from eigenattn.cache.packing import Widths
from eigenattn.kernels import decoding
from eigenattn.kernels.native_library import unavailable
from eigenattn.models.bases_file import save_bases
from eigenattn.models.conversion import eigen_layers

# One of each kind; `python tests/every_type.py` tries all.
SOME = ["qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen3_5_moe", "gemma3", "gemma3n", "gemma4", "mistral3", "llama4"]
SOME += ["glm4v", "kimi_k25", "paligemma"]
SHOWN = [(name, "image") for name in SOME] + [("qwen2_5_vl", "video"), ("qwen3_vl", "video"), ("gemma3n", "sound")]
CONFIG = EigenAttentionConfig(kv_ratio=0.6, basis="fisher", ranks="uniform", rank_multiple=2, window=4)


def wrapper(name: str) -> torch.nn.Module:
    """A tiny one; the test is skipped where this transformers has none."""
    if name not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        pytest.skip(f"this transformers has no {name}")
    if name == "llama4" and transformers.__version__.startswith("5.24."):
        pytest.skip("the original looks for outputs that its language model does not return")
    return built(name, wrapped=True)


@pytest.mark.parametrize(("name", "what"), SHOWN)
def test_an_image_in_the_prompt(name, what):
    """As the original at full rank, and coded the same with a cache as without, in batches as alone."""
    assert image_failure(wrapper(name), name, what) is None


@pytest.mark.skipif(unavailable() is not None, reason=f"no native kernels: {unavailable()}")
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v"])
@torch.no_grad()
def test_behind_an_image_steps_are_native(name, monkeypatch):
    """Positions are in rows there, which each kind of model shares out over pairs of dimensions in its own way."""
    calls, plain = [], decoding.DECODE_BACKENDS["native"]
    monkeypatch.setitem(decoding.DECODE_BACKENDS, "native", lambda step: calls.append(step.rotary.rows) or plain(step))
    coded = with_bases(wrapper(name), (Widths.of({8: 4, 4: 4}), Widths.of({8: 3, 2: 4})), window=5)
    both = vision.together(vision.prompt(name), vision.text_prompt(name, 9))
    found = generated(coded, both)
    assert len(calls) == 4 * len(eigen_layers(coded)) and all(rows is not None for rows in calls)
    before = kernels.use("torch")
    expected = generated(coded, both)
    kernels.use(before)
    assert error(found, expected) < TOLERANCE


@torch.no_grad()
def test_a_text_that_is_read_in_both_directions():
    """PaliGemma makes no mask of a text alone, and its attention is not causal then."""
    model, ids = wrapper("paligemma"), tokens(2, LENGTH) % 100
    expected = model(ids, use_cache=False).logits
    for window in (0, 5):
        full = with_bases(model, None, window, folded=not window)
        for use_cache in (False, True):
            assert error(full(ids, use_cache=use_cache).logits, expected) < TOLERANCE


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_5", "gemma4"])
def test_bases_beside_a_vision_model(name, tmp_path):
    """Calibrated on text, saved, and found again by the wrapper's own class."""
    base, bases = tmp_path / "base", tmp_path / "bases"
    wrapper(name).save_pretrained(base)
    model = AutoModelForImageTextToText.from_pretrained(base)
    compress(model, [tokens(2, LENGTH) % 100], CONFIG, provenance={"base_model": str(base)})
    bases.mkdir()
    save_bases(model, bases)
    prompt = vision.prompt(name)
    with torch.no_grad():
        expected = predicted(model, prompt)
        attached = eigenattn.attach(AutoModelForImageTextToText.from_pretrained(base), bases)
        assert torch.equal(predicted(attached, prompt), expected)
        loaded = AutoModelForImageTextToText.from_pretrained(bases)
        assert eigen_layers(loaded)
        assert torch.equal(predicted(loaded, prompt), expected)
