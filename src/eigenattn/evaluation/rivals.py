"""What transformers offers for a smaller cache: plain quantisation, as curves to compare with."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import QuantizedCache

from ..errors import EigenAttnError
from .reading import Logits

# Elements that share a scale and a zero point (transformers' own default).
GROUP = 64
# backend -> the package that it needs, the widths it has, and arguments of its own. HQQ quantises along axis 1 only in
# a form that is as good as along axis 0, and works on every device.
BACKENDS: dict[str, tuple[str | None, tuple[int, ...], dict[str, Any]]] = {
    "quanto": ("optimum.quanto", (2, 4), {}),
    "hqq": ("hqq", (1, 2, 3, 4, 8), {"axis_key": 1, "axis_value": 1}),
    "fp8": (None, (8,), {}),
}
NAMES = "quanto-4, quanto-2, hqq-8, hqq-4, hqq-3, hqq-2, hqq-1, fp8"


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # the package that it would be part of
        return False


@dataclass(frozen=True)
class Rival:
    """A plain quantised cache: `quanto-4` keeps 4 bits an element, by quanto."""

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

    @property
    def bits_per_element(self) -> float:
        """Bits a cached element takes, scale and zero point of its group at 16 bits included."""
        return self.bits + (0 if self.backend == "fp8" else 2 * 16 / GROUP)

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

    def logits(self, piece: int) -> Logits:
        """Reads through the quantised cache in pieces of `piece` tokens.

        A piece is seen exactly while it is read, by its own tokens; everything before it through the cache.
        """

        @torch.no_grad()
        def read(model: nn.Module, ids: Tensor, keep: int) -> Tensor:
            cache = self.cache(model.config, piece)
            pieces = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split(piece, dim=1)]
            return torch.cat(pieces, dim=1)[:, -keep:]

        return read
