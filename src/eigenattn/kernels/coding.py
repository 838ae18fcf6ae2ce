"""Coding latents: on a CPU by the native library, which finds codes and packs them at once, else by PyTorch."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..cache.codebook import Codebook
from ..cache.packing import PARTS, Widths, pack, plane_bytes, unpack
from .native_library import library
from .selection import decoding_backend


def codes_of(z: Tensor, codebook: Codebook) -> Tensor:
    """The codes of the levels nearest to latents [B, G, T, R], packed: [B, G, T, bytes]."""
    channels = _chosen(z, codebook.widths, levels=False)
    if channels is None:
        return pack(codebook.quantise(z), codebook.widths)
    found, _ = library()
    assert found is not None  # it was chosen
    z, thresholds = z.detach().float().contiguous(), codebook.all_thresholds
    out = torch.empty(*z.shape[:3], codebook.widths.bytes, dtype=torch.uint8)
    sizes = thresholds.shape[1], out.shape[3], torch.get_num_threads()
    found.eigenattn_pack(z.data_ptr(), *z.shape, channels.data_ptr(), thresholds.data_ptr(), *sizes, out.data_ptr())
    return out


def levels_of(rows: Tensor, codebook: Codebook) -> Tensor:
    """What packed codes [B, G, S, bytes] stand for, [B, G, S, R] in fp32."""
    channels = _chosen(rows, codebook.widths, levels=True)
    if channels is None:
        return codebook.dequantise(unpack(rows, codebook.widths))
    found, _ = library()
    assert found is not None  # it was chosen
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    levels = codebook.all_levels
    out = torch.empty(*rows.shape[:3], codebook.widths.channels)
    of_rows, of_levels = (*rows.shape, *rows.stride()[:3]), (levels.shape[1], torch.get_num_threads())
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
    """How the library finds and stores each channel's codes, `Channel` in native.cpp, [R, 10]; None if it cannot.

    Args:
        levels: it looks up levels, one more than there are thresholds.
    """
    if any(len(PARTS[bits]) > 2 for bits, _ in widths.counts):
        return None
    rows: list[list[int]] = []
    stored = looked_up = 0
    for bits, count in widths.counts:
        planes, below = [], bits
        for part in PARTS[bits]:
            below -= part
            planes.append((stored, plane_bytes(count, part), part, below))
            stored += plane_bytes(count, part)
        for i in range(count):
            parts = [(start + i % size, i // size * part, low, 2**part - 1) for start, size, part, low in planes]
            row = [bits, looked_up, *(x for part in parts for x in part)]
            rows.append(row + [0] * (10 - len(row)))
            looked_up += 2**bits - (not levels)
    return torch.tensor(rows, dtype=torch.int32)
