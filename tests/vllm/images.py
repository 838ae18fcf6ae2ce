"""Tiny vision models with what vLLM makes their images ready by, and prompts for them that hold some."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import VOCABULARY, character_tokenizer, tokens
from tokenizers import AddedToken
from transformers import (
    CLIPImageProcessor,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Gemma4AudioFeatureExtractor,
    Gemma4ImageProcessor,
    Gemma4Processor,
    Gemma4VideoProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
)
from vision import IDS, IMAGE

SIZE = 32  # of an image, in pixels
PROCESSORS = {
    "llava": LlavaProcessor,
    "qwen2_5_vl": Qwen2_5_VLProcessor,
    "qwen3_vl": Qwen3VLProcessor,
    "gemma3": Gemma3Processor,
    "gemma4": Gemma4Processor,
}
# Special tokens by the ids of the tiny models, and which of them stand for an image in a prompt.
QWEN = dict(zip(IDS, ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"), strict=True))
NEW_LINES = {IMAGE + 3 + more: "\n" * (2 + more) for more in range(3)}
GEMMA = {IMAGE: "<image_soft_token>", IMAGE + 1: "<start_of_image>", IMAGE + 2: "<end_of_image>", **NEW_LINES}
GEMMA |= {IMAGE + 6: "<audio_soft_token>", IMAGE + 7: "<start_of_audio>", IMAGE + 8: "<end_of_audio>"}
MARKS = {"llava": {}, "qwen2_5_vl": QWEN, "qwen3_vl": QWEN, "gemma3": GEMMA, "gemma4": GEMMA}
STANDS = {
    "llava": [IMAGE],
    "qwen2_5_vl": [IDS[2], IMAGE, IDS[3]],
    "qwen3_vl": [IDS[2], IMAGE, IDS[3]],
    "gemma3": [IMAGE + 1],
    "gemma4": [IMAGE],
}
# Under which names tokenizers give them.
NAMED = {"image_token": IMAGE, "boi_token": IMAGE + 1, "eoi_token": IMAGE + 2}
NAMED |= {"audio_token": IMAGE + 6, "boa_token": IMAGE + 7, "eoa_token": IMAGE + 8}


class Seen(NamedTuple):
    """A prompt.

    Args:
        ids: with one token in the place of an image.
        images: how many there are.
    """

    ids: list[int]
    images: int


def images(count: int) -> list[Image.Image]:
    """So many, of noise."""
    draw = np.random.default_rng(count)
    return [Image.fromarray(draw.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)) for _ in range(count)]


def saved(folder: Path, count: int) -> list[str]:
    """The same, in files."""
    files = [str(folder / f"{number}-of-{count}.png") for number in range(count)]
    for file, image in zip(files, images(count), strict=True):
        image.save(file)
    return files


def prompts(name: str) -> list[Seen]:
    """Prompts with none, one and two images."""
    image = STANDS[name]

    def text(length: int) -> list[int]:
        return (tokens(1, length, seed=length)[0] % IMAGE).tolist()

    return [
        Seen([*text(5), *image, *text(30)], 1),
        Seen(text(40), 0),
        Seen([*text(12), *image, *text(3), *image, *text(9)], 2),
        Seen([*text(50), *image, *text(50)], 1),
        Seen([*text(1), *image, *text(2)], 1),
    ]


def processor(name: str) -> Any:
    """What makes a model's images and texts ready."""
    tokenizer = marked_tokenizer(name)
    if name == "gemma4":
        sizes = {"patch_size": 8, "pooling_kernel_size": 2, "max_soft_tokens": 70}
        sounds, videos = Gemma4AudioFeatureExtractor(), Gemma4VideoProcessor(**sizes)
        return Gemma4Processor(sounds, Gemma4ImageProcessor(**sizes), tokenizer, videos, image_seq_length=70)
    if name == "gemma3":
        pixels = Gemma3ImageProcessor(size={"height": SIZE, "width": SIZE})
        return Gemma3Processor(pixels, tokenizer, image_seq_length=4)
    if name != "llava":
        sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 64, "max_pixels": 4096}
        return PROCESSORS[name](Qwen2VLImageProcessor(**sizes), tokenizer, Qwen2VLVideoProcessor(**sizes))
    sizes = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    options = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return LlavaProcessor(CLIPImageProcessor(**sizes), tokenizer, image_token=chr(IMAGE), **options)


def marked_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """One token a character, and those that stand for images and around them."""
    plain, marks = character_tokenizer(), MARKS[name]
    if not marks:
        return plain
    inner = plain.backend_tokenizer
    vocabulary = {marks.get(code, chr(code)): code for code in range(VOCABULARY)}
    inner.model = type(inner.model)(vocabulary, unk_token=plain.unk_token)
    special = {name: getattr(plain, name) for name in ("unk_token", "bos_token", "eos_token", "pad_token")}
    inner.add_special_tokens([AddedToken(mark, normalized=False) for mark in marks.values()])
    named = {attribute: marks[code] for attribute, code in NAMED.items() if code in marks}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special, extra_special_tokens=named)


@torch.no_grad()
def continued(model: torch.nn.Module, name: str, prompts: Sequence[Seen], new_tokens: int) -> list[list[int]]:
    """Greedy tokens of our own `generate`, one prompt at a time."""
    found = []
    for prompt in prompts:
        if prompt.images:
            text = "".join(MARKS[name].get(id, chr(id)) for id in prompt.ids)
            given = processor(name)(text=text, images=images(prompt.images), return_tensors="pt")
        else:
            given = {"input_ids": torch.tensor([prompt.ids])}
        out = model.generate(**given, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None)
        found.append(out[0, given["input_ids"].shape[1] :].tolist())
    return found


def name_as_on_hub(folder: Path) -> None:
    """CLIP's and SigLIP's towers have other names in checkpoints of the hub than in those that transformers writes."""
    held = load_file(folder / "model.safetensors")
    renamed = {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in held.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
