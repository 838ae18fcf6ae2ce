"""The native decoding step: what only it does, and what is done without it."""

import dataclasses
import re

import pytest
import torch
from tiny import levels_between, packed_rows

from eigenattn import EigenAttnError, kernels
from eigenattn.cache.packing import Widths
from eigenattn.kernels import native_library, selection
from eigenattn.kernels.decoding import Rotary, Side, Step, Window, decode, default_backend
from eigenattn.kernels.decoding import native as decoding_natively

native = pytest.mark.skipif(
    native_library.unavailable() is not None, reason=f"no native kernels: {native_library.unavailable()}"
)


def some_step(s=1100, rank=20, widths=None, dtype=torch.float32, **changes):
    """Enough tokens for several splits, with ragged rows; the window lies behind them."""
    torch.manual_seed(0)
    b, h, g, d, slots = 2, 6, 2, 24, 9

    def normal(*shape):
        return torch.randn(*shape).to(dtype)

    coded, rows = {}, (normal(b, g, s, rank), normal(b, g, s, rank))
    if widths is not None:
        rank = widths.channels
        rows = packed_rows(widths, b, g, s), packed_rows(widths, b, g, s)
        low = torch.randn(g, rank) - 2
        coded = {"widths": widths, "levels": levels_between(low, low + 3, widths)}
    length = torch.tensor([s, s - 70], dtype=torch.int32)
    step = {
        "q": normal(b, h, d),
        "rows": rows,
        "keys": Side(0, normal(g, rank, d) / rank**0.5, normal(g, d), **coded),
        "values": Side(1, normal(g, rank, d) / rank**0.5, normal(g, d), **coded),
        "scale": 0.3,
        "length": length,
        "first": torch.tensor([0, 37], dtype=torch.int32),
        "positions": torch.arange(s + slots).expand(b, -1),
        "query": length + slots,
        "rotary": Rotary(100.0 ** -(torch.arange(0, d, 2) / d)),
        "window": Window(normal(b, g, slots, d), normal(b, g, slots, d), length, length + slots),
    }
    return Step(**step | changes)


@pytest.fixture(params=["vectors", "matrices"])
def by(request, monkeypatch):
    """Either way, where the machine multiplies matrices."""
    dtypes, dimensions = {"vectors": ((), 10**9), "matrices": ((torch.bfloat16, torch.uint8), 0)}[request.param]
    monkeypatch.setattr(decoding_natively, "MATRICES", dtypes)
    monkeypatch.setattr(decoding_natively, "MULTIPLIED", dimensions)


def assert_same(step):
    tolerance = 1e-2 if step.q.dtype == torch.bfloat16 else 1e-5
    expected = decode(step, "reference")
    found = decode(step, "native")
    assert (found.float() - expected.float()).norm() < tolerance * expected.float().norm()


dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@native
@pytest.mark.parametrize("threads", [1, 3, 8])
@dtypes
def test_many_blocks_and_threads(by, threads, dtype):
    torch.set_num_threads(threads)
    step = some_step(dtype=dtype)
    assert_same(step)
    assert torch.equal(decode(step, "native"), decode(step, "native"))
    torch.set_num_threads(1)


@native
@dtypes
def test_positions_jump_between_blocks_and_within(by, dtype):
    positions = torch.arange(1109) + 500 * (torch.arange(1109) >= 64) + 3 * (torch.arange(1109) >= 81)
    positions[700:705] = 12  # and back
    assert_same(some_step(positions=positions.expand(2, -1), query=torch.tensor([2000, 1900]), dtype=dtype))


@native
@pytest.mark.parametrize("across", [7, 50, 90])
@dtypes
def test_positions_of_images(by, across, dtype):
    """In rows, of images narrower and wider than what is turned by a table."""
    s, d = 609, 24
    column = torch.arange(s)
    place = (column - 70).clamp_min(0)
    rows = torch.stack([column * 0 + 70, 70 + place // across, 70 + place % across], dim=-1)
    rows = torch.where(((column >= 70) & (column < 505))[:, None], rows, column[:, None])
    rotary = Rotary(100.0 ** -(torch.arange(0, d, 2) / d), 1.1, rows=torch.arange(d // 2) % 3)
    query = torch.tensor([[620, 620, 620], [540, 600, 580]])
    for widths in (None, Widths.of({8: 3, 5: 20, 2: 30}, scaled=True)):
        positions = {"positions": rows.expand(2, -1, -1), "query": query, "rotary": rotary}
        assert_same(some_step(s=600, widths=widths, dtype=dtype, **positions))
        assert_same(some_step(s=600, widths=widths, dtype=dtype, **positions | {"query": query[:1].int()}))


@native
@pytest.mark.parametrize("widths", [{8: 70, 3: 90}, {6: 17, 4: 150, 1: 3}, {8: 16}, {2: 64}], ids=str)
@dtypes
def test_wide_rows_of_codes(by, widths, dtype):
    """A vector's codes may lie too far apart for one load."""
    for s in (70, 600):
        assert_same(some_step(s=s, widths=Widths.of(widths, scaled=True), dtype=dtype))


@native
@dtypes
@pytest.mark.parametrize("rotates", [True, False], ids=["rotary", "none"])
def test_many_heads_share_keys_that_are_values(by, dtype, rotates):
    """More than a matrix takes at once; and the rows may be the same."""
    torch.manual_seed(0)
    changes = {"q": torch.randn(2, 40, 24).to(dtype)} | ({} if rotates else {"rotary": None, "positions": None})
    for widths in (None, Widths.of({8: 3, 5: 20, 2: 30})):
        step = some_step(s=300, widths=widths, dtype=dtype, **changes)
        assert_same(step)
        assert_same(dataclasses.replace(step, rows=step.rows[:1], values=dataclasses.replace(step.values, row=0)))


@native
@dtypes
def test_dimensions_that_are_odd(by, dtype):
    step = some_step(s=70, rotary=Rotary(torch.tensor([1.0, 0.3]), 1.1, interleaved=True), dtype=dtype)
    assert_same(step)
    d = 23
    odd = [Side(side.row, side.decoder[..., :d], side.mean[..., :d]) for side in (step.keys, step.values)]
    window = Window(step.window.keys[..., :d], step.window.values[..., :d], step.window.column, step.window.stop)
    changes = {"q": step.q[..., :d], "keys": odd[0], "values": odd[1], "window": window}
    assert_same(some_step(s=70, **changes, rotary=Rotary(torch.tensor([1.0, 0.3])), dtype=dtype))


@native
@pytest.mark.parametrize("rank", [1, 31, 33, 96])
@dtypes
def test_matrices_are_made_of_any_ranks(by, monkeypatch, rank, dtype):
    """Nothing behind a row, and nothing left of the block before, is in what is decoded."""
    torch.set_num_threads(1)
    for s in (70, 71, 101):
        step = some_step(s=s, rank=rank, dtype=dtype)
        room = [torch.full_like(row, torch.nan).repeat(1, 1, 1, 2) for row in step.rows]
        for row, own in zip(room, step.rows, strict=True):
            row[..., :rank] = own
        assert_same(dataclasses.replace(step, rows=tuple(row[..., :rank] for row in room)))


def in_pages(x, size, seed=0):
    """Rows [B, heads, S, *] as pages of `size` tokens in no order, and the table."""
    b, pages = len(x), -(-x.shape[2] // size)
    padded = torch.nn.functional.pad(x, (0, 0, 0, pages * size - x.shape[2]))
    order = torch.randperm(b * pages + 3, generator=torch.Generator().manual_seed(seed))[: b * pages].view(b, pages)
    held = x.new_zeros(b * pages + 3, x.shape[1], size, x.shape[3])
    held[order] = padded.unflatten(2, (pages, size)).transpose(1, 2)
    return held, order.to(torch.int32)


@pytest.mark.parametrize("backend", ["reference", "torch", pytest.param("native", marks=native)])
@pytest.mark.parametrize("sizes", [(16, 4), (5, 3), (64, 64)], ids=str)
@pytest.mark.parametrize("widths", [None, Widths.of({8: 3, 6: 2, 4: 30, 1: 4})], ids=str)
def test_rows_may_lie_in_pages(by, backend, sizes, widths):
    """Slots of the window's pages are counted from the row's first token, as a paged cache has them."""
    step = some_step(s=90, widths=widths, first=torch.tensor([0, 7], dtype=torch.int32))
    expected = decode(step, backend)
    (keys, table), (values, _) = (in_pages(row, sizes[0]) for row in step.rows)
    near = []
    for x in (step.window.keys, step.window.values):
        slots = x.new_full((*x.shape[:2], 110, x.shape[3]), 9.0)
        for row, length in enumerate(step.length.tolist()):
            slots[row, :, length : length + 9] = x[row]
        near.append(in_pages(slots, sizes[1], seed=1))
    window = Window(near[0][0], near[1][0], 0, step.window.stop, near[0][1])
    paged = dataclasses.replace(step, rows=(keys, values), table=table, window=window)
    torch.testing.assert_close(decode(paged, backend), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def fresh():
    """The library is looked for anew."""
    native_library.library.cache_clear()
    yield
    native_library.library.cache_clear()


def test_without_a_compiler_pytorch_decodes(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(selection, "_chosen", "auto")
    step = some_step(s=40)
    assert selection.decoding_backend(step.q) == "torch" == default_backend(step)
    assert re.match("torch: there is no C[+][+] compiler", kernels.decoding_step_reason())
    torch.testing.assert_close(decode(step), decode(step, "reference"))
    for choose in (lambda: decode(step, "native"), lambda: kernels.use("native")):
        with pytest.raises(EigenAttnError, match=r"no C[+][+] compiler"):
            choose()


def test_a_compiler_that_fails_is_told(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("EIGENATTN_CACHE", str(tmp_path))
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo "bad luck" >&2; exit 1; }\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert "bad luck" in str(native_library.unavailable())
    assert list(tmp_path.iterdir()) == [compiler]  # nothing half-built


@native
def test_it_is_compiled_once(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("EIGENATTN_CACHE", str(tmp_path))
    monkeypatch.setenv("EIGENATTN_NATIVE_FLAGS", "-O1")
    assert native_library.unavailable() is None
    (built,) = tmp_path.iterdir()
    then = built.stat().st_mtime_ns
    native_library.library.cache_clear()
    assert native_library.unavailable() is None
    assert built.stat().st_mtime_ns == then
    assert kernels.decoding_step_reason() == "native"
