"""Decoding on a CPU by a kernel of its own: `native/decoding.cpp`, which says how it goes about it.

What it cannot do is left to PyTorch's operations, and is said in one place, `why_not`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...cache.codebook import Codebook, level_table
from ...cache.packing import PARTS, Widths
from ...errors import EigenAttnError
from ..matrices import DEPTH, as_columns, as_rows
from ..native_library import address, library, multiplies, unavailable
from .arguments import Rotary, Side, Step

# What rows may hold; bytes are codes.
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}
# Where the machine multiplies matrices of bf16: dtypes of queries and rows for which all of a step is such products;
# and dimensions of a head from which on they decode the keys of others (chosen: of 64 they are no faster than vectors,
# see docs/decisions.md).
MATRICES = (torch.bfloat16, torch.uint8)
MULTIPLIED = 128
LARGEST_BYTES = 2**15  # of a row of codes, the places in which the kernel counts in 16 bits
MOST_ROWS = 4  # of positions, as in arguments.h


class _Tensors(NamedTuple):
    """What the kernel is given, in the order in which a graph holds them; counts that are numbers are not here."""

    q: Tensor
    far_keys: Tensor
    far_values: Tensor
    key_decoder: Tensor | None
    key_mean: Tensor | None
    key_levels: Tensor | None
    key_plan: Tensor | None
    value_decoder: Tensor | None
    value_mean: Tensor | None
    value_levels: Tensor | None
    value_plan: Tensor | None
    near_keys: Tensor | None
    near_values: Tensor | None
    first: Tensor | None
    length: Tensor | None
    column: Tensor | None
    stop: Tensor | None
    query: Tensor | None
    positions: Tensor | None
    order: Tensor | None
    table: Tensor | None
    frequencies: Tensor | None
    identity: Tensor | None
    row_of_pair: Tensor | None
    slopes: Tensor | None
    sinks: Tensor | None
    mask: Tensor | None
    far_pages: Tensor | None
    near_pages: Tensor | None


def why_not(step: Step) -> str | None:
    """Why a step is not for the native kernel; None if it is."""
    tensors = [step.q, *step.rows, *(() if step.window is None else (step.window.keys, step.window.values))]
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return "it runs on a CPU"
        if tensor.dtype not in KINDS:
            return "it reads float32, bfloat16 and codes"
    tables = step.table, None if step.window is None else step.window.table
    if any(table is not None and table.dtype != torch.int32 for table in tables):
        return "tables of pages are int32"
    if step.columns is not None:
        return "it does not decode where tokens were evicted"
    if step.mask is not None and step.mask.dtype != torch.bool and not step.mask.is_floating_point():
        return "masks are boolean or floating-point"
    if step.rotary is not None and step.rotary.rows is not None and step.rotary_positions[0].shape[-1] > MOST_ROWS:
        return f"positions have {MOST_ROWS} rows at most"
    for side in (step.keys, step.values):
        reason = side._once("native declines", lambda side=side: _why_not_codes(side.widths))
        if reason is not None:
            return reason
    return unavailable()


def _why_not_codes(widths: Widths | None) -> str | None:
    if widths is None:
        return None
    if widths.bytes > LARGEST_BYTES:
        return f"rows of codes have {LARGEST_BYTES} bytes at most"
    if any(len(PARTS[bits]) > 2 for bits, _ in widths.counts):
        return "codes lie in two parts at most"
    return None


def decode(step: Step) -> Tensor:
    """See `eigenattn.kernels.decoding.Step`; of a step that `why_not` has nothing to say of."""
    rotary, window, mask = step.rotary, step.window, step.mask
    exact = () if window is None else (window.keys, window.values)
    matrices = multiplies() and all(x.dtype in MATRICES for x in (step.q, *step.rows, *exact))
    counts = [
        step.first,
        step.length,
        None if window is None else window.column,
        None if window is None else window.stop,
        None if rotary is None else step.query,
    ]
    tensors: list[Tensor | None] = [  # `_Tensors`
        step.q,
        step.far_keys,
        step.far_values,
        *_prepared(step.keys, rotary, "keys", matrices),
        *_prepared(step.values, None, "values", matrices),
        None if window is None else window.keys,
        None if window is None else window.values,
        *(count if isinstance(count, Tensor) else None for count in counts),
        None if rotary is None else step.positions,
        *((None,) * 5 if rotary is None else _turning(rotary, step.q.shape[-1], matrices)),
        *(None if x is None else x.float().contiguous() for x in (step.slopes, step.sinks)),
        mask if mask is None or mask.dtype == torch.bool else mask.float(),
        step.table,
        None if window is None else window.table,
    ]
    launch = torch.ops.eigenattn.decode_natively if torch.compiler.is_compiling() else _launch
    return launch(
        tensors,
        [count if isinstance(count, int) else 0 for count in counts],
        [
            *(step.rows[s.row].shape[-1] if s.widths is None else s.widths.channels for s in (step.keys, step.values)),
            *(-1 if s.widths is None else s.widths.scale_at for s in (step.keys, step.values)),
            step.kv_heads,
            step.size_out,
            int(matrices),
        ],
        [1.0 if rotary is None else rotary.scaling, step.scale, step.softcap or 0.0],
    )


def _launch(
    tensors: Sequence[Tensor | None], counts: Sequence[int], sizes: Sequence[int], scales: Sequence[float]
) -> Tensor:
    """The kernel, for arguments that a graph can hold: `_Tensors`, numbers in the place of counts, and the rest."""
    x = _Tensors._make(tensors)
    found, about = library()
    if found is None:
        raise EigenAttnError(about)
    rank_k, rank_v, *places, g, size_out, matrices = sizes
    q, mask, positions = x.q, x.mask, x.positions
    if q.stride(-1) != 1:
        q = q.contiguous()
    b, h, d = q.shape
    out = torch.empty(b, h, size_out, dtype=q.dtype)
    # Copies, where there are any, live until the kernel has run.
    far_keys, far_values, near_keys, near_values = (
        x if x is None or x.stride(-1) == 1 else x.contiguous()
        for x in (x.far_keys, x.far_values, x.near_keys, x.near_values)
    )
    mask = mask if mask is None or mask.stride(-1) == 1 else mask.contiguous()
    of_rows, of_heads, _ = q.stride()
    # As `Arguments` in arguments.h has them, all of 8 bytes.
    arguments = _ARGUMENTS.pack(
        b, h, g, d, size_out, _tokens(x.far_keys, x.far_pages), torch.get_num_threads(),
        q.data_ptr(), of_rows, of_heads, 0, KINDS[q.dtype], 1,
        *_layout(near_keys, g),
        *_layout(near_values, g),
        *_layout(far_keys, g),
        rank_k, address(x.key_decoder), address(x.key_mean), address(x.key_levels),
        0 if matrices else _matrices(x.key_decoder), _of_levels(x.key_levels),
        x.far_keys.shape[-1], address(x.key_plan), places[0],
        *_layout(far_values, g),
        rank_v, address(x.value_decoder), address(x.value_mean), address(x.value_levels), 0, _of_levels(x.value_levels),
        x.far_values.shape[-1], address(x.value_plan), places[1],
        0 if near_keys is None else _tokens(near_keys, x.near_pages),
        *_count(x.first, counts[0]),
        *_count(x.length, counts[1]),
        *_count(x.column, counts[2]),
        *_count(x.stop, counts[3]),
        *_count(x.query, counts[4]),
        *((0, 0, 0, 0) if positions is None else (positions.data_ptr(), positions.stride(1), positions.itemsize, 0)),
        0 if positions is None or len(positions) == 1 else positions.stride(0),
        0 if x.order is None else len(x.order) // 2,
        address(x.order), address(x.table), address(x.frequencies), matrices, address(x.identity),
        *scales,
        address(x.slopes), address(x.sinks), address(mask), *((0, 0, 0) if mask is None else _mask_layout(mask)),
        out.data_ptr(), KINDS[out.dtype],
        *_pages(x.far_pages, x.far_keys),
        *_pages(x.near_pages, x.near_keys),
        address(x.row_of_pair), *_rows_of_positions(positions, x.query),
    )  # fmt: skip
    found.eigenattn_decode(arguments)
    return out


_ARGUMENTS = struct.Struct("=7q6q12q30q1q24q2q5q3d6q2q6q4q")


# One node in a graph, which does not break there.
_operator = torch.library.custom_op("eigenattn::decode_natively", _launch, mutates_args=())


@_operator.register_fake
def _shape_of_output(tensors: Sequence[Tensor | None], counts: Any, sizes: Sequence[int], scales: Any) -> Tensor:
    q = _Tensors._make(tensors).q
    return q.new_empty(*q.shape[:2], sizes[-2])


def _matrices(decoder: Tensor | None) -> int:
    """How many matrices of bf16 a decoder of keys is by `as_rows`; 0 if it is none."""
    return decoder.shape[1] if decoder is not None and decoder.dtype == torch.bfloat16 else 0


def _of_levels(levels: Tensor | None) -> int:
    """Numbers of each head's."""
    return 0 if levels is None else levels[0].numel()


def _layout(x: Tensor | None, g: int) -> tuple[int, ...]:
    """Where rows [B, G/N, S, R] lie, what they hold, and how many heads share one."""
    if x is None:
        return 0, 0, 0, 0, 0, 1
    return x.data_ptr(), *x.stride()[:3], KINDS[x.dtype], g // x.shape[1]


def _tokens(rows: Tensor, table: Tensor | None) -> int:
    """Tokens that a row may have."""
    return rows.shape[2] if table is None else table.shape[1] * rows.shape[2]


def _pages(table: Tensor | None, pages: Tensor | None) -> tuple[int, int, int]:
    """Where the table lies, the stride of its rows, and the tokens of a page."""
    return (0, 0, 1) if table is None or pages is None else (table.data_ptr(), table.stride(0), pages.shape[2])


def _mask_layout(mask: Tensor) -> tuple[int, int, int]:
    """Strides of rows and heads, and whether it is boolean, 1, or additive, 2."""
    strides = [mask.stride(i) if mask.shape[i] > 1 else 0 for i in (0, 1)]
    return strides[0], strides[1], 1 if mask.dtype == torch.bool else 2


def _rows_of_positions(positions: Tensor | None, query: Tensor | None) -> tuple[int, int, int]:
    """How many, and the ways from one to the next of columns, and of the query."""
    if positions is None or query is None or positions.dim() == 2:
        return 1, 0, 0
    return positions.shape[2], positions.stride(2), query.stride(1)


def _count(tensor: Tensor | None, number: int) -> tuple[int, int, int, int]:
    if tensor is None:
        return 0, 0, 0, number
    return tensor.data_ptr(), tensor.stride(0) if tensor.dim() and len(tensor) > 1 else 0, tensor.itemsize, 0


@torch.compiler.assume_constant_result
def _block() -> int:
    """Tokens that the kernel takes at a time."""
    found, _ = library()
    return 1 if found is None else found.eigenattn_block()


@torch.compiler.assume_constant_result
def _lanes() -> int:
    """Numbers in a vector of this machine."""
    found, _ = library()
    return 1 if found is None else found.eigenattn_lanes()


def _prepared(
    side: Side, rotary: Rotary | None, of: Literal["keys", "values"], matrices: bool
) -> tuple[Tensor | None, ...]:
    """Decoder, mean, levels and plan of codes as the kernel reads them; kept.

    Decoders are [G, R, size] in fp32, of keys that rotate with their dimensions as pairs lie, and in matrices where
    these are multiplied; of other keys, which the query is brought to, [G, D, R] with R filled up to whole vectors.
    """
    turned = (0, False) if rotary is None else (rotary.width, rotary.interleaved)
    return side._once(("native", of, matrices, *turned), lambda: _prepare(side, rotary, of, matrices))


def _prepare(
    side: Side, rotary: Rotary | None, of: Literal["keys", "values"], matrices: bool
) -> tuple[Tensor | None, ...]:
    decoder, mean = (None if x is None else x.detach().float() for x in (side.decoder, side.mean))
    if rotary is not None:
        decoder, mean = (None if x is None else _as_pairs(x, rotary) for x in (decoder, mean))
        if decoder is not None and matrices:
            decoder = as_columns(decoder)
        elif decoder is not None and decoder.shape[-1] >= MULTIPLIED and multiplies():
            decoder = as_rows(
                decoder, parts=1 if side.decoder is not None and side.decoder.dtype == torch.bfloat16 else 2
            )
    elif of == "keys" and decoder is not None:
        decoder = _filled(decoder.transpose(1, 2))
    levels, plan = None, None
    if side.widths is not None and matrices:
        levels, plan = _tables(side.codebook), channels_of(side.widths)
    elif side.widths is not None:
        levels = _filled(side.codebook.of_codes[:, :, 0].transpose(0, 1))  # [G, 4, R]
        plan = plan_of(side.widths, _lanes())
    return tuple(None if x is None else x.contiguous() for x in (decoder, mean, levels, plan))


def _filled(x: Tensor) -> Tensor:
    """The last dimension filled up with zeros to whole vectors."""
    return F.pad(x, (0, -x.shape[-1] % _lanes()))


def order_of(rotary: Rotary, size: int, lanes: int) -> list[int]:
    """Which of `size` dimensions lies where, -1 for none: of each vector of pairs the first ones, then the second ones.

    Dimensions that do not rotate are pairs too, behind the others.
    """
    dims = list(range(size))
    rest = dims[rotary.width :]
    half = -(-len(rest) // 2)
    first, second = (dims[part] for part in rotary.pairs())
    first, second = first + rest[:half], second + rest[half:] + [-1] * (2 * half - len(rest))
    first, second = (x + [-1] * (-len(x) % lanes) for x in (first, second))
    return [dim for i in range(0, len(first), lanes) for dim in (*first[i : i + lanes], *second[i : i + lanes])]


def _as_pairs(x: Tensor, rotary: Rotary) -> Tensor:
    """x [..., D] in the order of pairs, with zeros where no dimension lies."""
    order = order_of(rotary, x.shape[-1], _lanes())
    return F.pad(x, (0, 1))[..., torch.tensor(order)]


def _tables(codebook: Codebook) -> Tensor:
    """What codes stand for in bf16: of each head and channel its levels, filled up to whole tables of 32, [G, sum]."""
    found = []
    for bits, levels in codebook.widths.split(codebook.levels.float(), dim=1):
        tables = level_table(levels, bits).bfloat16()
        found.append(F.pad(tables, (0, -tables.shape[-1] % DEPTH)).flatten(1))
    return torch.cat(found, dim=1)


def channels_of(widths: Widths) -> Tensor:
    """Where each channel's codes lie in a row and in tables of levels: `Channel` in matrices_task.h, [R, 9]."""
    rows, table = [], 0
    for bits, count, planes in widths.planes():
        tables = -(-(2**bits) // DEPTH)
        for i in range(count):
            parts = []
            for plane in planes:
                place, shift = plane.at(i)
                mask = 2**plane.bits - 1 << plane.below
                turn = (8 * (place % 2) + shift - plane.below) % 16
                parts += [place // 2, turn | turn << 16, mask | mask << 16]
            rows.append([*parts, *[0] * (6 - len(parts)), table, tables, count - i])
            table += tables
    return torch.tensor(rows, dtype=torch.int32)


def _turning(rotary: Rotary, size: int, matrices: bool) -> tuple[Tensor | None, ...]:
    """The order of pairs, the table of a block's rotations, radians with those of a whole block, of matrices the
    decoder of keys that have none, and of positions in rows which one each pair turns by; kept."""
    key = ("native", size, matrices)
    if key not in rotary._tables:
        order, lanes = order_of(rotary, size, _lanes()), _lanes()
        frequencies = torch.zeros(len(order) // 2, dtype=torch.float64)
        frequencies[: rotary.width // 2] = rotary.inverse_frequencies.double()
        angles = torch.arange(_block() + 1, dtype=torch.float64).unsqueeze(-1) * frequencies
        turns = angles[:-1].cos(), angles[:-1].sin()
        if matrices:
            table, identity = torch.stack([turn.T for turn in turns], dim=1), _as_pairs(torch.eye(size), rotary)
            identity = as_columns(identity.unsqueeze(0)).contiguous()
        else:
            table, identity = torch.stack([turn.unflatten(-1, (-1, lanes)) for turn in turns], dim=2), None
        of_block = torch.stack([frequencies, angles[-1].cos(), angles[-1].sin()])
        rows = None
        if rotary.rows is not None:
            rows = torch.zeros(len(frequencies), dtype=torch.int32)
            rows[: rotary.width // 2] = rotary.rows
        order = torch.tensor(order, dtype=torch.int32)
        rotary._tables[key] = order, table.float().contiguous(), of_block, identity, rows
    return rotary._tables[key]


def plan_of(widths: Widths, lanes: int) -> Tensor:
    """Where each channel's code lies in a row, and how it comes out: `Codes` in vectors_task.h, [vectors, 6, lanes]."""
    channels: list[tuple[int, int, int, int, int, int]] = []  # bytes, shifts and masks of both parts
    for _, count, planes in widths.planes():
        for i in range(count):
            found = [(*plane.at(i), 2**plane.bits - 1 << plane.below, plane.below) for plane in planes]
            place, shift, mask, _ = found[-1]
            upper = found[0] if len(found) > 1 else (place, 0, 0, 0)
            channels.append((place, shift, mask, upper[0], 16 + upper[1] - upper[3], upper[2]))
    vectors = []
    for i in range(0, len(channels), lanes):
        some = channels[i : i + lanes]
        some += [(some[0][0], 0, 0, some[0][0], 16, 0)] * (lanes - len(some))
        base = min(min(x[0], x[3]) for x in some)
        near = max(max(x[0], x[3]) for x in some) - base < 64
        rows = [[x[0] - base | x[3] - base << 16 for x in some], *([x[j] for x in some] for j in (1, 2, 4, 5))]
        whole = not any(x[5] for x in some)
        vectors.append([*rows, [base, int(near), int(whole)] + [0] * (lanes - 3)])
    return torch.tensor(vectors, dtype=torch.int32)
