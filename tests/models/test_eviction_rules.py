"""Rules of eviction against their definitions, written out by loops over a layer that keeps everything; and one rule
from outside the package, which looks at all there is to look at."""

import pytest
import torch
from helpers import close, in_pieces, windows
from tiny import compressed, converted, some_bases, tokens

from eigenattn import EigenCache
from eigenattn.cache.rules import EVICTION_RULES, Rule
from eigenattn.compression.folding import attach
from eigenattn.models.rotary import rotate

BUDGET, LONG = 14, 40
# Prompts, turns and single tokens; SnapKV evicts after passes of 32 tokens, and keeps as many.
PIECES = [34, 1, 5, 1, 33, 1, 1]


def outside(held):
    """Of what got attention, and does now, what has large values and small keys."""
    keys, values = (held.by_head(x().float().norm(dim=-1)) for x in (held.keys, held.values))
    return (held.tally + held.by_head(held.attention(2).float().sum(-2))) * values / keys


@pytest.fixture
def outside_rule():
    """A rule that another package registers."""
    EVICTION_RULES["outside"] = Rule(outside, least=3, tally=lambda held: held.by_head(held.attention(1)[:, :, 0]))
    yield
    del EVICTION_RULES["outside"]


class Text:
    """One layer reads a text, and evicts from what it holds of each KV head by a rule of loops.

    All keys and values stay; `held` says which tokens behind the window each KV head still knows.
    """

    def __init__(self, attention, rule, budget):
        self.attention, self.rule, self.budget = attention, rule, budget
        self.window, self.groups = attention.layout.window, attention.num_key_value_groups
        self.held = [[] for _ in range(attention.kv_heads)]
        self.tally = [{} for _ in range(attention.kv_heads)]
        self.seen, self.vectors = 0, None

    def read(self, hidden):
        """The layer's output for a piece [1, T, C], after which it evicts."""
        layer, first, length = self.attention, self.seen, hidden.shape[1]
        heads = layer.project(hidden)
        self.seen += length
        q, k, v = heads
        latents = layer.encode(k, v)
        self.far_keys, far_values = layer.decode(latents[0], "key"), layer.decode(latents[1], "value")
        far_keys = self.far_keys
        if layer.rotates:
            angles = layer.angles(hidden, torch.arange(first, self.seen)[None])
            q, k, far_keys = (rotate(x, *angles) for x in (q, k, far_keys))
        new = [x[0] for x in (k, v, far_keys, far_values, self.far_keys)]
        before = self.vectors or [x[:, :0] for x in new]
        self.vectors = [torch.cat(pair, dim=1) for pair in zip(before, new, strict=True)]
        k, v, far_keys, far_values, self.plain_keys = self.vectors
        self.plain_values = far_values
        border = max(self.seen - self.window, 0)
        for held in self.held:
            held.extend(range(max(first - self.window, 0), border))
        # Weights of each query head, by query of this pass and token, seen exactly or through its latent.
        self.weights, rows = [], []
        for h in range(layer.heads):
            g, found = h // self.groups, []
            known = self.held[g] + list(range(border, self.seen))
            weights = {}
            for m in range(first, self.seen):
                sees = [n for n in known if n <= m]
                exact = [m - n < self.window for n in sees]
                keys = torch.stack([(k if near else far_keys)[g, n] for n, near in zip(sees, exact, strict=True)])
                values = torch.stack([(v if near else far_values)[g, n] for n, near in zip(sees, exact, strict=True)])
                shares = (keys @ q[0, h, m - first] * layer.scaling).softmax(0)
                found.append(shares @ values)
                weights |= {(m, n): share for n, share in zip(sees, shares.tolist(), strict=True)}
            rows.append(torch.stack(found))
            self.weights.append(weights)
        self.queries = range(first, self.seen)
        self.evict()
        return layer.output_projection(torch.cat(rows, dim=-1))[None]

    def weight(self, h, m, n):
        return self.weights[h].get((m, n), 0.0)

    def heads_of(self, g):
        return range(g * self.groups, (g + 1) * self.groups)

    def count(self, queries):
        """Add the attention of queries to the tallies, as a mean over the heads that share keys."""
        for g, tally in enumerate(self.tally):
            for n in self.held[g]:
                got = [sum(self.weight(h, m, n) for m in queries) for h in self.heads_of(g)]
                tally[n] = tally.get(n, 0.0) + sum(got) / len(got)

    def evict(self):
        kept = self.budget - self.window
        scores = self.rule(self, kept)
        if scores is None:
            return
        for g, held in enumerate(self.held):
            order = sorted(range(len(held)), key=lambda i: (-scores[g][i], i))[:kept]
            self.held[g] = sorted(held[i] for i in order)


INFINITE = float("inf")


def streaming(text, kept):
    return [[INFINITE if n < 4 else n for n in held] for held in text.held]


def snapkv(text, kept):
    if len(text.queries) < 32:
        return None
    scores = []
    for g, held in enumerate(text.held):
        votes = [sum(text.weight(h, m, n) for h in text.heads_of(g) for m in text.queries[-32:]) for n in held]
        pooled = [max(votes[max(i - 3, 0) : i + 4]) for i in range(len(held))]
        scores.append([INFINITE if n >= text.seen - 32 else vote for n, vote in zip(held, pooled, strict=True)])
    return scores


def tova(text, kept):
    last = text.seen - 1
    return [[sum(text.weight(h, last, n) for h in range(text.attention.heads)) for n in held] for held in text.held]


def h2o(text, kept):
    text.count(text.queries)
    recent = [held[len(held) - kept // 2 :] for held in text.held]
    return [[INFINITE if n in recent[g] else text.tally[g][n] for n in held] for g, held in enumerate(text.held)]


def knorm(text, kept):
    return [[-float(text.plain_keys[g, n].norm()) for n in held] for g, held in enumerate(text.held)]


def keydiff(text, kept):
    scores = []
    for g, held in enumerate(text.held):
        unit = [text.plain_keys[g, n] / text.plain_keys[g, n].norm() for n in held]
        mean = sum(unit) / max(len(unit), 1)
        scores.append([-float(x @ mean / mean.norm()) for x in unit])
    return scores


def outside_by_loops(text, kept):
    text.count(text.queries[-1:])
    scores = []
    for g, held in enumerate(text.held):
        now = [sum(text.weight(h, m, n) for h in text.heads_of(g) for m in text.queries[-2:]) for n in held]
        sizes = [text.plain_values[g, n].norm() / text.plain_keys[g, n].norm() for n in held]
        scores.append(
            [
                float((text.tally[g][n] + each / text.groups) * size)
                for n, each, size in zip(held, now, sizes, strict=True)
            ]
        )
    return scores


BY_LOOPS = {
    "streaming": streaming,
    "snapkv": snapkv,
    "tova": tova,
    "h2o": h2o,
    "knorm": knorm,
    "keydiff": keydiff,
    "outside": outside_by_loops,
}


def test_every_rule_has_its_definition(outside_rule):
    assert set(BY_LOOPS) == set(EVICTION_RULES)


@torch.no_grad()
@windows
@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("evict", BY_LOOPS)
def test_against_the_definition(evict, name, window, outside_rule):
    model, (attention,) = converted(name, num_hidden_layers=1)
    attach(attention, some_bases(attention), window)  # maps that are not folded: `Text` reads them
    model, budget = model.double(), LONG if evict == "snapkv" else BUDGET
    cache, text = EigenCache(model.config, evict=evict, budget=budget), Text(attention, BY_LOOPS[evict], budget)
    hidden = torch.randn(1, sum(PIECES), 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start, evictions = 0, 0
    for size in PIECES:
        piece, positions = hidden[:, start : start + size], torch.arange(start, start + size)[None]
        options = {"past_key_values": cache, "attention_mask": None}
        if size > 1 and start:  # the model gives a mask where it is not plainly causal
            options["attention_mask"] = torch.ones(size, start + size).tril(start).bool()[None, None]
        if attention.rotates:
            options |= {"position_ids": positions, "position_embeddings": attention.angles(piece, positions)}
        found, _ = attention(piece, **options)
        close(found, text.read(piece), 1e-6)  # angles are in fp32

        layer = cache.layers[0]
        if layer.columns is not None:
            evictions += 1
            assert layer.columns[0].tolist() == text.held
        start += size
    assert evictions >= (2 if evict == "snapkv" else 5)
    assert cache.get_seq_length() == start


@torch.no_grad()
@windows
@pytest.mark.parametrize("share", ["1", "2", "1-2", "2kv"])
@pytest.mark.parametrize("coded", [False, True])
def test_a_rule_from_outside_in_every_model(coded, share, window, outside_rule):
    model, ids = compressed("llama", window, coded, share), tokens(2, 60)
    cache = EigenCache(model.config, evict="outside", budget=20)
    assert in_pieces(model, ids, cache, [40, 1, 12, *[1] * 7]).isfinite().all()
    assert cache.kept_tokens == 20
    for layer in cache.layers:
        # Each row has a tally of its own, and heads that share latents keep the same tokens.
        assert layer.columns.shape == (2, 2 if share == "1" else 1, 20 - window)
        assert (layer.columns.diff() > 0).all()
