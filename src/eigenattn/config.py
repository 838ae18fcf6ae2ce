"""Every choice a compression makes, validated and versioned."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from .errors import EigenAttnError

CONFIG_VERSION = 2
# Of latents in 16 bits, and of coded ones.
DEFAULT_KV_RATIO, DEFAULT_CODED_RATIO = 0.6, 0.25
# Codes have 8 bits at most, of 16.
LARGEST_CODED_RATIO = 0.5
TARGETS = ("kv_ratio", "error_budget", "energy")


class Sharing(NamedTuple):
    """Which latents are shared: by how many neighbouring KV heads, of keys and of values, and by a token's both.

    Written `1` (none), `3` (three heads), `1-3` (three heads share those of values alone), `3kv` (keys and values of
    three heads are one latent).
    """

    keys: int = 1
    values: int = 1
    joint: bool = False

    @classmethod
    def of(cls, text: str) -> Sharing:
        """Read the notation.

        Raises:
            EigenAttnError: if it is not in it.
        """
        match = re.fullmatch(r"(\d{1,4})(?:(kv)|-(\d{1,4}))?", text) if isinstance(text, str) else None
        keys, values = (int(match[1]), int(match[3] or match[1])) if match else (0, 0)
        if not match or not keys or values % keys or not values:
            raise EigenAttnError(
                f"share is written 3 (KV heads to a latent), 1-3 (of keys, and of values a multiple of it) or 3kv "
                f"(keys and values in one), not {text!r:.60}."
            )
        return cls(keys, values, match[2] is not None)

    def __str__(self) -> str:
        if self.joint:
            return f"{self.keys}kv"
        return str(self.keys) if self.keys == self.values else f"{self.keys}-{self.values}"

    @property
    def kinds(self) -> tuple[tuple[tuple[str, ...], int], ...]:
        """The sides that each latent of a token is made of, and of how many KV heads."""
        if self.joint:
            return ((("key", "value"), self.keys),)
        return (("key",), self.keys), (("value",), self.values)

    def kinds_of(self, sides: tuple[str, ...]) -> tuple[tuple[tuple[str, ...], int], ...]:
        """The same where there are vectors of these sides alone."""
        return tuple(kind for kind in self.kinds if kind[0][0] in sides)


@dataclass(frozen=True, kw_only=True)
class EigenAttentionConfig:
    """What to compress a model's KV cache to, and how.

    Latents are coded unless something else is asked for: `coded=False`, a KV ratio above 0.5, a basis, a rank rule or a
    target other than a KV ratio. The paper's own method is `basis="eigen", ranks="error_budget", window=0`.

    One of the three targets is given; with none of them, `kv_ratio` is 0.25, or 0.6 if latents are not coded.

    Args:
        kv_ratio: bytes of the compressed cache over those of the original at 16 bits, in (0, 1]. The rank rule is
            searched for the largest cache that does not exceed it. 1.0 keeps full rank.
        error_budget: relative error allowed at the output of each decoder layer; implies `ranks="error_budget"`.
        energy: share of the squared singular values kept in each head, in (0, 1]; implies `ranks="energy"`.
        coded: whether each channel of a latent is coded in a few bits, from 0 to 8, or all are kept in the model's
            dtype. Ranks and bits are then one choice, to a KV ratio of at most 0.5, which is 8 bits for each element of
            the original; weighed by `sensitivity`.
        basis: name of the basis (`eigenattn.compression.methods.BASES`): by default `fisher` for coded latents and
            `attention` for others; `eigen` is the paper's.
        ranks: name of the rank rule (`eigenattn.compression.ranks.RANK_RULES`); `sensitivity` for a KV ratio.
        rank_multiple: ranks are multiples of this, or the full head dimension. Quantised latents choose theirs in steps
            of 8 channels, whatever it is.
        window: how many of the last tokens are kept exactly, W; 0 is the paper's method.
        share: which latents are shared (`Sharing`): `1`, `3`, `1-3`, `3kv`. The number of KV heads must be divisible.
            By default (None) the model says (`for_model`): `1kv` for coded latents beside a window where positions do
            not turn keys, and `1` else. Bytes are those of the KV ratio whatever is shared. What heads have in common
            is stored once, which loses less, and every head decodes from the whole latent, which takes N times the
            arithmetic; values are decoded after attention has summed them, so that sharing theirs alone takes hardly
            any. With all KV heads of a layer and `kv` it caches one vector a token, as in multi-head latent attention
            (arXiv 2405.04434).
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
    coded: bool | None = None
    basis: str | None = None
    ranks: str | None = None
    rank_multiple: int = 8
    window: int = 32
    share: str | None = None
    shrinkage: float = 0.0
    refit: bool | None = None
    version: int = CONFIG_VERSION

    def __post_init__(self) -> None:
        if self.version != CONFIG_VERSION:
            raise EigenAttnError(
                f"this configuration has version {self.version!r:.60}, and this eigenattn reads version "
                f"{CONFIG_VERSION}: install the eigenattn that wrote it."
            )
        self._choose()
        for name, kinds, allowed, words in _KINDS:
            value = getattr(self, name)
            if type(value) not in kinds or not allowed(value):
                raise EigenAttnError(f"{name} must be {words}, not {value!r:.60}.")
        self._check_target()
        sharing = self.sharing  # raises if it is not in the notation
        if self.share is not None:
            object.__setattr__(self, "share", str(sharing))
        if self.refit is None:
            object.__setattr__(self, "refit", self.window == 0 and self.basis == "attention" and not sharing.joint)
        elif type(self.refit) is not bool:
            raise EigenAttnError(f"refit must be true or false, not {self.refit!r:.60}.")
        if self.refit and sharing.joint:
            raise EigenAttnError("decoders of latents that keys and values share are not refitted: leave out refit.")

    def _choose(self) -> None:
        """Whether latents are coded, and by which basis, where that is left open."""
        if self.coded is None:
            other = (self.basis, self.ranks, self.error_budget, self.energy)
            small = self.kv_ratio is None or (
                type(self.kv_ratio) in (int, float) and self.kv_ratio <= LARGEST_CODED_RATIO
            )
            object.__setattr__(self, "coded", small and all(each is None for each in other))
        if self.basis is None:
            object.__setattr__(self, "basis", "fisher" if self.coded else "attention")

    def _check_target(self) -> None:
        targets = {name: getattr(self, name) for name in TARGETS}
        given = [name for name, value in targets.items() if value is not None]
        if len(given) > 1:
            raise EigenAttnError(f"{' and '.join(given)} were given together: choose one target.")
        for name in given:
            if type(targets[name]) not in (int, float) or not abs(targets[name]) < math.inf:
                raise EigenAttnError(f"{name} must be a number, not {targets[name]!r:.60}.")
        if not given:
            object.__setattr__(self, "kv_ratio", DEFAULT_CODED_RATIO if self.coded else DEFAULT_KV_RATIO)
        if self.kv_ratio is not None and not 0 < self.kv_ratio <= 1:
            raise EigenAttnError(f"kv_ratio must lie in (0, 1], not {self.kv_ratio}: 0.6 keeps 60% of the cache.")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise EigenAttnError(f"energy must lie in (0, 1], not {self.energy}: 0.95 keeps 95% of the energy.")
        if self.error_budget is not None and self.error_budget <= 0:
            raise EigenAttnError(f"error_budget must be above 0, not {self.error_budget}: 0.02 allows 2% a layer.")
        if self.coded and self.kv_ratio is None:
            raise EigenAttnError(f"coded latents are chosen for a kv_ratio, not for {given[0]}.")
        if self.coded and self.kv_ratio is not None and LARGEST_CODED_RATIO < self.kv_ratio < 1:
            raise EigenAttnError(
                f"codes have 8 bits at most, a kv_ratio of {LARGEST_CODED_RATIO}, not {self.kv_ratio}: "
                "ask for less, or for latents that are not coded."
            )
        implied = "sensitivity" if self.coded else given[0] if given and given[0] != "kv_ratio" else None
        if type(self.ranks) not in (str, type(None)):
            raise EigenAttnError(f"ranks must be a name, not {self.ranks!r:.60}.")
        if self.ranks is None:
            object.__setattr__(self, "ranks", implied or "sensitivity")
        elif implied is not None and self.ranks != implied:
            what = "coded latents go" if self.coded else f"{given[0]}={targets[given[0]]} goes"
            raise EigenAttnError(f"{what} with ranks={implied!r}, not {self.ranks!r}.")

    @property
    def sharing(self) -> Sharing:
        """Which latents are shared: none, while that is left to a model."""
        return Sharing() if self.share is None else Sharing.of(self.share)

    def for_model(self, turns_keys: bool) -> EigenAttentionConfig:
        """The same, with what is left open chosen for a model.

        A latent of both sides loses less at equal bytes, of codes most of all. Queries meet it as it is cached where no
        positions turn keys; else it is decoded for every token, which takes twice the arithmetic.

        Args:
            turns_keys: whether positions do (`eigenattn.models.families.turns_keys`).
        """
        if self.share is not None:
            return self
        joint = self.coded and self.basis == "fisher" and self.window > 0 and not turns_keys
        return dataclasses.replace(self, share="1kv" if joint else "1")

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EigenAttentionConfig:
        """Read what `to_dict` wrote, in this version or in version 1.

        Raises:
            EigenAttnError: on a name this version does not know.
        """
        if values.get("version", CONFIG_VERSION) == 1:
            values = _from_version_1(values)
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise EigenAttnError(f"unknown configuration name(s) {', '.join(unknown)}: was it written by a newer one?")
        return cls(**values)


# Values that a JSON file may hold anything in.
_KINDS: tuple[tuple[str, tuple[type, ...], Callable[[Any], bool], str], ...] = (
    ("coded", (bool,), lambda value: True, "true or false"),
    ("basis", (str,), lambda value: True, "a name"),
    ("rank_multiple", (int,), lambda value: value >= 1, "a whole number of at least 1"),
    ("window", (int,), lambda value: value >= 0, "a whole number of tokens, 0 or more"),
    ("shrinkage", (float, int), lambda value: 0 <= value < 1, "a number in [0, 1), of which 0.3 is a good deal"),
)


def _from_version_1(values: dict[str, Any]) -> dict[str, Any]:
    """Version 1 had a target `bits_per_element`, 16 times the KV ratio, and three names for what is shared."""
    old = {"bits_per_element": None, "shared_heads": 1, "shared_values": None, "joint": False}
    old = {"coded": False, "basis": "attention"} | old | values
    bits, keys, joint = (old.pop(name) for name in ("bits_per_element", "shared_heads", "joint"))
    share = old.pop("shared_values") or keys
    if type(keys) is not int or type(share) is not int or type(joint) is not bool:
        raise EigenAttnError(f"no such latents: {keys!r:.20}, {share!r:.20}, {joint!r:.20}.")
    new = old | {"share": str(Sharing(keys, share, joint)), "version": CONFIG_VERSION}
    if bits is not None:
        if type(bits) not in (int, float) or not 0 < bits <= 8:
            raise EigenAttnError(f"bits_per_element must lie in (0, 8], not {bits!r:.60}.")
        new |= {"coded": True, "kv_ratio": bits / 16}
    return new
