"""What a checkpoint's configuration says of its cache, without loading its weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..cache.layout import Layout
from ..cache.size import (
    HALF,
    STATED_LENGTHS,
    baseline_bytes_per_token,
    bytes_per_token,
    cache_bytes,
    kv_ratio,
    ratio_at,
)
from ..errors import EigenAttnError
from ..models.bases_file import read_bases_config
from ..models.checkpoint_format import METHOD, EigenAttnCheckpointConfig
from ..models.conversion import convert_attention, eigen_layers, originals_of
from ..models.families import family_of
from ..models.loading import Source, empty_model, load_config


@dataclass(frozen=True)
class Inspection:
    """The layout of each layer, what follows from it, and where it comes from.

    Args:
        model_type: as transformers calls it.
        compressed: whether it is; an original has the layouts of full rank.
        layers: of what latents the caches consist.
        element_size: bytes of an element in the checkpoint's dtype.
        method: the `EigenAttentionConfig` of the compression, as a dictionary.
        provenance: base model, calibration text and its hash, seed, tokens, versions.
        parameters: of the original model; None where they cannot be counted.
        stored_bytes: of its weights and bases, on disk, or in memory where they are quantised on loading; None where
            they are elsewhere.
    """

    model_type: str
    compressed: bool
    layers: list[Layout]
    element_size: int
    method: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    parameters: int | None = None
    stored_bytes: int | None = None

    @property
    def kv_ratio(self) -> float:
        """Size of the cache in proportion to the original's at 16 bits."""
        return kv_ratio(self.layers)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that a token adds to the cache."""
        return bytes_per_token(self.layers, self.element_size)

    @property
    def baseline_bytes_per_token(self) -> int:
        """Bytes that a token adds to the original's cache."""
        return baseline_bytes_per_token(self.layers, self.element_size)

    @property
    def window(self) -> int:
        """Last tokens that are kept exactly."""
        return self.layers[0].window

    @property
    def ratio_at(self) -> dict[int, float]:
        """Size of the whole cache in proportion to the original's at 16 bits, by length in tokens."""
        return ratio_at(self.layers)

    @property
    def memory(self) -> dict[str, dict[str, int | None]]:
        """Bytes of the original at 16 bits, and of this model as it is stored: weights, and caches by length."""
        weights = None if self.parameters is None else HALF * self.parameters
        sizes = {"weights": {"original": weights, "this": self.stored_bytes}}
        for length in STATED_LENGTHS:
            original = length * baseline_bytes_per_token(self.layers, HALF)
            sizes[f"cache of {length:,} tokens"] = {
                "original": original,
                "this": cache_bytes(self.layers, HALF, length),
            }
        return sizes

    def to_dict(self) -> dict[str, Any]:
        """The inspection as plain JSON values."""
        names = ("model_type", "compressed", "kv_ratio", "bytes_per_token", "baseline_bytes_per_token", "window")
        return {name: getattr(self, name) for name in names} | {
            "head_dim": self.layers[0].head_dim,
            "kv_heads": self.layers[0].kv_heads,
            "layers": [layer.to_dict() for layer in self.layers],
            "bytes_by_layer": [layer.bytes_per_token(self.element_size) for layer in self.layers],
            "ratio_at": self.ratio_at,
            "memory": self.memory,
            "method": self.method,
            "provenance": self.provenance,
        }


def compression_of(source: Source, config: Any) -> EigenAttnCheckpointConfig | None:
    """What a checkpoint, or a folder of bases, says of its compression; None for an original."""
    if source.bases:
        return read_bases_config(source.bases)
    stored = getattr(config, "quantization_config", None)
    if isinstance(stored, dict) and stored.get("quant_method") == METHOD:
        return EigenAttnCheckpointConfig(**stored)
    return None


def layouts(config: Any, compression: EigenAttnCheckpointConfig | None) -> list[Layout]:
    """What each layer's cache holds, for a model's configuration.

    Raises:
        EigenAttnError: if its type is not supported, or the compression does not fit it.
    """
    family_of(config)  # raises before anything is built
    model = empty_model(config)
    convert_attention(model)
    originals = originals_of(eigen_layers(model))
    return originals if compression is None else compression.layouts(config, originals)


def _parameters(config: Any) -> int | None:
    try:
        return sum(each.numel() for each in empty_model(config).parameters())
    except EigenAttnError:
        return None


def inspect_checkpoint(name: str) -> Inspection:
    """Read a model's configuration: folder, hub id, `.gguf` file or `smollm2`.

    Raises:
        EigenAttnError: if it cannot be read, or its type is not supported.
    """
    source = Source.of(name)
    config = load_config(source)
    text = config.get_text_config(decoder=True)
    compression = compression_of(source, config)
    # Quantised on loading, it takes less than its files.
    loaded = None if compression is None else (compression.base or {}).get("weight_bytes")
    return Inspection(
        model_type=text.model_type,
        compressed=compression is not None,
        layers=layouts(config, compression),
        element_size=(text.dtype or torch.float32).itemsize,
        parameters=_parameters(config),
        stored_bytes=loaded if type(loaded) is int else source.stored_bytes(),
        method=compression.method if compression else {},
        provenance=compression.provenance if compression else {},
    )
