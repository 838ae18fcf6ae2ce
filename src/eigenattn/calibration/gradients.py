"""What errors of far keys and values do to a model's predictions: gradients, layer by layer, one layer in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import EigenAttnError
from ..models.attention import EigenAttention, ReadingAttention
from ..models.forward_pass import ForwardPass
from ..models.placement import loaded
from ..models.projections import Heads
from .attention_moments import far_weights
from .passes import DecoderLayers, hidden, stubbed
from .quantised import differentiable
from .statistics import Batch, not_finite

# Takes a layer, its keys and values [B, G, T, D], before rotation, and the gradients of both. Where values are keys,
# those of keys are of both.
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
    blocks = DecoderLayers.of(model, layers)
    with _frozen(model):
        calls, output = _calls(model, blocks, batch)
        _check_finite(layers, blocks, [*(args[0] for args, _ in calls[1:]), hidden(output)])
        gradient = _at_last_layer(model, blocks.all, batch, output, seed)
        own = dict(zip(blocks.places, layers, strict=True))
        of_readers: dict[int, Reading] = {}
        for place, (args, kwargs) in reversed(list(enumerate(calls))):
            states = args[0].detach().requires_grad_()
            arguments, kwargs = (states, *args[1:]), dict(kwargs)
            block = blocks.all[place]
            with loaded(block), differentiable(block, states), torch.enable_grad():
                run = partial(_run, block, arguments, kwargs, gradient)
                if place in own:
                    reading = of_readers.get(own[place].layer_idx)
                    with _watched(own[place], window, batch.valid, found, reading):
                        run(reading)
                elif place in blocks.readers:
                    with _watched_reader(blocks.readers[place], kwargs, window, batch.valid, of_readers):
                        run()
                else:
                    run()
            assert states.grad is not None
            gradient = states.grad


@dataclass
class Reading:
    """What layers that read another one's keys and values add to its gradients, at keys after rotation.

    Args:
        keys, values: as far queries of theirs see them, [B, G, T, D] in fp32.
        whole: the same of all queries, in the order of the rows that they are cached in.
    """

    keys: Tensor
    values: Tensor
    whole: tuple[Tensor, ...]


def _run(
    layer: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    gradient: Tensor,
    reading: Reading | None = None,
) -> None:
    """Run a decoder layer, and back: from its output and from what later layers read of it."""
    if "shared_kv_states" in kwargs:
        kwargs["shared_kv_states"] = copy.copy(kwargs["shared_kv_states"])
    output = hidden(layer(*args, **kwargs))
    outputs, gradients = [output], [gradient.to(output.device)]
    if reading is not None:
        shared = kwargs["shared_kv_states"].values()
        held = (each.sight.far.rows for each in shared)
        rows = next(rows for rows in held if any(row.requires_grad for row in rows))
        outputs, gradients = [*outputs, *rows], [*gradients, *reading.whole]
    torch.autograd.backward(outputs, gradients)


def _check_finite(layers: Sequence[EigenAttention], blocks: DecoderLayers, outputs: Sequence[Tensor]) -> None:
    """Raise an `EigenAttnError` if a decoder layer gives what is no number: gradients would be none before it."""
    for place, given in enumerate(outputs):
        if not given.isfinite().all():
            before = [attention for attention, at in zip(layers, blocks.places, strict=True) if at <= place]
            raise not_finite((before or layers)[-1 if before else 0], "vectors")


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
    model: PreTrainedModel, blocks: DecoderLayers, batch: Batch
) -> tuple[list[tuple[tuple, dict[str, Any]]], Any]:
    """What every decoder layer is called with, and what the last one gives."""
    calls: list[tuple[tuple, dict[str, Any]]] = []
    outputs: list[Any] = []

    def note(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        # Some families hand the hidden states over by name.
        states = args if args else (kwargs["hidden_states"],)
        calls.append((states, {name: value for name, value in kwargs.items() if name != "hidden_states"}))

    with ExitStack() as hooks:
        for layer in blocks.all:
            hooks.callback(layer.register_forward_pre_hook(note, with_kwargs=True).remove)
        last = blocks.all[-1]
        hooks.callback(last.register_forward_hook(lambda layer, args, output: outputs.append(output)).remove)
        # Layers that read another one's cache may be run for those positions alone that give logits.
        some = {} if blocks.readers else {"logits_to_keep": 1}
        model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **some)
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
        logits.backward(_of_drawn(logits, batch.valid, seed))
    assert states.grad is not None
    return states.grad


@torch.no_grad()
def _of_drawn(logits: Tensor, valid: Tensor | None, seed: int) -> Tensor:
    """The gradient of the loss at the logits [B, T, vocabulary]: predictions, less 1 at the token that is drawn."""
    rows = logits.flatten(0, -2) if valid is None else logits[valid.to(logits.device)]
    gradient = rows.softmax(-1, dtype=torch.float32)
    drawn = drawn_of(gradient, seed)
    gradient[torch.arange(len(drawn)), drawn] -= 1
    if valid is None:
        return gradient.view(logits.shape).to(logits.dtype)
    of_all = torch.zeros_like(logits)
    of_all[valid.to(logits.device)] = gradient.to(logits.dtype)
    return of_all


def drawn_of(predictions: Tensor, seed: int) -> Tensor:
    """A token [n] of each row of probabilities [n, vocabulary], drawn by them."""
    # By the cumulated distribution: one random number a token, not one for every word of the vocabulary.
    edges = predictions.cumsum(-1)
    places = torch.rand((len(edges), 1), generator=torch.Generator().manual_seed(seed)).to(edges.device)
    return torch.searchsorted(edges, places * edges[:, -1:]).clamp_max(edges.shape[-1] - 1).squeeze(-1)


@contextmanager
def _observed(attention: EigenAttention | ReadingAttention, look: Callable[..., None]) -> Iterator[None]:
    """Look on in the middle of passes through a layer."""
    attention.observer = look
    try:
        yield
    finally:
        attention.observer = None


def _watched(
    attention: EigenAttention, window: int, valid: Tensor | None, found: Found, reading: Reading | None
) -> AbstractContextManager[None]:
    """Look on while a layer runs with gradients."""

    def look(layer: EigenAttention, heads: Heads[Tensor], this: ForwardPass) -> None:
        detached = Heads(*(each.detach() for each in heads))

        def give(output: Tensor, gradient: Tensor) -> None:
            rotated = this.rotated(detached.query), this.rotated(detached.key)
            of_keys, of_values = far_gradients(layer, rotated, detached.value, this, output, gradient, window, valid)
            if reading is not None:
                of_keys, of_values = of_keys + reading.keys, of_values + reading.values
            of_keys = this.rotated_back(of_keys)
            if layer.layout.tied:
                of_keys, of_values = of_keys + of_values, torch.zeros_like(of_values)
            found(layer, (detached.key, detached.value), (of_keys, of_values))

        this.on_output = partial(_when_known, give)

    return _observed(attention, look)


@contextmanager
def _watched_reader(
    reader: ReadingAttention,
    kwargs: dict[str, Any],
    window: int,
    valid: Tensor | None,
    of_readers: dict[int, Reading],
) -> Iterator[None]:
    """Look on while a layer that reads another one's keys and values runs with gradients, and add up its share.

    Args:
        kwargs: what its decoder layer is called with. What it reads is changed to leaves of a graph.
        of_readers: by the layer that is read.
    """
    shared = kwargs["shared_kv_states"] = copy.copy(kwargs["shared_kv_states"])
    shown = shared[reader.layer_type]
    source, sight = shown.source, shown.sight
    rows = tuple(row.detach().requires_grad_() for row in sight.far.rows)
    shared[reader.layer_type] = shown._replace(sight=sight._replace(far=sight.far._replace(rows=rows)))
    k, v = (row.detach() for row in rows)  # at full rank
    far: list[tuple[Tensor, Tensor]] = []

    def look(layer: ReadingAttention, source: EigenAttention, q: Tensor, this: ForwardPass) -> None:
        q_rotated = this.rotated(q.detach())

        def give(output: Tensor, gradient: Tensor) -> None:
            far.append(far_gradients(source, (q_rotated, k), v, this, output, gradient, window, valid))

        this.on_output = partial(_when_known, give)

    with _observed(reader, look):
        yield
    (of_keys, of_values), whole = far[0], tuple(row.grad for row in rows if row.grad is not None)
    held = of_readers.get(source.layer_idx)
    if held is not None:
        of_keys, of_values = of_keys + held.keys, of_values + held.values
        whole = tuple(one + other for one, other in zip(whole, held.whole, strict=True))
    of_readers[source.layer_idx] = Reading(of_keys, of_values, whole)


def _when_known(give: Callable[[Tensor, Tensor], None], output: Tensor) -> None:
    """Have an output's gradient given, with the output, as soon as it is known."""
    detached = output.detach()  # a hook that held its own tensor would outlive the pass
    output.register_hook(lambda gradient: give(detached, gradient))


@torch.no_grad()
def far_gradients(
    attention: EigenAttention,
    rotated: tuple[Tensor, Tensor],
    v: Tensor,
    this: ForwardPass,
    output: Tensor,
    gradient: Tensor,
    window: int,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The loss's gradients with respect to keys, after rotation, and values as far queries see them.

    With `a` the weights and `g` the gradient at attention's output `o`: a value's is `sum_m a_mn g_m` and a rotated
    key's `sum_m a_mn g_m . (v_n - o_m) q_m`, over the queries m of its group that have it outside their window.

    Args:
        rotated: queries and keys at their positions.
        v: values.
        output, gradient: [B, H, T, D].
        valid: [B, T] of booleans, or None: queries that are no padding.

    Returns:
        Both [B, G, T, D] in fp32.
    """
    q_rotated, k_rotated = rotated
    groups, mask = k_rotated.shape[1], this.whole_mask(q_rotated)
    of_keys, of_values = (torch.zeros_like(x, dtype=torch.float32) for x in (k_rotated, v))
    valid = None if valid is None else valid.to(v.device)
    # Gradients may leave the range of fp16, and not that of bf16, whose products are several times as fast.
    dtype = torch.bfloat16 if v.dtype == torch.bfloat16 else torch.float32
    gradient = gradient.float()
    # One product gives `g_m . v_n - g_m . o_m`. In fp32, for the two may nearly cancel.
    lengthened = torch.cat([gradient, -(gradient * output.float()).sum(-1, keepdim=True)], dim=-1)
    values = F.pad(v.float(), (0, 1), value=1.0)
    for start, stop, scores, weights in far_weights(attention, rotated, mask, window, valid):
        grouped, g, q_block = (
            x.unflatten(1, (groups, -1)).flatten(2, 3)
            for x in (weights, lengthened[:, :, start:stop], q_rotated[:, :, start:stop].to(dtype))
        )  # [B, G, H/G * block, stop, D + 1 or D]
        of_values[:, :, :stop] += grouped.to(dtype).transpose(-1, -2) @ g[..., :-1].to(dtype)
        of_scores = (g @ values[:, :, :stop].transpose(-1, -2)).mul_(grouped)
        if attention.softcap is not None:
            slope = 1 - (scores.float() / attention.softcap).clamp(-1, 1).square()
            of_scores *= slope.unflatten(1, (groups, -1)).flatten(2, 3)
        of_keys[:, :, :stop] += of_scores.to(dtype).transpose(-1, -2) @ q_block
    return of_keys * attention.scaling, of_values
