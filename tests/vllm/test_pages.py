"""Attention over pages: what vLLM calls, without vLLM."""

from dataclasses import replace

import pytest
import torch

from eigenattn.kernels.decoding import Rotary, Side
from eigenattn.vllm.attend import Head, Pages, attend_prompt, decode_rows, write

H, G, D, R_K, R_V, BLOCK, LENGTHS = 4, 2, 8, 6, 4, 4, (19, 3, 10)


def a_head(window: int, positions: str) -> Head:
    generator = torch.Generator().manual_seed(2)

    def side(rank: int) -> Side:
        decoder, mean = (torch.randn(G, n, D, generator=generator) for n in (rank, 1))
        return Side(decoder, mean[:, 0])

    return Head(
        keys=side(R_K),
        values=side(R_V) if window else Side(),
        size_k=R_K,
        scale=0.3,
        window=window,
        rotary=Rotary(torch.tensor([1.0, 0.3, 0.1, 0.03])) if positions == "rotary" else None,
        slopes=torch.tensor([0.5, 0.25, 0.1, 0.0]) if positions == "alibi" else None,
    )


def test_pages_hold_latents_of_several_heads():
    """Beside a latent of values those of its heads' keys, or vectors of a side at full rank, or none of values."""
    head, held = a_head(4, "none"), torch.arange(2.0 * 3 * 20).view(1, 2, 3, 20)
    keys, values = replace(head, size_k=12, in_page=(2, 1)).split(held)
    assert keys.shape == (1, 4, 3, 6) and values.shape == (1, 2, 3, 8)
    assert torch.equal(keys[0, 3, 1], held[0, 1, 1, 6:12]) and torch.equal(values[0, 1, 2], held[0, 1, 2, 12:])
    keys, values = replace(head, size_k=4, in_page=(1, 2)).split(held)
    assert values.shape == (1, 4, 3, 8) and torch.equal(values[0, 2, 0], held[0, 1, 0, 4:12])
    keys, values = replace(head, size_k=20).split(held)
    assert torch.equal(keys, held) and torch.equal(values, held)


def filled(channels: int, seed: int) -> Pages:
    """Pages in no order; what was not written is NaN."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randperm(15, generator=generator) + 1
    pages = Pages(torch.full((16, G, BLOCK, channels), torch.nan), blocks.view(3, 5))
    for row, length in enumerate(LENGTHS):
        columns = torch.arange(length)
        slots = pages.table[row, columns // BLOCK] * BLOCK + columns % BLOCK
        write(pages.cache, slots, torch.randn(length, G, channels, generator=generator))
    return pages


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("positions", ["none", "rotary", "alibi"])
@pytest.mark.parametrize("chunk", [1, 7, 19])
def test_prompts_attend_as_decoding_does(window, positions, chunk):
    head, far = a_head(window, positions), filled(R_K + R_V, 3)
    near = filled(2 * D, 4) if window else None
    q = torch.randn(len(LENGTHS), max(LENGTHS), H, D, generator=torch.Generator().manual_seed(5))
    for row, length in enumerate(LENGTHS):
        for stop in range(1, length + 1):
            start = max(stop - chunk, 0)
            out = attend_prompt(head, q[row, start:stop], torch.tensor([row]), stop, far, near)
            lengths = torch.tensor([stop], dtype=torch.int32)
            alone = decode_rows(head, q[row, stop - 1 : stop], torch.tensor([row]), lengths, stop, far, near)
            torch.testing.assert_close(out[-1:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("positions", ["none", "rotary", "alibi"])
def test_rows_decode_together_as_alone(window, positions):
    head, far = a_head(window, positions), filled(R_K + R_V, 3)
    near = filled(2 * D, 4) if window else None
    q = torch.randn(len(LENGTHS), H, D, generator=torch.Generator().manual_seed(5))
    rows, lengths = torch.tensor([2, 0, 1]), torch.tensor([LENGTHS[2], LENGTHS[0], LENGTHS[1]], dtype=torch.int32)
    together = decode_rows(head, q, rows, lengths, max(LENGTHS), far, near)
    for place in range(len(LENGTHS)):
        one = slice(place, place + 1)
        alone = decode_rows(head, q[one], rows[one], lengths[one], int(lengths[place]), far, near)
        torch.testing.assert_close(together[one], alone, rtol=1e-4, atol=1e-5)
