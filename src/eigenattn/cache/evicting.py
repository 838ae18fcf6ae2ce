"""`EigenCache`: a dynamic cache that keeps a budget of tokens, each head its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..errors import EigenAttnError
from .layers import WindowedLayer
from .rules import Eviction, Held
from .store import Store


class EvictingLayer(WindowedLayer):
    """A `WindowedLayer` that evicts some of its latents, and so knows of each row which token it is.

    From the first eviction on `columns` [B, heads, F] holds the tokens of the rows of `keys` and `values`, ascending;
    KV heads that share a latent, of keys or of values, keep the same tokens, and have one row of columns. The model
    still counts all tokens, and its masks and positions have a column for each.

    Args:
        window: exact tokens, W, which are never evicted; 0 for latents alone.
        eviction: rule and budget.

    Raises:
        EigenAttnError: if the budget does not reach beyond the window.
    """

    is_croppable = False  # not as transformers means it, at any time and without loss

    def __init__(self, window: int, eviction: Eviction) -> None:
        super().__init__(window)
        if isinstance(eviction.budget, int) and eviction.budget <= window:
            raise EigenAttnError(
                f"a budget of {eviction.budget} tokens leaves none beyond the exact window of {window}: raise it."
            )
        self.eviction = eviction
        self.evicted = 0  # tokens
        self._settled = 0  # rows that an eviction left, which crop cannot reach behind

    def _left(self) -> int:
        return super()._left() + self.evicted

    def _append(self, rows: tuple[Tensor, ...]) -> None:
        if self.evicted:
            rows = (*rows, self._columns(self._left(), rows))
        super()._append(rows)

    @staticmethod
    def _columns(first: int, rows: tuple[Tensor, ...]) -> Tensor:
        """Columns [B, heads, n, 1] of neighbouring rows of keys and values [B, G or fewer, n, width]."""
        b, _, n, _ = rows[0].shape
        heads = min(x.shape[1] for x in rows)
        columns = torch.arange(first, first + n, dtype=torch.int32, device=rows[0].device)
        return columns.view(1, 1, n, 1).expand(b, heads, n, 1)

    def _show(self) -> None:
        self.keys, self.values = (store.rows for store in self._stores[:2])
        self.columns = self._stores[2].rows.squeeze(-1) if self.evicted else None

    def rows_to_keep(self) -> int:
        """Rows that the budget has room for."""
        return max(self.eviction.kept(self.get_seq_length()) - self.window, 0)

    def evict(self, queries: int, first: Callable[[], Tensor], votes: Callable[[int], Tensor]) -> None:
        """Evict what is over the budget, after a pass.

        Args:
            queries: of the pass.
            first: gives the first token of each row that is no padding, [B or 1].
            votes: gives the mean attention [B, H, F] that so many last queries pay to each row.
        """
        rule, count = self.eviction.rule, self.rows_to_keep()
        over = self.keys.shape[-2] - count
        if over <= 0 or queries < rule.observes:
            return
        if not self.evicted:
            columns = self._columns(0, (self.keys, self.values))  # the rows are tokens 0 .. F - 1 still
            store = Store(columns[:, :, :0].contiguous())
            store.append(columns)
            self._stores = (*self._stores, store)
        columns = self._stores[2].rows.squeeze(-1)
        seen = votes(rule.observes).unflatten(1, (columns.shape[1], -1)).mean(2) if rule.observes else None
        held = Held(columns, first().view(-1, 1, 1), self.get_seq_length(), seen)
        kept = self.eviction.choose(held, count)
        for store in self._stores:
            store.keep(kept)
        self.evicted, self._settled = self.evicted + over, count
        self._show()

    def _crop_left(self, left: int) -> None:
        if self.evicted and left - self.evicted < self._settled:
            raise EigenAttnError(
                "tokens were evicted since those to be taken back came, and are gone: start a new cache."
            )
        super()._crop_left(left - self.evicted)

    def reset(self) -> None:
        super().reset()
        self.columns, self.evicted, self._settled = None, 0, 0


class EigenCache(DynamicCache):
    """A dynamic cache for compressed models, which may evict tokens: pass it as `past_key_values`.

    Eviction, low rank and quantisation multiply: what is evicted are latents, of each head its own tokens (of all
    that share a latent the same). Kept tokens keep their positions. Exact tokens of the window are never evicted, nor
    are tokens of layers with sliding-window attention. A pass sees what was held before it and all of itself, and
    tokens are evicted after it: `streaming` after every pass, `snapkv` after passes of at least 32 tokens, which are
    prompts.

    Args:
        config: the model's, for layers with sliding-window attention.
        evict: a rule of `EVICTION_RULES`, `streaming` or `snapkv`; None keeps all tokens.
        budget: tokens to keep of each sequence, the exact window and padding included, or as a fraction below 1 of the
            tokens seen when the rule evicts.

    Raises:
        EigenAttnError: on an unknown rule or an impossible budget, or if all layers slide.

    Example:
        >>> cache = EigenCache(model.config, evict="snapkv", budget=1024)
        >>> model.generate(**inputs, past_key_values=cache)
    """

    def __init__(self, config: Any = None, *, evict: str | None = None, budget: int | float | None = None) -> None:
        super().__init__(config=config)
        if (evict is None) != (budget is None):
            raise EigenAttnError("eviction takes both a rule (evict) and a budget.")
        self.eviction = None if evict is None else Eviction(evict, budget)
        if self.eviction is not None and self.layers and all(self.is_sliding):
            raise EigenAttnError("all layers of this model slide, and forget by themselves: there is nothing to evict.")

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        """As of transformers' caches.

        Raises:
            EigenAttnError: if tokens are to be evicted of a model that was not compressed.
        """
        if self.eviction is not None and not isinstance((*self.layers, None)[layer_idx], WindowedLayer):
            raise EigenAttnError("this model was not compressed by eigenattn, and its tokens cannot be evicted.")
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def activate_past_recording(self) -> None:
        """Called before decoding with an assistant, whose drafts are taken back.

        Raises:
            EigenAttnError: if this cache evicts: drafts come with the prompt, and what they drove out would be gone.
        """
        if self.eviction is not None:
            raise EigenAttnError("an assistant's drafts would drive out tokens for good: use a cache that evicts none.")
        super().activate_past_recording()

    def evicting_layer(self, window: int) -> EvictingLayer:
        """An empty layer, for a model with such a window."""
        return EvictingLayer(window, self.eviction)

    @property
    def kept_tokens(self) -> int:
        """Tokens of a sequence that the layers hold at most."""
        return max((layer.get_seq_length() - getattr(layer, "evicted", 0) for layer in self.layers), default=0)
