"""What a compressed checkpoint's configuration says, and the hook by which transformers builds the modules for it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import eigenattn_autoload

from ..cache.layout import SIDES, Layout
from ..config import EigenAttentionConfig, Sharing
from ..errors import EigenAttnError
from .attention import EigenAttention
from .conversion import METHOD, convert_attention, eigen_layers, originals_of, quantiser_of
from .maps import MAPS, QUANTISERS, local_part
from .parallel import plan, take_part
from .placement import offloaded, stored

FORMAT_VERSION = 2
# By which a hub finds compressed models.
TAGS = ["eigenattn", "kv-cache"]
# Of models that say nothing of how far they reach.
MOST_WINDOW = 2**20


class EigenAttnCheckpointConfig(QuantizationConfigMixin):
    """What `config.json` carries as `quantization_config`: the latents of each layer, and how they came about.

    Names that it does not have are passed over.

    Args:
        layers: `eigenattn.cache.layout.Layout.to_dict` of each layer. In format 1: `rank_k` and `rank_v`, which is 0
            where keys and values share latents of rank `rank_k`, and of coded latents `widths_k` and `widths_v`, each
            the numbers of channels of 8, 6, 4 and 2 bits. It is converted to what format 2 has.
        centred: whether the bases have means.
        method: the `EigenAttentionConfig` of the compression, as a dictionary.
        provenance: base model, calibration text and its hash, seed, tokens, versions.
        base: of bases alone, what tells the model that they belong to from others; None in a whole checkpoint.
        format_version: version of the checkpoint's format.

    Raises:
        EigenAttnError: if something is malformed, or the format is newer than this package. Layers are looked at by
            `layouts`.
    """

    def __init__(
        self,
        /,
        layers: list[dict[str, Any]] | None = None,
        centred: bool = False,
        method: dict[str, Any] | None = None,
        provenance: dict[str, Any] | None = None,
        base: dict[str, Any] | None = None,
        format_version: int = FORMAT_VERSION,
        **kwargs: Any,
    ) -> None:
        self.quant_method: Any = METHOD
        if type(format_version) is not int or not 1 <= format_version <= FORMAT_VERSION:
            raise EigenAttnError(
                f"this checkpoint has format {format_version!r:.60}, and this eigenattn reads formats up to "
                f"{FORMAT_VERSION}: install the eigenattn that wrote it."
            )
        if not isinstance(layers, list) or not layers:
            raise EigenAttnError("the checkpoint's quantization_config has no layers.")
        for name, value, kind in (("centred", centred, bool), ("method", method or {}, dict)):
            if not isinstance(value, kind):
                raise EigenAttnError(f"the checkpoint's quantization_config has {name} {value!r:.60}.")
        for name, facts in (("provenance", provenance), ("base", base)):
            if facts is not None and not isinstance(facts, dict):
                raise EigenAttnError(f"the checkpoint's quantization_config has a {name} that is no table of facts.")
        config = EigenAttentionConfig.from_dict(method or {})
        if format_version == 1:
            layers = [_from_format_1(layer, config.sharing) for layer in layers]
        self.layers = layers
        self.centred = centred
        self.method = config.to_dict()
        self.provenance = provenance or {}
        self.base = base
        self.format_version = FORMAT_VERSION

    def layouts(self, config: Any, originals: Sequence[Layout]) -> list[Layout]:
        """The layout of each layer that has keys and values, of a model with this configuration.

        Args:
            originals: those of the layers uncompressed.

        Raises:
            EigenAttnError: if a layer is malformed, or they do not fit such a model.
        """
        text, window = config.get_text_config(decoder=True), self.method["window"]
        if len(self.layers) != len(originals):
            raise EigenAttnError(
                f"the checkpoint has ranks for {len(self.layers)} layers, and its model has {len(originals)}."
            )
        longest = getattr(text, "max_position_embeddings", None) or MOST_WINDOW
        if window > longest:
            raise EigenAttnError(f"the checkpoint has a window of {window} tokens, and its model reads {longest}.")
        found = []
        for index, (entry, original) in enumerate(zip(self.layers, originals, strict=True)):
            try:
                layout = Layout.from_dict(entry, original, window)
            except ValueError as error:
                raise EigenAttnError(f"layer {index} of the checkpoint: {error}.") from error
            # At full rank, and not coded, vectors are stored as they are: format 1 has no other sign for it.
            low = [latent for latent in layout.latents if latent.widths is not None or latent.rank < latent.full_rank]
            found.append(layout.holding(low, layout.window))
        return found


class BasesFound(EigenAttnError):
    """Raised where transformers is about to read weights from a folder of bases; `eigenattn_autoload` takes it up.

    Args:
        config: of the bases.
    """

    def __init__(self, config: EigenAttnCheckpointConfig) -> None:
        super().__init__("these are bases of a model: load that, and put them on it with eigenattn.attach.")
        self.eigenattn_bases = config


def _from_format_1(layer: Any, sharing: Sharing) -> Any:
    """A layer's entry as format 2 has it; what is malformed stays so, for `Layout.from_dict` to refuse."""
    if not isinstance(layer, dict):
        return layer
    sides = [(["key"], sharing.keys, "k"), (["value"], sharing.values, "v")]
    if type(layer.get("rank_v")) is int and layer["rank_v"] == 0:
        sides = [(list(SIDES), sharing.keys, "k")]
    latents = []
    for names, heads, end in sides:
        latent = {"sides": names, "heads": heads, "rank": layer.get(f"rank_{end}")}
        widths = layer.get(f"widths_{end}")
        if isinstance(widths, list) and len(widths) == 4:
            widths = dict(zip(("8", "6", "4", "2"), widths, strict=True))
        latents.append(latent if widths is None else latent | {"widths": widths})
    # Shared latents kept their maps beside the projections, also in layers where none but single heads' are left.
    return {"latents": latents, "beside": sharing.values > 1}


def allocate(layers: list[EigenAttention], config: EigenAttnCheckpointConfig) -> None:
    """Give the layers of a converted model the shapes of a checkpoint.

    Raises:
        EigenAttnError: if it does not fit the model.
    """
    layouts = config.layouts(layers[0].config, originals_of(layers))
    for attention, layout in zip(layers, layouts, strict=True):
        attention.allocate(layout, config.centred)


class EigenAttnQuantizer(HfQuantizer):
    """Builds the compressed modules before the weights are loaded, and checks them afterwards."""

    requires_calibration = True
    quantization_config: EigenAttnCheckpointConfig

    def __init__(self, quantization_config: EigenAttnCheckpointConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if quantization_config.base is not None:
            raise BasesFound(quantization_config)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        convert_attention(model)
        layers = eigen_layers(model)
        allocate(layers, self.quantization_config)
        plan(model, layers)
        self._shapes = {
            (attention.layer_idx, name): parameter.shape
            for attention in layers
            for name, parameter in attention.named_parameters()
        }

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        # transformers only warns about a missing parameter, and 5.17 takes any shape: both end here instead.
        for attention in eigen_layers(model):
            for name, parameter in attention.named_parameters():
                where = f"layer {attention.layer_idx}'s {name}"
                module, _, own_name = name.rpartition(".")
                found = parameter if getattr(parameter, "_is_hf_initialized", False) else None
                if offloaded(attention.get_submodule(module)):
                    # Read from where it will be read in every pass, which is the only place it is in.
                    found = stored(attention.get_submodule(module), own_name)
                if found is None:
                    raise EigenAttnError(f"the checkpoint lacks {where}: is it truncated?")
                expected = self._shapes[attention.layer_idx, name]
                if found.shape != expected:
                    raise EigenAttnError(
                        f"{where} has shape {tuple(found.shape)} in the checkpoint, and its ranks ask for "
                        f"{tuple(expected)}."
                    )
                if name in (*MAPS, *QUANTISERS) and not local_part(found).isfinite().all():
                    raise EigenAttnError(f"{where} holds NaN or infinite numbers in {found.dtype}.")
        take_part(model, eigen_layers(model))
        cast(Any, model).compression = self.quantization_config
        _let_cast(model)
        return model

    def is_serializable(self, **kwargs: Any) -> bool:
        """Whether `save_pretrained` may write such a model."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether it can be fine-tuned."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether `torch.compile` may be used on it."""
        return True


# Not by transformers' decorators, which refuse a name twice: `eigenattn_autoload` may have put stand-ins there.
AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = EigenAttnCheckpointConfig
AUTO_QUANTIZER_MAPPING[METHOD] = EigenAttnQuantizer
eigenattn_autoload.watch()


def checkpoint_of(model: Any) -> EigenAttnCheckpointConfig | None:
    """How a model is compressed; None for an original."""
    return getattr(model, "compression", None)


def mark_compressed(model: Any, config: EigenAttnCheckpointConfig) -> None:
    """Make `save_pretrained` write a compressed checkpoint of a model compressed in memory.

    Where another quantiser holds its weights it stays so, and `save_pretrained` refuses: there are bases to save alone.
    """
    model.compression = config
    model.add_model_tags(TAGS)
    quantiser = quantiser_of(model)
    if quantiser is not None:
        model.save_pretrained = functools.partial(_refuse_saving, quantiser)
        return
    model.config.quantization_config = config
    # A model read from a GGUF file comes with a quantizer of its own, which would save it as something else.
    model.hf_quantizer = EigenAttnQuantizer(config, pre_quantized=True)
    _let_cast(model)
    model.quantization_method = METHOD


def _refuse_saving(quantiser: str, *args: Any, **kwargs: Any) -> None:
    raise EigenAttnError(
        f"{quantiser} quantises weights of this model, which stay where they are: save its bases, with "
        "eigenattn.save_bases(model, folder)."
    )


def _let_cast(model: Any) -> None:
    """Have `half` and `float` work, which transformers refuses where weights are integers."""
    model.is_quantized = False
