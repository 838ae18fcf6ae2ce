"""Smaller caches to compare with, which need no text: what transformers offers, and stronger ones from papers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from itertools import product
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, QuantizedCache

from ..cache.layout import Layout
from ..compression.folding import attach, detach
from ..errors import EigenAttnError
from ..models.attention import EigenAttention
from ..models.families import family_of
from ..models.rotary import rotate
from .reading import Logits, in_pieces, uncached
from .rounding import GROUP, STORED, ChannelCode, Code, HadamardCode, LatticeCode, SphereCode, half

# First tokens that are kept exactly, where any are (KVTC, arXiv 2511.01815, keeps as many).
SINKS = 4


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
        """Bits that an element of a token outside the window takes, all that is stored beside it included."""

    def once_a_sequence(self, layout: Layout) -> float:
        """Bytes that one layer of an uncompressed model takes more, once a sequence; none by default."""
        return 0.0

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


@dataclass(frozen=True)
class RoundedRival(Rival):
    """What transformers does not have: keys and values in some code, beside the same window of exact tokens as ours.

    Elements are rounded and not packed.

    Args:
        code: of keys and values.
        after_rotary: whether keys are coded as they are rotated to their positions, and not before.
        centred: whether the mean of each channel of keys is taken out, over all tokens of a prefill outside the window,
            and stored once a sequence. Here the whole text is the prefill.
        sinks: first tokens that are kept exactly.
    """

    code: Code = field(kw_only=True)
    after_rotary: bool = False
    centred: bool = False
    sinks: int = 0

    def bits_per_element(self, head_dim: int) -> float:
        """Norms, scales and zero points at 16 bits included."""
        return self.code.bits_per_element(head_dim)

    def once_a_sequence(self, layout: Layout) -> float:
        """Means, and what exact tokens take more."""
        means = layout.kv_heads * layout.head_dim * STORED / 8 if self.centred else 0
        more = (STORED - self.bits_per_element(layout.head_dim)) / 8
        return means + self.sinks * layout.original_elements * more

    def check(self, config: Any, window: int) -> None:
        """Raise an `EigenAttnError` if keys are not rotated, or vectors have no such code."""
        text = config.get_text_config(decoder=True)
        family = family_of(text)
        if self.after_rotary and family.positions_of(text) != "rotary":
            raise EigenAttnError(f"{self.name} rotates keys to their positions, and this model has none to rotate by.")
        self.code.check(family.head_dim(text))

    @contextmanager
    def reading(self, layers: Sequence[EigenAttention], window: int) -> Iterator[Logits]:
        """All at once, what lies outside the window being rounded."""
        try:
            for attention in layers:
                attach(attention, (), window)
                attention.rounded = partial(self._rounded, attention)
            yield uncached
        finally:
            for attention in layers:
                del attention.rounded
                detach(attention)

    def round(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What comes back of keys and values [B, G, S, D] of all tokens outside the window, in fp32."""
        exact, far = keys[:, :, : self.sinks], keys[:, :, self.sinks :]
        if not far.shape[2]:
            return keys, values
        mean = half(far.mean(2, keepdim=True)) if self.centred else torch.zeros_like(far[:, :, :1])
        keys = torch.cat([exact, self.code.rounded_keys(far - mean) + mean], dim=2)
        exact, far = values[:, :, : self.sinks], values[:, :, self.sinks :]
        return keys, torch.cat([exact, self.code.rounded(far)], dim=2)

    def _rounded(self, attention: EigenAttention, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        """In place of `EigenAttention.rounded`, of keys before rotation; values that are keys are coded as those."""
        dtype, keys, values = keys.dtype, keys.float(), values.float()
        latents = len(attention.layout.latents)
        if not (self.after_rotary and attention.rotates_far):
            keys, values = self.round(keys, values)
            return (keys.to(dtype), values.to(dtype))[:latents]
        count, interleaved = keys.shape[2], attention.family.interleaved
        # Some kinds of scaling go by the last position, which is in the window.
        positions = torch.arange(count + attention.layout.window, device=keys.device)[None]
        cos, sin = (x[:, :count] for x in attention.angles(keys, positions))
        keys, values = self.round(rotate(keys, cos, sin, interleaved), values)
        square = cos.square() + sin.square()  # some kinds of scaling make vectors longer, too
        return (rotate(keys, cos / square, -sin / square, interleaved).to(dtype), values.to(dtype))[:latents]


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
        return self.bits + 2 * STORED / GROUP if self.grouped else self.bits

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
        return in_pieces(model, ids, self.cache(model.config, piece), piece)[:, -keep:]


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # the package that it would be part of
        return False


def _variants() -> Iterator[RoundedRival]:
    """Codes at 4, 3 and 2 bits, with what keys are coded beside: `-rotated`, `-centred`, `-sinks`."""
    for bits in (4, 3, 2):
        yield RoundedRival(f"kivi-{bits}", bits, code=ChannelCode(bits), after_rotary=True)
        for name, code in (
            (f"hadamard-{bits}-64", HadamardCode(bits)),
            (f"hadamard-{bits}-32", HadamardCode(bits, symmetric=True)),
            (f"e8-{bits}", LatticeCode(bits)),
            (f"turboquant-{bits}-nc", SphereCode(bits, corrected=True)),
        ):
            yield RoundedRival(name, bits, code=code)
            yield RoundedRival(f"{name}-centred-sinks", bits, code=code, centred=True, sinks=SINKS)
        for after_rotary, centred, sinks in product((False, True), repeat=3):
            ends = zip(("rotated", "centred", "sinks"), (after_rotary, centred, sinks), strict=True)
            name = "-".join([f"turboquant-{bits}", *(end for end, given in ends if given)])
            options = {"after_rotary": after_rotary, "centred": centred, "sinks": SINKS * sinks}
            yield RoundedRival(name, bits, code=SphereCode(bits), **options)


# HQQ quantises along axis 1 only in a form that is as good as along axis 0, and works on every device; so its codes of
# 3 bits come back for matrices only.
RIVALS: dict[str, Rival] = {
    rival.name: rival
    for rival in (
        *(RoundedRival(f"plain-{bits}", bits, code=ChannelCode(bits)) for bits in (8, 4, 3, 2)),
        *_variants(),
        *(QuantisedCacheRival(f"quanto-{bits}", bits, "optimum.quanto", "quanto") for bits in (4, 2)),
        *(
            QuantisedCacheRival(f"hqq-{bits}", bits, "hqq", "hqq", {"axis_key": 1, "axis_value": 1})
            for bits in (8, 4, 2, 1)
        ),
        QuantisedCacheRival("fp8", 8, backend="fp8", grouped=False),
    )
}
