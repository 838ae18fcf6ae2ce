"""Kinds of bases: what each is made of, and what it goes with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..calibration.attention_moments import AttentionMoments
from ..calibration.fisher_moments import FisherMoments, collect_fisher
from ..calibration.statistics import LayerMoments, collect_moments
from ..config import Sharing
from ..models.attention import EigenAttention
from .bases import attention, attention_of_both, eigen
from .basis import Basis
from .fisher import fisher, fisher_quantisers
from .quantise import Fitted


@dataclass(frozen=True)
class BasisMethod:
    """A kind of basis. Another package adds its own to `BASES`.

    Args:
        moments: the empty moments of a layer, `(attention, window, sharing, shrinkage)`; they hold sums over all pairs,
            or over what the window leaves.
        build: the bases at full rank that moments give, of keys and of values.
        supports: the features (`eigenattn.compression.recipe.FEATURES`) that the basis goes with. `coded` needs a
            spectrum in whose units a squared error of a latent counts. `one vector`: the same of layers in which values
            are keys.
        build_both: one basis of both sides, `(moments, key_weight, value_weight)`, where a unit of error of either
            costs the model so much; None if keys and values cannot share latents, or `build` knows that they do.
            Moments for them have to give bases by `build`, too.
        collect: fills the moments of all layers: as `eigenattn.calibration.statistics.collect_moments`.
        quantisers: those of each latent that moments give, `(moments, bases)`; None if another pass is to fit them.
        in_nats: whether spectra are what truncation costs the model, so that nothing has to be measured.
    """

    moments: Callable[[EigenAttention, int, Sharing, float], Any]
    build: Callable[[Any], tuple[Basis, ...]]
    supports: frozenset[str] = frozenset()
    build_both: Callable[[Any, float, float], Basis] | None = None
    collect: Callable[..., list[Any]] = collect_moments
    quantisers: Callable[[Any, tuple[Basis, ...]], tuple[Fitted, ...]] | None = None
    in_nats: bool = False

    @property
    def features(self) -> frozenset[str]:
        """All that it supports."""
        return self.supports if self.build_both is None else self.supports | {"both sides"}


# The paper's moments are over all tokens, whatever the window, and of single heads.
BASES: dict[str, BasisMethod] = {
    "eigen": BasisMethod(lambda attention, *_: LayerMoments.of(attention), eigen, frozenset({"window", "refit"})),
    "attention": BasisMethod(
        AttentionMoments.of,
        attention,
        frozenset({"window", "coded", "shared heads", "shrinkage", "refit"}),
        attention_of_both,
    ),
    "fisher": BasisMethod(
        FisherMoments.of,
        fisher,
        frozenset({"window", "coded", "shared heads", "both sides", "one vector", "refit"}),
        collect=collect_fisher,
        quantisers=fisher_quantisers,
        in_nats=True,
    ),
}
