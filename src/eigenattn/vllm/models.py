"""vLLM's own models, served compressed where bases are asked for, and else as they are."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ..errors import EigenAttnError
from .bases import OPTION, Bases, own_bases
from .modes import is_of_drafts
from .registration import PREFIX, stock_class
from .versions import check_version, vllm_version


class Compressed(nn.Module):
    """Stands before a model of vLLM's."""

    def __init__(self, *, vllm_config: Any, prefix: str = "", **options: Any) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, **options)
        self._compression = None
        config = vllm_config.model_config
        if is_of_drafts(vllm_config):
            if own_bases(config.hf_config):
                raise EigenAttnError("models that draft are not served compressed: give the original of this one.")
            return
        if prefix:  # what reads text in a larger model, all of which has them
            return
        bases = Bases.of(config.hf_config, vllm_config.additional_config)
        if bases is None:
            return
        check_version(vllm_version())
        from .layers import Compression

        if bases.folder is not None:
            vllm_config.additional_config[OPTION] = bases.folder  # compiled graphs are kept by it
        self._compression = Compression(self, vllm_config, bases)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        load = super().load_weights  # of vLLM's model
        return load(weights) if self._compression is None else self._compression.load(weights, load)


def __getattr__(name: str) -> type[nn.Module]:
    """The class that vLLM was told of, made where it is first asked for."""
    if not name.startswith(PREFIX):
        raise AttributeError(name)
    stock = stock_class(name.removeprefix(PREFIX))
    made = type(name, (Compressed, stock), {"__module__": __name__, "__doc__": stock.__doc__})
    setattr(sys.modules[__name__], name, made)
    return made
