"""Attention over pages: what vLLM calls, without vLLM."""

import dataclasses

import pytest
import torch
from every_type import built
from tiny import compressed, converted

from eigenattn import EigenAttnError
from eigenattn.cache.packing import Widths
from eigenattn.kernels import decoding
from eigenattn.kernels.decoding import Step, Window
from eigenattn.models.conversion import eigen_layers
from eigenattn.models.rotary import rotate
from eigenattn.vllm.attend import (
    PagedAttention,
    Queries,
    angles_of,
    attend_prompt,
    decode_queries,
    rotary_of,
    sight_of,
)
from eigenattn.vllm.pages import Held, Pages, latents_in, positions_in, window_in, write

LENGTHS = (19, 3, 10)
BY_LAYER = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
}
SCALED = Widths.of({8: 3, 5: 2, 3: 3, 1: 2}, scaled=True), Widths.of({8: 2, 4: 1, 2: 6}, scaled=True)
# name -> (tiny model, whether latents are coded, what is shared)
KINDS = {
    "coded": ("llama", True, "1"),
    "scaled": ("llama3", True, "1"),
    "plain": ("llama", False, "1"),
    "interleaved": ("cohere", True, "1"),
    "shared": ("llama", True, "1-2"),
    "joint": ("qwen3", True, "2kv"),
    "learned": ("opt", True, "1"),
}
# Kinds, exact windows, and what queries see at all. Without a window bases are folded, unless latents are shared.
CASES = [
    *((kind, 4, None) for kind in KINDS),
    ("shared", 0, None),
    ("joint", 0, None),
    *((kind, 4, 7) for kind in ("coded", "plain", "interleaved")),
    ("coded", 4, 3),
    ("shared", 0, 7),
]


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def layer_of(kind: str, window: int, sees: int | None = None, slopes: bool = False) -> PagedAttention:
    """Those that slide have sinks, too."""
    name, coded, share = KINDS[kind]
    layer = eigen_layers(compressed(name, window, coded, share, SCALED if kind == "scaled" else None))[1]
    alibi = torch.tensor([0.5, 0.25, 0.1, 0.0]) if slopes else None
    sinks = None if sees is None else torch.tensor([0.5, -1.0, 2.0, 0.0])
    return PagedAttention(layer, layer.scaling, rotary_of(layer), alibi, sees=sees, sinks=sinks)


def seeing(window: int, sees: int | None) -> PagedAttention:
    """A layer of a model whose images have rows of positions."""
    model = compressed("qwen2_5_vl", window, True, build=lambda name: built(name, wrapped=True).float())
    layer = eigen_layers(model)[1]
    return PagedAttention(layer, layer.scaling, rotary_of(layer, 3), sees=sees)


def places(row: int, length: int) -> torch.Tensor:
    """Positions [length, 3] that images might give."""
    return torch.randint(60, (length, 3), generator=torch.Generator().manual_seed(row), dtype=torch.int32)


def filled(layer: PagedAttention, forgets: bool = False) -> Held:
    """Pages in no order, 4 tokens of latents or 2 of the window each; other tokens are NaN.

    Args:
        forgets: whether tokens that a row's last query does not see are others'.
    """
    maps, generator = layer.maps, torch.Generator().manual_seed(3)
    k, v = torch.randn(2, len(LENGTHS), maps.kv_heads, max(LENGTHS), maps.head_dim, generator=generator)

    def pages(cache, view, of_row, size):
        table = torch.randperm(len(cache), generator=generator)[: len(LENGTHS) * (20 // size)]
        table = table.view(len(LENGTHS), -1).to(torch.int32)
        for row, length in enumerate(LENGTHS):
            columns = seen_of(length)
            write(view, table[row, columns // size].long() * size + columns % size, of_row(row, length))
        return Pages(view, table)

    def seen_of(length):
        return torch.arange(max(length - layer.sees, 0) if forgets and layer.sees else 0, length)

    def vectors(row, length):
        return tuple(x[row : row + 1, :, seen_of(length)] for x in (k, v))

    def positions_of(row, length):
        return (places(row, length)[seen_of(length)][None, None],)

    size = maps.layout.bytes_per_token(4)
    cache = torch.full((17, 1, 4, size), 255, dtype=torch.uint8)
    far = pages(cache, latents_in(cache, maps.layout, k.dtype), lambda *row: maps.stored(*vectors(*row)), 4)
    if not maps.layout.window:
        return Held(far)
    positions = None
    if layer.rotary is not None and layer.rotary.rows is not None:
        cache = torch.full((17, 1, 4, 12), 255, dtype=torch.uint8)
        positions = pages(cache, positions_in(cache), positions_of, 4)
    cache = torch.full((33, maps.kv_heads, 2, 2 * maps.head_dim), torch.nan)
    return Held(far, pages(cache, window_in(cache), vectors, 2), positions)


def batch_of(lengths: list[int]) -> Queries:
    positions = torch.arange(max(lengths), dtype=torch.int32).unsqueeze(0)
    held = torch.tensor(lengths, dtype=torch.int32)
    return Queries(torch.arange(len(lengths)), held, torch.empty(0), positions)


def of_rows(held: Held, rows: list[int]) -> Held:
    every = held.far, held.near, held.positions
    return Held(*(None if pages is None else Pages(pages.rows, pages.table[rows]) for pages in every))


def some_queries(layer: PagedAttention) -> torch.Tensor:
    shape = len(LENGTHS), max(LENGTHS), layer.maps.heads, layer.maps.head_dim
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(("kind", "window", "sees"), CASES)
def test_prompts_attend_as_decoding_does(kind, window, sees, monkeypatch):
    monkeypatch.setattr("eigenattn.kernels.chunked.QUERY_BLOCK", 4)
    layer = layer_of(kind, window, sees, slopes=kind == "learned")
    held = filled(layer)
    q = some_queries(layer)
    for chunk in (1, 7, 19):
        for row, length in enumerate(LENGTHS):
            for stop in range(length, 0, -3):
                own = of_rows(held, [row])
                out = attend_prompt(layer, q[row, max(stop - chunk, 0) : stop], stop, own)
                alone = decode_queries(layer, q[row, stop - 1 : stop], batch_of([stop]), own)
                torch.testing.assert_close(out[-1:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "window", "sees"), CASES)
@pytest.mark.parametrize("backend", ["reference", "torch", "default"])
def test_rows_of_pages_decode_as_rows_in_one_piece(kind, window, sees, backend, monkeypatch):
    """In every layer of a pass, for all of which some things are computed once."""
    layer = layer_of(kind, window, sees)
    rows, q = [2, 0, 1], some_queries(layer)[:, 0]
    held = of_rows(filled(layer, forgets=True), rows)
    far, near = held.far, held.near
    batch = batch_of([LENGTHS[row] for row in rows])
    if backend != "default":
        monkeypatch.setattr("eigenattn.vllm.attend.accepted", lambda step, _: backend)
    found = [decode_queries(layer, q, batch, held) for _ in range(2)]
    assert torch.equal(*found)
    for place, length in enumerate(batch.lengths.tolist()):
        columns = torch.arange(max(length - (sees or length), 0), length)
        border = max(len(columns) - window, 0)
        keys, values = layer.maps.decoding_sides()
        exact = None if near is None else Pages(near.rows, near.table[place : place + 1]).at(columns[border:])
        step = Step(
            q=q[place : place + 1],
            rows=Pages(far.rows, far.table[place : place + 1]).at(columns),
            keys=keys,
            values=values,
            scale=layer.scale,
            length=border,
            positions=columns.unsqueeze(0),
            query=torch.tensor([length - 1]),
            rotary=layer.rotary,
            window=None if exact is None else Window(*exact, border, len(columns)),
            sinks=layer.sinks,
        )
        torch.testing.assert_close(
            found[0][place : place + 1], decoding.decode(step, "reference"), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("sees", [None, 6])
@pytest.mark.parametrize("backend", ["reference", "torch", "default"])
def test_positions_in_rows_lie_in_pages(sees, backend, monkeypatch):
    """The same as if they were given; and prompts attend as decoding does."""
    layer, window = seeing(4, sees), 4
    held, q = filled(layer, forgets=True), some_queries(layer)
    if backend != "default":
        monkeypatch.setattr("eigenattn.vllm.attend.accepted", lambda step, _: backend)
    found = decode_queries(layer, q[:, 0], batch_of(list(LENGTHS)), held)
    for row, length in enumerate(LENGTHS):
        columns = torch.arange(max(length - (sees or length), 0), length)
        border, own = max(len(columns) - window, 0), of_rows(held, [row])
        keys, values = layer.maps.decoding_sides()
        step = Step(
            q=q[row : row + 1, 0],
            rows=own.far.at(columns),
            keys=keys,
            values=values,
            scale=layer.scale,
            length=border,
            positions=places(row, length)[columns].unsqueeze(0),
            query=places(row, length)[-1:],
            rotary=layer.rotary,
            window=Window(*own.near.at(columns[border:]), border, len(columns)),
        )
        alone = decoding.decode(step, "reference")
        torch.testing.assert_close(found[row : row + 1], alone, rtol=1e-4, atol=1e-5)
        out = attend_prompt(layer, q[row, :1], length, own)
        torch.testing.assert_close(out, alone, rtol=1e-4, atol=1e-5)


def test_what_the_native_step_does_not_take_is_decoded_all_the_same():
    """Pages, maps and queries in fp16, on a CPU."""
    layer = layer_of("plain", 4)
    held = filled(layer)
    q = some_queries(layer)[:, 0]
    exact = decode_queries(layer, q, batch_of(list(LENGTHS)), held)
    halves = (Pages(tuple(row.half() for row in pages.rows), pages.table) for pages in (held.far, held.near))
    layer = dataclasses.replace(layer, maps=layer.maps.half())
    found = decode_queries(layer, q.half(), batch_of(list(LENGTHS)), Held(*halves))
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ["llama3", "llama-yarn", "cohere", "phi3-partial"])
def test_rotary_positions_are_the_models(name):
    """Scaling, pairs that are neighbours, dimensions that stay: nothing that a family has may be left out."""
    _, (layer, *_) = converted(name)
    check_angles(layer)
    assert rotary_of(converted("opt")[1][0]) is None


def test_rotary_positions_may_differ_by_layer():
    sliding, full, _ = converted("gemma3", rope_parameters=BY_LAYER)[1]
    check_angles(sliding)
    check_angles(full)
    assert angles_of(sliding) != angles_of(full)
    assert (sight_of(sliding), sight_of(full)) == (12, None)


def test_rotation_that_frequencies_do_not_give_is_refused():
    _, (layer, *_) = converted("llama")
    layer.family = dataclasses.replace(layer.family, backwards=True)
    with pytest.raises(EigenAttnError, match="of this kind"):
        rotary_of(layer)


def check_angles(layer):
    x = torch.randn(1, 2, 5, layer.head_dim)
    positions = torch.tensor([[0, 1, 7, 40, 300]])
    cos, sin = layer.angles(x, positions)
    expected = rotate(x, cos, sin, layer.family.interleaved)
    torch.testing.assert_close(rotary_of(layer).rotate(x, positions[0]), expected, rtol=1e-4, atol=1e-4)
