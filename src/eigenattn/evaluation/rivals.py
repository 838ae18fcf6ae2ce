"""Smaller caches by plain quantisation, as curves to compare with: what transformers offers, and a stronger one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, QuantizedCache

from ..compression.folding import attach, detach
from ..errors import EigenAttnError
from ..models.attention import EigenAttention
from .reading import Logits, uncached

# Elements that share a scale and a zero point (transformers' own default).
GROUP = 64


@dataclass(frozen=True)
class Rival(ABC):
    """A smaller cache to compare with. Another package adds its own to `RIVALS`.

    Args:
        name: what it is called in results.
        bits: of a stored number.
        package: what has to be installed for it, by the name that it is imported by; None for nothing.
    """

    name: str
    bits: int
    package: str | None = None

    @staticmethod
    def of(name: str) -> Rival:
        """The one of that name.

        Raises:
            EigenAttnError: if it is unknown, or its package is absent.
        """
        if name not in RIVALS:
            raise EigenAttnError(f"unknown rival {name!r}: choose from {', '.join(RIVALS)}.")
        rival = RIVALS[name]
        if rival.package is not None and not _installed(rival.package):
            raise EigenAttnError(f"rival {name!r} needs a package: pip install 'eigenattn[rivals]'.")
        return rival

    @property
    def keeps_window(self) -> bool:
        """Whether the last tokens are exact."""
        return True

    @abstractmethod
    def bits_per_element(self, head_dim: int) -> float:
        """Bits a cached element takes, all that is stored beside it included."""

    def check(self, config: Any, window: int) -> None:
        """Raise an `EigenAttnError` if such a model, of which `config` is the configuration, has no such cache."""
        return

    @abstractmethod
    def reading(self, layers: Sequence[EigenAttention], window: int) -> AbstractContextManager[Logits]:
        """How the model reads with this cache.

        Args:
            layers: the model's, at full rank.
            window: exact tokens.
        """


class PlainRival(Rival):
    """What transformers does not have: keys quantised per channel and before rotation, values per token.

    They stand beside the same window of exact tokens as ours. Elements are rounded and not packed. So does KIVI (arXiv
    2402.02750), and before rotation KVQuant (arXiv 2401.18079).
    """

    def bits_per_element(self, head_dim: int) -> float:
        """Scale and zero point of a group at 16 bits included."""
        return self.bits + 16 / GROUP + 16 / min(GROUP, head_dim)

    @contextmanager
    def reading(self, layers: Sequence[EigenAttention], window: int) -> Iterator[Logits]:
        """All at once, what lies outside the window being rounded."""
        try:
            for attention in layers:
                attach(attention, (), window)
                attention.rounded = self._rounded
            yield uncached
        finally:
            for attention in layers:
                del attention.rounded
                detach(attention)

    def _rounded(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """In place of `EigenAttention.rounded`: of [B, G, S, D], keys per channel and values per token."""
        by_channel = rounded_in_groups(keys.transpose(-1, -2), self.bits)
        return by_channel.transpose(-1, -2), rounded_in_groups(values, self.bits)


@dataclass(frozen=True)
class QuantisedCacheRival(Rival):
    """A quantised cache of transformers: `quanto-4` keeps 4 bits an element, by quanto.

    Args:
        backend: its name in transformers.
        options: arguments of its own.
        grouped: whether groups of elements have a scale and a zero point, and the last tokens are exact.
    """

    backend: str = ""
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    grouped: bool = True

    @property
    def keeps_window(self) -> bool:
        """Whether the last tokens are exact."""
        return self.grouped

    def bits_per_element(self, head_dim: int) -> float:
        """Scale and zero point of a group at 16 bits included."""
        return self.bits + 2 * 16 / GROUP if self.grouped else self.bits

    def check(self, config: Any, window: int) -> None:
        """Raise an `EigenAttnError` if transformers does not quantise the cache of such a model so."""
        self.cache(config, window)

    def cache(self, config: Any, window: int) -> QuantizedCache:
        """An empty cache.

        Args:
            config: the model's configuration.
            window: tokens that are kept exactly until so many have come together.

        Raises:
            EigenAttnError: if this transformers does not quantise the cache of such a model so.
        """
        groups = {"nbits": self.bits, "q_group_size": GROUP, "residual_length": window} if self.grouped else {}
        try:
            return QuantizedCache(self.backend, config, **groups, **self.options)
        except (ValueError, ImportError) as error:
            reason = str(error).splitlines()[0]
            raise EigenAttnError(f"transformers does not quantise this cache by {self.name}: {reason}") from error

    @contextmanager
    def reading(self, layers: Sequence[EigenAttention], window: int) -> Iterator[Logits]:
        """In pieces of `window` tokens.

        A piece is seen exactly while it is read, by its own tokens, and everything before it through the cache.
        """
        yield partial(self._in_pieces, window)

    @torch.no_grad()
    def _in_pieces(self, piece: int, model: PreTrainedModel, ids: Tensor, keep: int) -> Tensor:
        cache = self.cache(model.config, piece)
        pieces = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split(piece, dim=1)]
        return torch.cat(pieces, dim=1)[:, -keep:]


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # the package that it would be part of
        return False


def rounded_in_groups(x: Tensor, bits: int) -> Tensor:
    """Vectors [..., n] quantised uniformly from the least to the greatest of each group along the last dimension."""
    pieces = []
    for piece in x.split(GROUP, dim=-1):
        low, high = piece.amin(-1, keepdim=True).half().to(x.dtype), piece.amax(-1, keepdim=True)
        step = ((high - low) / (2**bits - 1)).half().to(x.dtype).clamp_min(1e-7)
        pieces.append(low + ((piece - low) / step).round().clamp(0, 2**bits - 1) * step)
    return torch.cat(pieces, dim=-1) if pieces else x


# HQQ quantises along axis 1 only in a form that is as good as along axis 0, and works on every device; so its codes of
# 3 bits come back for matrices only.
RIVALS: dict[str, Rival] = {
    rival.name: rival
    for rival in (
        *(PlainRival(f"plain-{bits}", bits) for bits in (8, 4, 3, 2)),
        *(QuantisedCacheRival(f"quanto-{bits}", bits, "optimum.quanto", "quanto") for bits in (4, 2)),
        *(
            QuantisedCacheRival(f"hqq-{bits}", bits, "hqq", "hqq", {"axis_key": 1, "axis_value": 1})
            for bits in (8, 4, 2, 1)
        ),
        QuantisedCacheRival("fp8", 8, backend="fp8", grouped=False),
    )
}
