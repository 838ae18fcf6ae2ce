"""Refitting value decoders once encoders and ranks are chosen, layer by layer, on what the compressed model reads."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..cache.sight import Near
from ..calibration.passes import DecoderLayers, embeddings_loaded, layer_output
from ..calibration.statistics import Batch
from ..journal import Journal
from ..kernels.blocks import FarKeys, attend
from ..models.attention import EigenAttention
from ..models.forward_pass import ForwardPass
from ..models.placement import loaded
from ..models.projections import Heads
from ..progress import TASK, TokenProgress
from . import resuming
from .basis import Bases, Basis
from .folding import attach, detach

STAGE = "refit"
# How far decoders are held to what they were, as a share of the mean energy of what they decode (chosen).
RIDGE = 1e-3
# Conjugate gradients end at this relative residual, or after so many steps (chosen).
TOLERANCE, STEPS = 1e-6, 300


@torch.no_grad()
def refit(
    model: PreTrainedModel,
    layers: Sequence[EigenAttention],
    chosen: Bases,
    window: int,
    batches: Sequence[Batch],
    bars: TokenProgress,
    journal: Journal | None = None,
) -> Bases:
    """Value decoders that bring each layer's attention output nearest to the original's (least squares).

    A layer is given what the layers before it make of the text once they are compressed and refitted, and its target
    is what the original's attention gives on the original's hidden states: so it takes back what earlier layers lost,
    where it can. Decoders whose sums meet a gate or a norm stay as they are. Each layer runs three times over the
    batches; memory holds the hidden states of all of them twice.

    Args:
        chosen: the bases of each layer, truncated or quantised. Those of keys stay, and so do those of both sides.
        window: exact tokens, W.
        batches: token ids to fit on.
        journal: keeps the layers that are done, and is asked for them.

    Returns:
        The bases with new decoders of values.
    """
    blocks = DecoderLayers.of(model, layers)
    done = journal.read(STAGE) if journal else None
    tensors: dict[str, Tensor] = done[0] if done else {}
    exact: list[Any] = [None] * len(batches)
    changed: list[Any] = [None] * len(batches)
    result: Bases = []
    saved = time.monotonic()
    with bars.bar("Refitting", len(layers) * len(batches)) as bar, embeddings_loaded(model):
        for index, (attention, bases) in enumerate(zip(layers, chosen, strict=True)):
            run = partial(layer_output, model, blocks, index)
            with loaded(blocks.own(index)):
                detach(attention)
                name, fit = f"{index}.change", None
                values = next((basis for basis in bases if basis.sides == ("value",)), None)
                values = values if attention.output_is_linear else None
                if values is not None and name not in tensors:
                    fit = LeastSquares(attention, values.rank)
                following = []
                for number, batch in enumerate(batches):
                    with _output_of(attention) as target:
                        following.append(run(exact[number], batch))
                    if fit is not None:
                        attach(attention, bases, window)
                        attention.observer = fit.observe
                        with _output_of(attention) as output:
                            run(changed[number], batch)
                        detach(attention)
                        attention.observer = None
                        fit.add(target[0] - output[0], batch.valid)
                    bar.advance(TASK)
                exact = following
                if fit is not None:
                    tensors[name] = fit.solve()
                if values is not None:
                    changed_values = _changed(values, tensors[name].to(values.decoder.device))
                    bases = tuple(changed_values if basis is values else basis for basis in bases)
                if index + 1 < len(layers):
                    attach(attention, bases, window)
                    changed = [run(before, batch) for before, batch in zip(changed, batches, strict=True)]
                    detach(attention)
            result.append(bases)
            if journal and fit is not None and time.monotonic() - saved > resuming.SAVE_SECONDS:
                journal.write(STAGE, tensors)
                saved = time.monotonic()
    return result


class LeastSquares:
    """How a layer's value decoders should change, from sums over batches in float64.

    Attention's sums over latents, `s_h = sum_n a_n z_n`, meet the decoder of their KV head, and then the output
    projection: `y = sum_h s_h U_g(h) W_h` and what does not depend on decoders. Sought is the change of U that takes y
    nearest to a target, with a ridge. Means stay: they are taken off before a value is encoded, too.

    Args:
        attention: the layer.
        rank: of its value latents, R.
    """

    def __init__(self, attention: EigenAttention, rank: int) -> None:
        h = attention.heads
        self.kv_heads, self.group = attention.kv_heads, attention.num_key_value_groups
        weight = attention.output_weight().double()  # [C, H * D]
        self.weight = weight.unflatten(1, (h, -1)).permute(1, 2, 0)  # [H, D, C]
        self.gram = weight.new_zeros(h, rank, h, rank)
        self.product = weight.new_zeros(h, rank, self.weight.shape[1])
        self.sums = weight.new_zeros(0)

    def observe(self, attention: EigenAttention, heads: Heads[Tensor], this: ForwardPass) -> None:
        """Find the sums [B, H, T, R] of a batch in the middle of its pass through the compressed layer."""
        q, k, v = heads
        t, window = q.shape[-2], attention.layout.window
        latents = attention.rounded(k, v)
        far = this.rotated(attention.decode(attention.latent(latents, "key"), "key"))
        q, near = this.rotated(q), this.rotated(k)
        z = attention.for_each_head(attention.latent(latents, "value"))  # [B, G, T, R]
        options = {"mask": this.mask(q, t), **attention.scoring}
        if window:
            # What is exact takes its share of the attention, and adds nothing.
            held = FarKeys(far, z), Near(near, torch.zeros_like(z), 0)
            self.sums, _ = attend(this.backend, q, *held, query_first=0, window=window, columns=t, **options)
        else:
            self.sums, _ = this.backend(q, far, z, **options)

    def add(self, missing: Tensor, valid: Tensor | None) -> None:
        """Add the batch that was observed.

        Args:
            missing: [B, T, C], the target less the output.
            valid: [B, T], or None; other tokens do not count.
        """
        sums, missing = self.sums.double(), missing.double()
        if valid is not None:
            sums = sums * valid.to(sums.device)[:, None, :, None]
        rows = sums.permute(0, 2, 1, 3).flatten(0, 1).flatten(1)  # [B * T, H * R]
        self.gram += (rows.T @ rows).view_as(self.gram)
        by_head = missing.flatten(0, 1) @ self.weight.transpose(1, 2)  # [H, B * T, D]
        self.product += sums.transpose(0, 1).flatten(1, 2).transpose(1, 2) @ by_head

    def solve(self) -> Tensor:
        """The change of decoders, [G, R, D]."""
        outer = torch.einsum("adc,bec->adbe", self.weight, self.weight)  # [H, D, H, D]
        own = self._by_group(torch.einsum("aras->ars", self.gram))  # [G, R, R]
        inner = self._by_group(torch.einsum("adae->ade", outer))  # [G, D, D]
        scale = [x.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] for x in (own, inner)]
        ridge = RIDGE * scale[0] * scale[1] / self.group

        def normal(change: Tensor) -> Tensor:
            by_head = change.repeat_interleave(self.group, dim=0)  # [H, R, D]
            spread = torch.einsum("arbs,bsd->abrd", self.gram, by_head)
            return self._by_group(torch.einsum("abrd,bdae->are", spread, outer)) + ridge * change

        # Exact for a head by itself, but for the ridge: what is left to the iteration is how heads hang together.
        left, right = (_inverse(x, size) for x, size in zip((own, inner), scale, strict=True))
        return conjugate_gradients(normal, self._by_group(self.product), lambda x: left @ x @ right)

    def _by_group(self, x: Tensor) -> Tensor:
        """The sum over the query heads of each KV head, [H, ...] to [G, ...]."""
        return x.unflatten(0, (self.kv_heads, self.group)).sum(1)


def _inverse(x: Tensor, scale: Tensor) -> Tensor:
    """The inverse of matrices [G, n, n] with a ridge; of heads that give nothing, whose scale is 0, it is any."""
    ridge = RIDGE * torch.where(scale > 0, scale, 1.0)
    return torch.linalg.inv(x + ridge * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device))


def conjugate_gradients(
    normal: Callable[[Tensor], Tensor], target: Tensor, precondition: Callable[[Tensor], Tensor]
) -> Tensor:
    """Solve `normal(x) = target`; `normal` is linear, symmetric and positive, and `precondition` near its inverse."""
    x, residual = torch.zeros_like(target), target
    direction = conditioned = precondition(residual)
    slope, enough = (residual * conditioned).sum(), TOLERANCE * target.norm()
    for _ in range(STEPS):
        if residual.norm() <= enough:
            break
        image = normal(direction)
        step = slope / (direction * image).sum()
        x, residual = x + step * direction, residual - step * image
        conditioned, before = precondition(residual), slope
        slope = (residual * conditioned).sum()
        direction = conditioned + slope / before * direction
    return x


@contextmanager
def _output_of(attention: EigenAttention) -> Iterator[list[Tensor]]:
    """Collects what the output projection gives, [B, T, C] a pass."""
    found: list[Tensor] = []

    def keep(projection: nn.Module, args: tuple, output: Tensor) -> None:
        found.append(output)

    hook = attention.output_projection.register_forward_hook(keep)
    try:
        yield found
    finally:
        hook.remove()


def _changed(basis: Basis, change: Tensor) -> Basis:
    """A basis of values with decoders changed by [G, R, D]."""
    by_latent = change.unflatten(0, (-1, basis.heads)).transpose(1, 2).flatten(2)  # [G/N, R, N * D]
    return dataclasses.replace(basis, decoder=basis.decoder + by_latent)
