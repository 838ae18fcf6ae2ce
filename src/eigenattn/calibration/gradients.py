"""What errors of far keys and values do to a model's predictions: gradients, layer by layer, one layer in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import EigenAttnError
from ..models.attention import EigenAttention
from ..models.forward_pass import ForwardPass
from ..models.placement import loaded
from ..models.projections import Heads
from .attention_moments import far_weights
from .passes import decoder_layers, hidden, stubbed
from .quantised import differentiable
from .statistics import Batch, not_finite

# Takes a layer, its keys and values [B, G, T, D], before rotation, and the gradients of both.
Found = Callable[[EigenAttention, tuple[Tensor, Tensor], tuple[Tensor, Tensor]], None]


def backward(
    model: PreTrainedModel, layers: Sequence[EigenAttention], batch: Batch, window: int, seed: int, found: Found
) -> None:
    """Run a batch forward and back, and give every layer's gradients of far keys and values.

    The loss is that of tokens drawn from the model's own predictions, summed over the batch: the second moment of its
    gradient is the Fisher information, which is what KL divergence of predictions grows by where errors are small. Each
    decoder layer is run once more with gradients, from the last to the first, so that one is in memory at a time.

    Args:
        layers: converted, at full rank.
        window: exact tokens, W: only what reaches queries m of a key n <= m - W counts.
        seed: of the tokens drawn.

    Raises:
        EigenAttnError: if the model predicts no tokens, or a layer's activations are not finite.
    """
    if model.get_output_embeddings() is None:
        raise EigenAttnError(
            f"this {type(model).__name__} has no language head, and the fisher basis looks at predictions: load it "
            'with AutoModelForCausalLM, or take basis="attention".'
        )
    modules = decoder_layers(model, layers)
    with _frozen(model):
        calls, output = _calls(model, modules, batch)
        for attention, given in zip(layers, [*(args[0] for args, _ in calls[1:]), hidden(output)], strict=True):
            if not given.isfinite().all():  # gradients would be none in the layers before it
                raise not_finite(attention, "vectors")
        gradient = _at_last_layer(model, modules, batch, output, seed)
        for attention, layer, (args, kwargs) in zip(reversed(layers), reversed(modules), reversed(calls), strict=True):
            states = args[0].detach().requires_grad_()
            with (
                loaded(layer),
                differentiable(layer, states),
                torch.enable_grad(),
                _watched(attention, window, batch.valid, found),
            ):
                hidden(layer(states, *args[1:], **kwargs)).backward(gradient.to(states.device))
            assert states.grad is not None
            gradient = states.grad


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Without gradients of the weights."""
    trained = [each for each in model.parameters() if each.requires_grad]
    try:
        for each in trained:
            each.requires_grad_(False)
        yield
    finally:
        for each in trained:
            each.requires_grad_(True)


@torch.no_grad()
def _calls(
    model: PreTrainedModel, modules: Sequence[nn.Module], batch: Batch
) -> tuple[list[tuple[tuple, dict[str, Any]]], Any]:
    """What every decoder layer is called with, and what the last one gives."""
    calls: list[tuple[tuple, dict[str, Any]]] = []
    outputs: list[Any] = []

    def note(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        # Some families hand the hidden states over by name.
        states = args if args else (kwargs["hidden_states"],)
        calls.append((states, {name: value for name, value in kwargs.items() if name != "hidden_states"}))

    with ExitStack() as hooks:
        for layer in modules:
            hooks.callback(layer.register_forward_pre_hook(note, with_kwargs=True).remove)
        hooks.callback(modules[-1].register_forward_hook(lambda layer, args, output: outputs.append(output)).remove)
        model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, logits_to_keep=1)
    return calls, outputs[0]


def _at_last_layer(
    model: PreTrainedModel, modules: Sequence[nn.Module], batch: Batch, output: Any, seed: int
) -> Tensor:
    """The gradient [B, T, C] of the loss at what the last decoder layer gives."""
    states = hidden(output).detach().requires_grad_()
    given = (states, *output[1:]) if isinstance(output, tuple) else states
    head: Any = model.get_output_embeddings()
    with differentiable(head, states), torch.enable_grad(), stubbed(modules, given):
        logits = model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        logits = logits.float() if batch.valid is None else logits.float()[batch.valid.to(logits.device)]
        logits = logits.flatten(0, -2)
        with torch.no_grad():
            # By the cumulated distribution: one random number a token, not one for every word of the vocabulary.
            edges = logits.softmax(-1).cumsum(-1)
            places = torch.rand((len(logits), 1), generator=torch.Generator().manual_seed(seed)).to(logits.device)
            drawn = torch.searchsorted(edges, places * edges[:, -1:]).clamp_max(logits.shape[-1] - 1).squeeze(-1)
        F.cross_entropy(logits, drawn, reduction="sum").backward()
    assert states.grad is not None
    return states.grad


@contextmanager
def _watched(attention: EigenAttention, window: int, valid: Tensor | None, found: Found) -> Iterator[None]:
    """Look on while a layer runs with gradients."""
    seen: list[tuple[Heads[Tensor], ForwardPass]] = []

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        output = args[0].detach()  # a hook that held its own tensor would outlive the pass

        def give(gradient: Tensor) -> None:
            heads, this = seen.pop()
            heads = Heads(*(each.detach() for each in heads))
            own, of_loss = (x.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for x in (output, gradient))
            gradients = far_gradients(attention, heads, this, own, of_loss, window, valid)
            found(attention, (heads.key, heads.value), gradients)

        args[0].register_hook(give)

    hook = attention.output_projection.register_forward_pre_hook(look)
    attention.observer = lambda layer, heads, this: seen.append((heads, this))
    try:
        yield
    finally:
        attention.observer = None
        hook.remove()


@torch.no_grad()
def far_gradients(
    attention: EigenAttention,
    heads: Heads[Tensor],
    this: ForwardPass,
    output: Tensor,
    gradient: Tensor,
    window: int,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The loss's gradients with respect to keys, before rotation, and values as far queries see them.

    With `a` the weights and `g` the gradient at attention's output `o`: a value's is `sum_m a_mn g_m` and a rotated
    key's `sum_m a_mn g_m . (v_n - o_m) q_m`, over the queries m of its group that have it outside their window.

    Args:
        heads: queries, keys and values before rotation.
        output, gradient: [B, H, T, D].
        valid: [B, T] of booleans, or None: queries that are no padding.

    Returns:
        Both [B, G, T, D] in fp32.
    """
    q, k, v = heads
    groups = k.shape[1]
    q_rotated, k_rotated, mask = this.rotated(q), this.rotated(k), this.whole_mask(q)
    of_keys, of_values = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
    valid = None if valid is None else valid.to(q.device)
    gradient = gradient.float()
    along = (gradient * output.float()).sum(-1, keepdim=True)  # [B, H, T, 1]
    for start, stop, scores, weights in far_weights(attention, (q_rotated, k_rotated), mask, window, valid):
        if attention.softcap is not None:
            slope = 1 - (scores / attention.softcap).clamp(-1, 1).square()
        grouped, g, q_block = (
            x.unflatten(1, (groups, -1)).flatten(2, 3)
            for x in (weights, gradient[:, :, start:stop], q_rotated[:, :, start:stop].float())
        )  # [B, G, H/G * block, stop or D]
        of_values[:, :, :stop] += grouped.transpose(-1, -2) @ g
        along_block = along[:, :, start:stop].unflatten(1, (groups, -1)).flatten(2, 3)
        of_scores = grouped * (g @ v[:, :, :stop].float().transpose(-1, -2) - along_block)
        if attention.softcap is not None:
            of_scores = of_scores * slope.unflatten(1, (groups, -1)).flatten(2, 3)
        of_keys[:, :, :stop] += (of_scores.transpose(-1, -2) @ q_block) * attention.scaling
    return this.rotated_back(of_keys), of_values
