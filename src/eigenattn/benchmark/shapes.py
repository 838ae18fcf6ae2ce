"""Models that speed is measured on by their shapes alone: random weights take the same time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..cache.layout import SIDES, Latent, Layout
from ..cache.size import kv_ratio
from ..calibration.checks import check_length
from ..errors import EigenAttnError
from ..models.conversion import convert_attention, eigen_layers, layouts_of
from ..models.families import family_of
from ..models.loading import Source, dtype_of, load_model
from .timing import device_of

# Of the models' published configurations.
LLAMA = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
SHAPES: dict[str, tuple[str, dict]] = {
    "llama-3-8b": (
        "llama",
        {
            **LLAMA,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 2**21,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        },
    ),
    "llama-2-7b": (
        "llama",
        {**LLAMA, "intermediate_size": 11008, "vocab_size": 32000, "max_position_embeddings": 2**21},
    ),
    "opt-6.7b": (
        "opt",
        {**LLAMA, "ffn_dim": 16384, "vocab_size": 50272, "word_embed_proj_dim": 4096, "max_position_embeddings": 2**17},
    ),
    "mpt-7b": ("mpt", {"d_model": 4096, "n_heads": 32, "n_layers": 32, "vocab_size": 50432, "max_seq_len": 2**17}),
}
RANK_MULTIPLE = 8


def head_shape(name: str) -> dict[str, int]:
    """The `heads`, `kv_heads` and `head_dim` of a preset.

    Raises:
        EigenAttnError: if there is no such preset.
    """
    if name not in SHAPES:
        raise EigenAttnError(f"unknown shape {name!r}: choose one of {', '.join(SHAPES)}.")
    model_type, sizes = SHAPES[name]
    config = AutoConfig.for_model(model_type, **sizes)
    family = family_of(config)
    return {
        "heads": config.num_attention_heads,
        "kv_heads": family.kv_heads(config),
        "head_dim": family.head_dim(config),
    }


def uniform_ranks(kv_ratio: float, size: int) -> tuple[int, int]:
    """Ranks of keys and values at a ratio, multiples of 8 where they can be; values get what is over."""
    step = RANK_MULTIPLE if size >= 4 * RANK_MULTIPLE else 1
    both = max(round(2 * kv_ratio * size / step), 2)
    return both // 2 * step, (both - both // 2) * step


@torch.no_grad()
def shrink(model: PreTrainedModel, kv_ratio: float, window: int) -> PreTrainedModel:
    """Compress a model in place by random bases of uniform ranks: as fast as real ones, and good for nothing else."""
    convert_attention(model)
    for attention in eigen_layers(model):
        before = {name for name, _ in attention.named_parameters()}
        ranks = zip(SIDES, uniform_ranks(kv_ratio, attention.head_dim), strict=True)
        latents = [Latent((side,), 1, rank, attention.head_dim) for side, rank in ranks]
        attention.allocate(Layout(attention.kv_heads, tuple(latents), window), centred=True)
        for name, parameter in attention.named_parameters():
            if name not in before or not window:
                nn.init.normal_(parameter, std=0.02)
    return model


def random_model(name: str, dtype: str | None, device: str | None) -> PreTrainedModel:
    """A preset with random weights, in evaluation mode.

    Raises:
        EigenAttnError: if there is no such preset, device or dtype.
    """
    head_shape(name)
    where = device_of(device)
    stored = dtype_of(dtype or ("bfloat16" if where.type == "cuda" else "float32"))
    model_type, sizes = SHAPES[name]
    torch.manual_seed(0)
    with where:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes), dtype=stored).eval()


@dataclass(frozen=True)
class Contest:
    """What is compared: a model and its baseline, or a preset compressed and not.

    Args:
        model, against: names of models: folders, hub ids, `.gguf` files or `smollm2`.
        shape: instead of them, a preset with random weights.
        kv_ratio, window: what the preset is compressed to.
        dtype, device: see `load_model`.

    Raises:
        EigenAttnError: if neither models nor a preset are given, or both.
    """

    model: str | None = None
    against: str | None = None
    shape: str | None = None
    kv_ratio: float = 0.6
    window: int = 32
    dtype: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        if self.shape is None and (self.model is None or self.against is None):
            raise EigenAttnError("give a model and --against its baseline, or --shape for one with random weights.")
        if self.shape is not None and (self.model is not None or self.against is not None):
            raise EigenAttnError("--shape brings a model and its baseline: give no others.")
        if self.shape is not None:
            head_shape(self.shape)

    @property
    def name(self) -> str:
        """What the compressed model is called."""
        return self.model or f"{self.shape}-{round(100 * self.kv_ratio)}"

    @property
    def baseline(self) -> str:
        """What the original is called."""
        return self.against or self.shape or ""

    def loaders(self) -> dict[str, Callable[[], PreTrainedModel]]:
        """Functions that load each by its name, the baseline first; one where a model is compared with itself."""
        shape, where = self.shape, (self.dtype, self.device)
        if shape is None:
            names = dict.fromkeys((self.baseline, self.name))
            return {name: lambda name=name: load_model(Source.of(name), *where) for name in names}
        return {
            self.baseline: lambda: random_model(shape, *where),
            self.name: lambda: shrink(random_model(shape, *where), self.kv_ratio, self.window),
        }

    def models(self, longest: int) -> dict[str, PreTrainedModel]:
        """Both at once, by their names.

        Raises:
            EigenAttnError: if they cannot be loaded, or do not read so many tokens.
        """
        models = {name: load() for name, load in self.loaders().items()}
        for model in models.values():
            check_length(model.config, longest)
        return models

    def speeds(self, tokens: int, seconds: dict[str, float]) -> dict[str, float]:
        """Tokens a second of both, which took so long for so many, and their ratio."""
        own, baseline = seconds[self.name], seconds[self.baseline]
        return {
            "tokens_per_second": tokens / own,
            "baseline_tokens_per_second": tokens / baseline,
            "ratio": baseline / own,
        }

    def facts(self, model: PreTrainedModel) -> dict[str, Any]:
        """What results say of it.

        Args:
            model: the compressed one.
        """
        return {
            "model": self.name,
            "against": self.baseline,
            "shape": self.shape,
            "ratio": self.kv_ratio,
            "kv_ratio": kv_ratio(layouts_of(model)),
            "dtype": str(model.dtype).removeprefix("torch."),
        }
