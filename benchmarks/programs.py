"""Time the fused decoding kernel in programs of other shapes than it chooses, on a GPU.

    python benchmarks/programs.py --programs 64,4,3,2 64,4,2,4,128 --splits 2 8
    python benchmarks/programs.py --ranks 64,96 --bits 3.5 --batch 1 --length 131072
    python benchmarks/programs.py --widths 8:8 6:8 5:16 4:32 3:24 2:32 1:8    # such as bases have

For each positions and latents: microseconds of a step, over the best at full rank, and how far it is from PyTorch's
step. Steps are replayed from a CUDA graph, and the median counts. `kernels/decoding/programs.py` holds what it chose.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from eigenattn.benchmark.kernel import Inputs, StepShape, baselines, layouts
from eigenattn.benchmark.timing import device_name, device_of, in_turns, recorded
from eigenattn.cache.layout import SIDES, Latent, Layout
from eigenattn.cache.packing import Widths
from eigenattn.kernels.decoding import decode, fused
from eigenattn.kernels.decoding.programs import Programs


def numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def shaped(choose: Callable[..., tuple[Programs, bool]], programs: Programs, *arguments: Any) -> tuple[Programs, bool]:
    """These programs, and of what is chosen whether the decoder stays in shared memory."""
    return programs, choose(*arguments)[1]


def width(text: str) -> tuple[int, int]:
    bits, channels = text.split(":")
    return int(bits), int(channels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--programs", nargs="*", type=numbers, default=[], help="block,warps,stages,together[,registers]"
    )
    parser.add_argument("--splits", nargs="*", type=int, default=[], help="of the sequence, in the programs it chooses")
    parser.add_argument("--ranks", nargs="*", type=numbers, default=[(80, 80)], help="of keys, of values")
    parser.add_argument("--bits", type=float, default=2.5)
    parser.add_argument("--widths", nargs="*", type=width, default=[], help="BITS:CHANNELS of keys, and of values")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()
    shape = StepShape(batch=options.batch, length=options.length)
    device = device_of(None)
    inputs = Inputs(shape, device, torch.bfloat16)
    full = {name: recorded(each, device) for name, each in baselines(inputs.q.unsqueeze(2), inputs.k, inputs.v).items()}
    best = min(in_turns(full, device, options.rounds).values())
    print(f"{device_name(device)}: full rank {1e6 * best:.0f} us")
    variants: dict[str, tuple[str, Any]] = {"as chosen": ("programs_for", fused.programs_for)}
    for each in options.programs:
        variants[f"programs {each}"] = "programs_for", functools.partial(shaped, fused.programs_for, Programs(*each))
    for count in options.splits:
        variants[f"{count} splits"] = "split_sequence", lambda *_, found=count: found
    cases = layouts(shape, options.ranks, options.bits, [])
    if options.widths:
        widths = Widths.of(dict(options.widths), scaled=True)
        of_sides = [Latent((side,), 1, widths.channels, shape.head_dim, widths) for side in SIDES]
        cases[str(widths)] = Layout(shape.kv_heads, tuple(of_sides), shape.window)
    for latents, layout in cases.items():
        plain = inputs.step(layout)
        for positions, step in (("none", plain), ("rotary", dataclasses.replace(plain, rotary=inputs.rotary))):
            expected = decode(step, "torch").float()
            for title, (name, function) in variants.items():
                with mock.patch.object(fused, name, function):
                    found = decode(step, "triton").float()
                    replay = recorded(functools.partial(decode, step, "triton"), device)
                    taken = in_turns({title: replay}, device, options.rounds)[title]
                error = (found - expected).norm() / expected.norm()
                print(f"{positions}, {latents}, {title}: {1e6 * taken:.0f} us, {taken / best:.2f}, error {error:.4f}")


if __name__ == "__main__":
    main()
