"""Of how many tokens the blocks of the engine's pool are, by which layers' pages they hold: arithmetic alone."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..cache.layout import Layout
from ..errors import EigenAttnError

# Tokens that a block of the first group may have, unless the user says otherwise (chosen). Smaller ones make longer
# tables.
BLOCKS = range(16, 257, 4)
# Of latents: pages begin where elements of four bytes may.
ALIGNED = 4
# Groups that there may be, in the order of `BlockPlan`.
GROUPS = ("full", "sliding", "exact")
# Where the engine schedules ahead, tokens of two steps are not settled.
STEPS_AHEAD = 2


@dataclass(frozen=True)
class Group:
    """Layers whose tokens lie in blocks of the same number.

    Args:
        sizes: bytes of a token in each of them; other groups may have other layers.
        sees: tokens of a sequence that it holds while it decodes; None for all.
        block: tokens of a block.
        leads: whether it is to be the first: vLLM has models that draft write to the first one's blocks.
    """

    sizes: tuple[int, ...]
    sees: int | None = None
    block: int = 1
    leads: bool = False

    def spacers(self, stages: int) -> int:
        """How many `Spacer`s keep it in one piece.

        Where each size of page occurs equally often vLLM sees a pattern that repeats, and cuts every group by it. It
        also cuts groups that slide, where as many pages like the first as there are do not fit into a block. A group
        leads by a page before all layers', and each stage of a pipeline, which are so many, has to have a page of it.
        """
        counts = {*Counter(self.sizes).values()}
        if stages > 1:
            return stages + (counts == {stages})
        slides = self.sees is not None and len(self.sizes) > 1
        if not (slides or self.leads) and (len({*self.sizes}) < 2 or len(counts) > 1):
            return 0
        return 2 if counts == {1} else 1

    def blocks(self, computed: int, longest: int) -> int:
        """That a sequence of `longest` tokens takes at most while so many are computed."""
        if self.sees is None:
            return -(-longest // self.block)
        return -(-min(self.sees - 1 + computed, longest) // self.block) + 1


@dataclass(frozen=True)
class BlockPlan:
    """Of how many tokens the engine's blocks are, where there are several groups.

    Args:
        groups: by name, those of `GROUPS` that there are in this order.
    """

    groups: dict[str, Group]

    @classmethod
    def of(
        cls,
        layouts: Sequence[Layout],
        sees: Sequence[int | None],
        element_size: int,
        longest: int,
        block: int,
        fixed: bool,
        states: bool = False,
        drafts: Sequence[int] = (),
        positions: int = 0,
    ) -> BlockPlan:
        """For the layers of a model, which have one window.

        Args:
            sees: tokens that each layer sees; None for all.
            element_size: bytes of an element that is not coded.
            longest: tokens of a sequence.
            block: tokens of a block, as the engine has it; where there are several groups, of the first one's.
            fixed: whether the user has said so; otherwise several groups have blocks that waste least.
            states: whether other layers have states. In each block there is room for one: the engine gives it as many
                bytes as keys and values of a block's tokens take in a layer of the original.
            drafts: bytes of a token in each layer that drafts. They see everything, in blocks of the engine's size.
            positions: bytes of a token's positions, if they are cached.

        Raises:
            EigenAttnError: if layers slide by different windows.
        """
        window, slide = layouts[0].window, sorted({seen for seen in sees if seen is not None})
        if len(slide) > 1:
            raise EigenAttnError(
                f"layers that see {' and '.join(map(str, slide))} tokens are not served together by vLLM once "
                "compressed: one sliding window a model is."
            )

        def sizes(seen: int | None) -> tuple[int, ...]:
            pairs = zip(layouts, sees, strict=True)
            return tuple(layout.bytes_per_token(element_size) for layout, own in pairs if own == seen)

        cached = (positions,) if positions else ()
        groups = {"full": Group((*sizes(None), *cached, *drafts), leads=bool(drafts))}
        if slide:
            groups["sliding"] = Group(sizes(slide[0]), slide[0])
        if window:
            exact = tuple(layout.original_elements * element_size for layout in layouts)
            groups["exact"] = Group(exact, window)
        groups = {name: group for name, group in groups.items() if group.sizes}
        state = block * layouts[0].original_elements * element_size if states else 0

        def with_blocks(first: int) -> BlockPlan:
            """Blocks divide each other: prefixes end with the first group's, and are hashed by the last one's."""
            made, room, block = {}, 0, first
            for name, group in groups.items():
                size = sum(group.sizes)
                if made:
                    step = 1 if name == "exact" else ALIGNED
                    fitting = [n for n in range(step, block + 1, step) if block % n == 0 and n * size <= room]
                    block = max(fitting, default=step)
                else:
                    room = max(first * size, state)
                made[name] = dataclasses.replace(group, block=block)
            return cls(made)

        def cost(first: int) -> float:
            """Bytes of the pool that a sequence takes for what slides, and for what its last block wastes."""
            plan = with_blocks(first)
            pages = [group.block * sum(group.sizes) for group in plan.groups.values()]
            held = sum(group.blocks(STEPS_AHEAD, longest) for group in plan.groups.values() if group.sees is not None)
            return pages[0] * (held + 0.5) if max(pages) == pages[0] else math.inf

        if states:
            block *= max(state // (block * sum(next(iter(groups.values())).sizes)), 1)
        fixed = fixed or states or bool(drafts) or len(groups) == 1
        return with_blocks(block if fixed else min(BLOCKS, key=cost))

    @property
    def kept(self) -> int:
        """Blocks that what slides takes of a prefix for later prompts."""
        return sum(-(-(group.sees - 1) // group.block) for group in self.groups.values() if group.sees is not None)

    def needed(self, in_flight: int, longest: int) -> int:
        """Blocks that a sequence of `longest` tokens takes while so many are computed, and one that vLLM reserves."""
        return 1 + sum(group.blocks(in_flight, longest) for group in self.groups.values())
