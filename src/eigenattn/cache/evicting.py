"""`EigenCache`: a dynamic cache that keeps a budget of tokens, each head its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..errors import EigenAttnError
from .context import CacheContext
from .layers import LatentLayer
from .rules import Eviction, Held
from .store import Store


class EvictingLayer(LatentLayer):
    """A `LatentLayer` that evicts some of its latents, and so knows of each row which token it is.

    From the first eviction on `columns` [B, heads, F] holds the tokens of the rows, ascending; KV heads that share a
    latent, of keys or of values, keep the same tokens, and have one row of columns. The model still counts all tokens,
    and its masks and positions have a column for each.

    Args:
        context, layer_idx, sliding_window: as for `LatentLayer`.
        window: exact tokens, W, which are never evicted; 0 for latents alone.
        eviction: rule and budget.

    Raises:
        EigenAttnError: if the budget does not reach beyond the window.
    """

    is_croppable = False  # not as transformers means it, at any time and without loss
    block = 1  # what is held may all be evicted

    def __init__(
        self,
        context: CacheContext,
        layer_idx: int,
        window: int,
        sliding_window: int | None = None,
        *,
        eviction: Eviction,
    ) -> None:
        super().__init__(context, layer_idx, window, sliding_window)
        if isinstance(eviction.budget, int) and eviction.budget <= window:
            raise EigenAttnError(
                f"a budget of {eviction.budget} tokens leaves none beyond the exact window of {window}: raise it."
            )
        self.eviction = eviction
        self.evicted = 0  # tokens
        self.columns: Tensor | None = None  # whose store lies behind those of the latents
        self._tally: Tensor | None = None
        self._settled = 0  # rows that an eviction left, which crop cannot reach behind

    def _tokens_left(self) -> int:
        return super()._tokens_left() + self.evicted

    def _columns_held(self) -> Tensor | None:
        return self.columns

    def _append(self, rows: tuple[Tensor, ...]) -> None:
        if self.columns is not None:
            rows = (*rows, self._neighbours(len(self.stores[0]) + self.evicted, rows))
        super()._append(rows)

    @staticmethod
    def _neighbours(first: int, rows: tuple[Tensor, ...]) -> Tensor:
        """Columns [B, heads, n, 1] of neighbouring rows [B, G/N, n, width] of latents."""
        b, _, n, _ = rows[0].shape
        heads = min(x.shape[1] for x in rows)
        columns = torch.arange(first, first + n, dtype=torch.int32, device=rows[0].device)
        return columns.view(1, 1, n, 1).expand(b, heads, n, 1)

    def _show(self) -> None:
        super()._show()
        if self.columns is not None:
            self.shown, self.columns = self.shown[:-1], self.shown[-1].squeeze(-1)
            self.values = self.shown[-1]

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        return super().tensors() + ([] if self._tally is None else [self._tally])

    def rows_to_keep(self) -> int:
        """Rows that the budget has room for."""
        return max(self.eviction.kept(self.get_seq_length()) - self.window, 0)

    def evict(self, queries: int, describe: Callable[..., Held]) -> None:
        """Evict what is over the budget, after a pass.

        Args:
            queries: of the pass.
            describe: gives what a rule may look at, for `columns`, `kept` and `tally`.
        """
        rule, kept_rows = self.eviction.rule, self.rows_to_keep()
        columns = self._neighbours(0, self.shown).squeeze(-1) if self.columns is None else self.columns
        if rule.tally is not None:
            counted = rule.tally(describe(columns, kept_rows))
            if self._tally is not None:
                counted[..., : self._tally.shape[-1]] += self._tally
            self._tally = counted
        over = columns.shape[-1] - kept_rows
        if over <= 0 or queries < rule.queries:
            return
        held = describe(columns, kept_rows, self._tally)
        if self.columns is None:
            self.stores, self.columns = (*self.stores, Store(columns[:, :, :0].unsqueeze(-1))), columns
            self.stores[-1].append(columns.unsqueeze(-1))
        kept = self.eviction.choose(held)
        for store in self.stores:
            store.keep(kept)
        if self._tally is not None:
            self._tally = self._tally.gather(-1, kept)
        self.evicted, self._settled, self.left = self.evicted + over, held.kept, held.kept
        self._show()

    def crop(self, tokens_to_remove: int) -> None:
        """As of other layers, but of what no eviction has looked at.

        Raises:
            EigenAttnError: if tokens were evicted since, or the attention of those to be taken back was counted.
        """
        if tokens_to_remove < 0 and self._tally is not None:
            raise EigenAttnError(
                f"{self.eviction.name} counts attention, that of tokens to be taken back too: start a new cache."
            )
        super().crop(tokens_to_remove)

    def _crop_left(self, left: int) -> None:
        if self.evicted and left - self.evicted < self._settled:
            raise EigenAttnError(
                "tokens were evicted since those to be taken back came, and are gone: start a new cache."
            )
        super()._crop_left(left - self.evicted)

    def _map(self, change: Any, batch: bool = True) -> None:
        if self._tally is not None:
            self._tally = change(self._tally)
        super()._map(change, batch)

    def reset(self) -> None:
        super().reset()
        self.columns, self._tally = None, None
        self.evicted = self._settled = 0


class EigenCache(DynamicCache):
    """A dynamic cache for compressed models, which may evict tokens: pass it as `past_key_values`.

    Eviction, low rank and coding multiply: what is evicted are latents, of each head its own tokens (of all that share
    a latent the same). Kept tokens keep their positions. Exact tokens of the window are never evicted, nor are tokens
    of layers with sliding-window attention. A pass sees what was held before it and all of itself, and tokens are
    evicted after it: by most rules after every pass, by `snapkv` after passes of at least 32 tokens, which are prompts.

    Args:
        config: the model's, for layers with sliding-window attention.
        evict: a rule of `eigenattn.cache.rules.EVICTION_RULES`: `streaming`, `snapkv`, `tova`, `h2o`, `knorm` or
            `keydiff`; None keeps all tokens.
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
        self.eviction = None if evict is None or budget is None else Eviction(evict, budget)
        if self.eviction is not None and self.layers and all(self.is_sliding):
            raise EigenAttnError("all layers of this model slide, and forget by themselves: there is nothing to evict.")

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        """As of transformers' caches.

        Raises:
            EigenAttnError: if tokens are to be evicted of a model that was not compressed.
        """
        if self.eviction is not None and not isinstance((*self.layers, None)[layer_idx], LatentLayer):
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

    @property
    def kept_tokens(self) -> int:
        """Tokens of a sequence that the layers hold at most."""
        held = (self.get_seq_length(i) - getattr(layer, "evicted", 0) for i, layer in enumerate(self.layers))
        return max(held, default=0)
