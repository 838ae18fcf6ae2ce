"""Decoding over latents: both backends against loops, with everything that is not to be read or is still to be written
set to NaN, and the fused kernel compiled for a GPU that need not be there."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny import levels_between, packed_rows

from eigenattn import EigenAttnError
from eigenattn.cache.packing import Widths, pack
from eigenattn.kernels.decoding import Rotary, Side, Step, Window, why_not
from eigenattn.kernels.decoding import decode as decode_step
from eigenattn.kernels.decoding.pieces import couples_of, cut, pieces, pieces_of
from eigenattn.kernels.decoding.programs import MOST_SPLITS, SHORTEST_SPLIT, Programs, programs_for, split_sequence
from eigenattn.kernels.native_library import unavailable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
without_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
without_compiler = pytest.mark.skipif(unavailable() is not None, reason=f"no native kernels: {unavailable()}")
BACKENDS = ["torch", pytest.param("triton", marks=without_triton)]
if DEVICE == "cpu":
    BACKENDS.append(pytest.param("native", marks=without_compiler))
NAN = float("nan")

# B, H, G, S, D, R_k, R_v, window slots (0 for none), positions, dtype
CASES = {
    "small-space": (2, 4, 4, 37, 16, 8, 16, 0, "none", torch.float32),
    "small-space-window": (3, 6, 2, 41, 24, 40, 9, 5, "none", torch.float32),
    "alibi": (2, 3, 1, 33, 16, 12, 8, 0, "alibi", torch.float32),
    "alibi-window": (2, 3, 3, 19, 16, 16, 12, 18, "alibi", torch.float32),
    "rotary": (2, 6, 2, 35, 32, 24, 8, 0, "rotary", torch.float32),
    "rotary-window": (3, 4, 2, 50, 40, 56, 72, 7, "rotary", torch.float32),
    "rotary-partial": (2, 8, 1, 33, 48, 8, 40, 3, "partial", torch.float32),
    "rotary-interleaved": (2, 4, 4, 18, 16, 8, 8, 4, "interleaved", torch.float32),
    "bf16": (2, 6, 2, 35, 32, 24, 16, 6, "rotary", torch.bfloat16),
    "fp16": (2, 6, 2, 35, 32, 24, 16, 6, "none", torch.float16),
    "long-rotary": (1, 4, 2, 300, 32, 24, 16, 6, "rotary", torch.float32),
    "many-rotary": (2, 8, 4, 35, 40, 24, 56, 5, "partial", torch.float32),
    "many-alibi": (2, 4, 4, 35, 16, 24, 40, 5, "alibi", torch.float32),
}


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch):
    """Uninitialised memory is NaN."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def decode(backend: str, **arguments) -> torch.Tensor:
    """A step with these arguments."""
    return decode_step(Step(**arguments), backend)


def rotary_of(kind: str, d: int) -> Rotary | None:
    width = d // 2 if kind == "partial" else d
    if kind not in ("rotary", "partial", "interleaved"):
        return None
    frequencies = 50.0 ** -(torch.arange(0, width, 2) / width)
    return Rotary(frequencies.to(DEVICE), 1.0 if kind == "rotary" else 1.2, interleaved=kind == "interleaved")


def problem(name: str, widths: Widths | None = None) -> dict:
    """A step of decoding with ragged rows, the unused ends of which are NaN."""
    b, h, g, s, d, rank_k, rank_v, slots, positions, dtype = CASES[name]
    torch.manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, device=DEVICE).to(dtype)

    length = torch.tensor([s, s // 2, 4][:b], dtype=torch.int32, device=DEVICE)
    first = torch.tensor([3, 0, 1][:b], dtype=torch.int32, device=DEVICE)
    unused = torch.arange(s, device=DEVICE) >= length[:, None]
    extra = {}
    if widths is None:
        latents = [normal(b, g, s, rank) for rank in (rank_k, rank_v)]
        for z in latents:
            z[unused[:, None].expand(b, g, s)] = NAN
            z[0, :, :3] = NAN  # before the first column
    else:
        rank_k = rank_v = widths.channels
        latents = [packed_rows(widths, b, g, s).to(DEVICE) for _ in range(2)]
        low = torch.randn(g, rank_k) - 2
        levels = levels_between(low, low + 2 + 4 * torch.rand(g, rank_k), widths).to(DEVICE)
        extra = {"widths": widths, "levels": levels}
    window = None
    if slots:
        # The window begins some columns before what is latent ends, and has a free slot in front and one behind.
        window = Window(normal(b, g, slots, d), normal(b, g, slots, d), length - 2, length - 2 + slots - 1)
        window.keys[:, :, -1] = window.values[:, :, -1] = NAN
        window.keys[:, :, 0] = window.values[:, :, 0] = NAN
    return {
        "q": normal(b, h, d),
        "rows": tuple(latents),
        "keys": Side(0, normal(g, rank_k, d) / rank_k**0.5, normal(g, d), **extra),
        "values": Side(1, normal(g, rank_v, d) / rank_v**0.5, normal(g, d), **extra),
        "scale": 0.4,
        "length": length,
        "first": first,
        "positions": torch.arange(s + slots, device=DEVICE) - first[:, None],
        "query": length - first + slots,
        "rotary": rotary_of(positions, d),
        "slopes": torch.rand(h, device=DEVICE) if positions == "alibi" else None,
        "window": window,
    }


def assert_same(found: torch.Tensor, arguments: dict) -> None:
    expected = decode("reference", **arguments)
    assert found.dtype == expected.dtype
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    limit = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}[found.dtype]
    if DEVICE == "cuda" and found.dtype == torch.float32 and arguments["rows"][0].shape[2] > 100:
        limit *= 2  # blocks are longer there, and angles of far positions differ by how they are summed
    if DEVICE == "cuda" and found.dtype != torch.float32 and arguments["keys"].widths is not None:
        limit *= 1.5  # codes become numbers by arithmetic in 16 bits there
    assert error < limit


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_backends_equal_the_reference(name, backend):
    arguments = problem(name)
    if name == "fp16" and backend == "native":
        assert "float32" in str(why_not(Step(**arguments)))
        return
    assert_same(decode(backend, **arguments), arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "widths",
    [
        Widths.of({8: 3, 4: 10, 2: 7}),
        Widths.of({8: 2, 6: 7, 4: 5, 2: 3}, scaled=True),
        Widths.of({4: 21}),
        Widths.of({6: 20}, scaled=True),
        Widths.of({5: 10, 4: 5, 3: 11, 1: 9}, scaled=True),
        Widths.of({1: 17}, scaled=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["small-space-window", "rotary", "bf16", "fp16"])
def test_packed_codes(name, widths, backend):
    arguments = problem(name, widths)
    if why_not(Step(**arguments)) and backend == "native":
        pytest.skip("the native step has no fp16")
    assert_same(decode(backend, **arguments), arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_full_rank_needs_no_decoder(backend):
    arguments = problem("rotary-window")
    b, g, s, d = 3, 2, 50, 40
    arguments["rows"] = torch.randn(b, g, s, d, device=DEVICE), torch.randn(b, g, s, d, device=DEVICE)
    arguments |= {"keys": Side(0), "values": Side(1)}
    assert_same(decode(backend, **arguments), arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_folded_projections_leave_values_in_their_space(backend):
    arguments = problem("small-space")
    arguments |= {"keys": Side(0), "values": Side(1), "q": arguments["q"][..., :8].contiguous()}
    assert decode(backend, **arguments).shape == (2, 4, 16)
    assert_same(decode(backend, **arguments), arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_sees_nothing_gives_zeros(backend):
    arguments = problem("small-space")
    arguments["length"] = arguments["first"].clone()
    assert torch.equal(decode(backend, **arguments), torch.zeros(2, 4, 16, device=DEVICE))


@pytest.mark.parametrize("backend", BACKENDS)
def test_far_positions_and_room_to_spare(backend):
    """Only distances matter: moving queries and keys by 100,000 positions changes little more than fp32 rounds."""
    arguments = problem("rotary-window")
    moved = arguments | {
        "query": arguments["query"] + 100_000,
        "positions": torch.nn.functional.pad(arguments["positions"] + 100_000, (0, 14)),
    }
    # The latents as a static cache holds them: a part of a tensor with room for more, tokens before heads.
    rows = []
    for row in arguments["rows"]:
        room = torch.full((3, 64, 2, row.shape[-1]), NAN, device=DEVICE)
        room[:, :50] = row.transpose(1, 2)
        rows.append(room.transpose(1, 2))
    moved["rows"] = tuple(rows)
    expected = decode("reference", **arguments)
    torch.testing.assert_close(decode(backend, **moved), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["small-space-window", "rotary-partial", "rotary-interleaved"])
def test_bases_through_the_origin(name, backend):
    arguments = problem(name)
    arguments |= {side: replace(arguments[side], mean=None) for side in ("keys", "values")}
    assert_same(decode(backend, **arguments), arguments)


@pytest.mark.parametrize("name", ["small-space-window", "alibi-window", *(n for n in CASES if n.startswith("rotary"))])
def test_other_dtypes_than_that_of_the_fast_way(name):
    """PyTorch's own operations have one way for fp32 on a CPU, and one for everything else."""
    arguments = problem(name)
    expected = decode("reference", **arguments)

    def wide(x):
        return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    for side in ("keys", "values"):
        arguments[side] = Side(arguments[side].row, wide(arguments[side].decoder), wide(arguments[side].mean))
    if arguments["window"] is not None:
        window = arguments["window"]
        arguments["window"] = replace(window, keys=wide(window.keys), values=wide(window.values))
    arguments |= {"rows": tuple(map(wide, arguments["rows"])), "q": wide(arguments["q"])}
    found = decode("torch", **arguments)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["rotary", "rotary-window", "rotary-interleaved", "full-rank"])
def test_what_the_cache_holds_stays_as_it_is(name, backend):
    arguments = problem("rotary-window" if name == "full-rank" else name)
    if name == "full-rank":
        arguments["rows"] = tuple(torch.randn(3, 2, 50, 40, device=DEVICE) for _ in range(2))
        arguments |= {"keys": Side(0), "values": Side(1)}
    window = arguments["window"]
    held = [*arguments["rows"], arguments["q"], *(() if window is None else (window.keys, window.values))]
    before = [x.clone() for x in held]
    decode(backend, **arguments)
    for now, then in zip(held, before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["rotary", "rotary-window", "rotary-interleaved"])
def test_positions_with_gaps(name, backend):
    """Padding inside a row, packed texts and images: each column has a position of its own."""
    arguments = problem(name)
    steps = torch.randint(0, 4, arguments["positions"].shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    arguments["positions"] = steps.cumsum(-1) + 40 * (torch.arange(steps.shape[1], device=DEVICE) > 9)
    assert_same(decode(backend, **arguments), arguments)
    same_for_all = arguments | {"positions": arguments["positions"][:1]}
    assert_same(decode(backend, **same_for_all), same_for_all)


def in_rows(arguments: dict) -> dict:
    """The same with positions in three rows, which differ in an image and not in the text around it."""
    b, columns = arguments["positions"].shape
    column = torch.arange(columns, device=DEVICE)
    place, inside = (column - 5).clamp(0, 20), (column >= 5) & (column < 25)
    of_image = torch.stack([torch.zeros_like(place), place // 4, 9 * (place % 4)], dim=-1)
    text = column - 20 * (column >= 25) + 9 * (column >= 25)
    positions = torch.where(inside[:, None], 5 + of_image, text[:, None])
    rotary = arguments["rotary"]
    row = torch.tensor([2, 0, 1] * columns, device=DEVICE)[: rotary.width // 2]
    query = (arguments["query"] + 2)[:, None].expand(b, 3)
    positions = positions.expand(b, -1, -1) + torch.arange(b, device=DEVICE)[:, None, None]
    return arguments | {"positions": positions, "query": query, "rotary": replace(rotary, rows=row)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["rotary", "rotary-window", "rotary-interleaved", "rotary-partial", "bf16"])
def test_positions_in_rows(name, backend):
    """Those of an image's tokens are of the time, the height and the width, and each pair turns by one of them."""
    arguments = in_rows(problem(name))
    assert_same(decode(backend, **arguments), arguments)
    same_for_all = arguments | {"positions": arguments["positions"][:1], "query": arguments["query"][:1]}
    assert_same(decode(backend, **same_for_all), same_for_all)
    expected = decode("reference", **same_for_all)
    other = same_for_all | {"rotary": replace(arguments["rotary"], rows=1 - arguments["rotary"].rows % 2)}
    assert (decode("reference", **other) - expected).norm() > 1e-2 * expected.norm()  # rows count


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("name", ["rotary", "rotary-window"])
def test_rows_of_one_position_are_one_row(name, backend):
    """A text's tokens have the same position in all rows."""
    arguments = problem(name)
    rows = {name: arguments[name].unsqueeze(-1).expand(*arguments[name].shape, 3) for name in ("positions", "query")}
    row = torch.arange(arguments["rotary"].width // 2, device=DEVICE) % 3
    rows["rotary"] = replace(arguments["rotary"], rows=row)
    assert_same(decode(backend, **arguments | rows), arguments)


@pytest.mark.parametrize("name", ["small-space-window", "alibi", "rotary", "rotary-window"])
def test_evicted_tokens(name):
    """Each head has rows of its own tokens; a mask, slopes and positions are of columns."""
    arguments = problem(name)
    b, g, s = arguments["rows"][0].shape[:3]
    arguments["rows"] = tuple(torch.randn(*row.shape, device=DEVICE) for row in arguments["rows"])
    drawn = torch.rand(b, g, 3 * s, generator=torch.Generator().manual_seed(0)).argsort(-1)[..., :s]
    columns = drawn.sort(-1).values.to(DEVICE)
    slots = 0 if arguments["window"] is None else arguments["window"].keys.shape[2]
    total = 3 * s + slots
    mask = torch.rand(b, 1, total, device=DEVICE) > 0.2
    arguments |= {"first": None, "length": 3 * s, "columns": columns, "mask": mask}
    arguments["positions"] = torch.arange(total, device=DEVICE).expand(b, -1)
    if slots:
        window = arguments["window"]
        near = (torch.randn(*window.keys.shape, device=DEVICE) for _ in range(2))
        arguments["window"] = Window(*near, 3 * s - 2, total - 2)
    assert_same(decode("torch", **arguments), arguments)


def test_reference_against_formulas():
    """One head, no window: softmax of `q . rotate(mean + z U)` over the columns seen."""
    arguments = problem("rotary")
    row, head, g = 1, 4, 1
    z_k, z_v = (stored[row, g, :17] for stored in arguments["rows"])
    k = z_k @ arguments["keys"].decoder[g] + arguments["keys"].mean[g]
    angles = torch.arange(17, device=DEVICE)[:, None] * arguments["rotary"].inverse_frequencies
    turn = torch.polar(torch.ones_like(angles), angles)
    angle = float(arguments["query"][row]) * arguments["rotary"].inverse_frequencies
    own = torch.complex(*arguments["q"][row, head].chunk(2)) * torch.polar(torch.ones_like(angle), angle)
    q = torch.cat([own.real, own.imag])
    pairs = torch.complex(k[:, :16], k[:, 16:]) * turn
    k = torch.cat([pairs.real, pairs.imag], dim=-1)
    weights = (k @ q * 0.4).softmax(0)
    expected = weights @ z_v @ arguments["values"].decoder[g] + arguments["values"].mean[g]
    torch.testing.assert_close(decode("reference", **arguments)[row, head], expected)


def test_ranks_are_cut_with_little_waste():
    assert [cut(size) for size in (8, 64, 72, 80, 88, 96, 112, 120)] == [
        (16,), (64,), (64, 32), (64, 32), (64, 32), (64, 32), (128,), (128,),
    ]  # fmt: skip
    for size in range(8, 257, 8):
        assert size <= sum(cut(size)) < size + 32


@pytest.mark.parametrize(
    "counts",
    [{8: 3, 6: 5, 4: 10, 2: 7}, {8: 24, 6: 8, 4: 40, 2: 16}, {6: 13, 5: 3, 3: 5, 2: 2, 1: 11}, {8: 128}, {4: 1}],
    ids=str,
)
def test_couples_find_all_codes(counts):
    widths = Widths.of(counts)
    codes = torch.stack([torch.randint(0, 2**bits, (50,)) for bits in widths.each()], dim=-1)
    packed = pack(codes.to(torch.uint8), widths).int()
    couples = couples_of(widths)
    assert sorted(channel for couple in couples for channel in couple.channels) == list(range(widths.channels))
    plan = pieces_of(couples)
    assert sum(piece.size for piece in plan) >= 2 * len(couples)
    for i, couple in enumerate(couples):
        upper, lower = ((packed[:, part.byte] * part.factor >> 8) & part.mask for part in (couple.upper, couple.lower))
        for half, channel in enumerate(couple.channels):
            parts = [word >> 16 * half & 0xFFFF for word in (upper, lower)]
            assert torch.equal(couple.weight * parts[0] + parts[1], codes[:, channel])
        [piece] = (piece for piece in plan if piece.start <= 2 * i < piece.start + piece.size)
        assert piece.parts == 2 or not couple.weight


def test_the_sequence_is_split_over_the_processors():
    for tokens, heads in ((0, 1), (1, 300), (5000, 4), (100_000, 128), (10**6, 1)):
        splits = split_sequence(tokens, heads, together=528)
        assert 1 <= splits <= MOST_SPLITS
        assert splits == 1 or splits * SHORTEST_SPLIT < tokens + SHORTEST_SPLIT


def test_programs_fit_into_shared_memory():
    hopper, small = 232_448, 101_376
    plain, large = pieces(80), pieces(512)
    coded = pieces_of(couples_of(Widths.of({8: 8, 4: 40})))
    assert programs_for(True, plain, plain, 128, 2, hopper) == (Programs(64, 4, 3, 2), True)
    assert programs_for(True, plain, plain, 128, 2, small) == (Programs(64, 4, 3, 2), True)
    assert programs_for(False, plain, plain, 128, 2, hopper) == (Programs(32, 4, 3, 4), True)
    assert programs_for(False, coded, coded, 128, 2, small) == (Programs(64, 4, 2, 4, 128), True)
    assert programs_for(True, coded, coded, 128, 2, small) == (Programs(64, 4, 2, 2), True)
    assert programs_for(True, large, large, 512, 2, hopper) == (Programs(32, 4, 2, 2), False)
    assert programs_for(True, large, large, 512, 2, small)[0].block == 16
    assert programs_for(True, pieces(128), pieces(128), 128, 4, hopper) == (Programs(32, 4, 2, 2), False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["boolean", "boolean-heads", "additive", "additive-heads"])
@pytest.mark.parametrize("name", ["small-space", "rotary-window"])
def test_masks_and_soft_caps(name, kind, backend):
    arguments = problem(name)
    b, h, columns = len(arguments["q"]), arguments["q"].shape[1], 60
    shape = (b, h if kind.endswith("heads") else 1, columns)
    mask = torch.rand(shape, device=DEVICE) > 0.4 if kind.startswith("boolean") else torch.randn(shape, device=DEVICE)
    if kind == "boolean":
        mask[0] = False
        assert not decode(backend, **arguments, mask=mask)[0].any()  # it sees nothing
    masked = arguments | {"mask": mask, "softcap": 1.5}
    assert_same(decode(backend, **masked), masked)
    everything = decode("reference", **arguments)
    assert (decode(backend, **arguments, mask=mask) - everything).norm() > 0.05 * everything.norm()
    assert (decode(backend, **arguments, softcap=1.5) - everything).norm() > 0.05 * everything.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["small-space", "rotary-window", "many-rotary"])
def test_sinks_take_their_share(name, backend):
    arguments = problem(name)
    everything = decode("reference", **arguments)
    sinks = torch.randn(arguments["q"].shape[1], device=DEVICE)
    sinks[0], sinks[1] = 60.0, -60.0  # nearly all, and nothing
    found = decode(backend, **arguments, sinks=sinks)
    assert_same(found, arguments | {"sinks": sinks})
    torch.testing.assert_close(found[:, 1], everything[:, 1], rtol=1e-4, atol=1e-4)
    assert found[:, 0].abs().max() < 1e-3 * everything[:, 0].abs().max()
    hidden = torch.zeros(len(found), 1, 60, dtype=torch.bool, device=DEVICE)
    assert not decode(backend, **arguments, sinks=sinks, mask=hidden).any()  # nothing but sinks is seen


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("widths", [None, Widths.of({8: 4, 4: 8, 2: 4}, scaled=True)], ids=["plain", "packed"])
@pytest.mark.parametrize("sharing", [(4, 4), (1, 4), (2, 4), (1, 2), (2, 1)], ids=str)
@pytest.mark.parametrize("name", ["many-rotary", "many-alibi"])
def test_heads_share_latents(name, sharing, widths, backend):
    arguments = problem(name, widths)
    if name == "many-rotary":
        arguments["mask"] = torch.randn(2, 8, 60, device=DEVICE)
    rows = tuple(row[:, ::shared] for row, shared in zip(arguments["rows"], sharing, strict=True))
    arguments["rows"] = rows
    repeated = {"rows": tuple(row.repeat_interleave(shared, dim=1) for row, shared in zip(rows, sharing, strict=True))}
    if widths is not None:
        for side, shared in zip(("keys", "values"), sharing, strict=True):
            together = arguments[side].levels[::shared].repeat_interleave(shared, dim=0)
            arguments[side] = replace(arguments[side], levels=together)
    found = decode(backend, **arguments)
    assert_same(found, arguments)
    assert_same(found, arguments | repeated)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shared", [1, 4])
@pytest.mark.parametrize("name", ["many-rotary", "many-alibi"])
def test_keys_and_values_share_latents(name, shared, backend):
    arguments = problem(name)
    latents = arguments["rows"][0][:, ::shared]
    decoder = torch.randn(4, 24, arguments["q"].shape[-1], device=DEVICE)
    values = replace(arguments["values"], row=0, decoder=decoder)
    arguments |= {"rows": (latents,), "values": values}
    found = decode(backend, **arguments)
    assert_same(found, arguments)
    assert_same(found, arguments | {"rows": (latents, latents.clone()), "values": replace(values, row=1)})


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_codes_without_decoders(backend):
    """What folded projections leave: queries in the keys' small space, and outputs in that of the values."""
    arguments = problem("small-space", Widths.of({8: 4, 4: 8, 2: 4}))
    arguments |= {name: replace(arguments[name], decoder=None, mean=None) for name in ("keys", "values")}
    assert_same(decode(backend, **arguments), arguments)


@without_triton
def test_kernels_compile_for_a_gpu():
    """Interpreting proves the arithmetic; that the compiler takes the kernels too is seen without a GPU."""
    script = Path(__file__).parent / "compile_decoding.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["decode_splits", "combine"] * 5


def test_mistakes_are_told():
    arguments = problem("rotary")
    with pytest.raises(EigenAttnError, match="backend 'fast'"):
        decode("fast", **arguments)
    with pytest.raises(EigenAttnError, match="keys of rank 24"):
        decode("torch", **arguments | {"keys": replace(arguments["values"], row=0)})
    with pytest.raises(EigenAttnError, match="no decoder"):
        decode("torch", **arguments | {"keys": Side(0)})
    with pytest.raises(EigenAttnError, match="query heads"):
        decode("torch", **arguments | {"q": arguments["q"][:, :5]})
    with pytest.raises(EigenAttnError, match="need positions"):
        decode("torch", **arguments | {"positions": None})
    with pytest.raises(EigenAttnError, match="need positions"):
        decode("torch", **arguments | {"query": None})
    packed = problem("rotary", Widths.of({8: 1, 4: 2, 2: 3}))
    with pytest.raises(EigenAttnError, match="widths"):
        decode("torch", **packed | {"rows": (packed["rows"][0], torch.zeros(2, 2, 35, 9, dtype=torch.uint8))})
