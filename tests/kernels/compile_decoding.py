"""Compile the fused decoding kernels for an H100 that need not be there, and print their names.

Triton asks its driver for the target, so a driver of our own that only knows a target is enough.
"""

from dataclasses import replace

import torch
import triton
from triton.backends.compiler import GPUTarget

from eigenattn.cache.packing import Widths
from eigenattn.kernels.decoding import Rotary, Side, Step, Window, decode, fused


class TargetOnly:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class Compile:
    """Compiles a kernel instead of launching it."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def compile_it(*args, **kwargs):
            compiled = self.kernel.warmup(*args, grid=grid, **kwargs)
            assert compiled.asm["cubin"]
            print(compiled.metadata.name)

        return compile_it


def main() -> None:
    triton.runtime.driver.set_active(TargetOnly())
    fused.decode_splits = Compile(fused.decode_splits)
    fused.combine = Compile(fused.combine)
    b, h, g, s, d, n = 2, 8, 2, 64, 128, 33

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.bfloat16)

    length = torch.full((b,), s, dtype=torch.int32)
    window = Window(normal(b, g, n, d), normal(b, g, n, d), length, length + n)
    rotary = Rotary(1e4 ** -(torch.arange(0, d, 2) / d))
    of_images = replace(rotary, rows=torch.arange(d // 2) % 3)
    places = torch.arange(s + n).view(1, -1, 1).expand(b, -1, 3)
    cases = (
        (32, rotary, None, 1, 1),
        (32, of_images, None, 1, 1),
        (24, None, Widths.of({8: 8, 6: 8, 4: 4, 3: 2, 1: 2}), 1, 1),
        (32, rotary, None, 1, 2),
        (24, None, None, 2, 2),
    )
    for rank, positions, widths, shared_k, shared_v in cases:
        if widths is None:
            z, quantiser = normal(b, g, s, rank), {}
        else:
            z = torch.zeros(b, g, s, widths.bytes, dtype=torch.uint8)
            quantiser = {"widths": widths, "levels": torch.ones(g, rank, 4)}
        keys = Side(0, normal(g, rank, d), normal(g, d), **quantiser)
        capped = {} if widths is None else {"softcap": 30.0, "mask": torch.ones(b, h, s + n, dtype=torch.bool)}
        step = Step(
            q=normal(b, h, d),
            rows=(z[:, ::shared_k], z[:, ::shared_v]),
            keys=keys,
            values=replace(keys, row=1),
            scale=0.1,
            length=length,
            positions=places if positions is of_images else places[..., 0],
            query=(length + n).unsqueeze(1).expand(b, 3) if positions is of_images else length + n,
            rotary=positions,
            window=window,
            **capped,
        )
        decode(step, "triton")


if __name__ == "__main__":
    main()
