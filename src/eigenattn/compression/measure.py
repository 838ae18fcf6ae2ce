"""What truncation costs, measured by running the truncated layer."""

from __future__ import annotations

import copy
from collections.abc import Container, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..calibration.passes import DecoderLayers, embeddings_loaded, hidden, stubbed
from ..calibration.statistics import Batch, forward_hidden
from ..errors import EigenAttnError
from ..models.attention import EigenAttention
from ..models.placement import is_spread, loaded
from ..progress import TASK, TokenProgress
from .basis import Bases, truncated
from .folding import attach, detach
from .rank_problem import Ranks
from .resuming import MemoisedMeasurements

JUDGED_STRIDE = 4  # chosen
# Layers whose trials share one pass, where weights come from disk: a 70B-shaped model's 5 trials a layer hold 1.3 GB of
# hidden states then (chosen).
LAYERS_A_PASS = 16


class Measurement:
    """Runs a converted model on a few batches with some of its layers truncated.

    Args:
        bases: of each layer's latents, at full rank.
        window: exact tokens, W.
        batches: token ids the costs are measured on.
        memo: what an interrupted command had measured already.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[EigenAttention],
        bases: Bases,
        window: int,
        batches: Sequence[Batch],
        bars: TokenProgress,
        memo: MemoisedMeasurements | None = None,
    ) -> None:
        self.model, self.layers, self.bases = model, layers, bases
        self.window, self.batches, self.bars = window, batches, bars
        self.memo = memo or MemoisedMeasurements(None)
        self.blocks = DecoderLayers.of(model, layers)

    def _truncate(self, index: int, ranks: tuple[int, ...]) -> None:
        (bases,) = truncated([self.bases[index]], [ranks])
        attach(self.layers[index], bases, self.window)

    def layer_errors(self, candidates: Sequence[Ranks]) -> list[list[float]]:
        """Relative error at each decoder layer's output when its latents are truncated.

        The error is `||Y - Y'|| / ||Y||` over all tokens of the batches, with the layer's original input (arXiv
        2408.05646, algorithm 1). Each layer is run again, within one pass over the batches, for each of its candidates.

        Args:
            candidates: for each layer the ranks to try.

        Returns:
            For each layer the errors of its candidates.
        """
        return self.memo.of(f"errors/{candidates}", partial(self._layer_errors, candidates))

    @torch.no_grad()
    def _layer_errors(self, candidates: Sequence[Ranks]) -> list[list[float]]:
        errors = [torch.zeros(len(choices), dtype=torch.float64) for choices in candidates]
        norms = torch.zeros(len(self.layers), dtype=torch.float64)
        valid: Tensor | None = None
        running = False

        def square(x: Tensor) -> float:
            x = x.double() if valid is None else x.double() * valid.to(x.device).unsqueeze(-1)
            return float(x.square().sum())

        def measure(index: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            nonlocal running
            if running:
                return
            running = True
            try:
                exact = hidden(output)
                norms[index] += square(exact)
                with loaded(layer):
                    for position, ranks in enumerate(candidates[index]):
                        self._truncate(index, ranks)
                        errors[index][position] += square(exact - hidden(layer(*args, **_apart(kwargs))))
            finally:
                detach(self.layers[index])
                running = False
            progress.advance(TASK)

        with self.bars.bar("Measuring layers", len(self.layers) * len(self.batches)) as progress, ExitStack() as hooks:
            for index in range(len(self.layers)):
                hook = self.blocks.own(index).register_forward_hook(
                    lambda layer, args, kwargs, output, index=index: measure(index, layer, args, kwargs, output),
                    with_kwargs=True,
                )
                hooks.callback(hook.remove)
            for batch in self.batches:
                valid = batch.valid
                forward_hidden(self.model, batch)
        return [(error / norm).sqrt().tolist() for error, norm in zip(errors, norms, strict=True)]

    @torch.no_grad()
    def divergences(self, trials: Sequence[Ranks]) -> list[list[float]]:
        """What truncating one layer at a time costs: the mean KL divergence of predictions from the original's.

        A layer's trials change nothing before it, so they begin with the hidden states that reach it. After it they go
        through every later layer side by side, so that a layer that is kept on disk is read once for all of them.

        Args:
            trials: for each layer the ranks that are tried on it, all others being at full rank.

        Returns:
            For each layer the divergences of its trials, in nats a token.

        Raises:
            EigenAttnError: if the model predicts no tokens.
        """
        sums = [[0.0] * len(choices) for choices in trials]
        tokens = 0
        a_pass = LAYERS_A_PASS if is_spread(self.model) else 1
        firsts = range(0, len(trials), a_pass)
        wanted = {self.blocks.places[first] - 1 for first in firsts if first and not self.blocks.readers}
        steps = sum(map(len, trials)) * len(self.batches)
        try:
            with self.bars.bar("Measuring sensitivities", steps) as progress:
                for number, batch in enumerate(self.batches):
                    tokens += judged_tokens(batch)
                    exact = log_probabilities(self.model, batch)
                    outputs = self._layer_outputs(batch, wanted)
                    for first in firsts:
                        wave = dict(list(enumerate(trials))[first : first + a_pass])
                        measure = partial(self._divergences_of, wave, batch, exact, outputs)
                        found = self.memo.of(f"divergences/{number}/{wave}", measure)
                        for index, costs in zip(wave, found, strict=True):
                            sums[index] = [total + cost for total, cost in zip(sums[index], costs, strict=True)]
                            progress.advance(TASK, len(costs))
        finally:
            for attention in self.layers:
                detach(attention)
        return [[value / tokens for value in values] for values in sums]

    def _divergences_of(
        self, wave: dict[int, Ranks], batch: Batch, exact: Tensor, outputs: dict[int, Any]
    ) -> list[list[float]]:
        """Divergences of the trials of some layers, summed over one batch.

        In half precision the path through the window rounds otherwise than the original's, and that alone makes some
        divergence. What the layer costs at full rank is therefore taken off.
        """
        rounds = self.window > 0 and self.layers[0].dtype != torch.float32
        full = {index: tuple(basis.full_rank for basis in self.bases[index]) for index in wave}
        runs = [
            (index, ranks) for index, tried in wave.items() for ranks in ([*tried, full[index]] if rounds else tried)
        ]
        found: dict[int, list[float]] = {index: [] for index in wave}
        if not runs:
            return list(found.values())
        with embeddings_loaded(self.model):
            for index, changed in self._changed(min(wave), runs, batch, outputs):
                found[index].append(float((exact.exp() * (exact - changed)).sum()))
        if not rounds:
            return list(found.values())
        return [[max(cost - costs[-1], 0.0) for cost in costs[:-1]] for costs in found.values()]

    def _changed(
        self,
        first: int,
        runs: Sequence[tuple[int, tuple[int, ...]]],
        batch: Batch,
        outputs: dict[int, Any],
    ) -> Iterator[tuple[int, Tensor]]:
        """The truncated layer of each run, `first` or a later one, and the log-probabilities that it makes."""
        if self.blocks.readers:  # a layer cannot be run without those that it reads
            for index, ranks in runs:
                self._truncate(index, ranks)
                changed = log_probabilities(self.model, batch)
                detach(self.layers[index])
                yield index, changed
            return
        with stubbed(self.blocks.before(first), outputs.get(self.blocks.places[first] - 1)):
            changed_outputs = self._outputs_of(runs, batch)
        for (index, _), output in zip(runs, changed_outputs, strict=True):
            with stubbed(self.blocks.all, output):
                yield index, log_probabilities(self.model, batch)

    def _outputs_of(self, runs: Sequence[tuple[int, tuple[int, ...]]], batch: Batch) -> list[Any]:
        """What the last layer gives in each run, in which one layer is truncated: one pass, layer by layer.

        The pass itself is the original's up to the last truncated layer, and the last run from there on.
        """
        outputs: list[Any] = [None] * len(runs)
        places = [self.blocks.places[index] for index, _ in runs]
        last = places[-1]
        running = False

        def follow(position: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
            nonlocal running
            if running or position < places[0]:
                return None
            running = True
            try:
                with loaded(layer):
                    for run, (index, ranks) in enumerate(runs[:-1] if position > last else runs):
                        if places[run] == position:
                            self._truncate(index, ranks)
                            outputs[run] = layer(*args, **kwargs)
                            detach(self.layers[index])
                        elif places[run] < position:
                            outputs[run] = layer(hidden(outputs[run]), *args[1:], **kwargs)
            finally:
                if position in places:
                    detach(self.layers[self.blocks.places.index(position)])
                running = False
            if position < last:
                return None
            outputs[-1] = outputs[-1] if position == last else output
            return outputs[-1]

        with ExitStack() as hooks:
            for position, layer in enumerate(self.blocks.all):
                hook = layer.register_forward_hook(partial(follow, position), with_kwargs=True)
                hooks.callback(hook.remove)
            forward_hidden(self.model, batch)
        return outputs

    def _layer_outputs(self, batch: Batch, wanted: Container[int]) -> dict[int, Any]:
        """What some decoder layers of the original give."""
        outputs: dict[int, Any] = {}

        def keep(position: int, layer: nn.Module, args: tuple, output: Any) -> None:
            if position in wanted:
                outputs[position] = output

        with ExitStack() as hooks:
            for position, layer in enumerate(self.blocks.all):
                hook = layer.register_forward_hook(partial(keep, position))
                hooks.callback(hook.remove)
            forward_hidden(self.model, batch)
        return outputs


def log_probabilities(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Log-probabilities of the next token [B * judged, vocabulary] in fp32; padding adds no divergence.

    Raises:
        EigenAttnError: if the model predicts no tokens.
    """
    if model.get_output_embeddings() is None:
        raise EigenAttnError(
            f"this {type(model).__name__} has no language head, and what is lost is measured at its predictions: load "
            'it with AutoModelForCausalLM. (ranks="uniform" needs no head, unless keys and values share latents.)'
        )
    positions = _judged_positions(batch)
    logits = model(
        batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, logits_to_keep=positions
    ).logits
    logs = logits.float().log_softmax(-1)
    if batch.valid is not None:
        logs = logs * batch.valid[:, positions, None]
    return logs.flatten(0, 1)


def judged_tokens(batch: Batch) -> int:
    """How many predictions of a batch are looked at."""
    positions = _judged_positions(batch)
    return len(batch.input_ids) * len(positions) if batch.valid is None else int(batch.valid[:, positions].sum())


def _apart(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a layer that is run once more: what it hands on to others is not to reach them."""
    shared = kwargs.get("shared_kv_states")
    return kwargs if shared is None else {**kwargs, "shared_kv_states": copy.copy(shared)}


def _judged_positions(batch: Batch) -> Tensor:
    """Every few positions: neighbours tell little more, and the output layer is much of a small model's work."""
    return torch.arange(0, batch.input_ids.shape[1], JUDGED_STRIDE)
