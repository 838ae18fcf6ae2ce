"""Tiny random vision models around a language model, built in code, and prompts for them that hold an image.

Some are given a video or a sound in its place, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from tiny import VOCABULARY, tokens
from torch import Tensor, nn
from transformers import AutoModel, Gemma3nVisionConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

IMAGE = 100  # the id in whose place an image's tokens stand; of a text's own none is as large
IDS = [IMAGE, IMAGE + 1, IMAGE + 2, IMAGE + 3]  # of images and videos, and what stands around them
BEFORE, BEHIND = 5, 6  # tokens of the text around an image

# Vision towers.
CLIP = {"image_size": 32, "patch_size": 8, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48}
CLIP |= {"num_attention_heads": 2}
SIGLIP = {**CLIP, "vision_use_head": False}
QWEN = {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "intermediate_size": 48, "out_hidden_size": 64}
QWEN_2_5 = {**QWEN, "window_size": 16, "fullatt_block_indexes": [1]}
QWEN_3 = {**QWEN, "num_position_embeddings": 16}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
QWEN_IDS = dict(
    zip(("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"), IDS, strict=True)
)


class Image(NamedTuple):
    """What a processor makes of an image, a video or a sound.

    Args:
        ids: that stand for it in the prompt.
        arguments: what the model is given of it.
        kind: by which its tokens are told from others.
    """

    ids: list[int]
    arguments: dict[str, Tensor]
    kind: int = 1


def noise(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def square(tokens: int, size: int = 32, *lead: int, **others: Any) -> Callable[[], Image]:
    """One image [1, 3, size, size], or of more leading dimensions."""
    return lambda: Image([IMAGE] * tokens, {"pixel_values": noise(*(lead or (1,)), 3, size, size)} | others)


def patches(*shape: int) -> Image:
    """4 by 6 patches in a row, of this shape, of which four neighbours make a token."""
    pixels = noise(24, *(shape or (3 * 2 * 4 * 4,)))
    return Image([IMAGE] * 6, {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 6]])})


def shaped_patches() -> Image:
    """4 by 4 patches in a row, of which four neighbours make a token."""
    arguments = {"pixel_values": noise(1, 16, 3 * 8 * 8), "spatial_shapes": torch.tensor([[4, 4]])}
    return Image([IMAGE] * 4, {**arguments, "pixel_attention_mask": torch.ones(1, 16, dtype=torch.int64)})


def placed_patches() -> Image:
    """4 by 4 patches with places, of which four neighbours make a token."""
    places = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    return Image([IMAGE] * 4, {"pixel_values": noise(1, 16, 3 * 8 * 8), "image_position_ids": places[None]})


def frames(apart: bool, *shape: int) -> Image:
    """Two frames of a video, each as `patches`; `apart`: a token of the text, which is their time, stands between."""
    pixels, frame = noise(48, *(shape or (3 * 2 * 4 * 4,))), [IMAGE + 1] * 6
    arguments = {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([[2, 4, 6]])}
    return Image([*frame, *([7] if apart else []), *frame], arguments, kind=2)


def sound() -> Image:
    """32 frames of 16 channels, of which four make a token, and one that stands for silence behind them."""
    arguments = {"input_features": noise(1, 32, 16), "input_features_mask": torch.ones(1, 32, dtype=torch.bool)}
    return Image([IMAGE + 1] * 9, arguments)


class PooledPixels(PreTrainedModel):
    """In the place of Gemma 3n's vision tower, which another package has and no small one: patches, projected."""

    config_class = Gemma3nVisionConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: Gemma3nVisionConfig) -> None:
        super().__init__(config)
        self.patches = nn.Conv2d(3, config.hidden_size, 16, 16)
        self.post_init()

    def forward(self, pixel_values: Tensor, **others: Any) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(last_hidden_state=self.patches(pixel_values))


AutoModel.register(Gemma3nVisionConfig, PooledPixels, exist_ok=True)


class Wrapper(NamedTuple):
    """A vision model around a language model.

    Args:
        settings: of its configuration, beside small numbers.
        image: what its processor makes of an image.
        marks: name under which it is told which tokens are an image's, if it is.
        others: what else it may be shown, by name.
    """

    settings: dict[str, Any]
    image: Callable[[], Image]
    marks: str | None = None
    others: Mapping[str, Callable[[], Image]] = MappingProxyType({})


GLM_4V = Wrapper(
    {
        "image_token_id": IMAGE,
        "video_token_id": IMAGE + 1,
        "text_config": {"rope_parameters": {**MROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}},
        "vision_config": {**QWEN, "image_size": 16},
    },
    patches,
    "mm_token_type_ids",
)
WRAPPERS: dict[str, Wrapper] = {
    "qwen2_vl": Wrapper(
        {
            **QWEN_IDS,
            "text_config": {"rope_parameters": MROPE},
            "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 4},
        },
        patches,
        "mm_token_type_ids",
    ),
    "qwen2_5_vl": Wrapper(
        {**QWEN_IDS, "text_config": {"rope_parameters": MROPE}, "vision_config": QWEN_2_5},
        patches,
        "mm_token_type_ids",
        {"video": functools.partial(frames, False)},
    ),
    "qwen3_vl": Wrapper(
        {
            **QWEN_IDS,
            "text_config": {"rope_parameters": {**MROPE, "mrope_interleaved": True}},
            "vision_config": {**QWEN_3, "deepstack_visual_indexes": [0, 1]},
        },
        patches,
        "mm_token_type_ids",
        {"video": functools.partial(frames, True)},
    ),
    "qwen3_vl_moe": Wrapper(
        {
            **QWEN_IDS,
            "text_config": {"rope_parameters": {**MROPE, "mrope_interleaved": True}, "sliding_window": None},
            "vision_config": {**QWEN_3, "deepstack_visual_indexes": [0, 1]},
        },
        patches,
        "mm_token_type_ids",
    ),
    "qwen3_5": Wrapper({**QWEN_IDS, "vision_config": QWEN_3}, patches, "mm_token_type_ids"),
    "qwen3_5_moe": Wrapper({**QWEN_IDS, "vision_config": QWEN_3}, patches, "mm_token_type_ids"),
    "glm4v": GLM_4V,
    "glm4v_moe": GLM_4V,
    "gemma3": Wrapper(
        {"image_token_index": IMAGE, "mm_tokens_per_image": 4, "vision_config": SIGLIP}, square(4), "token_type_ids"
    ),
    "gemma3n": Wrapper(
        {
            "image_token_id": IMAGE,
            "audio_token_id": IMAGE + 1,
            "vision_soft_tokens_per_image": 4,
            "audio_soft_tokens_per_image": 9,
            "vision_config": {"hidden_size": 32, "vocab_offset": IMAGE, "vocab_size": 1},
            "audio_config": {
                "hidden_size": 32,
                "vocab_offset": IMAGE + 1,
                "vocab_size": VOCABULARY - IMAGE - 1,
                "input_feat_size": 16,
                "conf_num_attention_heads": 2,
                "conf_num_hidden_layers": 2,
                "conf_reduction_factor": 1,
                "sscp_conv_channel_size": [8, 4],
            },
        },
        square(4),
        others={"sound": sound},
    ),
    "gemma4": Wrapper(
        {
            "image_token_id": IMAGE,
            "text_config": {"use_bidirectional_attention": "vision"},
            "vision_config": {
                "model_type": "gemma4_vision",
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "patch_size": 8,
                "pooling_kernel_size": 2,
                "position_embedding_size": 16,
            },
        },
        placed_patches,
        "mm_token_type_ids",
    ),
    "mistral3": Wrapper(
        {
            "image_token_index": IMAGE,
            "text_config": {"sliding_window": None},
            "vision_config": {**CLIP, "head_dim": 16},
        },
        square(4, image_sizes=torch.tensor([[32, 32]])),
    ),
    "llama4": Wrapper(
        {
            "image_token_index": IMAGE,
            "vision_config": {
                **CLIP,
                "vision_output_dim": 48,
                "projector_input_dim": 48,
                "projector_output_dim": 48,
                "intermediate_size": 128,
            },
        },
        square(4),
    ),
    "internvl": Wrapper(
        {"image_token_id": IMAGE, "vision_config": {**CLIP, "image_size": [32, 32], "patch_size": [8, 8]}}, square(4)
    ),
    "llava": Wrapper({"image_token_index": IMAGE, "vision_config": CLIP}, square(16)),
    "aya_vision": Wrapper({"image_token_index": IMAGE, "vision_config": SIGLIP}, square(4)),
    "cohere2_vision": Wrapper(
        {"image_token_id": IMAGE, "alignment_intermediate_size": 64, "vision_config": SIGLIP}, square(4)
    ),
    "paddleocr_vl": Wrapper(
        {**QWEN_IDS, "text_config": {"rope_parameters": MROPE}, "vision_config": {**SIGLIP, "patch_size": 4}},
        functools.partial(patches, 3, 4, 4),
        "mm_token_type_ids",
    ),
    "lfm2_vl": Wrapper(
        {"image_token_id": IMAGE, "vision_config": {**CLIP, "num_patches": 16}},
        shaped_patches,
    ),
    "kimi_k25": Wrapper(
        {
            "image_token_id": IMAGE,
            "projection_hidden_size": 32,
            "vision_config": {**CLIP, "patch_size": 4, "pos_emb_height": 4, "pos_emb_width": 4},
        },
        functools.partial(patches, 3, 4, 4),
    ),
    "paligemma": Wrapper(
        {"image_token_index": IMAGE, "projection_dim": 64, "vision_config": {**SIGLIP, "projection_dim": 64}},
        square(16),
        "token_type_ids",
    ),
    "idefics3": Wrapper({"image_token_id": IMAGE, "vision_config": CLIP}, square(4, 32, 1, 1)),
    "smolvlm": Wrapper({"image_token_id": IMAGE, "vision_config": CLIP}, square(4, 32, 1, 1)),
}


class Prompt(NamedTuple):
    """A prompt, as a processor gives it.

    Args:
        ids: [B, T].
        by_token: what else there is of each token [B, T]: the mask, which tokens are an image's.
        of_images: what the model is given of the images.
    """

    ids: Tensor
    by_token: dict[str, Tensor]
    of_images: dict[str, Tensor]

    @property
    def arguments(self) -> dict[str, Tensor]:
        """All that a model takes beside ids."""
        return {**self.by_token, **self.of_images}


def prompt(name: str, what: str = "image") -> Prompt:
    """One prompt with an image, or with what else the model may be shown, in the middle."""
    wrapper = WRAPPERS[name]
    image, marks = (wrapper.image if what == "image" else wrapper.others[what])(), wrapper.marks
    text = tokens(1, BEFORE + BEHIND) % IMAGE
    ids = torch.cat([text[:, :BEFORE], torch.tensor([image.ids]), text[:, BEFORE:]], dim=1)
    by_token = {"attention_mask": torch.ones_like(ids)}
    if marks is not None:
        by_token[marks] = (ids >= IMAGE).long() * image.kind
    return Prompt(ids, by_token, image.arguments)


def text_prompt(name: str, length: int) -> Prompt:
    """One prompt of text alone."""
    ids, marks = tokens(1, length, seed=2) % IMAGE, WRAPPERS[name].marks
    by_token = {"attention_mask": torch.ones_like(ids)}
    if marks is not None:
        by_token[marks] = torch.zeros_like(ids)
    return Prompt(ids, by_token, {})


def together(one: Prompt, other: Prompt) -> Prompt:
    """Two prompts in a batch, of which the first has an image, and the shorter padding in front."""
    length = max(one.ids.shape[1], other.ids.shape[1])

    def padded(x: Tensor) -> Tensor:
        return nn.functional.pad(x, (length - x.shape[1], 0))

    def joined(first: Tensor, second: Tensor) -> Tensor:
        return torch.cat([padded(first), padded(second)])

    by_token = {key: joined(x, other.by_token[key]) for key, x in one.by_token.items()}
    return Prompt(joined(one.ids, other.ids), by_token, one.of_images)
