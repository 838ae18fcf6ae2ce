"""What compressed models compute, recorded by one version of the package and compared with another's.

    python tests/equivalence.py record BEFORE.safetensors
    python tests/equivalence.py compare BEFORE.safetensors AFTER.safetensors

Tiny models of every kind are compressed and read in every way, through the public interface alone. Codes jump where a
latent lies in the middle of two, so that coded latents are of models in float64, whose rounding errors stay far below.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import tiny, tokens
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import eigenattn
from eigenattn import EigenAttentionConfig, EigenCache

Found = dict[str, Tensor]

WINDOW = 6
LENGTH = 40
PADDING = 8
# Logits are kept of the last positions, and of all in the mean.
LAST = 8
# A prompt, single tokens, a turn as long as a prompt, single tokens.
PIECES = [13, 1, 1, 16, *[1] * 9]
STATIC_PIECES = [24, *[1] * 8, 8]
# The same where tokens are evicted: SnapKV takes passes of 32 tokens and more for prompts.
EVICTING_PIECES = [45, 1, 1, 9, 1, 36, *[1] * 11]
# Longer than what is read in one chunk of keys, 2,048.
LONG_PIECES = [2100, 1, 170, *[1] * 4]
LONG = {"num_hidden_layers": 1, "max_position_embeddings": 4096}
# Where the original itself fails: Falcon's ALiBi does not fit a static cache's mask.
NO_STATIC_CACHE = {"falcon-alibi"}
# Refused: a window beside nothing but sliding layers has no room for latents in a static cache.
NO_STATIC_WINDOW = {"mistral-sliding"}
# Coded latents of keys and values together: with eager attention they are calibrated in no more than single precision.
NO_DOUBLE_CALIBRATION = {"mpt", "mpt-clip"}

HALVED = {"kv_ratio": 0.5}
CODED = {"bits": 3}
SHARES = ["1", "2", "1-2", "1kv", "2kv"]
THOROUGH = ["llama", "opt", "mpt"]
OTHERS = ["llama-yarn", "qwen3", "cohere-norm", "gpt_neox", "phi3-partial", "mpt-clip", "bloom", "falcon-alibi"]
OTHERS += ["gemma2", "gemma3", "mistral-sliding", "smollm3", "olmo2", "gpt2"]
COMPILED = [("llama", HALVED, "1", WINDOW), ("llama", HALVED, "2kv", 0), ("llama", CODED, "1", WINDOW)]
UNIFORM: dict[str, Any] = {"ranks": "uniform", "rank_multiple": 2}


def config(size: dict[str, float], share: str, **others: Any) -> EigenAttentionConfig:
    """A compression, in the words of whichever version of the package is there.

    Args:
        size: a target by its name, `bits` being those of coded latents for each element of the original cache.
        share: KV heads to a latent: `N`, `N-M` of keys and of values, or `Nkv` of both in one.
    """
    known = {each.name for each in dataclasses.fields(EigenAttentionConfig)}
    target: dict[str, Any] = dict(size)
    bits = target.pop("bits", None)
    if "coded" in known:
        target |= {"coded": bits is not None} | ({} if bits is None else {"kv_ratio": bits / 16})
    elif bits is not None:
        target["bits_per_element"] = bits
    if "share" in known:
        sharing: dict[str, Any] = {"share": share}
    else:
        keys, _, values = share.removesuffix("kv").partition("-")
        sharing = {"shared_heads": int(keys), "shared_values": int(values or keys), "joint": share.endswith("kv")}
    return EigenAttentionConfig(**target, **sharing, **others)


@dataclass(frozen=True)
class Case:
    """A tiny model, a compression, and the ways in which the compressed model is read."""

    family: str
    name: str
    size: dict[str, float]
    ways: list[str]
    share: str = "1"
    window: int = WINDOW
    others: dict[str, Any] | None = None
    model: dict[str, Any] = field(default_factory=dict)
    single: bool = False  # codes of a model in single precision

    @property
    def options(self) -> dict[str, Any]:
        """Coded latents have ranks of their own."""
        return ({} if self.size == CODED else UNIFORM) if self.others is None else self.others

    def dtype(self, plain: torch.dtype) -> torch.dtype:
        """The model's, given that of plain latents."""
        return torch.float64 if self.size == CODED and not self.single else plain

    @property
    def calibrates_in_double(self) -> bool:
        return not (self.share.endswith("kv") and self.family in NO_DOUBLE_CALIBRATION)

    @property
    def static(self) -> bool:
        return self.family not in NO_STATIC_CACHE and not (self.window and self.family in NO_STATIC_WINDOW)


def compressions(family: str) -> Iterator[Case]:
    """The plain way to each compression, and what else is tried on it."""
    thorough = family in THOROUGH
    every = ["uncached", "pieces", "static", "padded", "generate"]
    if not thorough:
        chosen = [(HALVED, "1", 0), (HALVED, "1", WINDOW), (HALVED, "2kv", WINDOW), (HALVED, "1-2", 0)]
        chosen += [(CODED, "1", WINDOW), (CODED, "2", 0)]
    else:
        chosen = [(size, share, window) for size in (HALVED, CODED) for share in SHARES for window in (0, WINDOW)]
    for size, share, window in chosen:
        ways = list(every)
        plain = size == HALVED
        if thorough:
            ways += ["crop", "streaming", "snapkv"]
        if thorough and share in ("1", "2kv"):
            ways += ["ways to generate", "gradient"]
        if plain and share == "1" and family in ("gemma2", "gemma3", "cohere-norm", "bloom", "gpt_neox"):
            ways += ["streaming", "snapkv"]
        if (family, size, share, window) in COMPILED:
            ways += ["compiled"]
        if plain and (thorough or share == "1"):
            ways += ["half"]
        yield Case(family, f"{'plain' if plain else 'coded'} {share} w{window}", size, ways, share, window)
    yield Case(family, "paper", HALVED, every if thorough else every[:2], window=0, others={"basis": "eigen"} | UNIFORM)


def extras() -> Iterator[Case]:
    """Other ways to ranks and maps, and models that are read in other ways."""
    two = ["uncached", "pieces"]
    chosen = {"rank_multiple": 2}
    for family in THOROUGH:
        for share, window in (("1", WINDOW), ("1-2", 0), ("2kv", 0)):
            yield Case(family, f"sensitivity {share} w{window}", HALVED, two, share, window, chosen)
        paper = {"basis": "eigen", **chosen}
        yield Case(family, "paper error budget", {"error_budget": 0.3}, two, window=0, others=paper)
        yield Case(family, "paper energy", {"energy": 0.8}, two, window=0, others=paper)
        yield Case(family, "energy", {"energy": 0.8}, two, others=chosen)
        yield Case(family, "shrinkage", HALVED, two, others={"shrinkage": 0.3, **UNIFORM})
        yield Case(family, "shrinkage 2kv", HALVED, two, "2kv", 0, {"shrinkage": 0.3, **UNIFORM})
        yield Case(family, "refit w6", HALVED, two, others={"refit": True, **UNIFORM})
        yield Case(family, "no refit w0", HALVED, two, window=0, others={"refit": False, **UNIFORM})
    for family in (*THOROUGH, "bloom", "gemma2"):
        yield Case(family, "coded, single precision", CODED, [*two, "padded"], single=True)
    for family in (*THOROUGH, "gpt2", "gemma3", "bloom", "falcon-alibi", "mistral-sliding"):
        eager = {"attn_implementation": "eager"}
        for share, window in (("1", 0), ("1", WINDOW), ("2kv", WINDOW)):
            yield Case(family, f"eager {share} w{window}", HALVED, ["weights"], share, window, model=eager)
    for family, size, share, window in (
        ("llama", HALVED, "1", 0),
        ("llama", HALVED, "1-2", WINDOW),
        ("llama", CODED, "2kv", WINDOW),
        ("llama-yarn", HALVED, "1", WINDOW),
        ("opt", HALVED, "1", 0),
        ("opt", HALVED, "2kv", WINDOW),
        ("opt", CODED, "1", 0),
        ("mpt", HALVED, "1", 0),
        ("mpt", HALVED, "2", WINDOW),
        ("gemma2", HALVED, "1", WINDOW),
        ("mistral-sliding", HALVED, "1", WINDOW),
        ("falcon-alibi", HALVED, "1", 0),
    ):
        model = LONG | ({"max_seq_len": 4096} if family == "mpt" else {})
        if family == "gemma2":
            model |= {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
        kind = "plain" if size == HALVED else "coded"
        yield Case(family, f"long {kind} {share} w{window}", size, ["long"], share, window, model=model)


def cases() -> Iterator[Case]:
    for family in (*THOROUGH, *OTHERS):
        yield from compressions(family)
    yield from extras()


def summary(logits: Tensor, from_column: int = 0) -> Found:
    """Logits [B, T, V] in short."""
    return {"last": logits[:, -LAST:], "mean": logits[:, from_column:].mean((0, 1))}


def held_bytes(cache: Any) -> Tensor:
    """Bytes of all numbers and codes in the layers of a cache, wherever they keep them; not of positions and counts."""
    storages: dict[int, int] = {}
    seen: set[int] = set()

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            if value.is_floating_point() or value.dtype == torch.uint8:
                storage = value.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
            return
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, (list, tuple)):
            parts: Any = value
        elif isinstance(value, dict):
            parts = value.values()
        else:
            ours = type(value).__module__.startswith(("eigenattn.", "transformers.cache_utils"))
            parts = vars(value).values() if ours else ()
        for part in parts:
            visit(part)

    visit(cache.layers)
    return torch.tensor(sum(storages.values()))


def in_pieces(model: nn.Module, ids: Tensor, cache: Any, sizes: list[int], **by_column: Tensor) -> Tensor:
    """Logits of a text that goes through a cache in pieces.

    Args:
        by_column: arguments [B, T] of all tokens; the mask is passed of all that went before, too.
    """
    logits, start = [], 0
    for size in sizes:
        stop = start + size
        options = {name: x[:, :stop] if name == "attention_mask" else x[:, start:stop] for name, x in by_column.items()}
        out = model(ids[:, start:stop], past_key_values=cache, use_cache=True, **options)
        logits.append(out.logits)
        start = stop
    return torch.cat(logits, dim=1)


def dynamic(model: nn.Module) -> DynamicCache:
    return DynamicCache(config=model.config)


def uncached(model: nn.Module, case: Case) -> Found:
    return summary(model(tokens(2, LENGTH), use_cache=False).logits)


def pieces(model: nn.Module, case: Case) -> Found:
    cache = dynamic(model)
    found = summary(in_pieces(model, tokens(2, LENGTH), cache, PIECES))
    return found | {"bytes": held_bytes(cache)}


def static(model: nn.Module, case: Case) -> Found:
    if not case.static:
        return {}
    cache = StaticCache(config=model.config, max_cache_len=48)
    found = summary(in_pieces(model, tokens(2, LENGTH), cache, STATIC_PIECES))
    return found | {"bytes": held_bytes(cache)}


def padded_batch() -> tuple[Tensor, Tensor]:
    """Two texts, the second padded on the left, and their mask."""
    ids = tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    ids[1, :PADDING] = mask[1, :PADDING] = 0
    return ids, mask


def padded(model: nn.Module, case: Case) -> Found:
    ids, mask = padded_batch()
    options = {"attention_mask": mask}
    # Those that take positions are given them, as `generate` does; BLOOM and MPT read them off the mask.
    if "position_ids" in inspect.signature(model.forward).parameters:
        options["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    whole = model(ids, use_cache=False, **options).logits
    cached = in_pieces(model, ids, dynamic(model), PIECES, **options)
    found = {"whole": summary(whole, PADDING), "cached": summary(cached, PADDING)}
    return {f"{how} {name}": x for how, both in found.items() for name, x in both.items()}


def decode(model: nn.Module, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    settings = {"use_cache": True, "do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0}
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, **settings | options)[:, ids.shape[1] :]


def generate(model: nn.Module, case: Case) -> Found:
    ids, mask = padded_batch()
    return {"padded": decode(model, ids[:, :24], mask[:, :24])}


def ways_to_generate(model: nn.Module, case: Case) -> Found:
    ids = tokens(2, 20)
    found = {
        "beams": decode(model, ids, num_beams=3),
        "prompt in chunks": decode(model, ids, prefill_chunk_size=7),
        "prompt lookup": decode(model, ids[:1].repeat(1, 2), prompt_lookup_num_tokens=3),
    }
    if case.static:
        found["static"] = decode(model, ids, cache_implementation="static", disable_compile=True)
    return found


def crop(model: nn.Module, case: Case) -> Found:
    ids, cache = tokens(2, LENGTH), dynamic(model)
    model(ids[:, :20], past_key_values=cache, use_cache=True)
    model(tokens(2, 12, seed=5), past_key_values=cache, use_cache=True)
    cache.crop(-12)
    return summary(model(ids[:, 20:], past_key_values=cache, use_cache=True).logits)


def evicted(model: nn.Module, case: Case, evict: str, budget: int) -> Found:
    ids = tokens(2, sum(EVICTING_PIECES))
    cache = EigenCache(model.config, evict=evict, budget=budget)
    found = summary(in_pieces(model, ids, cache, EVICTING_PIECES))
    prompt = EigenCache(model.config, evict=evict, budget=budget)
    text = decode(model, ids[:, :45], past_key_values=prompt)
    return found | {"bytes": held_bytes(cache), "kept": torch.tensor(cache.kept_tokens), "generated": text}


def weights(model: nn.Module, case: Case) -> Found:
    ids, cache = tokens(2, LENGTH), dynamic(model)
    whole = model(ids, use_cache=False, output_attentions=True)
    model(ids[:, :-3], past_key_values=cache, use_cache=True)
    late = model(ids[:, -3:], past_key_values=cache, use_cache=True, output_attentions=True)
    found = summary(whole.logits) | {"cached last": late.logits}
    for i, (one, other) in enumerate(zip(whole.attentions, late.attentions, strict=True)):
        found |= {f"weights {i}": one[:, :, -LAST:], f"cached weights {i}": other}
    return found


def gradient(model: nn.Module, case: Case) -> Found:
    ids = tokens(2, LENGTH)
    with torch.enable_grad():
        out = model(ids, labels=ids, use_cache=False)
        out.loss.backward()
    found = model.get_input_embeddings().weight.grad.clone()
    model.zero_grad(set_to_none=True)
    return summary(out.logits.detach()) | {"of embeddings": found}


def long(model: nn.Module, case: Case) -> Found:
    ids = tokens(1, sum(LONG_PIECES))
    whole = summary(model(ids, use_cache=False).logits)
    cached = summary(in_pieces(model, ids, dynamic(model), LONG_PIECES))
    return whole | {f"cached {name}": x for name, x in cached.items()}


def compiled(model: nn.Module, case: Case) -> Found:
    ids = tokens(1, 16)
    torch._dynamo.reset()
    step = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    cache = StaticCache(config=model.config, max_cache_len=24)
    logits = [model(ids[:, :12], past_key_values=cache, use_cache=True).logits]
    logits += [step(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(12, 16)]
    return summary(torch.cat(logits, 1))


def half(model: nn.Module, case: Case) -> Found:
    """Last of all, for it changes the model."""
    model = model.to(torch.bfloat16)
    cached = summary(in_pieces(model, tokens(2, LENGTH), dynamic(model), PIECES))
    return uncached(model, case) | {f"cached {name}": x for name, x in cached.items()}


WAYS: dict[str, Callable[[nn.Module, Case], Found]] = {
    "uncached": uncached,
    "pieces": pieces,
    "static": static,
    "padded": padded,
    "generate": generate,
    "ways to generate": ways_to_generate,
    "crop": crop,
    "streaming": functools.partial(evicted, evict="streaming", budget=20),
    "snapkv": functools.partial(evicted, evict="snapkv", budget=38),
    "weights": weights,
    "gradient": gradient,
    "long": long,
    "compiled": compiled,
    "half": half,
}


@torch.no_grad()
def read(case: Case, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """All that is recorded of a case, by name; what goes wrong is printed, and has no record."""

    def failed(what: str, error: Exception) -> None:
        print(f"{case.family}/{case.name}/{what}: {type(error).__name__}: {error!s:.200}", file=sys.stderr)

    dtype = case.dtype(dtype)
    model = tiny(case.family, **case.model).to(dtype if case.calibrates_in_double else torch.float32)
    torch.manual_seed(0)
    try:
        asked = config(case.size, case.share, window=case.window, **case.options)
        report = eigenattn.compress(model, tokens(8, 64, seed=3).split(2), asked)
    except Exception as error:  # whatever it is, the other cases are recorded
        failed("compress", error)
        return
    model = model.to(dtype)
    yield "compress/bytes per token", torch.tensor(report.bytes_per_token)
    yield "compress/KV ratio", torch.tensor(report.kv_ratio, dtype=torch.float64)
    for way in (way for way in WAYS if way in case.ways):
        torch.manual_seed(0)
        try:
            found = WAYS[way](model, case)
        except Exception as error:
            failed(way, error)
            continue
        # In float64, eager attention makes NaN of padding.
        yield from ((f"{way}/{name}", x) for name, x in found.items() if not x.isnan().any())


def record(path: str, dtype: torch.dtype, only: str) -> None:
    """Record all cases, or those whose `family/compression` contains a string, into a safetensors file."""
    torch.set_num_threads(1)
    found: Found = {}
    start = time.perf_counter()
    for case in cases():
        where = f"{case.family}/{case.name}"
        if only in where:
            found |= {f"{where}/{name}": x.detach().clone().contiguous() for name, x in read(case, dtype)}
    metadata = {"eigenattn": eigenattn.__file__, "torch": torch.__version__, "transformers": transformers.__version__}
    save_file(found, path, metadata=metadata)
    print(f"{len(found)} tensors in {time.perf_counter() - start:.0f} s, by {eigenattn.__file__}")


def difference(before: Tensor, after: Tensor) -> float:
    """The largest difference in standard deviations of what was before; whole numbers are equal or infinitely apart."""
    if before.shape != after.shape or before.dtype != after.dtype:
        return float("inf")
    if torch.equal(before, after):
        return 0.0
    if not before.is_floating_point() or not (before.isfinite().all() and after.isfinite().all()):
        return float("inf")
    scale = before.double().std() if before.numel() > 1 else before.double().abs().squeeze()
    return float((before.double() - after.double()).abs().max() / scale.clamp_min(1e-30))


def compare(before: str, after: str, tolerance: float, half_tolerance: float) -> bool:
    """Print how far two records lie apart; whether they are the same within tolerance, and nothing is missing."""
    with safe_open(before, "pt") as old, safe_open(after, "pt") as new:
        names, others = set(old.keys()), set(new.keys())
        found = {name: difference(old.get_tensor(name), new.get_tensor(name)) for name in sorted(names & others)}
    far = {
        name: distance
        for name, distance in found.items()
        if distance > (half_tolerance if name.split("/")[2] == "half" else tolerance)
    }
    for part, title in enumerate(("family", "compression", "way")):
        groups: dict[str, list[str]] = defaultdict(list)
        for name in sorted(names | others):
            groups[name.split("/")[part]].append(name)
        print(f"{title:32}{'tensors':>9}{'largest':>11}{'too far':>9}{'missing':>9}{'new':>6}  bits")
        for group, members in groups.items():
            distances = [found[name] for name in members if name in found]
            largest = max(distances, default=float("nan"))
            counts = [sum(name in others for name in members) for others in (far, names - others, others - names)]
            print(
                f"{group:32}{len(distances):9}{largest:11.1e}{counts[0]:9}{counts[1]:9}{counts[2]:6}  "
                f"{'equal' if largest == 0 else f'equal in {distances.count(0)}'}"
            )
        print()
    for name in sorted(far, key=lambda name: -far[name])[:30]:
        print(f"{far[name]:9.1e}  {name}")
    missing: dict[str, int] = defaultdict(int)
    for name in names - others:
        missing[name.rpartition("/")[0]] += 1
    for name, count in sorted(missing.items()):
        print(f"  missing  {name} ({count})")
    print(
        f"{len(found)} compared, {list(found.values()).count(0)} equal in every bit, {len(far)} too far apart, "
        f"{len(names - others)} missing."
    )
    return not far and names <= others


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("record")
    verb.add_argument("path")
    verb.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="of latents that are no codes")
    verb.add_argument("--only", default="", help="cases whose family/compression contains this")
    verb = verbs.add_parser("compare")
    verb.add_argument("before")
    verb.add_argument("after")
    verb.add_argument("--tolerance", type=float, default=1e-5)
    verb.add_argument("--half-tolerance", type=float, default=0.05, help="for bfloat16")
    arguments = parser.parse_args()
    if arguments.verb == "record":
        record(arguments.path, getattr(torch, arguments.dtype), arguments.only)
        return
    same = compare(arguments.before, arguments.after, arguments.tolerance, arguments.half_tolerance)
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
