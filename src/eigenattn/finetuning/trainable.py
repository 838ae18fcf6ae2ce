"""What is trained: the run-time maps themselves, and LoRA on the projections that maps were folded into."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import EigenAttnError
from ..models.attention import EigenAttention
from ..models.conversion import eigen_layers
from ..models.maps import MAPS
from ..models.projections import holds_codes


class Trainable:
    """The trained parameters of a compressed model, kept in fp32 beside it.

    - Maps applied at run time (`MAPS`) are small and are trained directly. With a window, or latents that heads share,
      they are all there is to the compression, so nothing else is trained, and the original weights stay as they are.
    - Maps folded into projections are gone. Such projections are trained by LoRA (as in arXiv 2408.05646) and merged.

    The rows of a map differ in size by orders of magnitude, while Adam moves every element by about the learning rate.
    So a row is trained in units of its own size. The units are powers of two, in which nothing is rounded: what is not
    trained stays equal to the bit.

    Args:
        model: a compressed model. Nothing of it asks for gradients afterwards but what is trained.
        lora_rank, lora_alpha: of the adapters; a merged weight is `W + alpha / rank * B A`.
        seed: of the adapters' first values.

    Raises:
        EigenAttnError: if the model is not compressed, or at full rank; if adapters are needed and peft is absent.
    """

    def __init__(self, model: PreTrainedModel, lora_rank: int, lora_alpha: int, seed: int) -> None:
        layers = eigen_layers(model)
        if not layers:
            raise EigenAttnError("this model is not compressed: compress it first.")
        model.requires_grad_(False)
        self.model = model
        self.maps = {
            f"layers.{attention.layer_idx}.{name}": getattr(attention, name)
            for attention in layers
            for name in MAPS
            if getattr(attention, name) is not None
        }
        self.units = {name: _unit(stored, layers[0].head_dim) for name, stored in self.maps.items()}
        self.parameters: dict[str, Tensor] = {}
        for name, stored in self.maps.items():
            stored.requires_grad_(True)
            self.parameters[name] = (stored.detach().float() / self.units[name]).requires_grad_(True)
        folded = [name for attention in layers for name in _folded(attention)]
        self.adapted = None
        if folded:
            names = [name for name, module in model.named_modules() if module in folded]
            self._add_adapters(names, isinstance(folded[0], Conv1D), lora_rank, lora_alpha, seed)
        if not self.parameters:
            raise EigenAttnError("there is nothing to train: every layer of this model is at full rank.")

    def _add_adapters(self, names: list[str], transposed: bool, rank: int, alpha: int, seed: int) -> None:
        if find_spec("peft") is None:
            raise EigenAttnError(
                "this model's maps are folded into its weights, which are trained by LoRA: pip install "
                "'eigenattn[finetune]'."
            )
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        settings = LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=0.0, bias="none", target_modules=names, fan_in_fan_out=transposed
        )
        maps = {id(stored) for stored in self.maps.values()}
        self.adapted = get_peft_model(self.model, settings)
        for name, parameter in self.adapted.named_parameters():
            if id(parameter) in maps:
                parameter.requires_grad_(True)  # peft freezes all but its own
            elif parameter.requires_grad:
                self.parameters[name] = parameter

    @property
    def count(self) -> int:
        """Numbers trained."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    def take_gradients(self) -> None:
        """Move the gradients of the maps, accumulated in the model's dtype, to the parameters."""
        for name, stored in self.maps.items():
            self.parameters[name].grad = stored.grad.float() * self.units[name]
            stored.grad = None

    @torch.no_grad()
    def apply(self) -> None:
        """Put the parameters' values into the model."""
        for name, stored in self.maps.items():
            stored.copy_(self.parameters[name] * self.units[name])

    @torch.no_grad()
    def load(self, values: dict[str, Tensor]) -> None:
        """Take up values that were kept, and put them into the model."""
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
        self.apply()

    def merge(self) -> PreTrainedModel:
        """The trained model, adapters merged into its weights, in evaluation mode."""
        model: Any = self.model if self.adapted is None else self.adapted.merge_and_unload(safe_merge=True)
        for parameter in model.parameters():
            parameter.requires_grad_(not holds_codes(parameter))
        return model.eval()


def _unit(stored: Tensor, head_dim: int) -> Tensor:
    """The power of two next to the root mean square of each row of a map [G * R, D], or of a mean [G * D] by head."""
    rows = stored.detach().float().view(-1, head_dim)
    size = rows.square().mean(-1, keepdim=True).sqrt()
    size = torch.where(size > 0, size, 1.0)
    return size.log2().round().exp2().expand_as(rows).reshape(stored.shape)


def _folded(attention: EigenAttention) -> list[nn.Module]:
    """The projections of a layer that something was folded into: a side is compressed, and its map is gone."""
    family, layout = attention.family, attention.layout
    if layout.at_run_time:
        return []
    gone = {
        name: not layout.of(name.split("_")[0]).verbatim and getattr(attention, name) is None
        for name in ("key_decoder", "key_encoder", "value_encoder", "value_decoder")
    }
    *small, output = gone.values()  # key decoders are folded into the queries' projection
    small = [any(small)] if attention.fused else small
    names = [name for name, is_small in zip(family.qkv, small, strict=True) if is_small]
    return [getattr(attention, name) for name in (*names, *([family.output] if output else []))]
