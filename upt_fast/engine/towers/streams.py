"""Streams of rows, for kernels: a layer's last sum is left to the next layer's LayerNorm.

Streams         the prompts' keys and values are read in place
ReservedStreams the same beside attention that takes no shared keys: prompts lie in reserved rows of the images' stream,
                and in buffers in front of each class's rows
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from upt_fast.engine import ops
from upt_fast.engine.backends import dispatch, pytorch
from upt_fast.engine.backends.asked import TORCH, Asked
from upt_fast.engine.towers import prompts
from upt_fast.engine.towers.blocks import FrozenBlocks
from upt_fast.engine.towers.prompts import Packed
from upt_fast.engine.towers.route import Pooled, Route, Summands, constant_heads, keys_values, total
from upt_fast.engine.weights import Attend, BlockWeights, Heads
from upt_fast.engine.workspace import Workspace

LAYER_OPS = frozenset({"layer_norm", "add_layer_norm", "linear_gelu", "activation"})


class Streams(Route):
    """See the module."""

    image_ops = LAYER_OPS | {"prefix_attention"}
    text_ops = LAYER_OPS | {"packed_attention"}
    with_places = True

    @property
    def of_prompts(self) -> Asked:
        return TORCH  # a handful of rows

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
    """Streams whose prompts are rows, put in place."""

    image_ops = LAYER_OPS | {"prompt_insert", "stream_attention"}
    text_ops = LAYER_OPS | {"insert_shared", "buffer_attention"}

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
            if blocks.memory == "lean" or self._is_saved(x):
                x = x.clone()  # what comes in is needed once more, to compute the layer again or a LayerNorm's gradient
            x, h = ops.prompt_insert(x, y, inserted, set_index, layer.eps, self.asked)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ops.stream_attention(q, k, v, self.asked)

        return self.finish(blocks, i, layer, x, self.heads(layer, h), attend, pooled)

    def _is_saved(self, x: Tensor) -> bool:
        """Whether the stream that a kernel changes in place was saved for backward: by PyTorch's LayerNorm."""
        norm, insert = (dispatch.find(op, self.asked, x) for op in ("add_layer_norm", "prompt_insert"))
        return norm is pytorch and insert is not pytorch

    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, prefix: Tensor, packed: Packed) -> Tensor:
        prefix_k, prefix_v = prefix.unbind(2)
        assert packed.places is not None
        keys = ops.insert_shared(k, prefix_k, packed.places, self.asked)
        values = ops.insert_shared(v, prefix_v, packed.places, self.asked)
        return ops.buffer_attention(q, keys, values, packed.layout, prefix_k.shape[1], self.asked)
