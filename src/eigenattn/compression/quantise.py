"""Ranks and bits as one choice: a quantiser for each channel, and bits where they pay (transform coding)."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..cache.packing import BITS, Widths
from ..calibration.latent_histograms import LatentHistograms, Map
from ..calibration.statistics import Batch, collect_moments
from ..errors import EigenAttnError
from ..models.attention import EigenAttention
from .bases import TINY, Basis, Quantiser
from .codebooks import Fit, fit
from .joint import WEIGHED_AT
from .ranks import TIE

# Widths a channel may have, narrowest first. Of width 0 nothing is stored, and the latent is its mean, 0.
CHOICES = (0, *reversed(BITS))
# Channels that share a width: planes of whole bytes, and hardly coarser than single channels (see docs/decisions.md).
GROUP = 4


def key_costs(fitted: Fit, basis: Basis, weight: Tensor) -> Tensor:
    """What keys' channels cost at each width of `CHOICES`, summed over heads, in units of the spectrum: [R, widths].

    Args:
        weight: total weight of each head's histograms [G]; the spectrum is of a covariance, that is, of means.
    """
    weight = weight.clamp_min(TINY).unsqueeze(-1)
    columns = [basis.spectrum, *(fitted.error[bits] / weight for bits in CHOICES[1:])]
    return torch.stack([column.sum(0) for column in columns], dim=-1)


def value_costs(fitted: Fit, basis: Basis) -> Tensor:
    """As `key_costs`, for values.

    The spectrum is what is lost of attention *outputs* when latents are cut off: errors that add up over tokens. A
    quantiser's error has a part in proportion to the latent, `c z`, which adds up like that, and a rest that is
    independent from token to token. The best quantiser's error is orthogonal to what it restores, so that `c` is the
    error's share of the energy. At `c = 1` this is truncation.
    """
    columns = [basis.spectrum]
    for bits in CHOICES[1:]:
        share = (fitted.error[bits] / fitted.energy.clamp_min(TINY)).clamp_max(1)
        columns.append(share.square() * basis.spectrum + (1 - share) * fitted.error[bits])
    return torch.stack([column.sum(0) for column in columns], dim=-1)


def joint_costs(fitted: Fit, basis: Basis, histograms: LatentHistograms) -> Tensor:
    """As `key_costs`, for joint latents.

    What is due to keys counts as theirs. What is due to values counts as `value_costs` has it: errors that are
    independent from token to token average in attention's sums, and latents that are cut off do so less. Their weight
    was measured on cut-off latents, so it is in proportion to what sums lose of those.
    """
    squared, weight = histograms.squares.unsqueeze(-1), histograms.keys.weight[:, :1].clamp_min(TINY)
    kept = histograms.outputs / fitted.energy.clamp_min(TINY)
    of_keys = basis.spectrum * basis.key_share
    of_values = basis.spectrum - of_keys
    cut = of_values[:, int(WEIGHED_AT * of_values.shape[-1]) :]
    unit = (cut * kept[:, -cut.shape[-1] :]).sum() / cut.sum().clamp_min(TINY)
    columns = []
    for bits in CHOICES:
        share = (fitted.error[bits] / fitted.energy.clamp_min(TINY)).clamp_max(1) if bits else torch.ones_like(kept)
        summed = share.square() * kept + (1 - share) * share * squared / weight
        columns.append(of_keys * share + of_values * summed / unit.clamp_min(TINY))
    return torch.stack([column.sum(0) for column in columns], dim=-1)


def allocate(
    costs: Sequence[Tensor], weights: Sequence[float], heads: Sequence[int], budget: float, multiple: int
) -> list[Tensor]:
    """The widths of least weighted cost within a budget: ranks and bits of all sides in one greedy choice.

    Channels are taken in groups of `multiple`. A group's costs against its bits have a lower convex hull, along which
    every step pays less for a bit than the one before; the best step of all groups of all sides is taken again and
    again. No choice of so few bytes costs less, up to what the last step leaves unused. Every side keeps one group at
    least.

    Args:
        costs: for each side [R, widths], the cost of each channel at each width of `CHOICES`, over all its heads.
        weights: for each side what a unit of its cost counts.
        heads: for each side its KV heads, G, all of which store their channels so.
        budget: bytes of a token, packed, all sides together.
        multiple: channels that share one width.

    Returns:
        For each side the width of each channel [R].

    Raises:
        EigenAttnError: if the smallest choice does not fit.
    """
    groups = [
        [(cost[i : i + multiple].sum(0), len(cost[i : i + multiple])) for i in range(0, len(cost), multiple)]
        for cost in costs
    ]
    chosen = [[CHOICES[1]] + [0] * (len(side) - 1) for side in groups]

    def size(side: int) -> int:
        counts = [sum(n for (_, n), w in zip(groups[side], chosen[side], strict=True) if w == bits) for bits in BITS]
        return heads[side] * Widths(*counts).bytes

    sizes = [size(side) for side in range(len(costs))]
    if sum(sizes) > budget:
        raise EigenAttnError(
            f"the budget of {budget:.0f} bytes a token cannot be met: the smallest quantised cache takes {sum(sizes)}. "
            "Ask for more bits_per_element."
        )

    def step(side: int, group: int) -> tuple[float, int, int, int] | None:
        """The next step along the hull: the point of best gain for a bit beyond the present width."""
        cost, count = groups[side][group]
        width = chosen[side][group]
        present = float(cost[CHOICES.index(width)])
        slopes = [
            ((present - float(cost[i])) / (heads[side] * count * (bits - width)), bits)
            for i, bits in enumerate(CHOICES)
            if bits > width
        ]
        gain, bits = max(slopes, default=(0.0, 0))
        return (-(weights[side] + TIE) * gain, side, group, bits) if gain > 0 else None

    queue = [found for side in range(len(costs)) for group in range(len(groups[side])) if (found := step(side, group))]
    heapq.heapify(queue)
    total = sum(sizes)
    while queue:
        _, side, group, bits = heapq.heappop(queue)
        before, chosen[side][group] = chosen[side][group], bits
        new = size(side)
        if total + new - sizes[side] > budget:
            chosen[side][group] = before
            continue
        total, sizes[side] = total + new - sizes[side], new
        following = step(side, group)
        if following is not None:
            heapq.heappush(queue, following)
    return [
        torch.tensor([width for width, (_, count) in zip(side, pairs, strict=True) for _ in range(count)])
        for side, pairs in zip(chosen, groups, strict=True)
    ]


def quantised(basis: Basis, fitted: Fit, widths: Tensor) -> Basis:
    """The basis of the channels that are stored, sorted by width, with their quantisers.

    Args:
        widths: bits of each channel [R].
    """
    order = torch.argsort(widths, descending=True, stable=True)[: int((widths > 0).sum())]
    stored = widths[order].tolist()
    levels = torch.stack(
        [fitted.levels[bits][:, channel] for channel, bits in zip(order.tolist(), stored, strict=True)], dim=1
    )
    quantiser = Quantiser(levels, Widths(*(stored.count(bits) for bits in BITS)))
    order = order.to(basis.encoder.device)
    encoder, decoder = basis.encoder[..., order], basis.decoder[:, order]
    return dataclasses.replace(basis, encoder=encoder, decoder=decoder, quantiser=quantiser)


class Fitted(NamedTuple):
    """One layer's quantisers at every width, and what they cost: see `key_costs` and `value_costs`."""

    keys: Fit
    values: Fit
    key_costs: Tensor
    value_costs: Tensor


def fit_quantisers(
    model: nn.Module,
    layers: list[EigenAttention],
    bases: Sequence[tuple[Basis, Basis]],
    batches: Iterable[Batch],
    window: int,
) -> list[Fitted]:
    """Fit quantisers to all channels of all layers, on a pass over calibration text.

    Args:
        bases: of the kind `attention`, in whose latents a squared error adds to the spectrum's tail.
        batches: token ids; memory does not grow with their number.
        window: exact tokens, W.
    """
    maps = {
        attention.layer_idx: [Map(basis.encoder, basis.mean, basis.joint) for basis in pair]
        for attention, pair in zip(layers, bases, strict=True)
    }
    found = collect_moments(
        model, layers, batches, lambda attention: LatentHistograms(*maps[attention.layer_idx], window)
    )
    fitted = []
    for histograms, (keys, values) in zip(found, bases, strict=True):
        fit_k, fit_v = fit(histograms.keys), fit(histograms.values)
        if keys.joint:
            costs_k = joint_costs(fit_k, keys, histograms)
        else:
            costs_k = key_costs(fit_k, keys, histograms.keys.weight[:, 0])
        fitted.append(Fitted(fit_k, fit_v, costs_k.cpu(), value_costs(fit_v, values).cpu()))
    return fitted


def equivalent_ratio(bits_per_element: float) -> float:
    """The KV ratio at which truncation costs about as much as quantised latents of so many bits an element.

    Sensitivities are measured there. A line through two pairs measured on SmolLM2, with evenly spaced levels: 0.76 cost
    it what 4.5 bits did, 0.51 what 2.5 did.
    """
    return min(0.2 + 0.125 * bits_per_element, 0.9)


def quantise_bases(
    layers: Sequence[EigenAttention],
    bases: Sequence[tuple[Basis, Basis]],
    fitted: Sequence[Fitted],
    weights: Sequence[Sequence[float]],
    bits_per_element: float,
    multiple: int = GROUP,
) -> list[tuple[Basis, Basis | None]]:
    """Share bits out over all layers, keys and values, and give the bases of what is stored.

    Args:
        weights: for each layer what a unit of its keys' and of its values' tail costs the model.
        bits_per_element: latent bits for each element of the original cache.
        multiple: see `allocate`.

    Raises:
        EigenAttnError: if the budget is too small.
    """
    elements = sum(2 * attention.kv_heads * attention.head_dim for attention in layers)
    sides = [  # whose channels are shared out; the values' basis beside a joint one has none
        (basis, fit, cost, weight)
        for pair, layer, both in zip(bases, fitted, weights, strict=True)
        for basis, fit, cost, weight in zip(
            pair, (layer.keys, layer.values), (layer.key_costs, layer.value_costs), both, strict=True
        )
        if basis.rank
    ]
    found, fits, costs, flat = zip(*sides, strict=True)
    heads = [len(basis.encoder) for basis in found]
    widths = allocate(costs, flat, heads, bits_per_element * elements / 8, multiple)
    made = iter(quantised(basis, fit, each) for basis, fit, each in zip(found, fits, widths, strict=True))
    return [(next(made), next(made) if values.rank else None) for _, values in bases]
