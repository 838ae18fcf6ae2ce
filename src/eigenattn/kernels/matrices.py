"""How the native library takes what it multiplies by: matrices of bf16, as a processor's registers hold them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS, DEPTH = 16, 32  # of a matrix


def as_columns(decoder: Tensor) -> Tensor:
    """Decoders [G, R, size] in fp32 as matrices_task.h takes them, in bf16: [G, size / 16, chunks, 16, 32].

    Channels come in chunks of 32.
    """
    filled = F.pad(decoder.bfloat16(), (0, 0, 0, -decoder.shape[1] % DEPTH)).transpose(1, 2)
    return filled.unflatten(2, (-1, DEPTH)).unflatten(1, (-1, ROWS)).transpose(2, 3)


def as_rows(matrix: Tensor, parts: int) -> Tensor:
    """Maps [G, R, size] in fp32 as `multiply` in matrices.h takes them: [G, parts, chunks, size / 16, 16, 16, 2].

    The parts are their roundings to bf16, what these leave, and so on. R comes in chunks of 32, of which rows of a
    matrix hold pairs.
    """
    found: list[Tensor] = []
    for _ in range(parts):
        found.append(matrix.bfloat16())
        matrix = matrix - found[-1].float()
    filled = F.pad(torch.stack(found, dim=1), (0, 0, 0, -matrix.shape[1] % DEPTH))
    return filled.unflatten(2, (-1, ROWS, 2)).unflatten(-1, (-1, ROWS)).permute(0, 1, 2, 5, 3, 6, 4)
