"""Which model bases belong to: a few of its weights, compared with what the bases say of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .attention import EigenAttention
from .maps import MAPS, QUANTISERS
from .placement import execution_device, stored
from .projections import answered, is_plain

# Of each parameter of each layer's attention (chosen: training changes all of them, and 64 a layer take 256 bytes).
SAMPLES = 16
# How far two roundings of one weight may lie apart, to bfloat16 and to float16, which has small numbers no closer.
APART = {"rtol": 2**-7, "atol": 2**-24}
# Of samples of one parameter, where one of both is quantised: how far they may lie apart, and how many may not do so.
# (chosen: two bits a weight are within it, and other weights are 1.4 apart).
APART_QUANTISED, SHARE_QUANTISED = 0.5, 0.9


def is_quantised(attention: EigenAttention) -> bool:
    """Whether any of a layer's projections is."""
    return bool(_quantised(attention))


def _quantised(attention: EigenAttention) -> dict[str, nn.Module]:
    """Those of a layer's projections that are, by name."""
    return {name: each for name, each in attention.projections.items() if not is_plain(each)}


def fingerprint_of(layers: Sequence[EigenAttention]) -> str:
    """Weights of the original's, evenly spaced in each parameter, in bfloat16 as hexadecimal digits."""
    return fingerprint_from([sample for attention in layers for _, sample in sorted(_samples(attention))])


def fingerprint_from(samples: Sequence[Tensor]) -> str:
    """The fingerprint of what was `sampled` of all parameters, layer by layer and in the order of their names."""
    return torch.cat(list(samples)).view(torch.uint8).numpy().tobytes().hex()


def sampled(weight: Tensor) -> Tensor:
    """What a fingerprint holds of one parameter."""
    weight = weight.detach().flatten()
    return weight[_places(len(weight))].to("cpu", torch.bfloat16)


def original_names(attention: EigenAttention) -> list[str]:
    """The names of a layer's parameters that are the original's, in their order."""
    return sorted({name for name, _ in attention.named_parameters()} - {*MAPS, *QUANTISERS})


def _samples(attention: EigenAttention) -> Iterator[tuple[str, Tensor]]:
    """Some weights of each parameter of a layer's attention, by its name; quantised projections are asked for them."""
    asked = _quantised(attention)
    for name in original_names(attention):
        module, _, own_name = name.rpartition(".")
        if module.partition(".")[0] not in asked:
            yield name, sampled(cast(Tensor, stored(attention.get_submodule(module), own_name)))
    for name, projection in asked.items():
        is_output = name == attention.family.output
        inputs = attention.heads * attention.head_dim if is_output else attention.config.hidden_size
        inputs = getattr(projection, "in_features", inputs)
        device = execution_device(projection)
        outputs = answered(projection, torch.zeros(1, inputs, device=device, dtype=attention.dtype)).shape[-1]
        places = torch.tensor(_places(outputs * inputs))
        rows = torch.zeros(SAMPLES, inputs, device=device, dtype=attention.dtype)
        rows[torch.arange(SAMPLES), places % inputs] = 1
        weights = answered(projection, rows).cpu()[torch.arange(SAMPLES), places // inputs]
        yield f"{name}.weight", weights.to(torch.bfloat16)
        bias = getattr(projection, "bias", None)
        if bias is not None:
            yield f"{name}.bias", sampled(bias)


def _places(count: int) -> list[int]:
    return [n * (count - 1) // (SAMPLES - 1) for n in range(SAMPLES)]


def alike(recorded: Any, own: str, quantised: bool = False) -> bool:
    """Whether two fingerprints are of one model, be it in different dtypes, or of which one is `quantised`."""
    try:
        values = [torch.tensor(list(bytes.fromhex(each)), dtype=torch.uint8) for each in (recorded, own)]
    except (TypeError, ValueError):  # it comes from a file
        return False
    if len(values[0]) != len(values[1]):
        return False
    one, other = (each.view(torch.bfloat16).float() for each in values)
    if not quantised:
        return bool(torch.isclose(one, other, **APART).all())
    one, other = one.view(-1, SAMPLES), other.view(-1, SAMPLES)
    near = (one - other).norm(dim=1) <= APART_QUANTISED * other.norm(dim=1)
    return bool(near.float().mean() >= SHARE_QUANTISED)
