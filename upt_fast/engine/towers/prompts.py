"""Prompts as keys and values alone, where the next layer replaces them, and as rows behind the last of these layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from upt_fast.engine import ops
from upt_fast.engine.backends.asked import Asked
from upt_fast.engine.layout import PackedLayout
from upt_fast.engine.towers.blocks import FrozenBlocks
from upt_fast.engine.towers.packing import PackedClasses, RepeatedClasses
from upt_fast.engine.workspace import Workspace

Packed = PackedClasses | RepeatedClasses


def of_images(blocks: FrozenBlocks, entering: list[Tensor]) -> tuple[list[Tensor], Tensor | None]:
    """Keys and values (S, n, 2, H, K) of prompts that act as nothing else, and those (S, n, w) that become rows.

    In the last prompted layer they become rows, unless no later layer reads those.

    Args:
        entering: for each prompted layer (S, n, w).
    """
    depth, length = len(entering), entering[0].shape[1]
    if not length:
        return [], None
    key_value_only = depth if depth >= blocks.num_layers else depth - 1
    rows = entering[key_value_only] if key_value_only < depth else None
    if not key_value_only:
        return [], rows
    return list(blocks.prompt_kv(torch.stack(entering[:key_value_only])).unbind()), rows


class TextPrompts:
    """[start token ; prompts] in front of the names of a set's classes, layer by layer.

    Args:
        blocks: the text tower's.
        prompts: (depth, S, P, d), prompts[i] entering layer i.
        packed: the classes.
        asked: who computes attention of the prompts' own rows.
    """

    def __init__(self, blocks: FrozenBlocks, prompts: Tensor, packed: Packed, asked: Asked) -> None:
        assert packed.sos_kv is not None
        self.asked = asked
        self.blocks, self.sos_kv = blocks, packed.sos_kv
        self.depth, sets, self.length = prompts.shape[:3]
        positions = F.pad(packed.prompt_positions[None, None], (0, 0, 0, 0, 0, 0, 0, self.depth - 1))  # of layer 0
        entering = prompts + positions
        prompt_kv = blocks.prompt_kv(entering).flatten(0, 1)  # (depth S, P, 2, H, K)
        layers = torch.arange(self.depth, device=prompts.device).repeat_interleave(sets)
        kv = ops.prepend_rows(self.sos_kv[: self.depth, None], prompt_kv, layers)
        self.rows = entering[-1]  # (S, P, d), which propagate from the last prompted layer on
        self.kv = kv.unflatten(0, (self.depth, sets))
        self.workspace = blocks.workspace("prompts")

    def keys_values(self, i: int) -> Tensor:
        """(S, 1 + P, 2, H, K) of layer i, whose rows are there."""
        if i < self.depth:
            return self.kv[i]
        return ops.prepend_rows(self.sos_kv[i, None, None], self.blocks.prompt_kv(self.rows[None], first=i)[0])

    def advance(self, i: int) -> None:
        """Let the rows pass layer i, where a later layer reads them."""
        if self.length and self.depth - 1 <= i < self.blocks.num_layers - 1:
            self.rows = self.blocks.run(self._layer, i, self.rows, self.workspace)

    def _layer(self, i: int, rows: Tensor, workspace: Workspace) -> Tensor:
        """Layer i for rows (S, P, d), causal behind the start token."""
        sets, length, _ = rows.shape
        sos_k, sos_v = self.sos_kv[i, :, None, None]  # (1, 1, H, K) each

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            layout = PackedLayout((((sets, length),),))
            q, k, v = (t.flatten(0, 1) for t in (q, k, v))
            return ops.packed_attention(q, k, v, sos_k, sos_v, layout, self.asked).view(sets, length, *q.shape[1:])

        return self.blocks.layer(i).by_ops(rows, attend, self.blocks.memory, workspace, i)
