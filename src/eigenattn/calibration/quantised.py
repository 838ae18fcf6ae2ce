"""Gradients through quantised layers: of their inputs, which is all that calibration needs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import EigenAttnError
from ..models.projections import NOT_LINEAR, holds_codes, matrix_of, probes
from .passes import replaced

# Where transformers has layers of its own for quantised weights, and no others that stand inside of models.
INTEGRATIONS = "transformers.integrations."


class Linear(torch.autograd.Function):
    """A linear layer whose own arithmetic gives no gradients: they are taken by its matrix, which it is asked for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Callable[[Tensor], Tensor], matrix: Callable[[], Tensor]) -> Tensor:
        ctx.matrix = matrix
        return forward(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        matrix = ctx.matrix()
        return gradients[0].to(matrix.dtype) @ matrix, None, None


def differentiable(module: nn.Module, like: Tensor) -> AbstractContextManager[None]:
    """Have gradients pass the quantised layers inside a module.

    Args:
        like: of the dtype of hidden states, on the device of the module.

    Raises:
        EigenAttnError: if one of them gives none, and is not a linear layer.
    """
    forwards = []
    for name, each in module.named_modules():
        size = getattr(each, "in_features", getattr(each, "infeatures", None))
        # What rounds activations has a `forward` of its own, and its weight may be plain.
        suspect = is_quantised(each) or (size is not None and "forward" in vars(each))
        if not suspect or (size is not None and _gives_gradients(each, size, like)):
            continue
        if size is None:
            raise EigenAttnError(
                f"gradients do not pass {name}, a {type(each).__name__} with quantised weights: take "
                'basis="attention" (--basis attention), or load the model with its weights dequantised.'
            )
        forwards.append((each, _by_matrix(each, size, like)))
    return replaced(forwards)


def is_quantised(module: nn.Module) -> bool:
    """Whether a module itself holds quantised weights."""
    if type(module).__module__.startswith(INTEGRATIONS):
        return True  # MXFP4 is held in objects that are no tensors
    own = chain(module.parameters(recurse=False), (b for b in module.buffers(recurse=False) if _may_be_codes(b)))
    return any(holds_codes(tensor) for tensor in own)


def _may_be_codes(buffer: Tensor) -> bool:
    """Masks and positions are no codes."""
    return buffer.dim() > 1 and buffer.dtype not in (torch.bool, torch.int64)


def _gives_gradients(module: nn.Module, size: int, like: Tensor) -> bool:
    """Whether gradients say what becomes of other inputs: through what is rounded in it, few or none pass."""
    x, other = probes(2 * 8, size, device=like.device, dtype=like.dtype).unflatten(0, (2, 1, 8))
    with torch.enable_grad():
        try:
            y = module(x.requires_grad_())
            weights = probes(8, y.shape[-1], device=y.device, dtype=y.dtype)[None]
            (gradient,) = torch.autograd.grad(y, x, weights)
        except (RuntimeError, NotImplementedError):  # also where what it gives needs no gradients
            return False
    with torch.no_grad():
        found = (gradient.float() * other.float()).sum(-1)
        expected = ((module(x + other) - y).float() * weights.float()).sum(-1)
    return bool((found - expected).norm() <= NOT_LINEAR * expected.norm())


def _by_matrix(module: nn.Module, size: int, like: Tensor) -> Callable[[Tensor], Any]:
    forward = module.forward
    asked: list[Tensor] = []

    def matrix() -> Tensor:
        if not asked:
            asked.append(matrix_of(forward, size, device=like.device, dtype=like.dtype))
        return asked[0]

    return lambda x: Linear.apply(x, forward, matrix)
