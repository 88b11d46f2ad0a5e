"""The prompted text tower: class features from packed class names and shared prompts.

Prompt rows that the next layer replaces act only as keys and values, computed once per layer for all classes; rows
that propagate (after the last prompted layer) run once per prompt set. The last layer has queries for the pooled rows
only; layer 0's q, k and v of the class rows are constants.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upt_fast.clip.frozen import FrozenText
from upt_fast.clip.tokens import ClassTokens
from upt_fast.engine import ops
from upt_fast.engine.autograd import composing
from upt_fast.engine.backends.dispatch import TORCH, Asked
from upt_fast.engine.layout import PackedLayout
from upt_fast.engine.memory import Need, tower_need
from upt_fast.engine.towers.blocks import FrozenBlocks
from upt_fast.engine.towers.folding import FrozenHead
from upt_fast.engine.towers.packing import PackedClasses, RepeatedClasses
from upt_fast.engine.workspace import Workspace

Packed = PackedClasses | RepeatedClasses


class TextTower(nn.Module):
    """A frozen causal text tower with prompts.

    Args:
        text: the tower's weights.
        dtype: dtype in which it computes.
        memory: see :class:`FrozenBlocks`.
        backend: see :class:`FrozenBlocks`.
        quantized: see :class:`FrozenBlocks`.
    """

    def __init__(
        self,
        text: FrozenText,
        dtype: torch.dtype,
        memory: str = "fast",
        backend: Asked | str = TORCH,
        quantized: bool = False,
    ) -> None:
        super().__init__()
        self.blocks = FrozenBlocks(text.blocks, text.num_heads, text.activation, dtype, memory, backend, quantized)
        self.head = FrozenHead(text.ln_final, text.projection, text.projection_bias, dtype)
        self.register_buffer("token_embedding", text.token_embedding, persistent=False)
        self.register_buffer("positional_embedding", text.positional_embedding, persistent=False)
        self.dtype = dtype

    token_embedding: Tensor  # (V, d)
    positional_embedding: Tensor  # (T, d)

    @torch.no_grad()
    def pack(
        self,
        tokens: ClassTokens,
        n_text: int,
        class_token_position: str = "end",
        class_sets: list[int] | None = None,
        per_class: bool = False,
    ) -> PackedClasses:
        """Pack class names and compute what no prompt can change; see :class:`PackedClasses` for the arguments."""
        dtype = self.blocks.qkv_bias.dtype
        embeddings = self.token_embedding, self.positional_embedding
        packed = PackedClasses(tokens, n_text, class_token_position, *embeddings, dtype, class_sets, per_class)
        x, sos_kv, workspace = packed.sos, [], Workspace(0)
        for i in range(self.blocks.num_layers):
            _, k, v = self.blocks.qkv(i, x)
            sos_kv.append(torch.stack([k[0], v[0]]))
            x = self.blocks.finish(i, x, v, workspace)  # a row that sees only itself attends to its own value
        packed.sos_kv = torch.stack(sos_kv)
        if packed.num_inner == 0:
            packed.first_qkv = torch.stack(self.blocks.qkv(0, packed.rows))
        return packed

    def for_sets(self, prompts: Tensor, packed: PackedClasses) -> Tensor:
        """Features (S, C, e) of the same C classes under each of S sets of prompts (S, depth, n_text, d)."""
        repeated = packed.repeated(len(prompts), with_places=self.blocks.streams)
        return self(prompts, repeated).unflatten(0, (len(prompts), -1))

    def need(self, packed: PackedClasses, backward: bool, sets: int = 1, depth: int | None = None) -> Need:
        """Memory of a step's pass; see upt_fast/engine/memory.py.

        Args:
            packed: the classes of one set.
            backward: whether there is a gradient.
            sets: S sets of prompts for them.
            depth: layers with prompts of their own; None: all.
        """
        own, shared, layers = len(packed.rows), packed.num_shared, self.blocks.num_layers
        depth = layers if depth is None else depth
        rows = [sets * (own + (shared if depth - 1 <= i < layers - 1 else 0)) for i in range(layers)]
        return tower_need(self.blocks, rows, backward, text=True, constant=not packed.num_inner)

    def forward(self, prompts: Tensor | None, packed: Packed) -> Tensor:
        """Features of the classes.

        Args:
            prompts: (S, depth, n_text, d) prompts of S sets, [:, i] entering layer i; (C, depth, n_text, d) where
                each class has its own; None: none.
            packed: C class names.
        Returns:
            (C, e), not normalised, in the order the classes were given.
        """
        return composing.twice_differentiable(functools.partial(self._features, packed=packed), prompts)

    def _features(self, prompts: Tensor | None, packed: Packed) -> Tensor:
        blocks, last = self.blocks, self.blocks.num_layers - 1
        if composing.composes(packed.rows):
            blocks.check_composes()
        if prompts is None:
            prompts = packed.rows.new_empty(len(packed.layout.sets), 1, 0, blocks.width)
        prompts = prompts.to(packed.rows.dtype).transpose(0, 1)  # (depth, S, n, d)
        depth, shared = len(prompts), packed.num_shared
        in_front = prompts[:, : len(packed.layout.sets), :shared]  # prompts of each class's own share nothing
        prefix_rows, prompt_kv = self._prefix(in_front, packed)
        x, y, workspace = packed.rows, None, blocks.workspace()
        prefix_workspace = blocks.workspace("prompts")
        for i in range(blocks.num_layers):
            prefix_kv = prompt_kv[i] if i < depth else self._propagated_kv(i, prefix_rows, packed)
            if depth - 1 <= i < last and shared:
                prefix_rows = blocks.run(self._prefix_layer, i, prefix_rows, packed, prefix_workspace)
            if i < depth and packed.num_inner:
                inner = prompts[i, packed.inner_sets, shared:]  # (C, num_inner, d)
                if i == 0:
                    inner = inner + packed.rows[packed.inner_rows]
                x, y = x if y is None else x + y, None
                x = x.index_copy(0, packed.inner_rows.flatten(), inner.flatten(0, 1))
            if blocks.streams:
                x, y = blocks.run(self._stream_layer, i, x, y, prefix_kv, packed)
            else:
                x = blocks.run(self._last_layer if i == last else self._layer, i, x, prefix_kv, packed, workspace)
        for space in (workspace, prefix_workspace):
            space.end_forward()
        return self.head(x if y is None else x + y)[packed.inverse]

    def _prefix(self, prompts: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
        """Rows entering the last prompted layer (S, P, d), and [start token ; prompts] as keys and values.

        Args:
            prompts: (depth, S, P, d).
        Returns:
            rows, and (depth, S, 1 + P, 2, H, K).
        """
        assert packed.sos_kv is not None
        depth, sets = prompts.shape[:2]
        positions = F.pad(packed.prompt_positions[None, None], (0, 0, 0, 0, 0, 0, 0, depth - 1))  # of layer 0 alone
        entering = prompts + positions
        prompt_kv = self.blocks.prompt_kv(entering).flatten(0, 1)  # (depth S, P, 2, H, K)
        layers = torch.arange(depth, device=prompts.device).repeat_interleave(sets)
        kv = ops.prepend_rows(packed.sos_kv[:depth, None], prompt_kv, layers)
        return entering[-1], kv.unflatten(0, (depth, sets))

    def _propagated_kv(self, i: int, rows: Tensor, packed: Packed) -> Tensor:
        """[start token ; propagating rows (S, P, d)] as keys and values (S, 1 + P, 2, H, K) of layer i."""
        assert packed.sos_kv is not None
        return ops.prepend_rows(packed.sos_kv[i, None, None], self.blocks.prompt_kv(rows[None], first=i)[0])

    def _prefix_layer(self, i: int, rows: Tensor, packed: Packed, workspace: Workspace) -> Tensor:
        """Layer i for the propagating prompt rows (S, P, d), causal behind the start token."""
        assert packed.sos_kv is not None
        sets, length, _ = rows.shape
        q, k, v = (t.flatten(0, 1) for t in self.blocks.qkv(i, rows))
        sos_k, sos_v = packed.sos_kv[i, :, None, None]  # (1, 1, H, K) each
        layout = PackedLayout((((sets, length),),))
        attended = ops.packed_attention(q, k, v, sos_k, sos_v, layout).view(sets, length, *q.shape[1:])
        return self.blocks.finish(i, rows, attended, workspace)

    def _layer(self, i: int, x: Tensor, prefix_kv: Tensor, packed: Packed, workspace: Workspace) -> Tensor:
        if i == 0 and packed.first_qkv is not None:
            q, k, v = packed.first_qkv
        else:
            q, k, v = self.blocks.qkv(i, x)
        prefix_k, prefix_v = prefix_kv.unbind(2)
        attended = ops.packed_attention(q, k, v, prefix_k, prefix_v, packed.layout)
        return self.blocks.finish(i, x, attended, workspace)

    def _stream_layer(
        self, i: int, x: Tensor, y: Tensor | None, prefix_kv: Tensor, packed: Packed
    ) -> tuple[Tensor, Tensor]:
        """Layer i of rows x and of y, which the last layer left to add; the last layer pools."""
        blocks = self.blocks
        eps, backend = blocks.eps_1[i], blocks.backend
        if i == 0 and packed.first_qkv is not None:
            q, k, v = packed.first_qkv
        else:
            if y is None:
                h = ops.layer_norm(x, eps, backend)
            else:
                x, h = ops.add_layer_norm(x, y, eps, backend)
            q, k, v = blocks.stream_qkv(i, h)
        if i == blocks.num_layers - 1:
            x, q = x[packed.last_rows], q[packed.last_rows]
        prefix_k, prefix_v = prefix_kv.unbind(2)
        if blocks.copies_prompts:
            assert packed.places is not None
            keys = ops.insert_shared(k, prefix_k, packed.places, backend)
            values = ops.insert_shared(v, prefix_v, packed.places, backend)
            attended = ops.buffer_attention(q, keys, values, packed.layout, prefix_k.shape[1], backend)
        else:
            attended = ops.packed_attention(q, k, v, prefix_k, prefix_v, packed.layout, backend, packed.tiles)
        return blocks.stream_finish(i, x, attended)

    def _last_layer(self, i: int, x: Tensor, prefix_kv: Tensor, packed: Packed, workspace: Workspace) -> Tensor:
        rows = x[packed.last_rows]
        q, k, v = self.blocks.qkv(i, x, query_rows=rows)
        prefix_k, prefix_v = prefix_kv.unbind(2)
        attended = ops.packed_attention(q, k, v, prefix_k, prefix_v, packed.layout)
        return self.blocks.finish(i, rows, attended, workspace)
