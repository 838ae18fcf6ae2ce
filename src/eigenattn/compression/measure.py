"""What truncation costs, measured by running the truncated layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.statistics import Batch, forward_hidden
from ..models.attention import EigenAttention
from .bases import Basis
from .folding import attach, detach


def decoder_layers(model: nn.Module, layers: Sequence[EigenAttention]) -> list[nn.Module]:
    """The decoder layer around each attention module: its parent."""
    parents = {id(child): parent for parent in model.modules() for child in parent.children()}
    return [parents[id(attention)] for attention in layers]


@torch.no_grad()
def layer_errors(
    model: nn.Module,
    layers: Sequence[EigenAttention],
    bases: Sequence[tuple[Basis, Basis]],
    candidates: Sequence[Sequence[tuple[int, int]]],
    batches: Iterable[Batch],
    advance: Callable[[], None] = lambda: None,
) -> list[list[float]]:
    """Relative error at each decoder layer's output when its keys and values are truncated.

    The error is `||Y - Y'|| / ||Y||` over all tokens of the batches, with the layer's original input (arXiv 2408.05646,
    algorithm 1). Each layer is run again, within one pass over the batches, for each of its candidates.

    Args:
        candidates: for each layer the pairs `(R_k, R_v)` to try.
        advance: called after each layer of each batch, for a progress bar.

    Returns:
        For each layer the errors of its candidates.
    """
    errors = [torch.zeros(len(pairs), dtype=torch.float64) for pairs in candidates]
    norms = torch.zeros(len(layers), dtype=torch.float64)
    valid: Tensor | None = None
    running = False

    def square(x: Tensor) -> float:
        x = x.double() if valid is None else x.double() * valid.unsqueeze(-1)
        return float(x.square().sum())

    def measure(index: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        nonlocal running
        if running:
            return
        running = True
        try:
            exact = _hidden(output)
            norms[index] += square(exact)
            for position, (rank_k, rank_v) in enumerate(candidates[index]):
                keys, values = bases[index]
                attach(layers[index], keys.truncate(rank_k), values.truncate(rank_v))
                errors[index][position] += square(exact - _hidden(layer(*args, **kwargs)))
        finally:
            detach(layers[index])
            running = False
        advance()

    hooks = [
        layer.register_forward_hook(
            lambda layer, args, kwargs, output, index=index: measure(index, layer, args, kwargs, output),
            with_kwargs=True,
        )
        for index, layer in enumerate(decoder_layers(model, layers))
    ]
    try:
        for batch in batches:
            valid = batch.valid
            forward_hidden(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return [(error / norm).sqrt().tolist() for error, norm in zip(errors, norms, strict=True)]


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
