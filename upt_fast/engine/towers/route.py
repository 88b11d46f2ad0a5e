"""What a route is: how the rows of a tower run through its layers; routes.py chooses one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from upt_fast.engine.autograd import composing
from upt_fast.engine.backends import dispatch, pytorch
from upt_fast.engine.backends.asked import Asked
from upt_fast.engine.towers.blocks import FrozenBlocks
from upt_fast.engine.towers.prompts import Packed, TextPrompts
from upt_fast.engine.weights import Heads
from upt_fast.engine.workspace import Workspace

Pooled = Callable[[int], Any]  # first row of an image behind the prompts -> index of the pooled rows of (B, L, w)
Summands = tuple[Tensor, Tensor | None]  # rows, and what is still to be added to them


class Route(ABC):
    """See the module.

    Args:
        asked: the backends of the operations.

    Attributes:
        image_ops: ops of an image tower that the backends compute, by their names.
        text_ops: of a text tower.
        with_places: whether packed classes need places and tiles.
    """

    image_ops: ClassVar[frozenset[str]]
    text_ops: ClassVar[frozenset[str]]
    with_places = False

    def __init__(self, asked: Asked) -> None:
        self.asked = asked

    @property
    def packs(self) -> bool:
        """Whether weights may be packed for the compiled operations."""
        return False

    @property
    def of_prompts(self) -> Asked:
        """Who computes attention of text prompts that are rows of their own."""
        return self.asked

    def refusals(self, device: str, dtype: torch.dtype, blocks: FrozenBlocks) -> list[str]:
        """Why blocks would not run on a kind of device in a dtype; an operation's own refusals come when it is called.

        Args:
            device: "cpu", "cuda", ...
            dtype: of the weights.
            blocks: of the tower, wherever they are now.
        """
        return []

    def check(self, blocks: FrozenBlocks, move: Callable[[Tensor], Tensor] | None = None) -> None:
        """Raise a ValueError where blocks would not run, as they are or moved.

        Args:
            blocks: of the tower.
            move: what nn.Module._apply got.
        """
        probe = torch.empty(0, dtype=blocks.qkv_bias.dtype, device=blocks.qkv_bias.device)
        if move is not None:
            probe = move(probe)
        if not composing.has_data(probe, blocks.qkv_bias):
            return
        reasons = self.refusals(probe.device.type, probe.dtype, blocks)
        if reasons:
            tower = "image" if blocks.length else "text"
            raise ValueError(
                f"backend='{self.asked}' cannot compute this {tower} tower: {'; '.join(reasons)}; wanted 'auto', or "
                "another backend for this tower (IMAGES/TEXTS)"
            )

    def widens(self, q: Tensor) -> bool:
        """Whether attention of packed rows like q (., H, K) goes from half precision to float32, as PyTorch's does."""
        return q.dtype.itemsize < 4 and dispatch.find("packed_attention", self.asked, q) is pytorch

    @abstractmethod
    def check_composes(self) -> None:
        """Raise a ValueError where the rows of a pass cannot be computed op by op, as composing asks for."""

    @abstractmethod
    def images(
        self, blocks: FrozenBlocks, x: Tensor, entering: list[Tensor], set_index: Tensor | None, pooled: Pooled
    ) -> Tensor:
        """The pooled rows (B, ., w) after all layers; prompts that the next layer replaces are keys and values only.

        Args:
            blocks: the image tower's.
            x: (B, 1 + G, w) rows of the images.
            entering: prompts, for each prompted layer (S, n, w).
            set_index: (B,) int64, each image's set; None where S is 1.
            pooled: gives the index of the pooled rows.
        """

    def texts(self, blocks: FrozenBlocks, given: Tensor, packed: Packed) -> Tensor:
        """The pooled rows (C, d) of packed classes after all layers.

        Args:
            blocks: the text tower's.
            given: prompts (depth, S, n, d); (depth, C, n, d) where each class has its own.
            packed: the classes.
        """
        depth, shared = len(given), packed.num_shared
        # prompts of each class's own share nothing
        front = TextPrompts(blocks, given[:, : len(packed.layout.sets), :shared], packed, self.of_prompts)
        x, y, workspace = packed.rows, None, blocks.workspace()
        for i in range(blocks.num_layers):
            prefix = front.keys_values(i)
            front.advance(i)
            if i < depth and packed.num_inner:
                inner = given[i, packed.inner_sets, shared:]  # (C, num_inner, d)
                if i == 0:
                    inner = inner + packed.rows[packed.inner_rows]
                x, y = total(x, y), None
                x = x.index_copy(0, packed.inner_rows.flatten(), inner.flatten(0, 1))
            x, y = blocks.run(self.classes, blocks, i, x, y, prefix, packed, workspace)
        for space in (workspace, front.workspace):
            space.end_forward()
        return total(x, y)

    @abstractmethod
    def classes(
        self,
        blocks: FrozenBlocks,
        i: int,
        x: Tensor,
        y: Tensor | None,
        prefix: Tensor,
        packed: Packed,
        workspace: Workspace,
    ) -> Summands:
        """Layer i of packed rows x (N, d) and of y; the last layer gives the pooled rows alone.

        Args:
            prefix: (S, 1 + P, 2, H, K), in front of the classes of each set.
        """


def keys_values(prefix: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Those of (S, P, 2, H, K)."""
    return (None, None) if prefix is None else tuple(prefix.unbind(2))  # type: ignore[return-value]


def total(x: Tensor, y: Tensor | None) -> Tensor:
    """Rows and what is still to be added to them."""
    return x if y is None else x + y


def constant_heads(i: int, packed: Packed) -> Heads | None:
    """Queries, keys and values of packed rows that enter layer i, where no prompt can change them."""
    return tuple(packed.first_qkv) if i == 0 and packed.first_qkv is not None else None  # type: ignore[return-value]
