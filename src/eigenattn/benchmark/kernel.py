"""One step of attention: over latents, and over full-rank keys and values by the best there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..cache.packing import Widths
from ..errors import EigenAttnError
from ..kernels.decoding import Near, Rotary, Side, decode
from ..kernels.selection import HAS_TRITON
from ..models.loading import DTYPES
from .timing import copy_bandwidth, device_of, in_turns, machine, recorded

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


def widths_of(bits: float, head_dim: int) -> Widths:
    """Channels of 6, 4 and 2 bits as transform coding shares out so many an original element, about.

    Raises:
        EigenAttnError: if they are too few, or more than codes can use.
    """
    six, two = head_dim // 64 * 4, head_dim // 4
    four = int((bits * head_dim - 6 * six - 2 * two) // 4)
    if not 0 <= four <= head_dim - six - two:
        raise EigenAttnError(f"{bits:g} bits an element are not measured: choose between 1 and 3.5.")
    return Widths(0, six, four, two)


def benchmark_kernel(
    *,
    batch: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    length: int,
    ranks: Sequence[tuple[int, int]],
    window: int,
    dtype: str | None = None,
    device: str | None = None,
    rounds: int = 50,
    bits: float | None = None,
    shared_values: int = 1,
    joint: bool = False,
    label: str | None = None,
) -> dict[str, Any]:
    """Time one step of decoding, with rotary positions and without, at some ranks.

    Args:
        batch, heads, kv_heads, head_dim, length: B, H, G, D and S of both.
        ranks: pairs (R_k, R_v).
        window: exact tokens, of the S; 0 for none.
        rounds: timings of each, of which the median counts.
        bits: of an original element; adds rows for quantised latents, in 8, 4 and 2 bits.
        shared_values: adds rows in which so many KV heads share a latent of values, of the same bytes.
        joint: adds rows in which keys and values of a head share one.
        label: names what was measured, in the file of results.

    Returns:
        What was measured, on which machine, the baselines, and rows that say for each kernel its seconds, the bytes it
        has to read, the share of the bandwidth of copying that is, and its speed against the best baseline.

    Raises:
        EigenAttnError: on sizes that do not fit or an unknown device or dtype.
    """
    where = device_of(device)
    name = dtype or ("bfloat16" if where.type == "cuda" else "float32")
    if name not in DTYPES:
        raise EigenAttnError(f"unknown dtype {name!r}: choose one of {', '.join(DTYPES)}.")
    if heads % kv_heads or not 0 <= window < length:
        raise EigenAttnError("KV heads must divide the heads, and the window must be shorter than the text.")
    if kv_heads % shared_values:
        raise EigenAttnError(f"{shared_values} KV heads cannot share a latent where there are {kv_heads}.")
    if any(not 0 < rank <= head_dim for pair in ranks for rank in pair):
        raise EigenAttnError(f"ranks must lie between 1 and the head dimension, {head_dim}.")
    torch.manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=where, dtype=DTYPES[name])

    q = normal(batch, heads, head_dim)
    k, v = normal(batch, kv_heads, length, head_dim), normal(batch, kv_heads, length, head_dim)
    functions: dict[str, Callable[[], Tensor]] = dict(baselines(q.unsqueeze(2), k, v))
    full = list(functions)
    element = q.element_size()
    bytes_of = dict.fromkeys(full, 2 * batch * kv_heads * length * head_dim * element)
    far = length - window
    lengths = torch.full((batch,), far, dtype=torch.int32, device=where)
    near = Near(k[:, :, far:], v[:, :, far:], lengths, lengths + window) if window else None
    exponents = torch.arange(0, head_dim, 2, device=where) / head_dim
    fused = where.type == "cuda" and HAS_TRITON
    # PyTorch decodes all keys at once, which must fit.
    kernels = [*(["torch"] if not fused or batch * length <= 2**18 else []), *(["triton"] if fused else [])]

    def latents(rank: int | Widths, shared: int = 1) -> tuple[Tensor, Side]:
        if isinstance(rank, int):
            stored = normal(batch, kv_heads // shared, far, rank)
            return stored, Side(normal(kv_heads, rank, head_dim), normal(kv_heads, head_dim))
        stored = torch.randint(256, (batch, kv_heads, far, rank.bytes), device=where, dtype=torch.uint8)
        scale = torch.rand(kv_heads, rank.channels, device=where)
        # A little further apart at the ends than in the middle.
        levels = scale.unsqueeze(-1) * torch.tensor([0, 1, 0, 1e-4], device=where)
        return stored, Side(normal(kv_heads, rank.channels, head_dim), normal(kv_heads, head_dim), rank, levels)

    cases = {f"({k}, {v})": (latents(k), latents(v)) for k, v in ranks}
    if bits is not None:
        widths = widths_of(bits, head_dim)
        cases[f"{bits:g} bits"] = latents(widths), latents(widths)
    if shared_values > 1:
        for k, v in ranks:
            together = latents(shared_values * v, shared_values)
            cases[f"({k}, {v}), values of {shared_values} heads together"] = latents(k), together
    if joint:
        for k, v in ranks:
            z, side = latents(k + v)
            cases[f"({k}, {v}), keys and values together"] = (z, side), (z, latents(k + v)[1])
    for case, ((z_k, side_k), (z_v, side_v)) in cases.items():
        sides = [side_k, side_v]
        for positions, rotary in (("none", None), ("rotary", Rotary(10000.0**-exponents))):
            for kernel in kernels:
                row = f"{kernel}, {positions}, {case}"
                functions[row] = lambda kernel=kernel, z_k=z_k, z_v=z_v, sides=sides, rotary=rotary: decode(
                    q,
                    z_k,
                    z_v,
                    keys=sides[0],
                    values=sides[1],
                    scale=head_dim**-0.5,
                    length=lengths,
                    rotary=rotary,
                    near=near,
                    backend=kernel,
                )
                latent = sum(z.nbytes for z in ((z_k,) if z_v is z_k else (z_k, z_v)))
                bytes_of[row] = latent + batch * kv_heads * window * 2 * head_dim * element
    with torch.no_grad():
        bandwidth = copy_bandwidth(where, rounds)
        taken = in_turns({name: recorded(function, where) for name, function in functions.items()}, where, rounds)
    best = min(full, key=taken.__getitem__)
    return {
        "kind": "kernel",
        **({} if label is None else {"model": label}),
        **machine(where),
        "shape": {
            "batch": batch,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "length": length,
            "window": window,
            "dtype": name,
        },
        "ranks": [list(pair) for pair in ranks],
        "bits": bits,
        "shared_values": shared_values,
        "joint": joint,
        "rounds": rounds,
        "copy_bandwidth": bandwidth,
        "best_baseline": best,
        "rows": [
            {
                "name": row,
                "seconds": seconds,
                "bytes": bytes_of[row],
                "bandwidth_share": bytes_of[row] / seconds / bandwidth,
                "speed_against_best": taken[best] / seconds,
            }
            for row, seconds in taken.items()
        ],
    }
