"""Fitting quantisers: the levels that lose least of how latents are distributed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache.codebook import DEGREE, level_table, middle
from ..calibration.latent_histograms import Histograms
from .basis import TINY

# A bin's latents are taken as points spread evenly over so many deviations as its variance says (chosen).
POINTS = 8
# They lie within this many deviations of all latents at least (chosen: far below a step of 8 bits).
POINT = 1e-4
# Ranges that levels cover at first, in standard deviations to either side of the mean (chosen: of three times as many,
# codes of 8 bits would leave 0.94 of the error, all others the same within half a percent).
SPREADS = (0.75, 1.5, 3.0, 7.0, 16.0)
# They are spaced evenly, or as `t + 3 t^3`: ten times as widely at the ends as in the middle.
CURVES = (0.0, 3.0)
ROUNDS = 16
# Neighbouring levels keep this share of their mean distance, so that rounding leaves them in order.
LEAST_GAP = 0.02
RIDGE = 1e-10


@dataclass(frozen=True)
class Fit:
    """The best quantisers of one latent's channels at some widths.

    Args:
        levels: for each width [G, R, 4]: see `eigenattn.cache.codebook.Codebook`.
        error: the weighted sum of squared errors they leave, for each width, [G, R].
        energy: the weighted sum of squares of the latents, [G, R].
    """

    levels: dict[int, Tensor]
    error: dict[int, Tensor]
    energy: Tensor

    def in_units(self, unit: Tensor) -> Fit:
        """The same levels, with what they leave in the units that latents had before they were divided by `unit`."""
        unit = unit.square()
        return Fit(self.levels, {bits: error * unit for bits, error in self.error.items()}, self.energy * unit)


def fit(histograms: Histograms, widths: Sequence[int]) -> Fit:
    """Fit levels of each channel at each width to a histogram, by least weighted squared error.

    As in Lloyd's algorithm (1957) latents are given to the nearest level, and levels then moved to where those given to
    them want them, again and again. Here the levels of a channel move together: they are a polynomial of the code, and
    its coefficients a least-squares fit. From several starts, each channel keeps the best it has met.

    Args:
        widths: bits of the codes.
    """
    shape = histograms.sums.shape[1:-1]
    samples = _Samples.of(histograms)
    total, deviation, mean = (x.view(shape) for x in (samples.total, samples.deviation, samples.mean))
    levels, errors = {}, {}
    for bits in widths:
        found, error = _best(samples, bits)
        powers = torch.arange(DEGREE + 1, device=found.device)
        found = found.view(*shape, DEGREE + 1) * deviation.unsqueeze(-1) / float(middle(bits)) ** powers
        found[..., 0] += mean
        levels[bits], errors[bits] = found, (error.view(shape) * total * deviation.square()).clamp_min(0)
    return Fit(levels, errors, histograms.sums[2].sum(-1))


@dataclass(frozen=True)
class _Samples:
    """Latents of C channels as sorted points with weights; each channel's have mean 0 and variance 1.

    Args:
        points: [C, P].
        sums: weights, and what they give with the points and their squares, summed over all points before one:
            [3, C, P + 1].
        total, mean, deviation: [C], to undo the standardising.
    """

    points: Tensor
    sums: Tensor
    total: Tensor
    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, histograms: Histograms) -> _Samples:
        weight, first, second = histograms.sums.flatten(1, 2)  # [C, BINS] each
        total = weight.sum(-1, keepdim=True)
        share = weight / total.clamp_min(TINY)
        centre = first / weight.clamp_min(TINY)
        spread = (second / weight.clamp_min(TINY) - centre.square()).clamp_min(0)
        mean = (share * centre).sum(-1, keepdim=True)
        deviation = (share * (spread + (centre - mean).square())).sum(-1, keepdim=True).sqrt()
        deviation = torch.where(deviation > 0, deviation, 1.0)
        half = ((3 * spread).sqrt() / deviation).clamp_min(POINT)
        places = (torch.arange(POINTS, device=weight.device, dtype=weight.dtype) + 0.5) * (2 / POINTS) - 1
        points = ((centre - mean) / deviation).unsqueeze(-1) + half.unsqueeze(-1) * places  # [C, BINS, POINTS]
        points = points.where((weight > 0).unsqueeze(-1), 0.0)
        points, order = points.flatten(1).sort(-1)
        share = share.repeat_interleave(POINTS, dim=-1).gather(-1, order) / POINTS
        sums = torch.stack([share, share * points, share * points.square()]).cumsum(-1)
        return cls(points, F.pad(sums, (1, 0)), total.squeeze(-1), mean.squeeze(-1), deviation.squeeze(-1))

    def assigned(self, levels: Tensor) -> Tensor:
        """Weight, first and second moment of the points nearest to each level [C, n]: [3, C, n]."""
        between = (levels[:, 1:] + levels[:, :-1]) / 2
        ends = F.pad(F.pad(torch.searchsorted(self.points, between), (1, 0)), (0, 1), value=self.points.shape[1])
        return self.sums.gather(-1, ends.expand(3, -1, -1)).diff(dim=-1)


def _error(levels: Tensor, assigned: Tensor) -> Tensor:
    """The weighted squared error [C] of levels [C, n], to which `_Samples.assigned` gives what is nearest."""
    weight, first, second = assigned
    return (second - 2 * levels * first + levels.square() * weight).sum(-1)


def _best(samples: _Samples, bits: int) -> tuple[Tensor, Tensor]:
    """Coefficients [C, 4] over codes in units of `middle(bits)`, counted from there, and the errors [C] they leave."""
    units = torch.eye(DEGREE + 1, device=samples.points.device, dtype=samples.points.dtype)
    powers = level_table(units, bits)  # [4, n]
    powers = powers / powers.abs().amax(-1, keepdim=True)
    best, error = _refined(samples, powers, _spread(samples, powers, CURVES[0]))
    for curve in CURVES[1:]:
        best, error = _better(best, error, *_refined(samples, powers, _spread(samples, powers, curve)))
    # Levels that are free to go where they want say best which latents belong together.
    free = _free_levels(samples, powers.shape[-1])
    return _better(best, error, *_refined(samples, powers, best, samples.assigned(free)))


def _spread(samples: _Samples, powers: Tensor, curve: float) -> Tensor:
    """The best coefficients [C, 4] of levels spaced in one way, over ranges about the mean or from either end."""
    place = powers[1] - powers[1].mean()
    place = place / place.amax()
    place = (place + curve * place**3) / (1 + curve)  # in -1 .. 1
    lowest, highest = samples.points[:, :1], samples.points[:, -1:]
    best, error = lowest.expand(-1, len(powers)), torch.full_like(samples.total, torch.inf)
    inverse = torch.linalg.pinv(powers)
    # A sink is often the outermost of all, and a level should meet it.
    ranges = [(lowest, highest)]
    for spread in SPREADS:
        reach = torch.full_like(lowest, spread)
        ranges += [(-reach, reach), (lowest, reach), (-reach, highest)]
    for low, high in ranges:
        levels = (low + high) / 2 + (high - low) / 2 * place
        levels = levels.where(high > low, place)
        best, error = _better(best, error, levels @ inverse, _error(levels, samples.assigned(levels)))
    return best


def _free_levels(samples: _Samples, n: int) -> Tensor:
    """Lloyd's algorithm itself: n levels of each channel, [C, n]."""
    distance = samples.points.diff(dim=-1).clamp_min(TINY)
    weight = samples.sums[0, :, 1:-1].diff(dim=-1, prepend=samples.sums[0, :, :1])
    # As densely as the cube root of the density, which is best for many levels (Panter and Dite, 1951).
    places = F.pad(((weight / distance) ** (1 / 3) * distance).cumsum(-1), (1, 0))
    shares = (torch.arange(n, device=places.device, dtype=places.dtype) + 0.5) / n
    at = torch.searchsorted(places, places[:, -1:] * shares).clamp_max(places.shape[-1] - 1)
    levels = samples.points.gather(-1, at)
    for _ in range(ROUNDS):
        weight, first, _ = samples.assigned(levels)
        levels = (first / weight.clamp_min(TINY)).where(weight > TINY, levels).sort(-1).values
    return levels


def _refined(samples: _Samples, powers: Tensor, start: Tensor, assigned: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The best coefficients [C, 4] on the way from a start, and their errors [C].

    Args:
        assigned: what is given to each level at first, as `_Samples.assigned` has it, if not what is nearest.
    """
    levels = start @ powers
    nearest = samples.assigned(levels)
    best, error = start, _error(levels, nearest)
    assigned = nearest if assigned is None else assigned
    products = (powers.unsqueeze(0) * powers.unsqueeze(1)).flatten(0, 1).T  # [n, 16]
    ridge = RIDGE * torch.eye(DEGREE + 1, device=powers.device, dtype=powers.dtype)
    for _ in range(ROUNDS):
        weight, first, _ = assigned
        normal = (weight @ products).unflatten(-1, ridge.shape) + ridge
        found = _in_order(torch.linalg.solve(normal, first @ powers.T), best, powers)
        levels = found @ powers
        assigned = samples.assigned(levels)
        best, error = _better(best, error, found, _error(levels, assigned))
    return best, error


def _in_order(found: Tensor, safe: Tensor, powers: Tensor) -> Tensor:
    """Coefficients whose levels rise: as found, or nearer to safe ones, or these."""
    for step in range(4):
        gaps = (found @ powers).diff(dim=-1)
        rises = gaps.amin(-1, keepdim=True) > LEAST_GAP * gaps.mean(-1, keepdim=True).abs()
        if rises.all():
            break
        found = found.where(rises, (found + safe) / 2 if step < 3 else safe)
    return found


def _better(a: Tensor, error_a: Tensor, b: Tensor, error_b: Tensor) -> tuple[Tensor, Tensor]:
    """Of each channel the coefficients that leave less."""
    return b.where((error_b < error_a).unsqueeze(-1), a), error_a.minimum(error_b)
