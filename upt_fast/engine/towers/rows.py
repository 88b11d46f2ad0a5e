"""Rows in, rows out; a layer of images is one function where that is exact and fast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from upt_fast.engine import ops
from upt_fast.engine.autograd.gpu_attention import NAMES as KERNELS
from upt_fast.engine.autograd.gpu_attention import FusedAttention
from upt_fast.engine.backends import compiled, dispatch
from upt_fast.engine.towers import prompts
from upt_fast.engine.towers.blocks import FrozenBlocks
from upt_fast.engine.towers.prompts import Packed
from upt_fast.engine.towers.route import Pooled, Route, Summands, constant_heads, keys_values
from upt_fast.engine.weights import BlockWeights
from upt_fast.engine.workspace import Workspace


class Rows(Route):
    """See the module."""

    image_ops = frozenset({"prefix_attention"})
    text_ops = frozenset({"packed_attention"})

    @property
    def attends(self) -> bool:
        """Whether someone is asked for attention of images, so that a layer cannot be one function."""
        names = (name for name in self.asked.names if name != "torch")
        return "prefix_attention" in dict(self.asked.ops) or any(
            "prefix_attention" in dispatch.BACKENDS[name].OPS for name in names
        )

    @property
    def pinned(self) -> str:
        """Which of PyTorch's kernels attention of images is held to; a layer can be one function with it on a GPU."""
        return next((name for name in self.asked.wanted("prefix_attention") if name in KERNELS), "")

    @property
    def packs(self) -> bool:
        return self.asked.names in ((), ("compiled",))

    def refusals(self, device: str, dtype: torch.dtype, blocks: FrozenBlocks) -> list[str]:
        if "compiled" not in self.asked.names:
            return []
        if blocks.quantized:
            return ["compiled: fp8 (take float32, bfloat16)"]
        found = compiled.refusals(device, dtype, width=blocks.width, num_heads=blocks.num_heads)
        return [f"compiled: {reason}" for reason in found]

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
                x = self.layer(blocks, i, x, prefix, set_index, workspace)
            else:
                x = blocks.run(self._pool, blocks, x, prefix, set_index, pooled(first_row), blocks.workspace("last"))
        workspace.end_forward()
        return x

    def layer(
        self,
        blocks: FrozenBlocks,
        i: int,
        x: Tensor,
        prefix: Tensor | None,
        set_index: Tensor | None,
        workspace: Workspace,
    ) -> Tensor:
        """Layer i of rows x (B, L, w) of images; prefix: (S, P, 2, H, K) or None."""
        prefix_k, prefix_v = keys_values(prefix)
        weights = blocks.layer(i)
        if self.pinned and x.device.type == "cuda":
            weights = weights._replace(attention=FusedAttention(self.pinned))
        elif self.attends:
            return self._by_ops(blocks, i, weights, x, prefix, set_index, workspace)
        return weights.block(x, prefix_k, prefix_v, set_index, blocks.memory, workspace, i)

    def _by_ops(
        self,
        blocks: FrozenBlocks,
        i: int,
        weights: BlockWeights,
        x: Tensor,
        prefix: Tensor | None,
        set_index: Tensor | None,
        workspace: Workspace,
    ) -> Tensor:
        prefix_k, prefix_v = keys_values(prefix)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ops.prefix_attention(q, k, v, prefix_k, prefix_v, set_index, self.asked)

        if blocks.memory == "lean" and torch.is_grad_enabled():
            # what a workspace keeps for a layer would outlive the first computation
            return blocks.run(weights.by_ops, x, attend, blocks.memory)
        return blocks.run(weights.by_ops, x, attend, blocks.memory, workspace, i)

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
            return ops.prefix_attention(q, k, v, prefix_k, prefix_v, set_index, self.asked)

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
            return ops.packed_attention(q, k, v, prefix_k, prefix_v, packed.layout, self.asked)

        last = i == blocks.num_layers - 1
        rows = x[packed.last_rows] if last else None
        heads = constant_heads(i, packed) if not last else None
        return blocks.layer(i).by_ops(x, attend, blocks.memory, workspace, i, rows, heads), None
