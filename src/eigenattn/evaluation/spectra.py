"""How steep is a model's spectrum? Eigenvalues of every head, and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..calibration.statistics import Batch
from ..compression.recipe import Recipe
from ..config import EigenAttentionConfig
from ..errors import EigenAttnError
from ..files import read_results
from ..models.conversion import convert_attention, eigen_layers, restore_attention
from ..progress import TokenProgress

VERSION = 1
FILE = "spectrum.json"
SIDES = ("keys", "values")


def effective_rank(spectrum: Tensor) -> Tensor:
    """`exp` of the entropy of a normalised spectrum [..., D], from 1 for one direction to D (Roy and Vetterli 2007)."""
    share = spectrum / spectrum.sum(-1, keepdim=True).clamp_min(torch.finfo(spectrum.dtype).tiny)
    return torch.special.entr(share).sum(-1).exp()


def energy_kept(spectrum: Tensor) -> Tensor:
    """The share of a spectrum [..., D] in its first 1 .. D directions."""
    return spectrum.cumsum(-1) / spectrum.sum(-1, keepdim=True).clamp_min(torch.finfo(spectrum.dtype).tiny)


def spectra_of(
    model: PreTrainedModel, batches: Sequence[Batch], *, basis: str = "eigen", window: int = 0, progress: bool = False
) -> dict[str, Tensor]:
    """Spectra [layers, G, D], descending, of `keys` (for `eigen` of stacked keys and queries) and `values`.

    Args:
        model: an uncompressed transformers model; it is left as it was.
        basis: `eigen` gives squared singular values, `attention` the error that leaving a direction out would make, and
            `fisher` what that costs the predictions, in nats a token.
        window: exact tokens; the bases `attention` and `fisher` look only at what lies further back.

    Raises:
        EigenAttnError: if the basis is unknown, or goes with no window, or the model is not supported or compressed.
    """
    config = EigenAttentionConfig(basis=basis, window=window)
    originals = convert_attention(model)
    try:
        layers = eigen_layers(model)
        if any(attention.layout.tied for attention in layers):
            raise EigenAttnError("spectra are of keys and of values, and multi-head latent attention has one vector.")
        bases = Recipe(model, layers, config, batches, TokenProgress(progress)).bases
    finally:
        restore_attention(model, originals)
    sides = zip(SIDES, zip(*bases, strict=True), strict=True)
    return {side: torch.stack([each.spectrum.cpu() for each in found]) for side, found in sides}


def describe(spectra: dict[str, Tensor]) -> dict[str, Any]:
    """Eigenvalues, effective ranks and kept energy by layer and head, in plain JSON values of six digits."""

    def plain(values: Any) -> Any:
        return [plain(each) for each in values] if isinstance(values, list) else float(f"{values:.6g}")

    return {
        side: {
            "eigenvalues": plain(spectrum.tolist()),
            "effective_rank": plain(effective_rank(spectrum).tolist()),
            "energy_kept": plain(energy_kept(spectrum).tolist()),
        }
        for side, spectrum in spectra.items()
    }


def read_spectra(folder: Path) -> dict[str, Any]:
    """What `eigenattn spectrum` wrote.

    Raises:
        EigenAttnError: if the folder holds none, or one of another version.
    """
    return read_results(folder / FILE, "spectra", VERSION)
