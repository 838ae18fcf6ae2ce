"""Coding latents: on a CPU by the native library, which finds codes and packs them at once, else by PyTorch."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..cache.codebook import Codebook
from ..cache.packing import Widths
from .native_library import library
from .selection import decoding_backend


def codes_of(z: Tensor, codebook: Codebook) -> Tensor:
    """As `Codebook.encode`: the bytes [B, G, T, bytes] of latents [B, G, T, R]."""
    channels = _chosen(z, codebook.widths, levels=False)
    if channels is None:
        return codebook.encode(z)
    return codebook.encode(z.detach(), lambda z: _packed(z, codebook, channels))


def _packed(z: Tensor, codebook: Codebook, channels: Tensor) -> Tensor:
    found, _ = library()
    assert found is not None  # it was chosen
    z, thresholds = z.float().contiguous(), codebook.all_thresholds
    out = torch.empty(*z.shape[:3], codebook.widths.of_codes, dtype=torch.uint8)
    sizes = thresholds.shape[1], out.shape[3], torch.get_num_threads()
    found.eigenattn_pack(z.data_ptr(), *z.shape, channels.data_ptr(), thresholds.data_ptr(), *sizes, out.data_ptr())
    return out


def levels_of(rows: Tensor, codebook: Codebook) -> Tensor:
    """As `Codebook.decode`: the latents [B, G, S, R] of bytes [B, G, S, bytes], in fp32; of all heads."""
    channels = _chosen(rows, codebook.widths, levels=True)
    if channels is None:
        return codebook.decode(rows)
    return codebook.decode(rows, lambda rows: _looked_up(rows, codebook, channels))


def _looked_up(rows: Tensor, codebook: Codebook, channels: Tensor) -> Tensor:
    found, _ = library()
    assert found is not None  # it was chosen
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    levels = codebook.all_levels
    out = torch.empty(*rows.shape[:3], codebook.widths.channels)
    of_rows = *rows.shape[:3], codebook.widths.of_codes, *rows.stride()[:3]
    of_levels = levels.shape[1], torch.get_num_threads()
    found.eigenattn_unpack(
        rows.data_ptr(), *of_rows, channels.data_ptr(), out.shape[3], levels.data_ptr(), *of_levels, out.data_ptr()
    )
    return out


def _chosen(x: Tensor, widths: Widths, levels: bool) -> Tensor | None:
    """What the library is told of the channels; None where PyTorch is to do it."""
    if torch.compiler.is_compiling() or decoding_backend(x) != "native":
        return None
    return _channels(widths, levels)


@functools.cache
def _channels(widths: Widths, levels: bool) -> Tensor | None:
    """How the library finds and stores each channel's codes, `Channel` in coding.cpp, [R, 10]; None if it cannot.

    Args:
        levels: it looks up levels, one more than there are thresholds.
    """
    rows: list[list[int]] = []
    looked_up = 0
    for bits, count, planes in widths.planes():
        if len(planes) > 2:
            return None
        for i in range(count):
            parts = [(*plane.at(i), plane.below, 2**plane.bits - 1) for plane in planes]
            row = [bits, looked_up, *(x for part in parts for x in part)]
            rows.append(row + [0] * (10 - len(row)))
            looked_up += 2**bits - (not levels)
    return torch.tensor(rows, dtype=torch.int32)
