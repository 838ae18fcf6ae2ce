"""Attention over pages: what vLLM calls, without vLLM."""

import dataclasses

import pytest
import torch
from tiny import converted

from eigenattn.cache.layout import Latent, Layout
from eigenattn.kernels.decoding import Rotary, Side
from eigenattn.models.rotary import rotate
from eigenattn.vllm.attend import DecodingRows, PagedAttention, attend_prompt, decode_rows, rotary_of, slopes_of
from eigenattn.vllm.pages import Pages, from_page, page_shape, to_page, write

H, G, D, R_K, R_V, BLOCK, LENGTHS = 4, 2, 8, 6, 4, 4, (19, 3, 10)
LAYOUTS = {
    "1": ((("key",), 1, R_K), (("value",), 1, R_V)),
    "1-2": ((("key",), 1, R_K), (("value",), 2, 2 * R_V)),
    "2kv": ((("key", "value"), 2, 2 * R_K),),
    "2 of keys": ((("key",), 2, R_K), (("value",), 1, D)),
}
ROTARY = Rotary(torch.tensor([1.0, 0.3, 0.1, 0.03]))
POSITIONS = ["none", "rotary", "interleaved", "alibi"]


def layout_of(share: str, window: int = 0, kv_heads: int = G) -> Layout:
    return Layout(kv_heads, tuple(Latent(*latent, head_dim=D) for latent in LAYOUTS[share]), window)


def a_layer(window: int, positions: str, share: str) -> PagedAttention:
    """Without a window, latents of values of single heads stay what they are, as where their decoder is folded."""
    generator, layout = torch.Generator().manual_seed(2), layout_of(share, window)

    def side(name: str) -> Side:
        latent = layout.of(name)
        if latent.verbatim or (name == "value" and not layout.at_run_time):
            return Side(layout.index(name))
        decoder, mean = (torch.randn(G, n, D, generator=generator) for n in (latent.rank, 1))
        return Side(layout.index(name), decoder, mean[:, 0])

    rotary = {"rotary": ROTARY, "interleaved": dataclasses.replace(ROTARY, interleaved=True)}.get(positions)
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.0]) if positions == "alibi" else None
    return PagedAttention(layout, side("key"), side("value"), 0.3, rotary, slopes)


@pytest.mark.parametrize(
    ("share", "shape"), [("1", (4, 10)), ("1-2", (2, 20)), ("2kv", (2, 12)), ("2 of keys", (2, 22))]
)
def test_pages_hold_latents_of_the_same_heads_beside_each_other(share, shape):
    layout = layout_of(share, kv_heads=4)
    assert page_shape(layout) == shape
    latents = tuple(torch.randn(layout.count(latent), 3, latent.rank) for latent in layout.latents)
    page = to_page(layout, latents)
    assert page.shape == (3, *shape)
    for found, latent in zip(from_page(layout, page.transpose(0, 1).unsqueeze(0)), latents, strict=True):
        assert torch.equal(found[0], latent)
    if share == "1-2":
        assert torch.equal(page[2, 1], torch.cat([latents[0][2, 2], latents[0][3, 2], latents[1][1, 2]]))


def filled(shape: tuple[int, int], seed: int) -> Pages:
    """Pages in no order; what was not written is NaN."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randperm(15, generator=generator) + 1
    pages = Pages(torch.full((16, shape[0], BLOCK, shape[1]), torch.nan), blocks.view(3, 5))
    for row, length in enumerate(LENGTHS):
        columns = torch.arange(length)
        slots = pages.table[row, columns // BLOCK] * BLOCK + columns % BLOCK
        write(pages.cache, slots, torch.randn(length, *shape, generator=generator))
    return pages


def batch_of(rows: list[int], lengths: list[int]) -> DecodingRows:
    longest = max(lengths)
    positions = torch.arange(longest, dtype=torch.int32).unsqueeze(0)
    tokens = torch.arange(len(rows))
    return DecodingRows(torch.tensor(rows), tokens, torch.tensor(lengths, dtype=torch.int32), longest, positions)


def case(window: int, positions: str, share: str) -> tuple[PagedAttention, Pages, Pages | None]:
    layer = a_layer(window, positions, share)
    return layer, filled(page_shape(layer.layout), 3), filled((G, 2 * D), 4) if window else None


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("share", LAYOUTS)
@pytest.mark.parametrize("chunk", [1, 7, 19])
def test_prompts_attend_as_decoding_does(window, positions, share, chunk):
    layer, far, near = case(window, positions, share)
    q = torch.randn(len(LENGTHS), max(LENGTHS), H, D, generator=torch.Generator().manual_seed(5))
    for row, length in enumerate(LENGTHS):
        for stop in range(length, 0, -3):
            start = max(stop - chunk, 0)
            out = attend_prompt(layer, q[row, start:stop], torch.tensor([row]), stop, far, near)
            alone = decode_rows(layer, q[row, stop - 1 : stop], batch_of([row], [stop]), far, near)
            torch.testing.assert_close(out[-1:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("share", LAYOUTS)
def test_rows_decode_together_as_alone(window, positions, share):
    """In every layer of a pass, for all of which some things are computed once."""
    layer, far, near = case(window, positions, share)
    q = torch.randn(len(LENGTHS), H, D, generator=torch.Generator().manual_seed(5))
    rows = [2, 0, 1]
    batch = batch_of(rows, [LENGTHS[row] for row in rows])
    together = [decode_rows(layer, q, batch, far, near) for _ in range(2)]
    assert torch.equal(*together)
    for place, row in enumerate(rows):
        alone = decode_rows(layer, q[place : place + 1], batch_of([row], [LENGTHS[row]]), far, near)
        torch.testing.assert_close(together[0][place : place + 1], alone, rtol=1e-4, atol=1e-5)


def test_what_the_native_step_does_not_take_is_decoded_all_the_same():
    """Pages, maps and queries in fp16, on a CPU."""
    layer, far, near = case(4, "rotary", "1")
    assert near is not None
    q, rows = torch.randn(len(LENGTHS), H, D, generator=torch.Generator().manual_seed(5)), list(range(len(LENGTHS)))
    exact = decode_rows(layer, q, batch_of(rows, LENGTHS), far, near)
    far, near = (Pages(pages.cache.half(), pages.table) for pages in (far, near))
    keys, values = (
        Side(side.row, *(None if x is None else x.half() for x in (side.decoder, side.mean)))
        for side in (layer.keys, layer.values)
    )
    layer = dataclasses.replace(layer, keys=keys, values=values)
    found = decode_rows(layer, q.half(), batch_of(rows, LENGTHS), far, near)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ["llama3", "llama-yarn", "cohere", "phi3-partial"])
def test_rotary_positions_are_the_models(name):
    """Scaling, pairs that are neighbours, dimensions that stay: nothing that a family has may be left out."""
    _, (layer, *_) = converted(name)
    x = torch.randn(1, 2, 5, layer.head_dim)
    positions = torch.tensor([[0, 1, 7, 40, 300]])
    cos, sin = layer.angles(x, positions)
    expected = rotate(x, cos, sin, layer.family.interleaved)
    torch.testing.assert_close(rotary_of(layer).rotate(x, positions[0]), expected, rtol=1e-4, atol=1e-4)


def test_other_positions():
    layers = {name: converted(name)[1][0] for name in ("llama", "opt", "mpt")}
    assert [name for name, layer in layers.items() if rotary_of(layer) is not None] == ["llama"]
    assert [name for name, layer in layers.items() if slopes_of(layer) is not None] == ["mpt"]
    assert torch.equal(slopes_of(layers["mpt"]), torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]))
