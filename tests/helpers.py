"""What more than one test module does with models and commands; models themselves are made in `tiny.py`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from packaging.version import Version
from tiny import tiny, tokens
from torch import nn
from transformers import DynamicCache, StaticCache, cache_utils
from transformers.cache_utils import Cache
from typer.testing import CliRunner

from eigenattn.cache.size import allocated_bytes, cache_bytes
from eigenattn.cli import app
from eigenattn.models.conversion import layouts_of

TOLERANCE = 1e-4
LENGTH, WINDOW = 30, 6
# Grouped queries, rotary in part and scaled, norms, learned positions, ALiBi, fused projections, sliding windows.
VARIED = ["llama", "phi3-partial", "qwen3", "opt", "mpt", "bloom", "gpt_neox", "gemma3", "mistral-sliding"]
names = pytest.mark.parametrize("name", VARIED)
windows = pytest.mark.parametrize("window", [0, WINDOW])
# Where the original itself fails: Falcon's ALiBi does not fit a static cache's mask.
NO_STATIC_CACHE = {"falcon-alibi"}
# Nor did BLOOM's before transformers 5.21, unless the mask was as long as the cache: `generate` makes it so.
OLD_BLOOM = {"bloom"} if Version(transformers.__version__) < Version("5.21") else set()
NO_STATIC_CACHE_WITHOUT_MASK = NO_STATIC_CACHE | OLD_BLOOM
# A static cache in which every layer slides has no room for latents (see test_window.py).
ONLY_SLIDES = {"mistral-sliding"}


class Killed(BaseException):
    """What no handler of errors stops, as a signal that ends the process."""


def skip_without(backend: str) -> None:
    """Skip where the package of a quantised cache is absent, or this transformers has no such cache.

    It asks nothing of ours: whatever fails then is a fault.
    """
    package = {"quanto": "optimum-quanto", "hqq": "hqq"}.get(backend)
    if package is not None:
        try:
            version(package)
        except PackageNotFoundError:
            pytest.skip(f"{package} is not installed")
    if backend == "fp8" and not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this transformers has no fp8 cache")


def has_static(name: str, masked: bool = False) -> bool:
    """Whether a tiny model, compressed, reads through a static cache.

    Args:
        name: of the tiny model.
        masked: whether it is given an attention mask as long as the cache, as `generate` does.
    """
    fails = NO_STATIC_CACHE if masked else NO_STATIC_CACHE_WITHOUT_MASK
    return name not in fails | ONLY_SLIDES


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    """Assert that no element differs by more than the tolerance."""
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all that a model would save."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Whether tensors have equal names and equal bits."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def padded(ids: torch.Tensor, room: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Left padding in front of each row, and the attention mask."""
    pad = torch.zeros(ids.shape[0], room, dtype=ids.dtype)
    return torch.cat([pad, ids], 1), torch.cat([pad, torch.ones_like(ids)], 1)


@torch.no_grad()
def in_pieces(model: nn.Module, ids: torch.Tensor, cache: Cache, sizes: list[int]) -> torch.Tensor:
    """Logits of a text that goes through a cache in pieces."""
    logits, start = [], 0
    for size in sizes:
        end = start + size
        out = model(ids[:, start:end], past_key_values=cache, use_cache=True)
        logits.append(out.logits)
        start = end
    return torch.cat(logits, dim=1)


def generate(
    model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None, length: int = 12, **options
) -> torch.Tensor:
    """Ids with exactly `length` tokens behind them, the most likely unless `options` ask for others.

    Args:
        model: the model.
        ids: prompts [B, T].
        mask: attention mask [B, T]; None for prompts without padding.
        length: tokens to add.
        options: of `model.generate`, which they may override.
    """
    mask = torch.ones_like(ids) if mask is None else mask
    settings = {"do_sample": False, "max_new_tokens": length, "min_new_tokens": length, "pad_token_id": 0, **options}
    return model.generate(ids, attention_mask=mask, **settings)


@torch.no_grad()
def check_caches(model: nn.Module, name: str) -> None:
    """Through every kind of cache a model gives what it gives without one, and a cache takes the bytes planned.

    Args:
        model: compressed, in fp32.
        name: of the tiny model that it is made of.
    """
    ids = tokens(2, LENGTH)
    exact = model(ids, use_cache=False).logits
    assert (exact - tiny(name)(ids).logits).abs().max() > 1e-2
    close(in_pieces(model, ids, DynamicCache(config=model.config), [1] * LENGTH), exact)
    close(in_pieces(model, ids, DynamicCache(config=model.config), [13, 1, 16]), exact)
    if has_static(name):
        close(in_pieces(model, ids, StaticCache(config=model.config, max_cache_len=48), [20] + [1] * 10), exact)
    if name not in ("mistral-sliding", "gemma3"):  # whose sliding layers hold less
        cache = DynamicCache(config=model.config)
        in_pieces(model, ids, cache, [LENGTH - 1, 1])
        assert allocated_bytes(cache) == 2 * cache_bytes(layouts_of(model), 4, LENGTH)


@torch.no_grad()
def check_generation(model: nn.Module) -> None:
    """Greedy decoding and beams give the same with a cache and without one, and in padded batches."""
    short = tokens(1, 9)
    ids, mask = padded(short, 6)
    greedy = generate(model, short)
    assert torch.equal(generate(model, short, use_cache=False), greedy)
    assert torch.equal(generate(model, ids, mask)[:, 6:], greedy)
    assert torch.equal(generate(model, short, num_beams=3), generate(model, short, num_beams=3, use_cache=False))


def run(*arguments) -> str:
    """What a command of ours prints; it ends without an error."""
    result = CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def script(path: Path) -> ModuleType:
    """A script of the repository as a module; it may import its neighbours."""
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module
