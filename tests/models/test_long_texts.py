"""Long texts are read a chunk at a time: to the same end, and within bounds."""

import pytest
import torch
from helpers import close, generate, has_static, in_pieces, padded, windows
from tiny import compressed, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, StaticCache

from eigenattn import kernels
from eigenattn.kernels import chunked
from eigenattn.kernels.native_library import multiplies
from eigenattn.kernels.reference import attend, causal_mask

CASES = [("llama", 0), ("llama", 6), ("llama-yarn", 6), ("cohere-norm", 6), ("gemma2", 6), ("gemma3", 0)]
CASES += [("mistral-sliding", 0), ("mistral-sliding", 6), ("opt", 0), ("opt", 6), ("mpt", 0), ("mpt", 6)]
CASES += [("bloom", 6), ("falcon-alibi", 6), ("stablelm", 6), ("phi3-partial", 6)]
cases = pytest.mark.parametrize(("name", "window"), CASES)


@pytest.fixture(params=["auto", "torch"], autouse=True)
def backend(request):
    """The native library where the machine has one that takes prompts, and PyTorch's operations."""
    if request.param == "auto" and not multiplies():
        pytest.skip("this machine multiplies no matrices of bf16, and PyTorch reads prompts")
    before = kernels.use(request.param)
    yield
    kernels.use(before)


@pytest.fixture
def chunks(monkeypatch):
    """A function that makes chunks small, which counts them; before it is called all fits in one.

    Every test that has it reads some in the end.
    """
    calls = []
    plain = chunked.attend_far

    def begin(chunk=7):
        monkeypatch.setattr(chunked, "CHUNK", chunk)
        monkeypatch.setattr(chunked, "QUERY_BLOCK", 5)
        monkeypatch.setattr(chunked, "BAND", 4)
        monkeypatch.setattr(chunked, "attend_far", lambda *a, **k: calls.append(1) or plain(*a, **k))
        return calls

    yield begin
    assert calls


@torch.no_grad()
@cases
def test_chunks_change_nothing(name, window, chunks):
    model, ids = compressed(name, window), tokens(2, 40)
    whole = model(ids, use_cache=False).logits
    calls = chunks()
    close(model(ids, use_cache=False).logits, whole)
    assert len(calls) == 3
    close(in_pieces(model, ids, DynamicCache(config=model.config), [3, 17, 1, 19]), whole)
    if has_static(name):
        close(in_pieces(model, ids, StaticCache(config=model.config, max_cache_len=48), [20, 1, 19]), whole)


@torch.no_grad()
@pytest.mark.parametrize(("name", "window"), [("llama", 0), ("llama", 6), ("opt", 6), ("mpt", 6), ("gemma2", 6)])
def test_left_padding(name, window, chunks):
    model, ids = compressed(name, window), tokens(2, 30)
    whole = model(ids).logits
    chunks()
    with_room, mask = padded(ids, 5)
    options = {"attention_mask": mask}
    if name in ("llama", "gemma2"):
        options["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    close(model(with_room, **options).logits[:, 5:], whole)


@torch.no_grad()
@pytest.mark.parametrize("share", ["1", "1kv"])
@windows
@pytest.mark.parametrize("name", ["llama", "mpt"])
def test_quantised_latents(name, window, share, chunks):
    # Norms and angles are fp32 even so: with another seed a latent may lie as near to the middle of two codes as that.
    model, ids = compressed(name, window, coded=True, share=share).double(), tokens(2, 40, seed=2)
    whole = model(ids, use_cache=False).logits
    chunks()
    close(in_pieces(model, ids, DynamicCache(config=model.config), [3, 17, 1, 19]), whole)


@torch.no_grad()
@pytest.mark.parametrize("share", ["2", "2kv", "1-2"])
@pytest.mark.parametrize(("name", "window"), [("llama", 6), ("llama", 0), ("opt", 6)])
def test_heads_that_share_latents(name, window, share, chunks):
    model, ids = compressed(name, window, share=share), tokens(2, 40)
    whole = model(ids, use_cache=False).logits
    chunks()
    close(in_pieces(model, ids, DynamicCache(config=model.config), [3, 17, 1, 19]), whole)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_tokens_whose_exact_form_is_gone(name, chunks):
    """After `crop` took back more than is kept, some tokens inside the window are known by their latents alone."""
    model, ids = compressed(name, 6), tokens(1, 60)
    found = []
    for chunk in (100, 7):
        chunks(chunk)
        cache = DynamicCache(config=model.config)
        for token in ids.split(1, dim=1):
            model(token, past_key_values=cache)
        cache.crop(-36)
        found.append(model(ids[:, 24:50], past_key_values=cache).logits)
    close(*found)


@torch.no_grad()
@windows
def test_generate(window, chunks):
    model, ids = compressed("llama", window), tokens(2, 30)
    whole = generate(model, ids, length=24)
    chunks()
    assert torch.equal(generate(model, ids, length=24), whole)
    assert torch.equal(generate(model, ids, length=24, prefill_chunk_size=11), whole)


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that any operation makes; views make none."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not function.is_view:
            sizes = [x.numel() * x.element_size() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
            self.bytes = max(self.bytes, *sizes, 0)
        return out


def largest_tensor(model, length):
    """Bytes of the largest tensor made in reading a text in pieces of 48 tokens, and of the largest in the cache."""
    cache = DynamicCache(config=model.config)
    with Largest() as found:
        for piece in tokens(2, length).split(48, dim=1):
            model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
    held = [x.untyped_storage().nbytes() for layer in cache.layers for x in (layer.keys, layer.values)]
    return found.bytes, max(held)


@torch.no_grad()
@pytest.mark.parametrize("quantised", [False, True], ids=["plain", "quantised"])
@pytest.mark.parametrize(("name", "window"), [("llama", 0), ("llama", 16), ("opt", 16), ("mpt", 16)])
def test_memory_is_that_of_the_cache_and_one_chunk(name, window, quantised, chunks):
    model = compressed(name, window, quantised, num_hidden_layers=1)
    at_once, held = largest_tensor(model, 480)
    mask = 2 * 48 * 480 * (4 if name == "mpt" else 1)  # transformers' own: additive for eager attention
    chunks(32)
    assert largest_tensor(model, 480)[0] <= max(largest_tensor(model, 144)[0], held, mask) < at_once


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("kind", ["causal", "boolean", "additive", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_and_its_log_sum_exp(kind, softcap, dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, 9, n).to(dtype) for h, n in ((6, 8), (2, 8), (2, 5)))
    mask = {"boolean": torch.rand(2, 1, 9, 9) > 0.3, "additive": torch.randn(1, 6, 9, 9).to(dtype)}.get(kind)
    whole = mask if mask is not None else causal_mask(9, 9, q.device) if kind == "causal" else torch.ones(9, 9).bool()
    expected, _ = attend(q.float(), k.float(), v.float(), mask=whole, scale=0.3, softcap=softcap)
    out, lse = chunked.attend_with_lse(q, k, v, mask=mask, causal=kind == "causal", scale=0.3, softcap=softcap)
    assert out.dtype == dtype and lse.dtype == torch.float32
    scores = q.float().view(2, 2, 3, 9, 8) @ k.float()[:, :, None].mT * 0.3
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.view(2, 6, 9, 9)
    scores = scores.masked_fill(~whole, -1e30) if whole.dtype == torch.bool else scores + whole
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    close(out.float(), expected, tolerance)
    close(lse, scores.logsumexp(-1, keepdim=True), tolerance)
