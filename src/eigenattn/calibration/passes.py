"""Running some of a model's decoder layers: the others are stubbed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..models.attention import EigenAttention, ReadingAttention
from ..models.placement import loaded
from .statistics import Batch, forward_hidden


@dataclass(frozen=True)
class DecoderLayers:
    """A model's decoder layers, some of which may have no attention, or read what another one caches.

    Args:
        all: in their order.
        places: which of them each attention module with latents belongs to.
        readers: the attention of those that read, by place.
    """

    all: list[nn.Module]
    places: list[int]
    readers: dict[int, ReadingAttention]

    @classmethod
    def of(cls, model: PreTrainedModel, layers: Sequence[EigenAttention]) -> DecoderLayers:
        """Those that attention modules belong to, and what lies between."""
        parents = {id(child): parent for parent in model.modules() for child in parent.children()}

        def block(attention: nn.Module) -> nn.Module:
            while not isinstance(parents[id(attention)], nn.ModuleList):
                attention = parents[id(attention)]
            return attention

        found = [block(attention) for attention in layers]
        everything = list(parents[id(found[0])].children())
        place = {id(each): index for index, each in enumerate(everything)}
        readers = [module for module in model.modules() if isinstance(module, ReadingAttention)]
        return cls(
            everything,
            [place[id(each)] for each in found],
            {place[id(block(reader))]: reader for reader in readers},
        )

    def own(self, index: int) -> nn.Module:
        """The decoder layer of an attention module."""
        return self.all[self.places[index]]

    def before(self, index: int) -> list[nn.Module]:
        """The decoder layers before an attention module's, from the first one that has attention."""
        return self.all[: self.places[index]] if index else []


@contextmanager
def embeddings_loaded(model: PreTrainedModel) -> Iterator[None]:
    """Have the weights of input and output embeddings on their device, however often they are used meanwhile."""
    with ExitStack() as stack:
        for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
            if embeddings is not None:
                stack.enter_context(loaded(embeddings))
        yield


@contextmanager
def replaced(forwards: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Have modules do something else instead of running."""
    before = [vars(module).get("forward") for module, _ in forwards]  # accelerate's, which loads weights, if anything
    for module, forward in forwards:
        module.forward = forward
    try:
        yield
    finally:
        for (module, _), own in zip(forwards, before, strict=True):
            if own is None:
                del module.forward
            else:
                module.forward = own


def stubbed(layers: Sequence[nn.Module], output: Any) -> AbstractContextManager[None]:
    """Have all layers give this output instead of running."""
    return replaced([(layer, lambda *args, **kwargs: output) for layer in layers])


def layer_output(model: PreTrainedModel, layers: DecoderLayers, index: int, before: Any, batch: Batch) -> Any:
    """What the decoder layers give from one that has attention on, up to the next one, and no other is run.

    Args:
        before: what the layer before it gave; None for the first.
    """
    found: list[Any] = []
    stop = layers.places[index + 1] if index + 1 < len(layers.places) else len(layers.all)
    hook = layers.all[stop - 1].register_forward_hook(lambda layer, args, output: found.append(output))
    try:
        with (
            stubbed(layers.before(index), before),
            replaced([(layer, lambda *args, **kwargs: found[0]) for layer in layers.all[stop:]]),
        ):
            forward_hidden(model, batch)
    finally:
        hook.remove()
    return found[0]


def hidden(output: Any) -> Tensor:
    """The hidden states [B, T, C] in what a decoder layer, or an attention module, gives."""
    return output[0] if isinstance(output, tuple) else output
