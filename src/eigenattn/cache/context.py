"""What the layers of one cache share: positions of the tokens, and what a pass computes once for all layers."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from ..errors import EigenAttnError
from .store import Store


class CacheContext:
    """Kept on a transformers cache by the layers that hold latents.

    The first of them in a pass, which owns it, begins the pass and writes positions; the others read. All that changes
    the batch (beams, selections) reaches the owner like every layer, and it changes the table.
    """

    def __init__(self) -> None:
        self.owner: int | None = None
        self._last, self._seen = -1, -1  # layers: of the passes before, and of this one so far
        self._memo: dict[Hashable, Any] = {}
        self._grown: Store | None = None
        self._fixed: Tensor | None = None

    @classmethod
    def of(cls, cache: Any) -> CacheContext:
        """A cache's own, made when it is first asked for."""
        found = getattr(cache, "_eigenattn_context", None)
        if found is None:
            found = cache._eigenattn_context = cls()
        return found

    def begin(self, layer_idx: int) -> bool:
        """Have a layer begin its part of a pass; whether it is the owner, with which a new pass begins."""
        if self.owner is None or layer_idx <= self.owner:
            self.owner, self._last, self._seen = layer_idx, self._seen, -1
            self._memo = {}
        self._seen = max(self._seen, layer_idx)
        return layer_idx == self.owner

    def end(self, layer_idx: int) -> None:
        """Have a layer end its part of a pass; with the last goes what was computed for all, which takes room."""
        if layer_idx == self._last:
            self._memo = {}

    def memoised(self, name: Hashable, compute: Callable[[], Any]) -> Any:
        """What `compute` gives, computed by the first layer that asks for it in a pass. Compiled graphs share by
        themselves."""
        if torch.compiler.is_compiling():
            return compute()
        if name not in self._memo:
            self._memo[name] = compute()
        return self._memo[name]

    def write(self, start: int, position_ids: Tensor | None, batch: int) -> None:
        """Note positions [B or 1, T] or [B or 1, T, rows] of tokens start .. of a batch, if it has any; later ones are
        forgotten.

        Raises:
            EigenAttnError: if positions of earlier tokens, or of other rows, are not known.
        """
        if position_ids is None:
            return
        rows = position_ids.unsqueeze(-1) if position_ids.dim() == 2 else position_ids
        rows = rows.expand(batch, -1, -1).unsqueeze(1)
        if self._grown is None:
            self._grown = Store(rows[:, :, :0])
        if len(self._grown) < start or len(self._grown.rows) != batch:
            raise EigenAttnError("this cache was filled by another model, or for another batch: pass a new one.")
        self._grown.crop(start)
        # Tokens of a text have the same position in all rows.
        width = max(rows.shape[-1], self._grown.rows.shape[-1])
        if self._grown.rows.shape[-1] < width:
            self._grown.map(lambda x: x.expand(-1, -1, -1, width).contiguous())
        self._grown.append(rows.expand(-1, -1, -1, width))

    def write_fixed(self, places: Tensor, position_ids: Tensor | None, batch: int, room: int) -> None:
        """The same at columns [T] of a table of fixed size, for static caches."""
        if position_ids is None:
            return
        if self._fixed is not None and self._fixed.dim() != position_ids.dim():
            width = max(self._fixed.shape[2:] or position_ids.shape[2:])
            position_ids, self._fixed = (
                x if x.dim() == 3 else x.unsqueeze(-1).expand(-1, -1, width) for x in (position_ids, self._fixed)
            )
            self._fixed = self._fixed.contiguous()
        if self._fixed is None:
            self._fixed = position_ids.new_zeros(batch, room, *position_ids.shape[2:])
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self._fixed)
        self._fixed.index_copy_(1, places, position_ids.expand(batch, *position_ids.shape[1:]))

    def positions(self, first: int, columns: int, device: torch.device) -> Tensor | None:
        """Positions [B, columns] or [B, columns, rows] of tokens first .. ; None if the model has none."""
        if self._fixed is not None:
            return self._fixed[:, :columns].to(device)
        if self._grown is None:
            return None
        found = self._grown.rows[:, 0, first : first + columns].to(device)
        return found.squeeze(-1)  # of one row

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change the batch."""
        if self._grown is not None:
            self._grown.map(change)
        if self._fixed is not None:
            self._fixed = change(self._fixed)

    def reset(self) -> None:
        """Forget all tokens; tensors of fixed size stay where they are."""
        self._grown, self._memo = None, {}
