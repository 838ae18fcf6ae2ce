"""Running some of a model's decoder layers: the others are stubbed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..models.attention import EigenAttention
from ..models.placement import loaded
from .statistics import Batch, forward_hidden


def decoder_layers(model: PreTrainedModel, layers: Sequence[EigenAttention]) -> list[nn.Module]:
    """The decoder layers that attention modules belong to."""
    parents = {id(child): parent for parent in model.modules() for child in parent.children()}
    return [parents[id(attention)] for attention in layers]


@contextmanager
def embeddings_loaded(model: PreTrainedModel) -> Iterator[None]:
    """Have the weights of input and output embeddings on their device, however often they are used meanwhile."""
    with ExitStack() as stack:
        for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
            if embeddings is not None:
                stack.enter_context(loaded(embeddings))
        yield


@contextmanager
def replaced(layers: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Have all layers do this instead of running."""
    before = [vars(layer).get("forward") for layer in layers]  # accelerate's, which loads weights, if anything
    for layer in layers:
        layer.forward = forward
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            if own is None:
                del layer.forward
            else:
                layer.forward = own


def stubbed(layers: Sequence[nn.Module], output: Any) -> AbstractContextManager[None]:
    """Have all layers give this output instead of running."""
    return replaced(layers, lambda *args, **kwargs: output)


def layer_output(model: PreTrainedModel, layers: Sequence[nn.Module], index: int, before: Any, batch: Batch) -> Any:
    """What one decoder layer gives, and no other is run.

    Args:
        before: what the layer before it gave; None for the first.
    """
    found: list[Any] = []
    hook = layers[index].register_forward_hook(lambda layer, args, output: found.append(output))
    try:
        with stubbed(layers[:index], before), replaced(layers[index + 1 :], lambda *args, **kwargs: found[0]):
            forward_hidden(model, batch)
    finally:
        hook.remove()
    return found[0]


def hidden(output: Any) -> Tensor:
    """The hidden states [B, T, C] in what a decoder layer, or an attention module, gives."""
    return output[0] if isinstance(output, tuple) else output
