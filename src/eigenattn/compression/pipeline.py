"""`compress`: the whole way from a model and some text, or its statistics, to a model with a smaller cache."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..cache.size import baseline_bytes_per_token, bytes_per_token, kv_ratio, ratio_at
from ..calibration.statistics import Batch, forward_hidden
from ..calibration.statistics_file import Statistics, check_fit, merged, open_statistics
from ..config import EigenAttentionConfig
from ..errors import EigenAttnError
from ..journal import Journal
from ..kernels import BACKENDS
from ..models.attention import EigenAttention
from ..models.checkpoint_format import EigenAttnCheckpointConfig, mark_compressed
from ..models.conversion import convert_attention, eigen_layers, restore_attention
from ..models.families import turns_keys
from ..models.parallel import check_whole
from ..models.placement import input_device, loaded
from ..progress import Clock, TokenProgress
from ..resources import peak_memory
from ..version import versions
from .checks import check_layer, check_weights
from .folding import compress_layer
from .recipe import Recipe, Text, as_attached, check_supported
from .smallest import Bound, smallest

# Batches over which a plain forward pass is timed (chosen: enough to even out the first one's warm-up).
TIMED_BATCHES = 2


@dataclass(frozen=True)
class CompressionReport:
    """What `compress` did.

    Bytes are those the cache allocates in the model's dtype for a token outside the window, all layers together.
    `kv_ratio` is theirs to the original's, at 16 bits where latents are quantised, and `ratio_at` is the whole cache's,
    window included, by length in tokens. `forward_seconds` is what a plain pass over all calibration tokens takes, None
    where statistics came from files. `divergences` are those measured on each held-out text, where a loss was bounded.
    """

    kv_ratio: float
    bytes_per_token: int
    baseline_bytes_per_token: int
    layers: list[dict[str, Any]]
    window: int
    ratio_at: dict[int, float]
    tokens: int
    seconds: dict[str, float]
    forward_seconds: float | None
    peak_memory_bytes: int
    config: dict[str, Any] = field(default_factory=dict)
    divergences: dict[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return dataclasses.asdict(self)


@contextmanager
def _at_full_rank(model: PreTrainedModel, keep: bool = True) -> Iterator[list[EigenAttention]]:
    """The layers of a model, converted to be looked into. After an error it is as it was.

    Args:
        keep: whether it stays converted else.

    Raises:
        EigenAttnError: if the model cannot be compressed.
    """
    check_whole(model)
    was_training = model.training
    originals = convert_attention(model)
    try:
        implementation = model.config.get_text_config(decoder=True)._attn_implementation
        if implementation not in BACKENDS:
            raise EigenAttnError(
                f"compressing looks into attention, and {implementation} hides it: load with "
                'attn_implementation="sdpa".'
            )
        check_weights(model)
        model.eval()
        yield eigen_layers(model)
        if not keep:
            restore_attention(model, originals)
    except BaseException:
        restore_attention(model, originals)
        raise
    finally:
        model.train(was_training)


def calibrate(
    model: PreTrainedModel,
    batches: Iterable[Any],
    config: EigenAttentionConfig | None = None,
    *,
    journal: Journal | None = None,
    progress: bool = False,
) -> Statistics:
    """Collect the statistics that `compress` takes in place of text, once they are saved. The model is left as it was.

    Args:
        model, batches, journal, progress: as for `compress`.
        config: whose window and shared latents they are of. They serve any size.

    Raises:
        EigenAttnError: on a model type that is not supported, a model compressed already, or unusable batches.
    """
    config = config or EigenAttentionConfig()
    check_supported(config)
    check_fit([], config)
    with _at_full_rank(model, keep=False) as layers:
        config = config.for_model(turns_keys(model.config))
        found = Recipe(model, layers, config, batches, TokenProgress(progress), journal=journal).moments
        return Statistics.of(layers, found)


def compress(
    model: PreTrainedModel,
    batches: Iterable[Any] | None = None,
    config: EigenAttentionConfig | None = None,
    *,
    statistics: Sequence[str | Path] = (),
    provenance: dict[str, Any] | None = None,
    max_divergence: float | None = None,
    held_out: Mapping[str, Iterable[Any]] | None = None,
    journal: Journal | None = None,
    progress: bool = False,
) -> CompressionReport:
    """Compress the KV cache of a transformers causal language model, in place.

    Args:
        model: a model as `AutoModelForCausalLM.from_pretrained` gives it.
        batches: calibration text: token-id tensors [B, T], or dictionaries with `input_ids` and `attention_mask`. Any
            iterable; it is read once.
        config: what to compress to, and how; the default keeps a quarter of the cache, and the last 32 tokens exact.
            By default window and shared latents are those of statistics that are given.
        statistics: in place of batches, folders that `eigenattn calibrate` wrote; they are added up.
        provenance: facts to keep in the checkpoint (where model and text came from).
        max_divergence: in place of a size, the loss that is allowed: the smallest cache is chosen whose mean divergence
            from the original, in nats a token, stays below it on each text that is held out. 0.005 is hardly seen. The
            configuration's KV ratio is then where the search begins.
        held_out: batches of texts that are not calibrated on, by name, to measure that on.
        journal: keeps what is finished, and is asked for it: the same model, batches and config have to come again.
        progress: show progress bars on the error stream, if it is a terminal.

    Returns:
        The ranks and sizes reached, and what it cost.

    Raises:
        EigenAttnError: on a model type that is not supported, a model compressed already, unusable batches or
            statistics, or a target that cannot be met. The model is then as it was.
    """
    if (batches is None) != bool(statistics):
        raise EigenAttnError("compressing takes either batches of text or statistics of some: give one of both.")
    files = open_statistics(statistics)
    config = config or EigenAttentionConfig(**(files[0].latents if files else {}))
    check_supported(config)
    if files:
        check_fit(files, config)
        config = dataclasses.replace(config, share=files[0].latents["share"])
    bound = None if max_divergence is None else Bound(max_divergence, held_out or {})
    if bound is not None:
        bound.check(config)
    if config.kv_ratio == 1:
        config = as_attached(config, [])
    clock, bars = Clock(), TokenProgress(progress)
    with _at_full_rank(model) as layers:
        config = config.for_model(turns_keys(model.config))
        known = merged(files, layers) if files else None
        batches = () if batches is None else batches
        recipe = Recipe(model, layers, config, batches, bars, journal=journal, clock=clock, statistics=known)
        centred = any(basis.mean is not None for bases in recipe.bases for basis in bases)
        if bound is None:
            chosen, divergences = recipe.choose(config), None
        else:
            config, chosen, divergences = smallest(recipe, config, bound)
        forward_seconds = None if files else _time_forward(model, recipe.text)
    config = as_attached(config, chosen)
    with clock.stage("folding"):
        for attention, bases in zip(layers, chosen, strict=True):
            with loaded(attention):
                compress_layer(attention, bases, config.window)
                check_layer(attention)
    element_size = layers[0].dtype.itemsize
    layouts = [attention.layout for attention in layers]
    report = CompressionReport(
        kv_ratio=kv_ratio(layouts),
        bytes_per_token=bytes_per_token(layouts, element_size),
        baseline_bytes_per_token=baseline_bytes_per_token(layouts, element_size),
        layers=[layout.to_dict() for layout in layouts],
        window=config.window,
        ratio_at=ratio_at(layouts),
        tokens=recipe.moments[0].tokens,
        seconds=clock.seconds,
        forward_seconds=forward_seconds,
        peak_memory_bytes=peak_memory(input_device(model)),
        config=config.to_dict(),
        divergences=divergences,
    )
    facts = {"tokens": report.tokens, "versions": versions(), **(provenance or {})}
    if bound is not None:
        facts |= {"max_divergence": bound.nats, "divergences": divergences}
    mark_compressed(model, EigenAttnCheckpointConfig(report.layers, centred, config.to_dict(), facts))
    return report


def _time_forward(model: PreTrainedModel, text: Text) -> float:
    """Seconds of a plain forward pass over all calibration tokens, from the mean speed over a few batches."""
    timed: list[Batch] = text.judged[:TIMED_BATCHES]
    start = time.perf_counter()
    for batch in timed:
        forward_hidden(model, batch)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * text.tokens / sum(batch.tokens for batch in timed)
