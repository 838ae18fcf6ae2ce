"""One step of attention: over latents, and over full-rank keys and values by the best there is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..cache.codebook import UNIT_SCALE
from ..cache.context import CacheContext
from ..cache.layout import SIDES, Latent, Layout
from ..cache.packing import Widths
from ..compression.checks import check_sharing
from ..config import Sharing
from ..errors import EigenAttnError
from ..kernels.decoding import Rotary, Side, Step, Window, decode
from ..kernels.native_library import unavailable
from ..kernels.selection import HAS_TRITON
from ..models.loading import dtype_of
from .timing import copy_bandwidth, device_of, in_turns, machine, peak_arithmetic, recorded

SDPA = {
    "sdpa, FlashAttention": SDPBackend.FLASH_ATTENTION,
    "sdpa, cuDNN": SDPBackend.CUDNN_ATTENTION,
    "sdpa, memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def _sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend | None = None) -> Tensor:
    if backend is None:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def baselines(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Full-rank attention of one query a row [B, H, 1, D] over keys and values [B, G, S, D], where it runs at all."""
    found: dict[str, Callable[[], Tensor]] = {"sdpa": lambda: _sdpa(q, k, v)}
    if q.is_cuda:
        from torch.nn.attention.flex_attention import flex_attention

        compiled = torch.compile(flex_attention)
        found = {name: lambda backend=backend: _sdpa(q, k, v, backend) for name, backend in SDPA.items()}
        found["FlexAttention"] = lambda: compiled(q, k, v, enable_gqa=True)
    usable = {}
    for name, function in found.items():
        try:
            function()
        except RuntimeError:  # not built, or not for this dtype, size or GPU
            continue
        usable[name] = function
    return usable


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """How large a step of decoding is: by default 16 rows of Llama 3 8B.

    Args:
        batch, heads, kv_heads, head_dim, length: B, H, G, D and S.
        window: exact tokens, of the S; 0 for none.

    Raises:
        EigenAttnError: on sizes that do not fit.
    """

    batch: int = 16
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    length: int = 8192
    window: int = 32

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads or not 0 <= self.window < self.length:
            raise EigenAttnError("KV heads must divide the heads, and the window must be shorter than the text.")


def widths_of(bits: float, head_dim: int) -> Widths:
    """Channels of 6, 4 and 2 bits as transform coding shares out so many an original element, scales' byte included.

    Raises:
        EigenAttnError: if they are too few, or more than codes can use.
    """
    six, two = head_dim // 64 * 4, head_dim // 4
    four = int((bits * head_dim - 8 - 6 * six - 2 * two) // 4)
    if not 0 <= four <= head_dim - six - two:
        raise EigenAttnError(f"{bits:g} bits an element are not measured: choose between 1 and 3.5.")
    return Widths.of({6: six, 4: four, 2: two}, scaled=True)


def layouts(
    shape: StepShape, ranks: Sequence[tuple[int, int]], bits: float | None, share: Sequence[str]
) -> dict[str, Layout]:
    """What is attended to, by the name of it; arguments as for `benchmark_kernel`.

    Raises:
        EigenAttnError: on what does not fit the shape.
    """
    d, found = shape.head_dim, {}
    if any(not 0 < rank <= d for pair in ranks for rank in pair):
        raise EigenAttnError(f"ranks must lie between 1 and the head dimension, {d}.")
    for sharing in (Sharing(), *map(Sharing.of, share)):
        check_sharing(shape.kv_heads, sharing)
        for pair in ranks:
            rank: dict[str, int] = dict(zip(SIDES, pair, strict=True))
            name = f"({pair[0]}, {pair[1]})" + ("" if sharing == Sharing() else f", share {sharing}")
            found[name] = [Latent(s, n, n * sum(rank[side] for side in s), d) for s, n in sharing.kinds]
    if bits is not None:
        widths = widths_of(bits, d)
        found[f"{bits:g} bits"] = [Latent((side,), 1, widths.channels, d, widths) for side in SIDES]
    return {name: Layout(shape.kv_heads, tuple(latents), shape.window) for name, latents in found.items()}


def operations(shape: StepShape, layout: Layout, rotary: bool) -> int:
    """Additions and multiplications of a step that nothing can leave out: products alone, without rotations.

    Args:
        rotary: whether keys are decoded, rather than queries encoded.
    """
    far, heads, d = shape.length - shape.window, shape.heads, shape.head_dim
    keys, values = (layout.of(side).rank for side in SIDES)
    scores = shape.kv_heads * keys * d + heads * d if rotary else heads * keys
    return 2 * shape.batch * (far * (scores + heads * values) + 2 * shape.window * heads * d)


class Inputs:
    """Random tensors of a step, on a device and in a dtype."""

    def __init__(self, shape: StepShape, device: torch.device, dtype: torch.dtype) -> None:
        self.shape, self.device, self.dtype = shape, device, dtype
        torch.manual_seed(0)
        self.q = self.normal(shape.batch, shape.heads, shape.head_dim)
        self.k, self.v = (self.normal(shape.batch, shape.kv_heads, shape.length, shape.head_dim) for _ in SIDES)
        exponents = torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim
        self.rotary = Rotary(10000.0**-exponents)
        self.positions = torch.arange(shape.length, device=device).expand(shape.batch, -1)

    def normal(self, *size: int) -> Tensor:
        """Elements of a normal distribution."""
        return torch.randn(*size, device=self.device, dtype=self.dtype)

    def step(self, layout: Layout) -> Step:
        """A step over latents, without rotary positions, as a model with a dynamic cache asks for it."""
        shape = self.shape
        far = shape.length - shape.window
        rows = []
        for latent in layout.latents:
            size = shape.batch, layout.count(latent), far, latent.elements
            if latent.widths is None:
                rows.append(self.normal(*size))
            else:
                rows.append(torch.randint(256, size, device=self.device, dtype=torch.uint8))
                rows[-1][..., latent.widths.of_codes :] = UNIT_SCALE
        return Step(
            q=self.q,
            rows=tuple(rows),
            keys=self._side(layout, "key"),
            values=self._side(layout, "value"),
            scale=shape.head_dim**-0.5,
            length=far,
            positions=self.positions,
            query=self.positions[:, -1],
            window=Window(self.k[:, :, far:], self.v[:, :, far:], far, shape.length) if shape.window else None,
            memoised=CacheContext().memoised,
        )

    def _side(self, layout: Layout, name: str) -> Side:
        latent, levels = layout.of(name), None
        if latent.widths is not None:
            scale = torch.rand(layout.count(latent), latent.rank, device=self.device)
            # A little further apart at the ends than in the middle.
            levels = scale.unsqueeze(-1) * torch.tensor([0, 1, 0, 1e-4], device=self.device)
        decoder = self.normal(layout.kv_heads, latent.rank, layout.head_dim)
        mean = self.normal(layout.kv_heads, layout.head_dim)
        return Side(layout.index(name), decoder, mean, latent.widths, levels)


def benchmark_kernel(
    shape: StepShape,
    *,
    ranks: Sequence[tuple[int, int]],
    bits: float | None = None,
    share: Sequence[str] = (),
    rounds: int = 50,
    label: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Time one step of decoding in one layer, with rotary positions and without, at some ranks.

    It is what models run, in a layer that is not the first of a pass: that one computes the rotations for all.

    Args:
        shape: how large it is.
        ranks: pairs (R_k, R_v).
        bits: of an original element; adds rows for coded latents, in 6, 4 and 2 bits.
        share: adds rows for latents that are shared (`eigenattn.config.Sharing`), of the same bytes.
        rounds: timings of each, of which the median counts.
        label: names what was measured, in the file of results.

    Returns:
        What was measured, on which machine, the baselines, and rows that say for each kernel its seconds, the bytes it
        has to read, the share of the bandwidth of copying that is, the share of the arithmetic of products of matrices
        that it does, and its speed against the best baseline.

    Raises:
        EigenAttnError: on sizes that do not fit or an unknown device or dtype.
    """
    where = device_of(device)
    name = dtype or ("bfloat16" if where.type == "cuda" else "float32")
    stored = dtype_of(name)
    cases = layouts(shape, ranks, bits, share)
    inputs = Inputs(shape, where, stored)
    functions = baselines(inputs.q.unsqueeze(2), inputs.k, inputs.v)
    full = list(functions)
    bytes_of = dict.fromkeys(full, inputs.k.nbytes + inputs.v.nbytes)
    exactly = Layout.full(shape.kv_heads, shape.head_dim)
    operations_of = dict.fromkeys(full, operations(shape, exactly, rotary=False))
    fused = where.type == "cuda" and HAS_TRITON
    # PyTorch decodes all keys at once, which must fit.
    kernels = [
        *(["torch"] if not fused or shape.batch * shape.length <= 2**18 else []),
        *(["triton"] if fused else []),
        *(["native"] if where.type == "cpu" and unavailable() is None else []),
    ]
    far, element = shape.length - shape.window, stored.itemsize
    for case, layout in cases.items():
        plain = inputs.step(layout)
        for positions, step in (("none", plain), ("rotary", dataclasses.replace(plain, rotary=inputs.rotary))):
            for kernel in kernels:
                row = f"{kernel}, {positions}, {case}"
                functions[row] = lambda step=step, kernel=kernel: decode(step, kernel)
                exact = shape.window * layout.original_elements * element
                bytes_of[row] = shape.batch * (far * layout.bytes_per_token(element) + exact)
                operations_of[row] = operations(shape, layout, positions == "rotary")
    with torch.no_grad():
        bandwidth, peak = copy_bandwidth(where, rounds), peak_arithmetic(where, stored, rounds)
        taken = in_turns({name: recorded(function, where) for name, function in functions.items()}, where, rounds)
    best = min(full, key=taken.__getitem__)
    return {
        "kind": "kernel",
        **({} if label is None else {"model": label}),
        **machine(where),
        "shape": dataclasses.asdict(shape) | {"dtype": name},
        "ranks": [list(pair) for pair in ranks],
        "bits": bits,
        "share": list(share),
        "rounds": rounds,
        "copy_bandwidth": bandwidth,
        "peak_arithmetic": peak,
        "best_baseline": best,
        "rows": [
            {
                "name": row,
                "seconds": seconds,
                "bytes": bytes_of[row],
                "bandwidth_share": bytes_of[row] / seconds / bandwidth,
                "arithmetic_share": operations_of[row] / seconds / peak,
                "speed_against_best": taken[best] / seconds,
            }
            for row, seconds in taken.items()
        ],
    }
