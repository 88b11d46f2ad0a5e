"""What both towers have in common: blocks, and a route through them that can change in place."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from upt_fast.engine.backends.asked import Asked
from upt_fast.engine.towers import routes
from upt_fast.engine.towers.blocks import FrozenBlocks
from upt_fast.engine.towers.route import Route
from upt_fast.engine.towers.stacks import PlainStack


class Tower(nn.Module):
    """A frozen tower; its constructor sets the attributes.

    Attributes:
        blocks: the residual blocks.
        route: how rows run through them.
    """

    blocks: FrozenBlocks
    route: Route

    def ready(self, asked: Asked) -> tuple[Route, PlainStack]:
        """Another route and the weights that it works with, for :meth:`take`; nothing changes yet.

        Args:
            asked: the backends of the operations.
        Raises:
            ValueError: there is no such route, or it cannot compute this tower.
        """
        route = routes.choose(asked)
        route.check(self.blocks)
        return route, self.blocks.stack_for(route.packs)

    def take(self, route: Route, stack: PlainStack, release: bool = True) -> None:
        """Change to what :meth:`ready` made; classes that were packed before are to be packed anew.

        Args:
            release: whether to let go of the memory that passes reuse.
        """
        self.route, self.blocks.stack, self.blocks.packs = route, stack, route.packs
        if release:
            self.blocks.release()

    def check_move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Raise a ValueError where nn.Module._apply(fn) would ruin the weights, or leave them without their route."""
        self.blocks.stack.check_move(fn, self.blocks)
        self.route.check(self.blocks, fn)

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        self.check_move(fn)
        return super()._apply(fn, recurse)
