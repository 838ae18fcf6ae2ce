"""What a checkpoint's configuration says of its cache, without loading its weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..cache.packing import Widths
from ..cache.size import Shape, baseline_bytes_per_token, bytes_of_layer, bytes_per_token, kv_ratio, ratio_at
from ..models.bases_file import read_bases_config
from ..models.checkpoint import METHOD, WIDTHS, EigenAttnCheckpointConfig
from ..models.families import family_of
from ..models.loading import Source, load_config


@dataclass(frozen=True)
class Inspection:
    """Ranks and widths by layer, cache bytes a token in the checkpoint's dtype, and provenance.

    Originals are at full rank. `widths_k` and `widths_v` count the channels of 8, 6, 4 and 2 bits of quantised latents.
    """

    model_type: str
    compressed: bool
    kv_ratio: float
    bytes_per_token: int
    baseline_bytes_per_token: int
    head_dim: int
    kv_heads: int
    layers: list[dict[str, Any]]
    bytes_by_layer: list[int]
    window: int
    ratio_at: dict[int, float]
    method: dict[str, Any]
    provenance: dict[str, Any]

    @property
    def full_ranks(self) -> tuple[int, int]:
        """Dimensions of what a latent of keys, and of values, is made of: of all heads, or both, that share it."""
        heads = [self.method.get(name, 1) for name in ("shared_heads", "shared_values")]
        keys, values = (self.head_dim * shared * (2 if self.method.get("joint") else 1) for shared in heads)
        return keys, values

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compression_of(source: Source, config: Any) -> EigenAttnCheckpointConfig | None:
    """What a checkpoint, or a folder of bases, says of its compression; None for an original."""
    if source.bases:
        return read_bases_config(source.bases)
    stored = getattr(config, "quantization_config", None)
    if isinstance(stored, dict) and stored.get("quant_method") == METHOD:
        return EigenAttnCheckpointConfig.from_dict(stored)
    return None


def shapes(config: Any, compression: EigenAttnCheckpointConfig | None) -> list[Shape]:
    """What each layer's cache holds, for a model's configuration.

    Raises:
        EigenAttnError: if its type is not supported.
    """
    family, text = family_of(config), config.get_text_config(decoder=True)
    kv_heads, head_dim = family.kv_heads(text), family.head_dim(text)
    if compression is None:
        return [Shape(kv_heads, head_dim, head_dim, head_dim)] * text.num_hidden_layers
    return [
        Shape(
            kv_heads,
            head_dim,
            **{name: Widths(*x) if name in WIDTHS else x for name, x in layer.items()},
            sharing=compression.sharing,
        )
        for layer in compression.layers
    ]


def inspect_checkpoint(name: str) -> Inspection:
    """Read a model's configuration: folder, hub id, `.gguf` file or `smollm2`.

    Raises:
        EigenAttnError: if it cannot be read, or its type is not supported.
    """
    source = Source.of(name)
    config = load_config(source)
    text = config.get_text_config(decoder=True)
    checkpoint = compression_of(source, config)
    layers = shapes(config, checkpoint)
    kv_heads, head_dim = layers[0].kv_heads, layers[0].head_dim
    full = {"rank_k": head_dim, "rank_v": head_dim}
    ranks = checkpoint.layers if checkpoint else [full] * text.num_hidden_layers
    window = checkpoint.method["window"] if checkpoint else 0
    element_size = (text.dtype or torch.float32).itemsize
    return Inspection(
        model_type=text.model_type,
        compressed=checkpoint is not None,
        kv_ratio=kv_ratio(layers),
        bytes_per_token=bytes_per_token(layers, element_size),
        baseline_bytes_per_token=baseline_bytes_per_token(layers, element_size),
        head_dim=head_dim,
        kv_heads=kv_heads,
        layers=ranks,
        bytes_by_layer=[bytes_of_layer(layer, element_size) for layer in layers],
        window=window,
        ratio_at=ratio_at(layers, window),
        method=checkpoint.method if checkpoint else {},
        provenance=checkpoint.provenance if checkpoint else {},
    )
