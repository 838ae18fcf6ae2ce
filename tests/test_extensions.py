"""Another package adds to every registry, before a model is loaded, and nothing here has to know."""

import dataclasses

import pytest
import torch
from helpers import close, in_pieces
from tiny import LLAMA, TINY, some_bases, tiny, tokens
from transformers import DynamicCache

from eigenattn import EigenAttentionConfig, EigenCache, compress
from eigenattn.cache.packing import PARTS, Widths, pack, unpack
from eigenattn.cache.rules import EVICTION_RULES, Rule
from eigenattn.compression import quantise
from eigenattn.compression.folding import compress_layer
from eigenattn.compression.methods import BASES
from eigenattn.compression.ranks import RANK_RULES, RankRule
from eigenattn.evaluation.rivals import RIVALS, Rival
from eigenattn.kernels.decoding import DECODE_BACKENDS, decode
from eigenattn.models.conversion import convert_attention, eigen_layers
from eigenattn.models.families import FAMILIES
from eigenattn.models.family import Family


@torch.no_grad()
def test_a_family(monkeypatch):
    monkeypatch.setitem(FAMILIES, "phi", Family(title="Phi", attention="PhiAttention", output="dense"))
    monkeypatch.setitem(TINY, "phi", ("phi", {**LLAMA, "partial_rotary_factor": 0.5}))
    model, ids = tiny("phi"), tokens(2, 30)
    exact = model(ids).logits
    convert_attention(model)
    close(model(ids).logits, exact)
    for attention in eigen_layers(model):
        compress_layer(attention, some_bases(attention), 6)
    close(in_pieces(model, ids, DynamicCache(config=model.config), [13, *[1] * 17]), model(ids).logits)


def test_a_basis_and_a_rank_rule(monkeypatch):
    monkeypatch.setitem(BASES, "own", dataclasses.replace(BASES["eigen"], supports=frozenset({"window"})))
    rule = RankRule(lambda problem: [(4, 8)] * len(problem.spectra))
    monkeypatch.setitem(RANK_RULES, "own", rule)
    model = tiny("llama")
    report = compress(model, [tokens(2, 60)], EigenAttentionConfig(kv_ratio=0.5, basis="own", ranks="own", window=4))
    assert {tuple(latent["rank"] for latent in layer["latents"]) for layer in report.layers} == {(4, 8)}


@torch.no_grad()
def test_an_eviction_rule(monkeypatch):
    def large_values_that_were_seen(held):
        return held.tally * held.by_head(held.values().norm(dim=-1)) - held.by_head(held.keys()[..., 0])

    seen = Rule(large_values_that_were_seen, tally=lambda held: held.by_head(held.attention(held.queries).sum(-2)))
    monkeypatch.setitem(EVICTION_RULES, "own", seen)
    model, ids = tiny("llama"), tokens(2, 60)
    convert_attention(model)
    for attention in eigen_layers(model):
        compress_layer(attention, some_bases(attention), 6)
    cache = EigenCache(model.config, evict="own", budget=20)
    in_pieces(model, ids, cache, [40, *[1] * 20])
    assert cache.kept_tokens == 20


@torch.no_grad()
def test_a_width(monkeypatch):
    monkeypatch.setitem(PARTS, 7, (4, 2, 1))
    codes = torch.randint(128, (3, 11), dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes, Widths.of({7: 11})), Widths.of({7: 11})), codes)
    monkeypatch.setattr(quantise, "ALLOTTED", [0, 1, 3, 7])
    model, ids = tiny("llama"), tokens(2, 60)
    report = compress(model, [ids], EigenAttentionConfig(coded=True, kv_ratio=0.2, window=4))
    widths = {bits for layer in report.layers for latent in layer["latents"] for bits in latent["widths"]}
    assert "7" in widths and widths <= {"1", "3", "7"}
    model = model.double()
    exact = model(ids[:, :30], use_cache=False).logits
    close(in_pieces(model, ids[:, :30], DynamicCache(config=model.config), [13, *[1] * 17]), exact)


def test_a_rival(monkeypatch):
    class Half(Rival):
        """Stores nothing of every second channel."""

        def bits_per_element(self, head_dim):
            return 8.0

        def reading(self, layers, window):
            raise NotImplementedError

    monkeypatch.setitem(RIVALS, "half", Half("half", 16))
    assert Rival.of("half").bits_per_element(64) == 8


def test_a_backend_of_decoding(monkeypatch):
    calls = []
    monkeypatch.setitem(DECODE_BACKENDS, "own", lambda step: calls.append(step) or torch.zeros(1))
    with pytest.raises(Exception, match="unknown decoding backend"):
        decode(some_step(), "absent")
    decode(some_step(), "own")
    assert len(calls) == 1


def some_step():
    """A small step of decoding."""
    from eigenattn.kernels.decoding import Side, Step

    rows = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    return Step(q=torch.randn(1, 4, 8), rows=rows, keys=Side(0), values=Side(1), scale=0.3, length=5)
