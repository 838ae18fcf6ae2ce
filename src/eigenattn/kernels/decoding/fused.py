"""Decoding as one Triton kernel over splits of the sequence, and one that combines them.

A program takes one row's KV head, with its query heads, and one stretch of the sequence; the last program of each head
takes the exact window. For a block of tokens it loads latents once; with rotary positions it decodes keys, rotates them
and scores them in registers; values are summed as latents, and decoded once by the second kernel. The layout:

- `R_(n0 + i) = R_n0 R_i`: a table of `R_i`, the same for every block and kept in registers, turns keys, and the query
  is turned back by the position `n0` of the block's place 0, from that of the block before. The cosines of a key's own
  position would be D numbers to read or to compute, more than its latent holds; they are computed only in a block
  whose positions have a gap, for what they turn beyond the table.
- Query heads, padded to 16, are the rows of all products with latents. Keys that are decoded are the first operand
  instead, which tensor cores take from registers; their decoder stays in shared memory.
- 64 pairs of dimensions are decoded at a time: more would not fit in registers.
- Heads that share a latent have programs of their own, which find it in the cache of the GPU. One that keys and values
  share is loaded once.
- Ranks are cut in pieces of powers of two (80 = 64 + 32), for all extents of tensors are such.
- Packed codes are read in couples of channels that share bytes (`pieces.Couple`), and become numbers about as large
  by a polynomial of their channel, in 16 bits two at a time; the scale of a token multiplies scores and weights, or
  decoded keys; the rest of the quantiser is in decoder and mean (`folded.fold`).
- Strides are passed in units of the widest vector they allow: the compiler cannot see by itself that 72 is a multiple
  of 8.

How large blocks are was measured once, on an H200 (docs/decisions.md): tuning at run time compiled each layer's shape
fourteen times over.
"""

# Arguments of a kernel's launch are no `constexpr` yet, and a graph's list of tensors has no types of its own.
# pyright: reportArgumentType=false

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton import knobs

from ...cache.packing import Widths
from .arguments import Step
from .fused_kernels import combine, decode_splits
from .pieces import couples_of, pieces, pieces_of
from .programs import LARGEST_BLOCK, SHORTEST_SPLIT, programs_for, split_sequence

INTERPRETED = knobs.runtime.interpret
CUDA = not INTERPRETED and torch.version.hip is None
LEAST_BLOCK = 16  # what is interpreted: short tests shall have several blocks and splits


def _layout(x: Tensor) -> tuple[int, int, int, int]:
    """Strides of rows and of KV heads in units of the widest vector they allow, that vector, and the tokens' stride."""
    row, head, token, element = x.stride()
    assert element == 1
    widest = max(16 // x.element_size(), 1)
    vector = math.gcd(row, head, token, widest)
    return row // vector, head // vector, vector, token


@functools.cache
def _device(device: torch.device) -> tuple[int, float]:
    """Processors, and bytes of shared memory that a program may have."""
    if device.type != "cuda":
        return 8, math.inf
    index = torch.cuda.current_device() if device.index is None else device.index
    driver: Any = triton.runtime.driver.active
    found = driver.utils.get_device_properties(index)
    return found["multiprocessor_count"], found["max_shared_mem"]


class _Arguments(NamedTuple):
    """What the kernels are given: tensors, of which some may be missing, in the order in which a graph holds them.

    `q_small` [B, H, R_k] are queries in the keys' latent space.
    Decoders and means, and codes and numbers of packed latents, are folded (`Folded`).
    """

    q: Tensor
    q_small: Tensor | None
    far_keys: Tensor
    far_values: Tensor | None  # None: they come from the keys' latents
    key_decoder: Tensor | None
    key_mean: Tensor | None
    value_decoder: Tensor | None
    value_mean: Tensor | None
    key_codes: Tensor | None
    key_numbers: Tensor | None
    value_codes: Tensor | None
    value_numbers: Tensor | None
    first: Tensor
    length: Tensor
    positions: Tensor | None
    query: Tensor | None
    near_keys: Tensor | None
    near_values: Tensor | None
    near_column: Tensor | None
    near_stop: Tensor | None
    inverse_frequencies: Tensor | None
    cosines: Tensor | None
    sines: Tensor | None
    row_of_pair: Tensor | None
    slopes: Tensor | None
    sinks: Tensor | None
    mask: Tensor | None


def decode(step: Step) -> Tensor:
    """See `eigenattn.kernels.decoding.Step`."""
    step = step.gathered()
    q, rotary, window = step.q, step.rotary, step.window
    b, h, d = q.shape
    g = step.kv_heads
    compiling = torch.compiler.is_compiling()
    keys, values = step.keys.folded, step.values.folded
    q_small = None
    if rotary is None:
        grouped = q.view(b, g, h // g, d)
        q_small = q if keys.decoder is None else (grouped @ keys.decoder.transpose(-1, -2)).flatten(1, 2)

    def each_row(count: int | Tensor | None) -> Tensor:
        if isinstance(count, Tensor):
            return count.to(torch.int32).expand(b, *count.shape[1:])
        return step.memoised(
            ("rows", count, b), lambda: torch.full((b,), count or 0, dtype=torch.int32, device=q.device)
        )

    tables, near = (None, None, None, None), (None, None, None, None)
    if rotary is not None:
        # Half precision holds cosines better than bf16 holds the keys that they turn.
        dtype = torch.float16 if q.element_size() == 2 else torch.float32
        tables = rotary.inverse_frequencies.float(), *rotary.table(LARGEST_BLOCK, dtype), rotary.rows
    if window is not None:
        near = window.keys, window.values, each_row(window.column), each_row(window.stop)
    arguments = _Arguments(
        q,
        q_small,
        step.far_keys,
        None if step.keys.row == step.values.row else step.far_values,
        None if rotary is None else keys.decoder,
        keys.mean,
        values.decoder,
        values.mean,
        keys.codes,
        keys.numbers,
        values.codes,
        values.numbers,
        each_row(step.first),
        each_row(step.length),
        None if rotary is None else step.rotary_positions[0],
        None if rotary is None else each_row(step.query),
        *near,
        *tables,
        step.slopes,
        step.sinks,
        step.mask,
    )
    launch = torch.ops.eigenattn.decode_over_latents if compiling else _launch
    return launch(
        list(arguments),
        _numbers(step.keys.widths),
        _numbers(step.values.widths),
        step.scale,
        1.0 if rotary is None else rotary.scaling,
        step.softcap,
        rotary is not None and rotary.interleaved,
        g,
        step.size_out,
    )


def _launch(
    tensors: Sequence[Tensor | None],
    key_widths: Sequence[int],
    value_widths: Sequence[int],
    scale: float,
    scaling: float,
    softcap: float | None,
    interleaved: bool,
    g: int,
    size_out: int,
) -> Tensor:
    """Both kernels, for arguments that a graph can hold: `_Arguments`, and widths as `_numbers` has them."""
    x = _Arguments(*tensors)
    q = x.q.contiguous()
    b, h, d = q.shape
    rotates, windowed, joint = x.inverse_frequencies is not None, x.near_keys is not None, x.far_values is None
    q_small = q if x.q_small is None else x.q_small.contiguous()
    far_keys = _rows(x.far_keys)
    far_values = far_keys if x.far_values is None else _rows(x.far_values)
    near_keys, near_values, mask, positions = (
        None if each is None else _rows(each) for each in (x.near_keys, x.near_values, x.mask, x.positions)
    )
    rows = 1
    if positions is not None and positions.dim() == 3:
        positions, rows = positions.contiguous(), positions.shape[2]
    widths_k, widths_v = (_widths(found) for found in (key_widths, value_widths))
    processors, memory = _device(q.device)
    key_plan, value_plan = (
        pieces(far.shape[-1]) if widths is None else pieces_of(couples_of(widths))
        for far, widths in ((far_keys, widths_k), (far_values, widths_v))
    )
    rank_k, rank_v = (sum(piece.held for piece in plan) for plan in (key_plan, value_plan))
    programs, kept = programs_for(rotates, key_plan, value_plan, d, q.element_size(), memory)
    block = LEAST_BLOCK if INTERPRETED else programs.block
    if key_plan[0].parts or value_plan[0].parts:
        far_keys, far_values = (_at_least(block, each) for each in (far_keys, far_values))
    far, shared_k, shared_v = far_keys.shape[2], g // far_keys.shape[1], g // far_values.shape[1]
    shortest = LEAST_BLOCK if INTERPRETED else SHORTEST_SPLIT
    splits = split_sequence(far, b * g, processors * programs.together, shortest)
    partial = functools.partial(torch.empty, dtype=torch.float32, device=q.device)
    far_sums, near_sums = partial(b, h, splits, rank_v), partial(b, h, d if windowed else 0)
    tops, totals = partial(b, h, splits + 1), partial(b, h, splits + 1)
    layouts = [
        (0, 0, 1, 0) if each is None else _layout(each) for each in (far_keys, far_values, near_keys, near_values)
    ]
    mask_kind, mask_strides = 0, (0, 0)
    if mask is not None:
        mask_strides = tuple(mask.stride(i) if mask.shape[i] > 1 else 0 for i in (0, 1))
        mask_kind = (1 if mask.dtype == torch.bool else 2) + (2 if mask.shape[1] > 1 else 0)
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    kernel: Any = decode_splits  # a launch takes more than the kernel's signature says
    kernel[(b * g, splits + windowed)](
        q,
        q_small,
        x.slopes,
        far_keys,
        far_values,
        *map(_contiguous, (x.key_decoder, x.key_mean)),
        *map(_contiguous, (x.key_codes, x.key_numbers, x.value_codes, x.value_numbers)),
        near_keys,
        near_values,
        *map(_contiguous, (x.first, x.length)),
        positions,
        None if x.query is None else x.query.contiguous(),
        *map(_contiguous, (x.near_column, x.near_stop, x.inverse_frequencies, x.cosines, x.sines)),
        _contiguous(x.row_of_pair),
        mask,
        far_sums,
        near_sums,
        tops,
        totals,
        scale,
        scaling,
        softcap,
        splits,
        far,
        0 if near_keys is None else near_keys.shape[2],
        *mask_strides,
        0 if positions is None or len(positions) == 1 else positions.stride(0),
        *(stride for layout in layouts for stride in layout[:2]),
        *(layout[2] for layout in layouts),
        *(layout[3] for layout in layouts),
        H=h,
        G=g,
        SHARED_K=shared_k,
        SHARED_V=shared_v,
        D=d,
        SIZE_Q=q_small.shape[-1],
        RANK=rank_k,
        RANK_V=rank_v,
        KEY_PLAN=tuple(map(tuple, key_plan)),
        VALUE_PLAN=tuple(map(tuple, value_plan)),
        NEAR_PLAN=tuple(map(tuple, pieces(d))),
        KEY_SCALE=-1 if widths_k is None else widths_k.scale_at,
        VALUE_SCALE=-1 if widths_v is None else widths_v.scale_at,
        PAIRS=0 if x.inverse_frequencies is None else x.inverse_frequencies.numel(),
        INTERLEAVED=interleaved,
        MASK=mask_kind,
        UPCAST=INTERPRETED and q.dtype == torch.bfloat16,
        JOINT=joint,
        BLOCK=block,
        KEEP=kept,
        ROWS=rows,
        PACKED=CUDA and q.element_size() == 2,  # arithmetic on two numbers at once is PTX
        num_warps=programs.warps,
        num_stages=programs.stages,
        **({"maxnreg": programs.registers} if CUDA and programs.registers else {}),
    )
    out = torch.empty(b, h, size_out, dtype=q.dtype, device=q.device)
    combine[(b * h,)](
        far_sums,
        near_sums,
        tops,
        totals,
        _contiguous(x.value_decoder),
        _contiguous(x.value_mean),
        _contiguous(x.sinks),
        out,
        splits,
        H=h,
        GROUP=h // g,
        RANK=rank_v,
        SIZE_OUT=size_out,
        SPLITS=triton.next_power_of_2(splits),
        PARTS=64 if splits <= 32 else 32,
        OUT=triton.next_power_of_2(size_out),
        NEAR=windowed,
    )
    return out


def _numbers(widths: Widths | None) -> list[int]:
    """Widths as a graph can hold them: whether they are scaled, bits, channels, bits, channels."""
    return [] if widths is None else [int(widths.scaled), *(number for pair in widths.counts for number in pair)]


def _widths(found: Sequence[int]) -> Widths | None:
    return Widths(tuple(zip(found[1::2], found[2::2], strict=True)), bool(found[0])) if found else None


# One node in a graph: it does not break there, and CUDA graphs record the kernels in it as they run.
_operator = torch.library.custom_op("eigenattn::decode_over_latents", _launch, mutates_args=())


@_operator.register_fake
def _shape_of_output(tensors: Sequence[Tensor | None], *arguments: Any) -> Tensor:
    q = _Arguments(*tensors).q
    return q.new_empty(*q.shape[:2], arguments[-1])


def _at_least(tokens: int, x: Tensor) -> Tensor:
    """The tensor itself if it has room for so many tokens, else with more."""
    missing = tokens - x.shape[2]
    return F.pad(x, (0, 0, 0, missing)) if missing > 0 else x


def _rows(x: Tensor) -> Tensor:
    """The tensor itself if a token's elements lie together, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return x if x is None else x.contiguous()
