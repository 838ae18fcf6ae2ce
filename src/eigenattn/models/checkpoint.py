"""The hook by which `from_pretrained` and `save_pretrained` know compressed checkpoints."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..cache.packing import BITS, Widths
from ..config import EigenAttentionConfig, Sharing
from ..errors import EigenAttnError
from .attention import EigenAttention
from .conversion import convert_attention, eigen_layers
from .maps import MAPS, QUANTISERS, local_part
from .parallel import plan, take_part
from .placement import put_off, stored

METHOD = "eigenattn"
FORMAT_VERSION = 1
RANKS, WIDTHS = ("rank_k", "rank_v"), ("widths_k", "widths_v")
# Of models that say nothing of how far they reach.
MOST_WINDOW = 2**20


@register_quantization_config(METHOD)
class EigenAttnCheckpointConfig(QuantizationConfigMixin):
    """What `config.json` carries as `quantization_config`: the ranks, and how they came about.

    Args:
        layers: `{"rank_k": R_k, "rank_v": R_v}` for each layer, R_v being 0 where keys and values share latents of rank
            R_k; with quantised latents also `widths_k` and `widths_v`, each the numbers of channels of 8, 6, 4 and 2
            bits.
        centred: whether the bases have means.
        method: the `EigenAttentionConfig` of the compression, as a dictionary.
        provenance: base model, calibration text and its hash, seed, tokens, versions.
        format_version: version of the checkpoint's format.

    Raises:
        EigenAttnError: if the ranks are malformed or the format is newer than this package.
    """

    def __init__(
        self,
        layers: list[dict[str, Any]] | None = None,
        centred: bool = False,
        method: dict[str, Any] | None = None,
        provenance: dict[str, Any] | None = None,
        format_version: int = FORMAT_VERSION,
        **kwargs: Any,
    ) -> None:
        self.quant_method = METHOD
        if type(format_version) is not int or format_version != FORMAT_VERSION:
            raise EigenAttnError(
                f"this checkpoint has format {format_version!r}, and this eigenattn reads format {FORMAT_VERSION}: "
                "install the eigenattn that wrote it."
            )
        if not isinstance(layers, list) or not layers or not all(_is_layer(layer) for layer in layers):
            raise EigenAttnError(
                "the checkpoint's quantization_config has no whole positive ranks for every layer, or its widths do "
                "not add up to them."
            )
        for name, value, kind in (("centred", centred, bool), ("method", method or {}, dict)):
            if not isinstance(value, kind):
                raise EigenAttnError(f"the checkpoint's quantization_config has {name} {value!r:.60}.")
        if not isinstance(provenance or {}, dict):
            raise EigenAttnError("the checkpoint's quantization_config has a provenance that is no table of facts.")
        self.layers = [
            {name: layer[name] for name in (*RANKS, *WIDTHS) if layer.get(name) is not None} for layer in layers
        ]
        self.centred = centred
        self.method = EigenAttentionConfig.from_dict(method or {}).to_dict()
        self.provenance = provenance or {}
        self.format_version = format_version

    @property
    def sharing(self) -> Sharing:
        """KV heads to a latent, of keys and of values."""
        return Sharing(self.method["shared_heads"], self.method["shared_values"])


def layer_entry(attention: EigenAttention) -> dict[str, Any]:
    """What the configuration says of a layer: its ranks, and its widths if it is quantised."""
    entry: dict[str, Any] = {name: getattr(attention, name) for name in RANKS}
    if attention.widths_k is not None:
        entry |= {name: list(getattr(attention, name)) for name in WIDTHS}
    return entry


def _is_layer(layer: Any) -> bool:
    if not isinstance(layer, dict):
        return False
    ranks, widths = ([layer.get(name) for name in names] for names in (RANKS, WIDTHS))
    if not all(type(rank) is int and rank >= least for rank, least in zip(ranks, (1, 0), strict=True)):
        return False
    return widths == [None, None] or all(map(_are_widths, widths, ranks))


def _are_widths(widths: Any, rank: int) -> bool:
    counts = isinstance(widths, list) and len(widths) == len(BITS)
    return counts and all(type(count) is int and count >= 0 for count in widths) and sum(widths) == rank


def allocate(layers: list[EigenAttention], config: EigenAttnCheckpointConfig) -> None:
    """Give the layers of a converted model the shapes of a checkpoint.

    Raises:
        EigenAttnError: if its ranks do not fit the model.
    """
    if len(layers) != len(config.layers):
        raise EigenAttnError(
            f"the checkpoint has ranks for {len(config.layers)} layers, and its model has {len(layers)}."
        )
    sharing = config.sharing
    for index, (attention, layer) in enumerate(zip(layers, config.layers, strict=True)):
        ranks = {name: layer[name] for name in RANKS}
        if any(attention.kv_heads % shared for shared in sharing):
            raise EigenAttnError(
                f"the checkpoint has {sharing.together} KV heads share a latent, and the model has "
                f"{attention.kv_heads}."
            )
        full = [attention.head_dim * shared * (1 if layer["rank_v"] else 2) for shared in sharing]
        if any(rank > most for rank, most in zip(ranks.values(), full, strict=True)):
            raise EigenAttnError(f"layer {index} of the checkpoint has ranks {ranks}, above full rank, {max(full)}.")
        longest = getattr(attention.config, "max_position_embeddings", None) or MOST_WINDOW
        if config.method["window"] > longest:
            raise EigenAttnError(
                f"the checkpoint has a window of {config.method['window']} tokens, and its model reads {longest}."
            )
        widths = {name: Widths(*layer[name]) for name in WIDTHS if name in layer}
        attention.allocate(**ranks, **widths, centred=config.centred, window=config.method["window"], sharing=sharing)


@register_quantizer(METHOD)
class EigenAttnQuantizer(HfQuantizer):
    """Builds the compressed modules before the weights are loaded, and checks them afterwards."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        convert_attention(model)
        layers = eigen_layers(model)
        allocate(layers, self.quantization_config)
        plan(model, layers)
        self._shapes = {
            (attention.layer_idx, name): parameter.shape
            for attention in layers
            for name, parameter in attention.named_parameters()
        }

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        # transformers only warns about a missing parameter, and 5.17 takes any shape: both end here instead.
        for attention in eigen_layers(model):
            for name, parameter in attention.named_parameters():
                where = f"layer {attention.layer_idx}'s {name}"
                module, _, own_name = name.rpartition(".")
                if put_off(attention.get_submodule(module)):
                    # Read from where it will be read in every pass, which is the only place it is in.
                    parameter = stored(attention.get_submodule(module), own_name)
                    missing = parameter is None
                else:
                    missing = not getattr(parameter, "_is_hf_initialized", False)
                if missing:
                    raise EigenAttnError(f"the checkpoint lacks {where}: is it truncated?")
                expected = self._shapes[attention.layer_idx, name]
                if parameter.shape != expected:
                    raise EigenAttnError(
                        f"{where} has shape {tuple(parameter.shape)} in the checkpoint, and its ranks ask for "
                        f"{tuple(expected)}."
                    )
                if name in (*MAPS, *QUANTISERS) and not local_part(parameter).isfinite().all():
                    raise EigenAttnError(f"{where} holds NaN or infinite numbers in {parameter.dtype}.")
        take_part(model, eigen_layers(model))
        return model

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def mark_compressed(model: nn.Module, config: EigenAttnCheckpointConfig) -> None:
    """Make `save_pretrained` write a compressed checkpoint of a model compressed in memory."""
    model.config.quantization_config = config
    # A model read from a GGUF file comes with a quantizer of its own, which would save it as something else.
    model.hf_quantizer = EigenAttnQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = METHOD
