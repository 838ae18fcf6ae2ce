"""Coding latents: on a CPU by the native library, which finds codes and packs them at once, else by PyTorch."""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache.codebook import Codebook
from ..cache.packing import Widths
from .matrices import as_rows
from .native_library import address, library, multiplies
from .selection import decoding_backend

FILLED = 32  # channels that an encoder is filled up to whole times of: two matrices, and whole vectors of any machine
PARTS = 3  # of bf16 that are a number in fp32


def codes_of(z: Tensor, codebook: Codebook) -> Tensor:
    """As `Codebook.encode`: the bytes [B, G, T, bytes] of latents [B, G, T, R]."""
    channels = _chosen(z, codebook.widths, levels=False)
    if channels is None:
        return codebook.encode(z)
    return codebook.encode(z.detach(), lambda z: _packed(z, codebook, channels))


class Encoder(NamedTuple):
    """How one side's vectors come into a latent.

    Args:
        matrix: of G/N latents of N heads each, [G/N, N * D, R] in fp32, R filled up with zeros.
        mean: what is taken from vectors first, [G/N, N * D] in fp32, or None.
        parts: where the processor multiplies matrices of bf16, the same as `as_rows` has it, of as many parts as are
            the whole; of_mean: and what the mean comes to, [G/N, R].
    """

    matrix: Tensor
    mean: Tensor | None
    parts: Tensor | None
    of_mean: Tensor | None

    @classmethod
    def of(cls, matrix: Tensor, mean: Tensor | None) -> Encoder:
        """From an encoder [G/N, R, N * D], and a mean [G/N, 1, N * D]."""
        parts = 1 if matrix.dtype == torch.bfloat16 else PARTS
        matrix = F.pad(matrix.detach().float().transpose(1, 2), (0, -matrix.shape[1] % FILLED)).contiguous()
        mean = None if mean is None else mean.detach().float().flatten(1).contiguous()
        if matrix.device.type != "cpu" or not multiplies():
            return cls(matrix, mean, None, None)
        of_mean = None if mean is None else (mean.double().unsqueeze(1) @ matrix.double()).squeeze(1).float()
        return cls(matrix, mean, as_rows(matrix, parts).contiguous(), of_mean)


def codes_of_vectors(vectors: Sequence[Tensor], encoders: Sequence[Encoder], codebook: Codebook) -> Tensor | None:
    """The bytes [B, G/N, T, bytes] of latents that vectors [B, G, T, D] of one or two sides come to, in fp32.

    None where the library does not do it: latents and then `codes_of` do.
    """
    channels = _chosen(vectors[0], codebook.widths, levels=False)
    if channels is None or any(x.dtype not in (torch.float32, torch.bfloat16) for x in vectors):
        return None
    found, _ = library()
    assert found is not None  # it was chosen
    vectors = [x.detach() if x.stride(-1) == 1 else x.detach().contiguous() for x in vectors]  # which live until then
    (batch, heads, tokens, size), latents = vectors[0].shape, len(encoders[0].matrix)
    sources = [
        struct.pack(
            "=10q", x.data_ptr(), *x.stride()[:3], x.dtype == torch.bfloat16, address(encoder.mean),
            encoder.matrix.data_ptr(), *_matrices(encoder, x), address(encoder.of_mean),
        )
        for x, encoder in zip(vectors, encoders, strict=True)
    ]  # fmt: skip
    widths, thresholds = codebook.widths, codebook.all_thresholds
    out = torch.empty(batch, latents, tokens, widths.bytes, dtype=torch.uint8)
    found.eigenattn_encode(
        b"".join(sources), len(sources), batch, latents, tokens, heads // latents, size, widths.channels,
        channels.data_ptr(), thresholds.data_ptr(), thresholds.shape[1], widths.of_codes, widths.scaled,
        torch.get_num_threads(), out.data_ptr(),
    )  # fmt: skip
    return out


def _matrices(encoder: Encoder, x: Tensor) -> tuple[int, int]:
    """Where the matrices are that vectors are to be multiplied by, and of how many parts; 0 for none."""
    if encoder.parts is None or x.dtype != torch.bfloat16:
        return 0, 0
    return encoder.parts.data_ptr(), encoder.parts.shape[1]


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
