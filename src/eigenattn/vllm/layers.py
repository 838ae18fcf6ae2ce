"""Compressed attention as a module of vLLM's models, and putting it in their own's place."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.models.utils import extract_layer_index
from vllm.model_executor.utils import set_weight_attrs

from ..cache.layout import Layout
from ..errors import EigenAttnError
from ..kernels.decoding import Rotary
from ..models.attention import EigenAttention
from ..models.maps import MAPS, QUANTISERS, LatentMaps
from .attend import PagedAttention, rotary_of, slopes_of
from .backend import LatentImpl
from .cache import BlockPlan, LatentAttention, Spacer, WindowCache
from .configuration import LatentsConfig, blueprints
from .pages import page_shape, to_page


class Shards:
    """Which heads this device has: queries' are divided, and KV heads too, or repeated where there are fewer of them.

    Args:
        heads: query heads of all devices, H.
        layout: of all devices' KV heads. Those that share a latent are on one device.

    Raises:
        EigenAttnError: if they cannot be shared out evenly.
    """

    def __init__(self, heads: int, layout: Layout) -> None:
        kv_heads = layout.kv_heads
        self.count, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        if heads % self.count or max(kv_heads, self.count) % min(kv_heads, self.count):
            raise EigenAttnError(f"{heads} heads and {kv_heads} KV heads do not share out over {self.count} devices.")
        self.heads, self.kv_heads = heads // self.count, max(kv_heads // self.count, 1)
        if self.kv_heads % layout.together:
            raise EigenAttnError(
                f"{kv_heads} KV heads, {layout.together} to a latent, do not share out over {self.count} devices."
            )
        self.first_head = rank * self.heads
        self.first_kv_head, self.all_kv_heads = rank * kv_heads // self.count, kv_heads
        self.layout = dataclasses.replace(layout, kv_heads=self.kv_heads)

    def of_kv(self, stored: Tensor) -> Tensor:
        """This device's rows of what has as many for each KV head, or for those that share a latent."""
        rows = len(stored)
        first, count = (rows * heads // self.all_kv_heads for heads in (self.first_kv_head, self.kv_heads))
        return stored.narrow(0, first, count)

    def of_queries(self, stored: Tensor, size: int) -> Tensor:
        """This device's rows of what has `size` rows a query head."""
        return stored.narrow(0, self.first_head * size, self.heads * size)


class HeadsProjection(ColumnParallelLinear):
    """Query, key and value projections as one, whose heads may each have a size of their own.

    Args:
        original: the attention it belongs to, as transformers has it.
        name: of the module, for vLLM.
    """

    def __init__(self, original: EigenAttention, shards: Shards, name: str) -> None:
        self.shards, self.original = shards, (original,)
        q, k, v = original.projected
        self.parts = {"q": shards.heads * q, "k": shards.kv_heads * k, "v": shards.kv_heads * v}
        projections = [getattr(original, name) for name in original.family.qkv]
        parts = ("q", "k", "v") if len(projections) == 3 else ("qkv",)
        biases = [part for part, projection in zip(parts, projections, strict=True) if projection.bias is not None]
        self.expected = {("weight", part) for part in parts} | {("bias", part) for part in biases}
        has_bias = bool(biases)
        width = sum(self.parts.values()) * shards.count
        super().__init__(original.config.hidden_size, width, bias=has_bias, prefix=name)
        if has_bias:
            nn.init.zeros_(self.bias)  # folding gives keys and values biases where queries have none

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
        """Called by vLLM's loader with the checkpoint's tensors; `shard_id` says of which of three projections."""
        (original,) = self.original
        heads, kv_heads, sizes = original.heads, original.kv_heads, original.projected
        for name, loaded in weights:
            shard = getattr(loaded, "shard_id", None)
            rows = [n * size for n, size in zip((heads, kv_heads, kv_heads), sizes, strict=True)]
            self.expected.discard((name, shard or "qkv"))
            pieces = {shard: loaded} if shard else dict(zip("qkv", loaded.split(rows), strict=True))
            into = getattr(self, name).data.split(list(self.parts.values()))
            for part, piece in pieces.items():
                place = "qkv".index(part)
                own = self.shards.of_queries(piece, sizes[place]) if part == "q" else self.shards.of_kv(piece)
                _copy(into[place], own, f"{self.prefix}.{name}")
            yield name

    def missing(self) -> list[str]:
        """What no tensor was loaded for."""
        return [f"{part}_proj.{name}" for name, part in sorted(self.expected)]


class ServedAttention(LatentMaps):
    """`EigenAttention` as vLLM runs it: the same projections and maps under the same names, and a paged cache.

    Args:
        original: the layer as transformers has it, without memory.
        rotary: the model's rotary positions, or None.
        slopes: ALiBi's slopes of all query heads [H], or None.
        prefix: name of the module.
        plan: of the blocks of all layers; None without an exact window.
    """

    def __init__(
        self,
        original: EigenAttention,
        *,
        vllm_config: VllmConfig,
        rotary: Rotary | None,
        slopes: Tensor | None,
        prefix: str,
        plan: BlockPlan | None,
    ) -> None:
        super().__init__()
        family = original.family
        shards = self.shards = Shards(original.heads, original.layout)
        self.layout = shards.layout
        self.heads, self.kv_heads, self.head_dim = shards.heads, shards.kv_heads, original.head_dim
        self.clip, self.scaling = original.clip, original.scaling
        self.rotary, self.slopes = (rotary,), slopes
        self.qkv_name = family.qkv[0] if family.fused else "qkv_proj"
        self.output_name = family.output
        qkv = HeadsProjection(original, shards, f"{prefix}.{self.qkv_name}")
        setattr(self, self.qkv_name, qkv)
        output = original.output_projection
        size_out = self.head_dim if self.layout.at_run_time else self.layout.of("value").rank
        projection = RowParallelLinear(
            original.heads * size_out,
            output.out_features,
            bias=output.bias is not None,
            prefix=f"{prefix}.{family.output}",
        )
        setattr(self, family.output, projection)
        self.norms = family.norms if original.normalises else None
        for name in self.norms or ():
            setattr(self, name, RMSNorm(self.head_dim, eps=original.config.rms_norm_eps))
        for name in (*MAPS, *QUANTISERS):
            stored = getattr(original, name)
            self.register_parameter(name, None if stored is None else self._map(stored))
        layer, window_layer = f"{prefix}.attn", None
        if plan is not None:
            window_layer = f"{prefix}.window"
            self.window_cache = WindowCache(
                vllm_config, window_layer, shards.heads, shards.kv_heads, self.head_dim, plan
            )
        self.attn = LatentAttention(
            vllm_config,
            layer,
            heads=shards.heads,
            page=page_shape(self.layout),
            size_out=size_out,
            block_size=None if plan is None else plan.latents,
            impl=LatentImpl(self.attention, shards.heads, self.head_dim, self.scaling, window_layer),
        )

    def _map(self, stored: Tensor) -> nn.Parameter:
        """An empty parameter for this device's heads of a map [G/N * R, N * D] or a mean [G * D]."""
        parameter = nn.Parameter(torch.empty(self.shards.of_kv(stored).shape), requires_grad=False)
        loader = {"weight_loader": lambda into, loaded: _copy(into.data, self.shards.of_kv(loaded), "a map")}
        set_weight_attrs(parameter, loader)
        return parameter

    def attention(self) -> PagedAttention:
        """How it attends, with the maps as they were loaded."""
        slopes = None if self.slopes is None else self.shards.of_queries(self.slopes, 1)
        keys, values = self.decoding_sides()
        return PagedAttention(self.layout, keys, values, self.scaling, self.rotary[0], slopes)

    def forward(self, hidden_states: Tensor, positions: Tensor | None = None) -> Tensor:
        """[tokens, C] to [tokens, C]. Positions are counted by the backend, which needs those of cached keys too."""
        qkv_proj: HeadsProjection = getattr(self, self.qkv_name)
        qkv, _ = qkv_proj(hidden_states)
        if self.clip:
            qkv = qkv.clamp(-self.clip, self.clip)
        q, k, v = qkv.split(list(qkv_proj.parts.values()), dim=-1)
        tokens = q.shape[0]
        q = q.view(tokens, self.shards.heads, -1)
        k, v = (x.view(tokens, self.shards.kv_heads, -1) for x in (k, v))
        if self.norms is not None:
            q, k = (getattr(self, name)(x.contiguous()) for name, x in zip(self.norms, (q, k), strict=True))
        latents = self.encode(*(x.transpose(0, 1).unsqueeze(0) for x in (k, v)))  # [1, G/N, tokens, R] each
        page = to_page(self.layout, tuple(z[0] for z in latents))
        # vLLM's operation takes three tensors; without a window there is no use for the last.
        exact = torch.cat([k, v], dim=-1) if self.layout.window else page
        out, _ = getattr(self, self.output_name)(self.attn(q, page, exact))
        return out


def _copy(into: Tensor, loaded: Tensor, name: str) -> None:
    if into.shape != loaded.shape:
        raise EigenAttnError(
            f"{name} has shape {tuple(loaded.shape)} in the checkpoint, and its ranks ask for {tuple(into.shape)}."
        )
    into.copy_(loaded)


def compress_layers(model: nn.Module, vllm_config: VllmConfig) -> None:
    """Put `ServedAttention` in the place of every attention module of a vLLM model that was just built.

    Raises:
        EigenAttnError: if the engine is asked for what the plug-in does not have.
    """
    config, quantization = vllm_config.model_config.hf_config, vllm_config.quant_config
    _check_engine(vllm_config)
    if not isinstance(quantization, LatentsConfig):
        raise EigenAttnError(f"{type(model).__name__} serves compressed checkpoints only.")
    originals = blueprints(config, quantization.checkpoint)
    plan = BlockPlan.of([original.layout for original in originals], vllm_config.cache_config)
    rotary, slopes = rotary_of(originals[0]), slopes_of(originals[0])
    layers = vllm_config.compilation_config.static_forward_context
    for name, module in list(model.named_modules()):
        if type(module).__name__ != originals[0].family.attention:
            continue
        index = extract_layer_index(name)
        stock = getattr(module, "attn", None)
        if stock is not None:
            del layers[stock.layer_name]
        served = ServedAttention(
            originals[index],
            vllm_config=vllm_config,
            rotary=rotary,
            slopes=slopes,
            prefix=name,
            plan=plan,
        )
        model.set_submodule(name, served)
        if index == 0 and plan is not None:
            for spacer in range(plan.spacers):
                Spacer(vllm_config, f"{name}.spacer_{spacer}", plan.latents)


def _check_engine(vllm_config: VllmConfig) -> None:
    if vllm_config.lora_config is not None:
        raise EigenAttnError("LoRA adapters are not served on compressed checkpoints: merge them before compressing.")
    if vllm_config.cache_config.cache_dtype not in ("auto", "float16", "bfloat16"):
        raise EigenAttnError(
            f"latents are not cached in {vllm_config.cache_config.cache_dtype}: leave --kv-cache-dtype at auto."
        )
    if vllm_config.parallel_config.decode_context_parallel_size > 1:
        raise EigenAttnError("context parallel is not supported for latents: use tensor or pipeline parallel.")
    if vllm_config.speculative_config is not None:
        raise EigenAttnError("speculative decoding is not supported for latents.")


def check_loaded(model: nn.Module, loaded: set[str]) -> None:
    """Refuse a checkpoint that lacks tensors of compressed layers: vLLM looks for none in quantised models, as it takes
    ours to be.

    Args:
        loaded: names of parameters that vLLM's loader found tensors for.

    Raises:
        EigenAttnError: naming the first that is missing.
    """
    for name, module in model.named_modules():
        if not isinstance(module, ServedAttention):
            continue
        missing = [part for part, _ in module.named_parameters() if f"{name}.{part}" not in loaded]
        missing += getattr(module, module.qkv_name).missing()
        if missing:
            raise EigenAttnError(f"the checkpoint lacks {name}.{missing[0]}: is it truncated?")
