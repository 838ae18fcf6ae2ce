"""Coding latents: on a CPU by the native library, which finds codes and packs them at once, else by PyTorch."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..cache.codebook import Codebook
from ..cache.packing import PARTS, Widths, pack, plane_bytes
from .native_library import library
from .selection import decoding_backend


def codes_of(z: Tensor, codebook: Codebook, packed: bool = True) -> Tensor:
    """The codes of the levels nearest to latents [B, G, T, R], of which each head has levels of its own.

    Returns:
        Bytes [B, G, T, `widths.bytes`] as `eigenattn.cache.packing.pack` gives them, or codes [B, G, T, R] in uint8.
    """
    channels = None
    if not torch.compiler.is_compiling() and decoding_backend(z) == "native":
        channels = _channels(codebook.widths, packed)
    if channels is None:
        codes = codebook.quantise(z)
        return pack(codes, codebook.widths) if packed else codes
    found, _ = library()
    assert found is not None  # it was chosen
    z, thresholds = z.detach().float().contiguous(), codebook.all_thresholds
    out = torch.empty(*z.shape[:3], codebook.widths.bytes if packed else z.shape[3], dtype=torch.uint8)
    sizes = thresholds.shape[1], out.shape[3], torch.get_num_threads()
    found.eigenattn_pack(z.data_ptr(), *z.shape, channels.data_ptr(), thresholds.data_ptr(), *sizes, out.data_ptr())
    return out


@functools.cache
def _channels(widths: Widths, packed: bool) -> Tensor | None:
    """How the library finds and stores each channel's codes, `Channel` in native.cpp, [R, 10]; None if it cannot."""
    if any(len(PARTS[bits]) > 2 for bits, _ in widths.counts):
        return None
    rows: list[list[int]] = []
    stored = thresholds = 0
    for bits, count in widths.counts:
        planes, below = [], bits
        for part in PARTS[bits]:
            below -= part
            planes.append((stored, plane_bytes(count, part), part, below))
            stored += plane_bytes(count, part)
        for i in range(count):
            parts = [(start + i % size, i // size * part, low, 2**part - 1) for start, size, part, low in planes]
            if not packed:
                parts = [(len(rows), 0, 0, 255)]
            row = [bits, thresholds, *(x for part in parts for x in part)]
            rows.append(row + [0] * (10 - len(row)))
            thresholds += 2**bits - 1
    return torch.tensor(rows, dtype=torch.int32)
