"""How the rows of a tower run through its layers: a route, chosen once, when the tower is built.

Rows            rows in, rows out; a layer is one function where that is exact and fast
Streams         a layer's last sum is left to the next layer's LayerNorm, on which kernels work; the prompts' keys and
                values are read in place
ReservedStreams the same beside xformers' attention, which takes no shared keys: prompts lie in reserved rows of the
                images' stream, and in buffers in front of each class's rows
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from upt_fast.engine import ops
from upt_fast.engine.backends import dispatch, pytorch
from upt_fast.engine.backends.dispatch import TORCH, Asked
from upt_fast.engine.towers import prompts
from upt_fast.engine.towers.blocks import FrozenBlocks
from upt_fast.engine.towers.prompts import Packed, TextPrompts
from upt_fast.engine.weights import Attend, BlockWeights, Heads
from upt_fast.engine.workspace import Workspace

Pooled = Callable[[int], Any]  # first row of an image behind the prompts -> index of the pooled rows of (B, L, w)
Summands = tuple[Tensor, Tensor | None]  # rows, and what is still to be added to them


def choose(asked: Asked) -> Route:
    """The route for the backends that were asked for: kernels need streams, xformers room for the prompts."""
    if asked.no_kernels:
        return Rows()
    return ReservedStreams(asked) if "xformers" in asked.names else Streams(asked)


class Route(ABC):
    """See the module.

    Attributes:
        asked: the backends of the operations.
        packs: whether weights may be packed for the compiled operations.
        with_places: whether packed classes need places and tiles.
    """

    asked = TORCH
    packs = True
    with_places = False

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
        front = TextPrompts(blocks, given[:, : len(packed.layout.sets), :shared], packed)
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


class Rows(Route):
    """Rows in, rows out."""

    def check_composes(self) -> None:
        """They always can."""

    def images(
        self, blocks: FrozenBlocks, x: Tensor, entering: list[Tensor], set_index: Tensor | None, pooled: Pooled
    ) -> Tensor:
        last, length, first_row = blocks.num_layers - 1, entering[0].shape[1], 0
        prompt_kv, prompt_rows = prompts.of_images(blocks, entering)
        before_rows = None if prompt_rows is None else len(prompt_kv)
        workspace = blocks.workspace(checkpointed=False, end=before_rows)
        for i in range(blocks.num_layers):
            if prompt_rows is not None and i == before_rows:
                x, first_row = ops.prepend_rows(prompt_rows, x, set_index), length
                workspace.end_forward()
                workspace = blocks.workspace(checkpointed=False)
            prefix = prompt_kv[i] if i < len(prompt_kv) else None
            if i < last:
                x = blocks.layer(i).block(x, *keys_values(prefix), set_index, blocks.memory, workspace, i)
            else:
                x = blocks.run(self._pool, blocks, x, prefix, set_index, pooled(first_row), blocks.workspace("last"))
        workspace.end_forward()
        return x

    def _pool(
        self,
        blocks: FrozenBlocks,
        x: Tensor,
        prefix: Tensor | None,
        set_index: Tensor | None,
        pooled: Any,
        workspace: Workspace,
    ) -> Tensor:
        """The last layer, for the pooled rows: the class token's, or all patches'."""
        prefix_k, prefix_v = keys_values(prefix)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ops.prefix_attention(q, k, v, prefix_k, prefix_v, set_index)

        last = blocks.num_layers - 1
        return blocks.layer(last).by_ops(x, attend, blocks.memory, workspace, last, rows=x[pooled])

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
        prefix_k, prefix_v = prefix.unbind(2)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ops.packed_attention(q, k, v, prefix_k, prefix_v, packed.layout)

        last = i == blocks.num_layers - 1
        rows = x[packed.last_rows] if last else None
        heads = constant_heads(i, packed) if not last else None
        return blocks.layer(i).by_ops(x, attend, blocks.memory, workspace, i, rows, heads), None


class Streams(Route):
    """A layer's last sum is left to the next layer's LayerNorm; the prompts' keys and values are read in place.

    Args:
        asked: the backends of the operations.
    """

    packs = False
    with_places = True

    def __init__(self, asked: Asked) -> None:
        self.asked = asked

    def check_composes(self) -> None:
        raise ValueError(
            f"backend='{self.asked}' has no second derivatives, no torch.func transforms and no shapes without "
            "data; wanted 'auto' or 'torch'"
        )

    def images(
        self, blocks: FrozenBlocks, x: Tensor, entering: list[Tensor], set_index: Tensor | None, pooled: Pooled
    ) -> Tensor:
        prompt_kv, prompt_rows = prompts.of_images(blocks, entering)
        y: Tensor | None = None
        first_row = 0
        for i in range(blocks.num_layers):
            if i == len(prompt_kv) and prompt_rows is not None:
                x, y = total(x, y), None
                x, first_row = ops.prepend_rows(prompt_rows, x, set_index), entering[0].shape[1]
            prefix = prompt_kv[i] if i < len(prompt_kv) else None
            x, y = blocks.run(self._images, blocks, i, x, y, prefix, set_index, pooled(first_row))
        return total(x, y)

    def _images(
        self,
        blocks: FrozenBlocks,
        i: int,
        x: Tensor,
        y: Tensor | None,
        prefix: Tensor | None,
        set_index: Tensor | None,
        pooled: Any,
    ) -> Summands:
        prefix_k, prefix_v = keys_values(prefix)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ops.prefix_attention(q, k, v, prefix_k, prefix_v, set_index, self.asked)

        layer = blocks.layer(i)
        x, h = self.norm(layer, x, y)
        return self.finish(blocks, i, layer, x, self.heads(layer, h), attend, pooled)

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
        layer, heads = blocks.layer(i), constant_heads(i, packed)
        if heads is None:
            x, h = self.norm(layer, x, y)
            heads = self.heads(layer, h)
        attend = partial(self.attend_packed, prefix=prefix, packed=packed)
        return self.finish(blocks, i, layer, x, heads, attend, packed.last_rows)

    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, prefix: Tensor, packed: Packed) -> Tensor:
        """Attention of packed rows; prefix: (S, 1 + P, 2, H, K)."""
        prefix_k, prefix_v = prefix.unbind(2)
        return ops.packed_attention(q, k, v, prefix_k, prefix_v, packed.layout, self.asked, packed.tiles)

    def norm(self, layer: BlockWeights, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """x + y, and the same normalised as it enters a layer."""
        if y is None:
            return x, ops.layer_norm(x, layer.eps, self.asked)
        return ops.add_layer_norm(x, y, layer.eps, self.asked)

    def heads(self, layer: BlockWeights, h: Tensor) -> Heads:
        """Queries, keys and values of normalised rows."""
        return layer.qkv.stream_heads(h, layer.qkv_bias, layer.num_heads)

    def finish(
        self, blocks: FrozenBlocks, i: int, layer: BlockWeights, x: Tensor, heads: Heads, attend: Attend, pooled: Any
    ) -> Summands:
        """Layer i from its queries, keys and values on, its last sum left to the next layer; the last one pools.

        Args:
            x: (..., D) rows that entered the layer.
            attend: gives attention's output (..., H, K).
            pooled: index of the pooled rows.
        """
        q, k, v = heads
        if i == blocks.num_layers - 1:
            x, q = x[pooled], q[pooled]
        out = layer.out.linear(attend(q, k, v).flatten(-2), layer.out_bias)
        x, h = ops.add_layer_norm(x, out, layer.mlp.eps, self.asked)
        return x, layer.mlp.of_normed(h, blocks.memory == "balanced", self.asked)


class ReservedStreams(Streams):
    """Streams beside xformers: all prompts are rows, put in place."""

    def widens(self, q: Tensor) -> bool:
        return False

    def images(
        self, blocks: FrozenBlocks, x: Tensor, entering: list[Tensor], set_index: Tensor | None, pooled: Pooled
    ) -> Tensor:
        length = entering[0].shape[1]
        stream = x.new_empty(x.shape[0], length + x.shape[1], x.shape[2])
        stream[:, length:] = x
        x, y = stream, None
        for i in range(blocks.num_layers):
            inserted = entering[i] if length and i < len(entering) else None
            x, y = blocks.run(self._images, blocks, i, x, y, inserted, set_index, pooled(length))
        return total(x, y)

    def _images(
        self,
        blocks: FrozenBlocks,
        i: int,
        x: Tensor,
        y: Tensor | None,
        inserted: Tensor | None,
        set_index: Tensor | None,
        pooled: Any,
    ) -> Summands:
        layer = blocks.layer(i)
        if inserted is None:
            x, h = self.norm(layer, x, y)
        else:
            if blocks.memory == "lean":
                x = x.clone()  # what comes in is needed once more, to compute the layer again
            x, h = ops.prompt_insert(x, y, inserted, set_index, layer.eps, self.asked)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ops.stream_attention(q, k, v, self.asked)

        return self.finish(blocks, i, layer, x, self.heads(layer, h), attend, pooled)

    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, prefix: Tensor, packed: Packed) -> Tensor:
        prefix_k, prefix_v = prefix.unbind(2)
        assert packed.places is not None
        keys = ops.insert_shared(k, prefix_k, packed.places, self.asked)
        values = ops.insert_shared(v, prefix_v, packed.places, self.asked)
        return ops.buffer_attention(q, keys, values, packed.layout, prefix_k.shape[1], self.asked)


def keys_values(prefix: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Those of (S, P, 2, H, K)."""
    return (None, None) if prefix is None else tuple(prefix.unbind(2))  # type: ignore[return-value]


def total(x: Tensor, y: Tensor | None) -> Tensor:
    """Rows and what is still to be added to them."""
    return x if y is None else x + y


def constant_heads(i: int, packed: Packed) -> Heads | None:
    """Queries, keys and values of packed rows that enter layer i, where no prompt can change them."""
    return tuple(packed.first_qkv) if i == 0 and packed.first_qkv is not None else None  # type: ignore[return-value]
