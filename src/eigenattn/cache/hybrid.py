"""Layers that hold latents beside states of linear attention, where a model has both in one layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import LinearAttentionCacheLayerMixin, LinearAttentionLayer

from .layers import LatentLayer
from .static import StaticLatentLayer


class BesideStates:
    """Mixed into a layer that holds latents: the states stay in the layer that it takes the place of.

    What is done to a whole layer is done to both; all else that the layer of latents does not know is the states'.
    """

    states: LinearAttentionLayer

    def beside(self, states: LinearAttentionLayer) -> BesideStates:
        """Take the place of a layer with states."""
        self.states = states
        return self

    def __getattr__(self, name: str) -> Any:
        if name == "states":
            raise AttributeError(name)
        return getattr(self.states, name)

    def update_conv_state(self, *args: Any, **kwargs: Any) -> Tensor:
        """Add to a state of a convolution."""
        return LinearAttentionLayer.update_conv_state(self.states, *args, **kwargs)

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> Tensor:
        """Change a recurrent state."""
        return LinearAttentionLayer.update_recurrent_state(self.states, *args, **kwargs)

    def _both(self, name: str, *args: Any) -> None:
        getattr(LinearAttentionLayer, name)(self.states, *args)
        getattr(super(), name)(*args)

    def reset(self) -> None:
        """Forget everything."""
        self._both("reset")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take other rows of the batch."""
        self._both("reorder_cache", beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Take tokens back, where states can."""
        self._both("crop", tokens_to_remove)

    def offload(self) -> None:
        """Put everything into CPU memory."""
        self._both("offload")

    def prefetch(self) -> None:
        """Fetch everything from there."""
        self._both("prefetch")

    def activate_past_recording(self) -> None:
        """Keep what `crop` will need."""
        self._both("activate_past_recording")


class HybridLatentLayer(BesideStates, LatentLayer):
    """`LatentLayer`, beside states."""


class HybridStaticLatentLayer(BesideStates, StaticLatentLayer):
    """`StaticLatentLayer`, beside states."""


# transformers asks which layers have states.
LinearAttentionCacheLayerMixin.register(BesideStates)
