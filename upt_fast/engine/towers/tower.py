"""What both towers have in common: blocks, and a route through them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from upt_fast.engine.towers.blocks import FrozenBlocks
from upt_fast.engine.towers.route import Route


class Tower(nn.Module):
    """A frozen tower; its constructor sets the attributes.

    Attributes:
        blocks: the residual blocks.
        route: how rows run through them.
    """

    blocks: FrozenBlocks
    route: Route

    def check_move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Raise a ValueError where nn.Module._apply(fn) would ruin the weights, or leave them without their route."""
        self.blocks.stack.check_move(fn, self.blocks)
        self.route.check(self.blocks, fn)

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        self.check_move(fn)
        return super()._apply(fn, recurse)
