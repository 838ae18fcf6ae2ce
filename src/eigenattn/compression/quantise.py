"""Ranks and bits as one choice: a quantiser for each channel, and bits where they pay (transform coding)."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..cache.packing import Widths
from ..cache.size import HALF, baseline_bytes_per_token
from ..calibration.latent_histograms import LatentHistograms, Map
from ..calibration.statistics import Batch, collect_moments
from ..errors import EigenAttnError
from ..models.attention import EigenAttention
from .bases import WEIGHED_AT
from .basis import TINY, Bases, Basis, Quantiser
from .codebooks import Fit, fit
from .sensitivity import TIE

# Bits a channel may be allotted, fewest first: 0, of which nothing is stored and the latent is its mean, and widths of
# `eigenattn.cache.packing.PARTS`. Another package may add one.
ALLOTTED = [0, 1, 2, 3, 4, 5, 6, 8]
# Channels that share a width: planes of whole bytes at every width (see docs/rules.md).
GROUP = 8


def key_costs(fitted: Fit, basis: Basis, weight: Tensor) -> Tensor:
    """What keys' channels cost at each width of `ALLOTTED`, summed over heads, in units of the spectrum: [R, widths].

    Args:
        weight: total weight of each head's histograms [G]; the spectrum is of a covariance, that is, of means.
    """
    weight = weight.clamp_min(TINY).unsqueeze(-1)
    columns = [basis.spectrum, *(fitted.error[bits] / weight for bits in ALLOTTED[1:])]
    return torch.stack([column.sum(0) for column in columns], dim=-1)


def value_costs(fitted: Fit, basis: Basis) -> Tensor:
    """As `key_costs`, for values.

    The spectrum is what is lost of attention *outputs* when latents are cut off: errors that add up over tokens. A
    quantiser's error has a part in proportion to the latent, `c z`, which adds up like that, and a rest that is
    independent from token to token. The best quantiser's error is orthogonal to what it restores, so that `c` is the
    error's share of the energy. At `c = 1` this is truncation.
    """
    return costs_in_part_coherent(fitted, basis.spectrum)


def costs_in_part_coherent(fitted: Fit, cut_off: Tensor, unit: Tensor | float = 1.0) -> Tensor:
    """Costs at each width of `ALLOTTED`, summed over heads, where errors in proportion to a latent add up over tokens.

    Args:
        cut_off: what latents that are cut off cost, [G, R].
        unit: what a unit of an independent error costs, [G, R].

    Returns:
        [R, widths].
    """
    columns = [cut_off]
    for bits in ALLOTTED[1:]:
        share = (fitted.error[bits] / fitted.energy.clamp_min(TINY)).clamp_max(1)
        columns.append(share.square() * cut_off + (1 - share) * fitted.error[bits] * unit)
    return torch.stack([column.sum(0) for column in columns], dim=-1)


def costs_of_both(fitted: Fit, basis: Basis, key_share: Tensor, found: LatentHistograms) -> Tensor:
    """As `key_costs`, for latents of both sides.

    What is due to keys counts as theirs. What is due to values counts as `value_costs` has it: errors that are
    independent from token to token average in attention's sums, and latents that are cut off do so less. Their weight
    was measured on cut-off latents, so it is in proportion to what sums lose of those.
    """
    squared, weight = found.squares.unsqueeze(-1), found.weights[0].unsqueeze(-1).clamp_min(TINY)
    summed = found.outputs * basis.unit.square() / fitted.energy.clamp_min(TINY)
    of_keys = basis.spectrum * key_share
    of_values = basis.spectrum - of_keys
    cut = of_values[:, int(WEIGHED_AT * of_values.shape[-1]) :]
    unit = (cut * summed[:, -cut.shape[-1] :]).sum() / cut.sum().clamp_min(TINY)
    columns = []
    for bits in ALLOTTED:
        share = (fitted.error[bits] / fitted.energy.clamp_min(TINY)).clamp_max(1) if bits else torch.ones_like(summed)
        lost = share.square() * summed + (1 - share) * share * squared / weight
        columns.append(of_keys * share + of_values * lost / unit.clamp_min(TINY))
    return torch.stack([column.sum(0) for column in columns], dim=-1)


def allocate(
    costs: Sequence[Tensor], weights: Sequence[float], heads: Sequence[int], budget: float, multiple: int
) -> list[Tensor]:
    """The widths of least weighted cost within a budget: ranks and bits of all latents in one greedy choice.

    Channels are taken in groups of `multiple`. A group's costs against its bits have a lower convex hull, along which
    every step pays less for a bit than the one before; the best step of all groups of all latents is taken again and
    again. No choice of so few bytes costs less, up to what the last step leaves unused. Every latent keeps one group
    at least.

    Args:
        costs: for each latent [R, widths], the cost of each channel at each width of `ALLOTTED`, over all its heads.
        weights: for each latent what a unit of its cost counts.
        heads: for each latent how many of it a token has, all of which store their channels so.
        budget: bytes of a token, packed, all latents together.
        multiple: channels that share one width.

    Returns:
        For each latent the width of each channel [R].

    Raises:
        EigenAttnError: if the smallest choice does not fit.
    """
    groups = [
        [(cost[i : i + multiple].sum(0), len(cost[i : i + multiple])) for i in range(0, len(cost), multiple)]
        for cost in costs
    ]
    chosen = [[ALLOTTED[1]] + [0] * (len(latent) - 1) for latent in groups]

    def size(latent: int) -> int:
        counts = dict.fromkeys(ALLOTTED[1:], 0)
        for (_, count), bits in zip(groups[latent], chosen[latent], strict=True):
            if bits:
                counts[bits] += count
        return heads[latent] * Widths.of(counts, scaled=True).bytes

    sizes = [size(latent) for latent in range(len(costs))]
    if sum(sizes) > budget:
        raise EigenAttnError(
            f"the budget of {budget:.0f} bytes a token cannot be met: the smallest coded cache takes {sum(sizes)}. "
            "Ask for a larger kv_ratio."
        )

    def step(latent: int, group: int) -> tuple[float, int, int, int] | None:
        """The next step along the hull: the point of best gain for a bit beyond the present width."""
        cost, count = groups[latent][group]
        width = chosen[latent][group]
        present = float(cost[ALLOTTED.index(width)])
        slopes = [
            ((present - float(cost[i])) / (heads[latent] * count * (bits - width)), bits)
            for i, bits in enumerate(ALLOTTED)
            if bits > width
        ]
        gain, bits = max(slopes, default=(0.0, 0))
        return (-(weights[latent] + TIE) * gain, latent, group, bits) if gain > 0 else None

    every = [(latent, group) for latent in range(len(costs)) for group in range(len(groups[latent]))]
    queue = [found for place in every if (found := step(*place))]
    heapq.heapify(queue)
    total = sum(sizes)
    while queue:
        _, latent, group, bits = heapq.heappop(queue)
        before, chosen[latent][group] = chosen[latent][group], bits
        new = size(latent)
        if total + new - sizes[latent] > budget:
            chosen[latent][group] = before
            continue
        total, sizes[latent] = total + new - sizes[latent], new
        following = step(latent, group)
        if following is not None:
            heapq.heappush(queue, following)
    return [
        torch.tensor([width for width, (_, count) in zip(latent, pairs, strict=True) for _ in range(count)])
        for latent, pairs in zip(chosen, groups, strict=True)
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
    quantiser = Quantiser(levels, Widths.of({bits: stored.count(bits) for bits in ALLOTTED[1:]}, scaled=True))
    order = order.to(basis.encoder.device)
    encoder, decoder = basis.encoder[..., order], basis.decoder[:, order]
    return dataclasses.replace(basis, encoder=encoder, decoder=decoder, quantiser=quantiser)


class Fitted(NamedTuple):
    """The quantisers of one latent at every width of `ALLOTTED`, and what its channels then cost: see `key_costs`."""

    fit: Fit
    costs: Tensor


def fit_quantisers(
    model: PreTrainedModel,
    layers: Sequence[EigenAttention],
    bases: Bases,
    batches: Iterable[Batch],
    window: int,
) -> list[tuple[Fitted, ...]]:
    """Fit quantisers to all channels of all layers, on a pass over calibration text.

    Args:
        bases: of a kind in whose latents a squared error adds to the spectrum's tail.
        batches: token ids; memory does not grow with their number.
        window: exact tokens, W.
    """
    maps = {
        attention.layer_idx: [Map(basis.encoder, basis.mean, basis.sides) for basis in layer]
        for attention, layer in zip(layers, bases, strict=True)
    }
    found = collect_moments(
        model, layers, batches, lambda attention: LatentHistograms(maps[attention.layer_idx], window)
    )
    return [
        tuple(_fitted(basis, histograms, i) for i, basis in enumerate(layer))
        for histograms, layer in zip(found, bases, strict=True)
    ]


def _fitted(basis: Basis, found: LatentHistograms, index: int) -> Fitted:
    histograms = found.histograms[index]
    quantisers = fit(histograms, ALLOTTED[1:]).in_units(basis.unit)
    if basis.key_share is not None:
        costs = costs_of_both(quantisers, basis, basis.key_share, found)
    elif "key" in basis.sides:
        costs = key_costs(quantisers, basis, found.weights[index])
    else:
        costs = value_costs(quantisers, basis)
    return Fitted(quantisers, costs.cpu())


def equivalent_ratio(kv_ratio: float) -> float:
    """The KV ratio at which truncation costs about as much as coded latents of this one.

    Sensitivities are measured there. A line through two pairs measured on SmolLM2, with evenly spaced levels: 0.76 cost
    it what 4.5 bits of 16 did, 0.51 what 2.5 did.
    """
    return min(0.2 + 2 * kv_ratio, 0.9)


def quantise_bases(
    layers: Sequence[EigenAttention],
    bases: Bases,
    fitted: Sequence[tuple[Fitted, ...]],
    weights: Sequence[tuple[float, ...]],
    kv_ratio: float,
    multiple: int = GROUP,
) -> Bases:
    """Share bits out over all layers, keys and values, and give the bases of what is stored.

    Args:
        weights: for each layer what a unit of each latent's tail costs the model.
        kv_ratio: bytes of the codes over those of the original cache at 16 bits.
        multiple: see `allocate`.

    Raises:
        EigenAttnError: if the budget is too small.
    """
    flat = [basis for layer in bases for basis in layer]
    quantisers = [each for layer in fitted for each in layer]
    budget = kv_ratio * baseline_bytes_per_token([attention.layout for attention in layers], HALF)
    widths = allocate(
        [each.costs for each in quantisers],
        [weight for layer in weights for weight in layer],
        [len(basis.encoder) for basis in flat],
        budget,
        multiple,
    )
    made = (quantised(basis, each.fit, bits) for basis, each, bits in zip(flat, quantisers, widths, strict=True))
    return [tuple(next(made) for _ in layer) for layer in bases]
