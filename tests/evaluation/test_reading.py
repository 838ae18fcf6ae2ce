"""Reading windows: losses by hand, and comparison with another model's predictions."""

import pytest
import torch
from tiny import compressed, random_basis, tiny, tokens

from eigenattn.compression.folding import attach
from eigenattn.errors import EigenAttnError
from eigenattn.evaluation.paired import mean
from eigenattn.evaluation.reading import read, scored_tokens, through_cache, windows_of
from eigenattn.models.conversion import convert_attention, eigen_layers


@pytest.fixture(scope="module")
def models():
    original, compressed = tiny("llama"), tiny("llama")
    convert_attention(compressed)
    for attention in eigen_layers(compressed):
        attach(attention, [random_basis(attention, 8, centred=True)], window=4)
    return original, compressed


@torch.no_grad()
def test_comparison_by_hand(models):
    original, compressed = models
    windows = tokens(3, 24)
    base = read(original, windows, keep=True)
    found = read(compressed, windows, original=base.predictions)
    p, q = (model(windows).logits[:, :-1].double().log_softmax(-1) for model in models)
    divergence = (p.exp() * (p - q)).sum(-1).mean(-1)
    agreement = (p.argmax(-1) == q.argmax(-1)).double().mean(-1)
    assert found.divergence == pytest.approx(divergence.tolist(), rel=1e-3)
    assert found.agreement == pytest.approx(agreement.tolist())
    assert min(found.divergence) > 0.01
    nll = -q.gather(-1, windows[:, 1:, None])[..., 0].mean(-1)
    assert found.nll == pytest.approx(nll.tolist(), rel=1e-4)
    assert found.tokens == 3 * 23


def test_a_model_agrees_with_itself(models):
    windows = tokens(2, 24)
    base = read(models[1], windows, keep=True)
    again = read(models[1], windows, original=base.predictions, logits_of=through_cache)
    assert again.divergence == pytest.approx([0, 0], abs=1e-6)
    assert again.agreement == [1, 1]


def test_few_distributions_are_kept_of_much_text(models, monkeypatch):
    monkeypatch.setattr("eigenattn.evaluation.reading.KEPT_DISTRIBUTIONS", 8)
    windows = tokens(4, 24)
    base = read(models[0], windows, keep=True).predictions
    assert base.log_probabilities.shape[:2] == (4, 2)
    assert base.positions.tolist() == [0, 22]
    assert base.top1.shape == (4, 23)
    assert len(read(models[1], windows, original=base).divergence) == 4


@torch.no_grad()
def test_a_stride_scores_no_token_twice(models):
    text = tokens(1, 100)[0]
    windows = windows_of(text, 90, 40, 25)
    assert windows.shape == (3, 40)
    assert windows[1, 0] == text[25]
    found = read(models[0], windows, scored=scored_tokens(40, 25))
    # The tokens scored lie side by side: 15 .. 39, 40 .. 64, 65 .. 89.
    losses = []
    for start in (0, 25, 50):
        logs = models[0](text[None, start : start + 40]).logits[0].log_softmax(-1)
        losses += [-logs[i - 1 - start, text[i]].item() for i in range(start + 15, start + 40)]
    assert mean(found.nll).value == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found.tokens == 75


def test_windows_lie_side_by_side_by_default():
    text = torch.arange(100)
    assert torch.equal(windows_of(text, 100, 30), torch.arange(90).view(3, 30))
    assert scored_tokens(30) == scored_tokens(30, 30) == 29
    with pytest.raises(EigenAttnError, match="stride"):
        windows_of(text, 100, 30, 31)
    with pytest.raises(EigenAttnError, match="one window"):
        windows_of(text, 29, 30)


@torch.no_grad()
def test_tokens_that_a_model_rules_out():
    """By logits of -inf, as some do with the padding of their vocabulary."""

    def without_some(model, ids, keep):
        return model(ids).logits[:, -keep:].masked_fill(torch.arange(128) < 3, -torch.inf)

    base = read(tiny("llama"), tokens(2, 12), logits_of=without_some, keep=True)
    found = read(compressed("llama", 4), tokens(2, 12), logits_of=without_some, original=base.predictions)
    assert min(found.divergence) > 0
    assert max(found.divergence) < 1e3
