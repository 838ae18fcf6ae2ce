"""Every choice a compression makes, validated and versioned."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from .errors import EigenAttnError

CONFIG_VERSION = 1
DEFAULT_KV_RATIO = 0.6
TARGETS = ("kv_ratio", "error_budget", "energy", "bits_per_element")


class Sharing(NamedTuple):
    """How many neighbouring KV heads share one latent, N: one of their keys, and one of their values."""

    keys: int = 1
    values: int = 1

    @property
    def together(self) -> int:
        """KV heads that cannot be told apart: they stay on one device, and evict the same tokens."""
        return max(self)

    def told(self, kv_heads: int) -> str:
        """So many KV heads, as a message begins: `8 KV heads, 4 to a latent,`."""
        return f"{kv_heads} KV heads" + (f", {self.together} to a latent," if self.together > 1 else "")


# Latents of single heads.
ALONE = Sharing()


@dataclass(frozen=True, kw_only=True)
class EigenAttentionConfig:
    """What to compress a model's KV cache to, and how.

    The paper's own method is `basis="eigen", ranks="error_budget", window=0`.

    One of the four targets is given; with none of them, `kv_ratio` is 0.6.

    Args:
        kv_ratio: bytes of the compressed cache over those of the original at 16 bits, in (0, 1]. The rank rule is
            searched for the largest cache that does not exceed it. 1.0 keeps full rank.
        error_budget: relative error allowed at the output of each decoder layer; implies `ranks="error_budget"`.
        energy: share of the squared singular values kept in each head, in (0, 1]; implies `ranks="energy"`.
        bits_per_element: quantised latents, of so many bits for each element of the original cache (which has 16), in
            (0, 8]. Ranks and bits are one choice, weighed by `sensitivity`; needs `basis="attention"`.
        basis: name of the basis (`eigenattn.compression.bases.BASES`): `attention`, or the paper's `eigen`.
        ranks: name of the rank rule (`eigenattn.compression.ranks.RANK_RULES`); `sensitivity` for a KV ratio.
        rank_multiple: ranks are multiples of this, or the full head dimension. Quantised latents choose theirs in steps
            of 4 channels, whatever it is.
        window: how many of the last tokens are kept exactly, W; 0 is the paper's method.
        shared_heads: how many KV heads share one latent, N; it must divide their number. Bytes are those of the KV
            ratio whatever N is. What heads have in common is stored once, which loses less, and every head decodes from
            the whole latent, which takes N times the arithmetic.
        shared_values: how many share one latent of their values, a multiple of `shared_heads`, which it is by default.
            Values are decoded after attention has summed them, so that this takes hardly any arithmetic.
        joint: whether a token's keys and values share one latent, of each KV head or of all that share theirs. The same
            bytes lose less, and both are decoded from the whole latent, which takes twice the arithmetic. With
            `shared_heads` at the number of KV heads a layer caches one vector a token, as in multi-head latent
            attention (arXiv 2405.04434).
        shrinkage: share of the covariances of keys and values that is taken not from the calibration text but from what
            the projections make of any text, in [0, 1). It helps where texts to come are of another kind, or the
            calibration text is short.
        refit: whether value decoders are fitted anew once ranks are chosen (`eigenattn.compression.refit`). By default
            they are where there is no window and the basis is `attention`, and latents are not joint.
        version: version of this configuration's format.

    Raises:
        EigenAttnError: if a value is outside its range or two targets are given.
    """

    kv_ratio: float | None = None
    error_budget: float | None = None
    energy: float | None = None
    bits_per_element: float | None = None
    basis: str = "attention"
    ranks: str | None = None
    rank_multiple: int = 8
    window: int = 32
    shared_heads: int = 1
    shared_values: int | None = None
    joint: bool = False
    shrinkage: float = 0.0
    refit: bool | None = None
    version: int = CONFIG_VERSION

    def __post_init__(self) -> None:
        targets = {name: getattr(self, name) for name in TARGETS}
        given = [name for name, value in targets.items() if value is not None]
        if len(given) > 1:
            raise EigenAttnError(f"{' and '.join(given)} were given together: choose one target.")
        for name in given:
            if not isinstance(targets[name], (int, float)) or not abs(targets[name]) < math.inf:
                raise EigenAttnError(f"{name} must be a number, not {targets[name]!r:.60}.")
        for name in ("basis", "ranks"):
            if not isinstance(getattr(self, name), str | None):
                raise EigenAttnError(f"{name} must be a name, not {getattr(self, name)!r:.60}.")
        if not given:
            object.__setattr__(self, "kv_ratio", DEFAULT_KV_RATIO)
        if self.kv_ratio is not None and not 0 < self.kv_ratio <= 1:
            raise EigenAttnError(f"kv_ratio must lie in (0, 1], not {self.kv_ratio}: 0.6 keeps 60% of the cache.")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise EigenAttnError(f"energy must lie in (0, 1], not {self.energy}: 0.95 keeps 95% of the energy.")
        if self.error_budget is not None and self.error_budget <= 0:
            raise EigenAttnError(f"error_budget must be above 0, not {self.error_budget}: 0.02 allows 2% a layer.")
        if self.bits_per_element is not None and not 0 < self.bits_per_element <= 8:
            raise EigenAttnError(
                f"bits_per_element must lie in (0, 8], not {self.bits_per_element}: 3 keeps 3 bits of 16 on average."
            )
        if self.bits_per_element is not None and self.basis != "attention":
            raise EigenAttnError(f"bits_per_element goes with basis='attention', not {self.basis!r}.")
        if type(self.rank_multiple) is not int or self.rank_multiple < 1:
            raise EigenAttnError(f"rank_multiple must be a whole number of at least 1, not {self.rank_multiple!r:.60}.")
        if type(self.window) is not int or self.window < 0:
            raise EigenAttnError(f"window must be a whole number of tokens, 0 or more, not {self.window!r:.60}.")
        if type(self.shared_heads) is not int or self.shared_heads < 1:
            raise EigenAttnError(f"shared_heads must be a whole number of at least 1, not {self.shared_heads!r:.60}.")
        if self.shared_values is None:
            object.__setattr__(self, "shared_values", self.shared_heads)
        if type(self.shared_values) is not int or self.shared_values < 1 or self.shared_values % self.shared_heads:
            raise EigenAttnError(
                f"shared_values must be a multiple of shared_heads, {self.shared_heads}, not "
                f"{self.shared_values!r:.60}."
            )
        if self.shared_values > 1 and self.basis != "attention":
            raise EigenAttnError(f'heads share latents of the basis "attention" only, not of {self.basis!r}.')
        if type(self.joint) is not bool:
            raise EigenAttnError(f"joint must be true or false, not {self.joint!r:.60}.")
        if self.joint and self.shared_values != self.shared_heads:
            raise EigenAttnError("keys and values share joint latents: leave out shared_values, or joint.")
        if self.joint and self.basis != "attention":
            raise EigenAttnError(f'joint latents go with the basis "attention" only, not with {self.basis!r}.')
        if self.version != CONFIG_VERSION:
            raise EigenAttnError(
                f"this configuration has version {self.version!r:.60}, and this eigenattn reads version "
                f"{CONFIG_VERSION}: install the eigenattn that wrote it."
            )
        if type(self.shrinkage) not in (int, float) or not 0 <= self.shrinkage < 1:
            raise EigenAttnError(f"shrinkage must lie in [0, 1), not {self.shrinkage!r:.60}: 0.3 is a good deal.")
        if self.shrinkage and self.basis != "attention":
            raise EigenAttnError(f'shrinkage goes with the basis "attention" only, not with {self.basis!r}.')
        if self.refit is None:
            object.__setattr__(self, "refit", self.window == 0 and self.basis == "attention" and not self.joint)
        elif type(self.refit) is not bool:
            raise EigenAttnError(f"refit must be true or false, not {self.refit!r:.60}.")
        if self.refit and self.joint:
            raise EigenAttnError("decoders of joint latents are not refitted: leave out refit, or joint.")
        rules = {"error_budget": "error_budget", "energy": "energy", "bits_per_element": "sensitivity"}
        target = next((name for name in rules if targets[name] is not None), None)
        implied = rules.get(target)
        if self.ranks is None:
            object.__setattr__(self, "ranks", implied or "sensitivity")
        elif implied is not None and self.ranks != implied:
            raise EigenAttnError(f"{target}={targets[target]} goes with ranks={implied!r}, not {self.ranks!r}.")

    @property
    def sharing(self) -> Sharing:
        """KV heads to a latent, of keys and of values."""
        return Sharing(self.shared_heads, self.shared_values)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EigenAttentionConfig:
        """Read what `to_dict` wrote.

        Raises:
            EigenAttnError: on a name this version does not know.
        """
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise EigenAttnError(f"unknown configuration name(s) {', '.join(unknown)}: was it written by a newer one?")
        return cls(**values)
