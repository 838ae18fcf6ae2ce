"""Smaller caches by plain quantisation, as curves to compare with: what transformers offers, and a stronger one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import QuantizedCache

from ..compression.folding import attach, detach
from ..errors import EigenAttnError
from ..models.attention import EigenAttention
from .reading import Logits, uncached

# Elements that share a scale and a zero point (transformers' own default).
GROUP = 64
# backend -> the package that it needs, the widths it has, and arguments of its own. HQQ quantises along axis 1 only in
# a form that is as good as along axis 0, and works on every device; so its codes of 3 bits come back for matrices only.
BACKENDS: dict[str, tuple[str | None, tuple[int, ...], dict[str, Any]]] = {
    "plain": (None, (8, 4, 3, 2), {}),
    "quanto": ("optimum.quanto", (4, 2), {}),
    "hqq": ("hqq", (8, 4, 2, 1), {"axis_key": 1, "axis_value": 1}),
    "fp8": (None, (8,), {}),
}
NAMES = ", ".join(
    f"{backend}-{bits}" if len(widths) > 1 else backend
    for backend, (_, widths, _) in BACKENDS.items()
    for bits in widths
)


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # the package that it would be part of
        return False


@dataclass(frozen=True)
class Rival:
    """A plain quantised cache: `quanto-4` keeps 4 bits an element, by quanto.

    `plain` stands for what transformers does not have: keys are quantised per channel and before rotation, values per
    token, beside the same window of exact tokens as ours. Elements are rounded and not packed. So does KIVI (arXiv
    2402.02750), and before rotation KVQuant (arXiv 2401.18079).
    """

    name: str
    backend: str
    bits: int

    @classmethod
    def of(cls, name: str) -> Rival:
        """Read a name.

        Raises:
            EigenAttnError: if it is unknown, or its package is absent.
        """
        match = re.fullmatch(r"(\w+?)(?:-(\d+))?", name)
        backend, bits = (match[1], int(match[2] or 8)) if match else ("", 0)
        if backend not in BACKENDS or bits not in BACKENDS[backend][1]:
            raise EigenAttnError(f"unknown rival {name!r}: choose from {NAMES}.")
        package = BACKENDS[backend][0]
        if package is not None and not _installed(package):
            raise EigenAttnError(f"rival {name!r} needs a package: pip install 'eigenattn[rivals]'.")
        return cls(name, backend, bits)

    def bits_per_element(self, head_dim: int) -> float:
        """Bits a cached element takes, scale and zero point of its group at 16 bits included."""
        if self.backend == "fp8":
            return self.bits
        of_values = min(GROUP, head_dim) if self.backend == "plain" else GROUP
        return self.bits + 16 / GROUP + 16 / of_values

    def check(self, config: Any, window: int) -> None:
        """Raise an `EigenAttnError` if the cache of such a model is not quantised so."""
        if self.backend != "plain":
            self.cache(config, window)

    def cache(self, config: Any, window: int) -> QuantizedCache:
        """An empty cache.

        Args:
            config: the model's configuration.
            window: tokens that are kept exactly until so many have come together.

        Raises:
            EigenAttnError: if this transformers does not quantise the cache of such a model so.
        """
        _, _, own = BACKENDS[self.backend]
        options = {} if self.backend == "fp8" else {"nbits": self.bits, "q_group_size": GROUP, **own}
        if options:
            options["residual_length"] = window
        try:
            return QuantizedCache(self.backend, config, **options)
        except (ValueError, ImportError) as error:
            reason = str(error).splitlines()[0]
            raise EigenAttnError(f"transformers does not quantise this cache by {self.name}: {reason}") from error

    @contextmanager
    def reading(self, layers: Sequence[EigenAttention], window: int) -> Iterator[Logits]:
        """How the model reads with this cache.

        Args:
            layers: the model's, at full rank.
            window: exact tokens. Through a cache of transformers text is read in pieces of so many: a piece is seen
                exactly while it is read, by its own tokens, and everything before it through the cache.
        """
        if self.backend != "plain":
            yield partial(self._in_pieces, window)
            return
        try:
            for attention in layers:
                attach(attention, None, None, window)
                attention.rounded = self._rounded
            yield uncached
        finally:
            for attention in layers:
                del attention.rounded
                detach(attention)

    @torch.no_grad()
    def _in_pieces(self, piece: int, model: nn.Module, ids: Tensor, keep: int) -> Tensor:
        cache = self.cache(model.config, piece)
        pieces = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split(piece, dim=1)]
        return torch.cat(pieces, dim=1)[:, -keep:]

    def _rounded(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """In place of `EigenAttention.rounded`: of [B, G, S, D], keys per channel and values per token."""
        by_channel = rounded_in_groups(keys.transpose(-1, -2), self.bits)
        return by_channel.transpose(-1, -2), rounded_in_groups(values, self.bits)


def rounded_in_groups(x: Tensor, bits: int) -> Tensor:
    """Vectors [..., n] quantised uniformly from the least to the greatest of each group along the last dimension."""
    pieces = []
    for piece in x.split(GROUP, dim=-1):
        low, high = piece.amin(-1, keepdim=True).half().to(x.dtype), piece.amax(-1, keepdim=True)
        step = ((high - low) / (2**bits - 1)).half().to(x.dtype).clamp_min(1e-7)
        pieces.append(low + ((piece - low) / step).round().clamp(0, 2**bits - 1) * step)
    return torch.cat(pieces, dim=-1) if pieces else x
