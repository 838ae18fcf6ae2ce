"""Attention over pages of latents in the place of vLLM's own, and the bases that it works with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..cache.layout import Layout
from ..errors import EigenAttnError
from ..kernels.decoding import Rotary
from ..models.attention import EigenAttention
from ..models.maps import MAPS, QUANTISERS, LatentMaps
from .attend import PagedAttention, angles_of, rotary_of, shows_later, sight_of
from .backend import LatentImpl
from .bases import Bases, Loading, blueprint
from .blocks import GROUPS
from .cache import CachingLayer, Planning, PositionsCache, Spacer, WindowCache
from .engine import (
    Attention,
    KVCacheSpec,
    LinearBase,
    MambaBase,
    RowParallelLinear,
    VllmConfig,
    encode_layer_name,
    extract_layer_index,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    read_outermost_blocks,
    run_attention,
)
from .modes import check_modes, check_states, layers_draft, positions_in_rows


class Unrotated(nn.Module):
    """In the place of rotary positions: keys are cached before rotation, and both are rotated where they meet."""

    def forward(self, positions: Tensor, query: Tensor, key: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        return query, key


class LatentAttention(LatentMaps, CachingLayer):
    """What vLLM's `Attention` is to a layer, with its maps, which have the names that a checkpoint gives them.

    Args:
        stock: vLLM's attention, whose place it takes.
        original: the layer as transformers has it, without memory.
        rotary: its rotary positions, or None.
        planning: of the engine's blocks.
        sinks: of its heads, if it has any.
        positions: the name of the cache of positions, if there is one.
        leads: whether it is the first layer of this process, which writes them.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        stock: Attention,
        original: EigenAttention,
        rotary: Rotary | None,
        planning: Planning,
        sinks: Tensor | None,
        positions: str | None,
        leads: bool,
    ) -> None:
        sees = sight_of(original)
        CachingLayer.__init__(self, vllm_config, stock.layer_name, planning, "full" if sees is None else "sliding")
        self.heads, self.kv_heads, self.head_dim = stock.num_heads, stock.num_kv_heads, original.head_dim
        self.num_heads, self.num_kv_heads = self.heads, self.kv_heads  # as vLLM calls them
        self.whole, self.layout = original.layout, _own_layout(original.layout, self.kv_heads)
        slopes = getattr(stock.impl, "alibi_slopes", None)
        slopes = None if slopes is None else torch.as_tensor(slopes, dtype=torch.float32)
        self.attention = PagedAttention(
            self, original.scaling, rotary, slopes, original.softcap, sees, sinks, shows_later(original)
        )
        for name in (*MAPS, *QUANTISERS):
            stored = getattr(original, name)
            empty = None if stored is None else torch.empty(self._own(stored).shape)
            self.register_parameter(name, None if empty is None else nn.Parameter(empty, requires_grad=False))
        self.positions_name, self.leads, self.window_name = positions, leads, None
        if self.layout.window:
            self.window_name = f"{stock.layer_name}.window"
            self.window_cache = WindowCache(vllm_config, self.window_name, planning, self.kv_heads, self.head_dim)
        self.impl = LatentImpl(self.heads, self.head_dim, original.scaling)

    def _own(self, stored: Tensor) -> Tensor:
        """This device's rows of what has as many for each KV head, or for those that share a latent.

        KV heads are divided, or repeated where there are fewer of them than devices.
        """
        rows, heads = len(stored), self.whole.kv_heads
        first = get_tensor_model_parallel_rank() * heads // get_tensor_model_parallel_world_size()
        return stored.narrow(0, rows * first // heads, rows * self.kv_heads // heads)

    def load(self, name: str, stored: Tensor) -> None:
        """Take one map of all devices' heads.

        Raises:
            EigenAttnError: if it is not of this layer's shape, or no number.
        """
        where, into, own = self.where(name), getattr(self, name), self._own(stored)
        if into.shape != own.shape:
            raise EigenAttnError(
                f"{where} has shape {tuple(stored.shape)} in the checkpoint, and its ranks ask for another."
            )
        into.data.copy_(own)
        if not into.isfinite().all():
            raise EigenAttnError(f"{where} holds NaN or infinite numbers in {into.dtype}.")

    def where(self, name: str) -> str:
        """A map's name in a checkpoint."""
        return f"{self.layer_name.rpartition('.')[0]}.{name}"

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return self.page_spec(1, self.layout.bytes_per_token(self.dtype.itemsize), torch.uint8)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """As vLLM's: [tokens, H * D] of queries [tokens, H * D], keys and values [tokens, G * D] before rotation."""
        q, k, v = (x.view(x.shape[0], -1, self.head_dim) for x in (query, key, value))
        output = torch.empty_like(q)
        run_attention(q, k, v, output, encode_layer_name(self.layer_name))
        return output.flatten(1)


def _own_layout(layout: Layout, kv_heads: int) -> Layout:
    if kv_heads % layout.together:
        raise EigenAttnError(
            f"{layout.kv_heads} KV heads, {layout.together} to a latent, do not share out over "
            f"{get_tensor_model_parallel_world_size()} devices."
        )
    return dataclasses.replace(layout, kv_heads=kv_heads)


class Compression:
    """What was done to a vLLM model: `LatentAttention` in the place of every attention of one that was just built.

    Raises:
        EigenAttnError: if the model or the engine has what the plug-in does not.
    """

    def __init__(self, model: nn.Module, vllm_config: VllmConfig, bases: Bases) -> None:
        check_modes(vllm_config)
        if layers_draft(vllm_config):
            read_outermost_blocks()
        self._bases, self._original = bases, blueprint(vllm_config.model_config.hf_config, bases.config)
        originals = {layer.layer_idx: layer for layer in self._original.layers.values()}
        states: list[Any] = [module for module in model.modules() if isinstance(module, MambaBase)]
        check_states((each.mamba_type.name for each in states), vllm_config.device_config.device_type)
        layers, stages = _layers_of(vllm_config), vllm_config.parallel_config.pipeline_parallel_size
        planning = Planning(
            vllm_config,
            [original.layout for original in originals.values()],
            [sight_of(original) for original in originals.values()],
            states=len(originals) < layers or bool(states),
        )
        if planning.states and vllm_config.speculative_config is not None:
            raise EigenAttnError("speculative decoding is not supported for latents beside layers with states.")
        if len(originals) < layers and stages > 1:
            raise EigenAttnError("with attention in some layers only, pipeline parallel is not supported for latents.")
        rows, positions = positions_in_rows(vllm_config), None
        rotary: dict[Any, Rotary | None] = {}
        self._layers: dict[int, tuple[str, LatentAttention]] = {}
        for name, stock in [each for each in model.named_modules() if isinstance(each[1], Attention)]:
            index, parent = extract_layer_index(name), model.get_submodule(name.rpartition(".")[0])
            original = originals.get(index)
            if original is None:
                raise EigenAttnError(f"vLLM's {type(model).__name__} has attention in layer {index}, and no latents.")
            _check_layer(type(model).__name__, stock, original, parent, vllm_config.model_config.is_mm_prefix_lm)
            if not self._layers:  # before what they are to precede
                for kind in GROUPS:
                    for number in range(2 if index == min(originals) else 1):  # at most, see `Group.spacers`
                        Spacer(vllm_config, name, planning, kind, number)
                if rows is not None:
                    positions = PositionsCache(vllm_config, f"{name}.positions", planning)
                    model.register_forward_pre_hook(positions.note, with_kwargs=True)
            del vllm_config.compilation_config.static_forward_context[stock.layer_name]
            angles = angles_of(original)
            if angles not in rotary:  # one for all layers of its kind, for it keeps tables
                rotary[angles] = rotary_of(original, rows)
            sinks = None if original.family.sinks is None else getattr(parent, original.family.sinks)
            name_of_positions = None if positions is None else positions.layer_name
            layer = LatentAttention(
                vllm_config, stock, original, rotary[angles], planning, sinks, name_of_positions, not self._layers
            )
            self._layers[index] = name, layer
            model.set_submodule(name, layer)
            if original.rotates:
                parent.rotary_emb = Unrotated()

    def load(self, weights: Iterable[tuple[str, Tensor]], load: Callable[..., set[str]]) -> set[str]:
        """Load a checkpoint, and the bases.

        Args:
            load: how the model loads its own weights.

        Returns:
            The names of all parameters that were loaded.

        Raises:
            EigenAttnError: if something is missing, of another shape, or belongs to another model.
        """
        taken = set()

        def take(index: int, name: str, stored: Tensor) -> None:
            if index in self._layers:  # and not of another stage of a pipeline
                where, layer = self._layers[index]
                layer.load(name, stored)
                taken.add(f"{where}.{name}")

        loading = Loading(self._bases, self._original, take)
        loaded = load(loading.passing(weights))
        loading.finish()
        return loaded | taken


def _layers_of(vllm_config: VllmConfig) -> int:
    return vllm_config.model_config.hf_config.get_text_config(decoder=True).num_hidden_layers


def _check_layer(model: str, stock: Attention, original: EigenAttention, parent: nn.Module, images: bool) -> None:
    if not original.layout.at_run_time:
        raise EigenAttnError(
            "bases folded into the weights are not served by vLLM: compress with a window, or use transformers."
        )
    if images and (original.family.both_directions is None or not original.layout.window):
        raise EigenAttnError(
            f"images whose tokens see each other in both directions are not served by {model} with these bases: text "
            "is, by --language-model-only."
        )
    if type(stock) is not Attention:
        raise EigenAttnError(f"{type(stock).__name__} is not served by vLLM once compressed.")
    if original.family.sinks is not None and not hasattr(parent, original.family.sinks):
        raise EigenAttnError(f"compressed {model} is not served by vLLM: it has sinks in a way of its own.")
    if original.rotates and not hasattr(parent, "rotary_emb"):
        raise EigenAttnError(f"compressed {model} is not served by vLLM: it rotates keys in a way of its own.")
    if _biased_in_transformers(original) - _biased_in_vllm(parent):
        raise EigenAttnError(f"vLLM's {model} leaves out biases that attention has here: it is right in transformers.")


def _biased_in_transformers(original: EigenAttention) -> set[bool]:
    """Of the projections with a bias, whether they are the output's."""
    biased = [name for name, each in original.projections.items() if getattr(each, "bias", None) is not None]
    return {name == original.family.output for name in biased}


def _biased_in_vllm(attention: nn.Module) -> set[bool]:
    linear = [module for module in attention.modules() if isinstance(module, LinearBase)]
    return {isinstance(each, RowParallelLinear) for each in linear if getattr(each, "bias", None) is not None}
