"""Of what latents a layer's cache consists: one value, from which bytes, shapes and what stays together follow."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import EigenAttnError
from .packing import PARTS, Widths

SIDES = ("key", "value")


@dataclass(frozen=True)
class Latent:
    """What one latent of a token is made of.

    Args:
        sides: whose vectors: `("key",)`, `("value",)` or both.
        heads: neighbouring KV heads that share it, N; a token has G/N such latents.
        rank: its size, R.
        head_dim: size of a vector, D.
        widths: channels by the bits of their codes; None for elements of the model's dtype.
    """

    sides: tuple[str, ...]
    heads: int
    rank: int
    head_dim: int
    widths: Widths | None = None

    @property
    def full_rank(self) -> int:
        """Dimensions of the vectors that it is made of."""
        return len(self.sides) * self.heads * self.head_dim

    @property
    def verbatim(self) -> bool:
        """Whether it is the vector of a single head as it is."""
        return self.widths is None and self.heads == len(self.sides) == 1 and self.rank == self.full_rank

    @property
    def elements(self) -> int:
        """Elements stored, in bytes if it is coded."""
        return self.rank if self.widths is None else self.widths.bytes

    def bytes(self, element_size: int) -> int:
        """Bytes stored, in elements of `element_size` bytes unless it is coded."""
        return self.elements * (element_size if self.widths is None else 1)

    def to_dict(self) -> dict[str, Any]:
        """As a checkpoint's configuration has it."""
        values: dict[str, Any] = {"sides": list(self.sides), "heads": self.heads, "rank": self.rank}
        if self.widths is not None:
            values["widths"] = self.widths.to_dict()
            if self.widths.scaled:
                values["scaled"] = True
        return values

    @classmethod
    def from_dict(cls, values: Any, head_dim: int) -> Latent:
        """Read what `to_dict` wrote.

        Raises:
            ValueError: if it is malformed.
        """
        if not isinstance(values, dict) or not set(values) <= {"sides", "heads", "rank", "widths", "scaled"}:
            raise ValueError(f"no latent: {values!r:.60}")
        sides, heads, rank, counts = (values.get(name) for name in ("sides", "heads", "rank", "widths"))
        if not isinstance(sides, list) or tuple(sides) not in (("key",), ("value",), SIDES):
            raise ValueError(f"no sides: {sides!r:.60}")
        if type(heads) is not int or type(rank) is not int or heads < 1 or rank < 1:
            raise ValueError(f"no heads and rank: {heads!r:.60}, {rank!r:.60}")
        widths = None
        scaled = values.get("scaled", False)
        if type(scaled) is not bool or (scaled and counts is None):
            raise ValueError(f"no scale: {scaled!r:.60}")
        if counts is not None:
            known = {str(bits): bits for bits in PARTS}
            if not isinstance(counts, dict) or not all(
                bits in known and type(count) is int and count >= 0 for bits, count in counts.items()
            ):
                raise ValueError(f"no widths: {counts!r:.60}")
            widths = Widths.of({known[bits]: count for bits, count in counts.items()}, scaled)
            if widths.channels != rank:
                raise ValueError(f"widths of {widths.channels} channels and rank {rank}")
        return cls(tuple(sides), heads, rank, head_dim, widths)


@dataclass(frozen=True)
class Layout:
    """The latents of a layer, in the order in which the cache holds them.

    Args:
        kv_heads: G.
        latents: of keys and of values, or one of both.
        window: last tokens that are kept exactly beside them, W.
        beside: whether maps stay beside the projections even where they could be folded into them.
        tied: whether a token's value is its key, as in multi-head latent attention: there are keys alone then.
    """

    kv_heads: int
    latents: tuple[Latent, ...]
    window: int = 0
    beside: bool = False
    tied: bool = False

    @classmethod
    def full(cls, kv_heads: int, head_dim: int, tied: bool = False) -> Layout:
        """Of an uncompressed layer."""
        sides = SIDES[:1] if tied else SIDES
        return cls(kv_heads, tuple(Latent((side,), 1, head_dim, head_dim) for side in sides), tied=tied)

    @property
    def sides(self) -> tuple[str, ...]:
        """Whose vectors the latents are made of."""
        return SIDES[:1] if self.tied else SIDES

    def side_of(self, side: str) -> str:
        """Whose maps keys, or values, have."""
        return "key" if self.tied else side

    def holding(self, latents: Sequence[Latent], window: int) -> Layout:
        """With these latents, and the vectors of whatever side is in none of them as they are."""
        missing = [side for side in self.sides if not any(side in latent.sides for latent in latents)]
        found = (*latents, *(Latent((side,), 1, self.head_dim, self.head_dim) for side in missing))
        latents = tuple(sorted(found, key=lambda latent: latent.sides))
        return dataclasses.replace(self, latents=latents, window=window)

    @property
    def head_dim(self) -> int:
        """Size of a vector, D."""
        return self.latents[0].head_dim

    def index(self, side: str) -> int:
        """The place of the latent that keys, or values, are decoded from."""
        return next(i for i, latent in enumerate(self.latents) if self.side_of(side) in latent.sides)

    def of(self, side: str) -> Latent:
        """The latent that keys, or values, are decoded from."""
        return self.latents[self.index(side)]

    def count(self, latent: Latent) -> int:
        """How many of it a token has, G/N."""
        return self.kv_heads // latent.heads

    @property
    def joint(self) -> bool:
        """Whether keys and values are decoded from the same latent."""
        return len(self.latents) == 1

    @property
    def coded(self) -> bool:
        """Whether latents are coded."""
        return any(latent.widths is not None for latent in self.latents)

    @property
    def uncompressed(self) -> bool:
        """Whether all vectors are stored as they are."""
        return all(latent.verbatim for latent in self.latents)

    @property
    def together(self) -> int:
        """KV heads that cannot be told apart: they stay on one device, and evict the same tokens."""
        return max(latent.heads for latent in self.latents)

    @property
    def at_run_time(self) -> bool:
        """Whether maps are applied at run time, beside projections that stay the original's."""
        return self.beside or self.window > 0 or self.together > 1 or self.joint

    def bytes_per_token(self, element_size: int) -> int:
        """Bytes of a token's latents, coded or in elements of `element_size` bytes."""
        return sum(self.count(latent) * latent.bytes(element_size) for latent in self.latents)

    @property
    def original(self) -> Layout:
        """Of the same layer, uncompressed."""
        return Layout.full(self.kv_heads, self.head_dim, self.tied)

    @property
    def original_elements(self) -> int:
        """Elements of a token's keys and values in the original."""
        return len(self.sides) * self.kv_heads * self.head_dim

    def split(self, size: int) -> Layout:
        """On one of `size` devices that share the heads.

        Raises:
            EigenAttnError: if they cannot be shared out evenly.
        """
        if self.kv_heads // self.together % size:
            told = f", {self.together} to a latent," if self.together > 1 else ""
            raise EigenAttnError(f"{self.kv_heads} KV heads{told} cannot be split evenly over {size} devices.")
        return dataclasses.replace(self, kv_heads=self.kv_heads // size)

    def to_dict(self) -> dict[str, Any]:
        """As a checkpoint's configuration has it; the window is the same for all layers, and said there once."""
        values: dict[str, Any] = {"latents": [latent.to_dict() for latent in self.latents]}
        return values | {"beside": True} if self.beside else values

    @classmethod
    def from_dict(cls, values: Any, original: Layout, window: int) -> Layout:
        """Read what `to_dict` wrote.

        Args:
            original: of the layer, uncompressed.

        Raises:
            ValueError: if it is malformed, or does not fit the layer.
        """
        latents = values.get("latents") if isinstance(values, dict) else None
        if not isinstance(latents, list) or type(beside := values.get("beside", False)) is not bool:
            raise ValueError(f"no latents: {values!r:.60}")
        found = tuple(Latent.from_dict(latent, original.head_dim) for latent in latents)
        if tuple(side for latent in found for side in latent.sides) != original.sides:
            raise ValueError(f"{' and '.join(f'{side}s' for side in original.sides)} are not each in one latent")
        for latent in found:
            if original.kv_heads % latent.heads:
                raise ValueError(f"{latent.heads} KV heads share a latent, and the model has {original.kv_heads}")
            if latent.rank > latent.full_rank:
                raise ValueError(f"rank {latent.rank} is above full rank, {latent.full_rank}")
        return dataclasses.replace(original, latents=found, window=window, beside=beside)
