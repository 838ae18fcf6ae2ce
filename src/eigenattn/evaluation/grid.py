"""Which compressions a sweep compares, and what they are called in its results."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..compression.quantise import equivalent_ratio
from ..compression.recipe import check_supported
from ..config import EigenAttentionConfig
from ..errors import EigenAttnError

# Sizes of coded latents are named in bits for each element of the original, which has 16.
ORIGINAL_BITS = 16
CODED = "bits"


@dataclass(frozen=True)
class Cell:
    """One compression of a sweep."""

    config: EigenAttentionConfig

    @classmethod
    def of(cls, method: str, asked: float, rank_multiple: int = 8) -> Cell:
        """Read what `method` and `asked` say of a cell.

        Raises:
            EigenAttnError: if they are no such names, or name no configuration.
        """
        found = re.fullmatch(r"([^:~+/]+)(?::([\w-]+))?(?:~([\d.]+))?(\+refit)?/([^/]+)/(\d+)", method)
        if found is None:
            raise EigenAttnError(f"a method is written attention:3kv~0.3+refit/sensitivity/32, not {method!r:.60}.")
        basis, share, shrinkage, refit, ranks, window = found.groups()
        coded = ranks == CODED
        return cls(
            EigenAttentionConfig(
                kv_ratio=asked / ORIGINAL_BITS if coded else asked,
                coded=coded,
                basis=basis,
                ranks=None if coded else ranks,
                rank_multiple=rank_multiple,
                window=int(window),
                share=share or "1",
                shrinkage=float(shrinkage or 0),
                refit=refit is not None,
            )
        )

    @property
    def kv_ratio(self) -> float:
        """The KV ratio asked for.

        Raises:
            EigenAttnError: if the configuration has another target.
        """
        if self.config.kv_ratio is None:
            raise EigenAttnError("the cells of a sweep have KV ratios for targets.")
        return self.config.kv_ratio

    @property
    def kind(self) -> str:
        """The basis, shared latents and shrinkage."""
        config = self.config
        share = "" if config.share in (None, "1") else f":{config.share}"
        return f"{config.basis}{share}{f'~{config.shrinkage:g}' if config.shrinkage else ''}"

    @property
    def statistics(self) -> str:
        """What statistics are collected for."""
        return f"{self.kind}/{self.config.window}"

    @property
    def method(self) -> str:
        """All but the size."""
        kind = f"{self.kind}+refit" if self.config.refit else self.kind
        return f"{kind}/{CODED if self.config.coded else self.config.ranks}/{self.config.window}"

    @property
    def bits_per_element(self) -> float | None:
        """Of coded latents the bits for each element of the original; None for others."""
        return ORIGINAL_BITS * self.kv_ratio if self.config.coded else None

    @property
    def asked(self) -> float:
        """The size: bits for each element of the original, or the KV ratio where latents are not coded."""
        return self.bits_per_element or self.kv_ratio

    @property
    def key(self) -> str:
        """Tells it from all other cells with the same calibration."""
        return f"{self.method}/{self.asked:g}"

    def describe(self) -> dict[str, Any]:
        """What results say of it, besides figures."""
        names = ("basis", "ranks", "window", "share", "coded", "refit", "shrinkage")
        choices = {name: getattr(self.config, name) for name in names}
        return {"method": self.method, **choices, "bits_per_element": self.bits_per_element, "asked": self.asked}


@dataclass(frozen=True)
class Grid:
    """The cells of a sweep: every combination.

    Args:
        coded: whether latents are coded, to each of the KV ratios. A folder of results takes both kinds, one after the
            other.
        bases: None is the default of `EigenAttentionConfig`.
        others: see `EigenAttentionConfig`.

    Raises:
        EigenAttnError: if a combination is no valid configuration, or not supported.
    """

    kv_ratios: Sequence[float] = ()
    bases: Sequence[str | None] = ("attention",)
    ranks: Sequence[str] = ("sensitivity",)
    windows: Sequence[int] = (32,)
    share: Sequence[str] = ("1",)
    rank_multiple: int = 8
    coded: bool = False
    refit: bool | None = None
    shrinkage: Sequence[float] = (0.0,)

    def __post_init__(self) -> None:
        if not all((self.kv_ratios, self.bases, self.ranks, self.windows, self.share, self.shrinkage)):
            raise EigenAttnError("a sweep needs at least one KV ratio, basis, rank rule, window, share and shrinkage.")
        for cell in self.cells():
            check_supported(cell.config)

    def cells(self) -> list[Cell]:
        """All cells, those that share statistics next to each other.

        Raises:
            EigenAttnError: if one is no valid configuration.
        """
        ratios = sorted(set(self.kv_ratios), reverse=True)
        varied = (self.bases, self.windows, self.share, self.shrinkage, self.ranks)
        cells = [
            Cell(
                EigenAttentionConfig(
                    kv_ratio=ratio,
                    coded=self.coded,
                    basis=basis,
                    ranks=rule,
                    rank_multiple=self.rank_multiple,
                    window=window,
                    share=share,
                    shrinkage=shrinkage,
                    refit=self.refit,
                )
            )
            for basis, window, share, shrinkage, rule in itertools.product(*varied)
            for ratio in ratios
        ]
        return list(dict.fromkeys(cells))

    @property
    def anchor(self) -> float:
        """The ratio near which divergences are measured: the middle one, of coded latents an equivalent one."""
        ratios = sorted({equivalent_ratio(ratio) if self.coded else ratio for ratio in self.kv_ratios})
        return ratios[len(ratios) // 2]
