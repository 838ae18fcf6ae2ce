"""Text models inside larger ones in vLLM, with images and without, against our own `generate`."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from every_type import built
from test_serving import NEEDS_VLLM, NGRAM, SMALL, job, run_engines, save, with_bases
from transformers import AutoModelForImageTextToText
from vision import IMAGE

pytestmark = [
    *NEEDS_VLLM,
    pytest.mark.skipif(find_spec("torchvision") is None, reason="images need torchvision"),
]
NEW_TOKENS = 16
TEXT_ALONE = {"language_model_only": True}
IMAGES = {"limit_mm_per_prompt": {"image": 2}}
WHOLE_IMAGES = IMAGES | {"disable_chunked_mm_input": True}
SHORT_OF_CACHE = {"kv_cache_memory_bytes": 90_000, "max_num_batched_tokens": 32, "new_tokens": 130}
# name -> (tiny model, whether bases lie in a folder of their own, options)
SERVED = {
    "places-of-the-text": ("llava", True, IMAGES),
    "own-checkpoint": ("llava", False, IMAGES),
    "rows": ("qwen2_5_vl", True, IMAGES),
    "rows-by-turns": ("qwen3_vl", False, IMAGES | {"max_num_batched_tokens": 48}),
    "rows-short-of-cache": ("qwen2_5_vl", True, IMAGES | SHORT_OF_CACHE),
    "rows-drafts": ("qwen2_5_vl", True, IMAGES | NGRAM),
    "both-directions": ("gemma3", True, WHOLE_IMAGES),
    "both-directions-where-layers-slide": (
        "gemma4",
        True,
        WHOLE_IMAGES | {"limit_mm_per_prompt": {"image": 2, "video": 0}},
    ),
    "no-images": ("gemma3", True, TEXT_ALONE),
    "no-images-several-shapes": ("gemma4", True, TEXT_ALONE),
    "rows-no-images": ("qwen2_5_vl", True, TEXT_ALONE),
}


# As the larger Gemma 4 has it: heads and what makes values differ by layer. vLLM asks for the most tokens of an image.
GEMMA_4 = {
    "text_config": {
        "num_kv_shared_layers": 0,
        "sliding_window": 80,  # an image has 64 tokens
        "hidden_size_per_layer_input": 0,
        "attention_k_eq_v": True,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
    },
    "vision_config": {"default_output_length": 70},
    "boi_token_id": IMAGE + 1,
    "eoi_token_id": IMAGE + 2,
}


def model_of(name: str) -> torch.nn.Module:
    return built(name, wrapped=True, **(GEMMA_4 if name == "gemma4" else {})).float()


def write(folder: Path, name: str, apart: bool) -> None:
    import images

    save(folder, name, 8, True, apart=apart, build=model_of)
    if name in images.PROCESSORS:
        images.processor(name).save_pretrained(folder)


def serve(root: Path, asked: dict) -> dict[str, dict]:
    """Results by name, with what `generate` gives as `expected`."""
    import images

    expected, jobs = {}, []
    for name, (model, apart, options) in asked.items():
        folder, new_tokens = root / name, options.get("new_tokens", NEW_TOKENS)
        write(folder, model, apart)
        prompts = [prompt for prompt in images.prompts(model) if not (prompt.images and options.get(*TEXT_ALONE))]
        expected[name] = images.continued(with_bases(folder, AutoModelForImageTextToText), model, prompts, new_tokens)
        if model in ("llava", "gemma3"):
            images.name_as_on_hub(folder)
        engine = {option: value for option, value in (SMALL | options).items() if option != "new_tokens"}
        files = [images.saved(root, prompt.images) for prompt in prompts]
        made = job(folder, [prompt.ids for prompt in prompts], **engine)
        jobs.append(made | {"new_tokens": new_tokens, "images": files})
    results = run_engines(root, jobs)
    return {name: result | {"expected": expected[name]} for name, result in zip(asked, results, strict=True)}


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> dict[str, dict]:
    return serve(tmp_path_factory.mktemp("served"), SERVED)


@pytest.mark.parametrize("name", SERVED)
def test_tokens_are_those_of_generate(served, name):
    """Requests with none, one and two images at once, and again out of the prefix cache."""
    result = served[name]
    assert "error" not in result, result
    assert result["tokens"] == result["expected"]
    assert result["again"] == result["expected"]


def test_prefixes_are_reused(served):
    for name in [name for name in served if "short" not in name and "several" not in name]:
        assert max(served[name]["reused"][1]) >= 16


def test_requests_were_preempted_and_drafts_taken(served):
    assert served["rows-short-of-cache"]["preempted"] > 0
    assert served["rows-drafts"]["drafts_taken"] > 0


@pytest.mark.parametrize("options", [{"tensor_parallel_size": 2}, {"enforce_eager": False}], ids=str)
def test_other_engines(tmp_path, options):
    """Over two processes, and compiled."""
    (result,) = serve(tmp_path, {"rows": ("qwen2_5_vl", True, IMAGES | options)}).values()
    assert "error" not in result, result
    assert result["tokens"] == result["expected"]
