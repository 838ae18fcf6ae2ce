"""`compress`: the whole way from a model and some text to a model with a smaller cache."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..cache.size import baseline_bytes_per_token, bytes_per_token, kv_ratio, ratio_at
from ..calibration.statistics import Batch, collect_moments, forward_hidden
from ..config import EigenAttentionConfig
from ..errors import EigenAttnError
from ..journal import Journal
from ..kernels import BACKENDS
from ..models.attention import EigenAttention
from ..models.checkpoint import EigenAttnCheckpointConfig, layer_entry, mark_compressed
from ..models.conversion import convert_attention, eigen_layers, restore_attention
from ..models.parallel import check_whole
from ..models.placement import input_device, loaded
from ..progress import TokenProgress
from ..resources import peak_memory
from ..version import versions
from .bases import BASES, Bases, Basis, truncated
from .checks import check_layer, check_range, check_vocabulary, check_weights
from .folding import compress_layer
from .joint import joint_bases
from .measure import Measurement
from .quantise import equivalent_ratio, fit_quantisers, quantise_bases
from .ranks import RANK_RULES, RankProblem, sensitivities
from .refit import refit
from .resuming import KeptMoments, Notes

# Tokens, from the first batches on, over which rank rules measure what truncation costs. Each side of each layer runs
# again over them, twice.
COST_TOKENS = 1024
# Batches over which a plain forward pass is timed (chosen: enough to even out the first one's warm-up).
TIMED_BATCHES = 2


@dataclass(frozen=True)
class CompressionReport:
    """What `compress` did.

    Bytes are those the cache allocates in the model's dtype for a token outside the window, all layers together.
    `kv_ratio` is theirs to the original's, at 16 bits where latents are quantised, and `ratio_at` is the whole cache's,
    window included, by length in tokens.
    """

    kv_ratio: float
    bytes_per_token: int
    baseline_bytes_per_token: int
    layers: list[dict[str, Any]]
    window: int
    ratio_at: dict[int, float]
    tokens: int
    seconds: dict[str, float]
    forward_seconds: float
    peak_memory_bytes: int
    config: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def compress(
    model: nn.Module,
    batches: Iterable[Any],
    config: EigenAttentionConfig | None = None,
    *,
    provenance: dict[str, Any] | None = None,
    journal: Journal | None = None,
    progress: bool = False,
) -> CompressionReport:
    """Compress the KV cache of a transformers causal language model, in place.

    Args:
        model: a model as `AutoModelForCausalLM.from_pretrained` gives it.
        batches: calibration text: token-id tensors [B, T], or dictionaries with `input_ids` and `attention_mask`. Any
            iterable; it is read once.
        config: what to compress to, and how; the default keeps 60% of the cache, and the last 32 tokens exact.
        provenance: facts to keep in the checkpoint (where model and text came from).
        journal: keeps what is finished, and is asked for it: the same model, batches and config have to come again.
        progress: show progress bars on the error stream, if it is a terminal.

    Returns:
        The ranks and sizes reached, and what it cost.

    Raises:
        EigenAttnError: on a model type that is not supported, a model compressed already, unusable batches or a target
            that cannot be met. The model is then as it was.
    """
    config = config or EigenAttentionConfig()
    for name, table in ((config.basis, BASES), (config.ranks, RANK_RULES)):
        if name not in table:
            raise EigenAttnError(f"unknown name {name!r}: choose one of {', '.join(table)}.")
    implementation = model.config.get_text_config(decoder=True)._attn_implementation
    if implementation not in BACKENDS:
        raise EigenAttnError(
            f'compressing looks into attention, and {implementation} hides it: load with attn_implementation="sdpa".'
        )
    check_whole(model)
    check_weights(model)
    method = BASES[config.basis]
    clock, bars = _Clock(), TokenProgress(progress)
    was_training = model.training
    originals = convert_attention(model)
    try:
        model.eval()
        layers = eigen_layers(model)
        check_sharing(layers[0].kv_heads, *config.sharing)
        device = input_device(model)
        stream = _Stream(batches, model, device, twice=config.refit or config.bits_per_element is not None)
        with clock.stage("statistics"):
            total = len(batches) if hasattr(batches, "__len__") else None
            joint = config.joint and config.kv_ratio != 1
            asked = config.window, config.sharing, config.shrinkage, joint
            kept = KeptMoments(lambda attention: method.moments(attention, *asked), journal)
            moments = collect_moments(
                model, layers, bars.batches("Calibrating", kept.batches(stream), total), kept.empty
            )
        if config.kv_ratio != 1 and stream.longest <= config.window:
            raise EigenAttnError(
                f"the calibration sequences have {stream.longest} tokens at most, and the window keeps {config.window} "
                "exactly: nothing lies outside. Give longer ones, or a smaller window."
            )
        notes = Notes(journal)

        def problem_of(bases: Bases) -> RankProblem:
            costs = Measurement(model, layers, bases, config.window, stream.kept, bars, notes)
            return RankProblem.of(bases, config, costs)

        with clock.stage("bases"):
            bases = joint_bases(moments, problem_of) if joint else [method.build(sums) for sums in moments]
        with clock.stage("ranks"):
            chosen = _choose(model, layers, bases, config, problem_of(bases), stream, bars)
        if config.refit and any(values is not None for _, values in chosen):
            with clock.stage("refit"):
                chosen = refit(
                    model, layers, chosen, config.window, config.sharing, list(stream.again()), bars, journal
                )
        for attention, pair in zip(layers, chosen, strict=True):
            check_range(attention, pair)
        forward_seconds = _time_forward(model, stream)
    except BaseException:
        restore_attention(model, originals)
        raise
    finally:
        model.train(was_training)
    del originals
    if all(basis is None for pair in chosen for basis in pair):
        # At full rank everything is exact.
        config = dataclasses.replace(config, window=0, shared_heads=1, shared_values=1, joint=False)
    with clock.stage("folding"):
        for attention, (keys, values) in zip(layers, chosen, strict=True):
            with loaded(attention):
                compress_layer(attention, keys, values, config.window, config.sharing)
                check_layer(attention)
    element_size = layers[0].output_projection.weight.element_size()
    report = CompressionReport(
        kv_ratio=kv_ratio(layers),
        bytes_per_token=bytes_per_token(layers, element_size),
        baseline_bytes_per_token=baseline_bytes_per_token(layers, element_size),
        layers=[layer_entry(attention) for attention in layers],
        window=config.window,
        ratio_at=ratio_at(layers, config.window),
        tokens=stream.tokens,
        seconds=clock.seconds,
        forward_seconds=forward_seconds,
        peak_memory_bytes=peak_memory(device),
        config=config.to_dict(),
    )
    facts = {"tokens": stream.tokens, "versions": versions(), **(provenance or {})}
    centred = any(basis.mean is not None for pair in bases for basis in pair)
    mark_compressed(model, EigenAttnCheckpointConfig(report.layers, centred, config.to_dict(), facts))
    return report


def check_sharing(kv_heads: int, *shared_heads: int) -> None:
    """Raise an `EigenAttnError` if KV heads cannot be dealt out to latents evenly."""
    for count in shared_heads:
        if kv_heads % count:
            divisors = [str(n) for n in range(1, kv_heads + 1) if kv_heads % n == 0]
            raise EigenAttnError(
                f"{count} KV heads cannot share a latent where there are {kv_heads}: choose {', '.join(divisors)}."
            )


def _choose(
    model: nn.Module,
    layers: list[EigenAttention],
    bases: Bases,
    config: EigenAttentionConfig,
    problem: RankProblem,
    stream: _Stream,
    bars: TokenProgress,
) -> list[tuple[Basis | None, Basis | None]]:
    """The bases to attach: truncated, or quantised; None for a side that stays at full rank."""
    if config.kv_ratio == 1:
        return [(None, None)] * len(layers)
    if config.bits_per_element is None:
        return truncated(bases, RANK_RULES[config.ranks](problem))
    fitted = fit_quantisers(
        model, layers, bases, bars.batches("Fitting quantisers", stream.again(), stream.count), config.window
    )
    weights = sensitivities(quantised_problem(problem, config.bits_per_element))
    return quantise_bases(layers, bases, fitted, weights, config.bits_per_element)


def quantised_problem(problem: RankProblem, bits_per_element: float) -> RankProblem:
    """The problem near whose solution sensitivities are measured for quantised latents of so many bits an element."""
    return problem.at(equivalent_ratio(bits_per_element))


class _Stream:
    """The user's batches, read once; the first ones are kept for measuring.

    Args:
        twice: keep the token ids of all batches, for `again`.
    """

    def __init__(self, batches: Iterable[Any], model: nn.Module, device: torch.device, twice: bool = False) -> None:
        self.batches, self.model, self.device, self.twice = batches, model, device, twice
        self.kept: list[Batch] = []
        self.later: list[Batch] = []
        self.tokens = self.longest = 0

    def __iter__(self) -> Iterator[Batch]:
        for value in self.batches:
            batch = Batch.of(value, self.device)
            check_vocabulary(batch.input_ids, self.model)
            if self.tokens < COST_TOKENS:
                self.kept.append(batch)
            elif self.twice:
                self.later.append(batch)
            self.tokens += batch.tokens
            self.longest = max(self.longest, batch.input_ids.shape[1])
            yield batch

    def again(self) -> Iterator[Batch]:
        """All batches once more."""
        yield from self.kept
        yield from self.later

    @property
    def count(self) -> int:
        return len(self.kept) + len(self.later)


def _time_forward(model: nn.Module, stream: _Stream) -> float:
    """Seconds of a plain forward pass over all calibration tokens, from the mean speed over a few batches."""
    timed = stream.kept[:TIMED_BATCHES]
    start = time.perf_counter()
    for batch in timed:
        forward_hidden(model, batch)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * stream.tokens / sum(batch.tokens for batch in timed)


class _Clock:
    """Wall-clock seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
