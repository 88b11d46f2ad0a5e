"""The prompted text tower: class features from packed class names and shared prompts.

Prompt rows that the next layer replaces act only as keys and values, computed once per layer for all classes; rows
that propagate (after the last prompted layer) run once per prompt set. The last layer has queries for the pooled rows
only; layer 0's q, k and v of the class rows are constants.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from upt_fast.clip.frozen import FrozenText
from upt_fast.clip.tokens import ClassTokens
from upt_fast.engine.autograd import composing
from upt_fast.engine.backends import dispatch
from upt_fast.engine.backends.asked import UNASKED, Asked
from upt_fast.engine.memory import Need, tower_need
from upt_fast.engine.towers import routes
from upt_fast.engine.towers.blocks import FrozenBlocks
from upt_fast.engine.towers.folding import FrozenHead
from upt_fast.engine.towers.packing import PackedClasses
from upt_fast.engine.towers.prompts import Packed
from upt_fast.engine.towers.tower import Tower
from upt_fast.engine.workspace import Workspace


class TextTower(Tower):
    """A frozen causal text tower with prompts.

    Args:
        text: the tower's weights.
        dtype: dtype in which it computes.
        memory: see :class:`FrozenBlocks`.
        backend: of the operations; it decides on the route through the layers (routes.py).
        quantized: see :class:`FrozenBlocks`.
    """

    def __init__(
        self,
        text: FrozenText,
        dtype: torch.dtype,
        memory: str = "fast",
        backend: Asked | str = UNASKED,
        quantized: bool = False,
    ) -> None:
        super().__init__()
        self.route = routes.choose(dispatch.read(backend))
        of_blocks = text.blocks, text.num_heads, text.activation
        self.blocks = FrozenBlocks(*of_blocks, dtype, memory, quantized, self.route.packs)
        self.route.check(self.blocks)
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

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            sos_kv.append(torch.stack([k[0], v[0]]))
            return v  # a row that sees only itself attends to its own value

        for i in range(self.blocks.num_layers):
            x = self.blocks.layer(i).by_ops(x, attend, self.blocks.memory, workspace, i)
        packed.sos_kv = torch.stack(sos_kv)
        if packed.num_inner == 0:
            first = self.blocks.layer(0)
            packed.first_qkv = torch.stack(first.qkv.heads(packed.rows, first.qkv_bias, first.eps, first.num_heads))
        return packed

    def join(self, packs: Sequence[PackedClasses]) -> PackedClasses:
        """The classes of several packs of one n_text and position one after another, those of each in a set of its own;
        where each class has its own prompts, those of all packs in a row."""
        first = packs[0]
        sets = [i for i, packed in enumerate(packs) for _ in packed.tokens.pooled]
        return self.pack(
            ClassTokens.join([packed.tokens for packed in packs]),
            first.n_text,
            first.class_token_position,
            None if first.per_class else sets,
            first.per_class,
        )

    def for_sets(self, prompts: Tensor, packed: Packed) -> Tensor:
        """Features (S, C, e) of the same C classes under each of S sets of prompts (S, depth, n_text, d)."""
        repeated = packed.repeated(len(prompts), with_places=self.route.with_places)
        return self(prompts, repeated).unflatten(0, (len(prompts), -1))

    def need(
        self, packed: Packed, backward: bool, sets: int = 1, depth: int | None = None, memory: str | None = None
    ) -> Need:
        """Memory of a step's pass; see upt_fast/engine/memory.py.

        Args:
            packed: the classes of one set.
            backward: whether there is a gradient.
            sets: S sets of prompts for them.
            depth: layers with prompts of their own; None: all.
            memory: level; None: the tower's.
        """
        own, shared, layers = len(packed.rows), packed.num_shared, self.blocks.num_layers
        depth = layers if depth is None else depth
        rows = [sets * (own + (shared if depth - 1 <= i < layers - 1 else 0)) for i in range(layers)]
        heads = self.blocks.qkv_bias.new_empty(1, self.blocks.num_heads, self.blocks.width // self.blocks.num_heads)
        kind = {"text": True, "constant": not packed.num_inner, "widens": self.route.widens(heads)}
        lasting, passing = tower_need(self.blocks, rows, backward, **kind, memory=memory)
        if sets > 1:  # what `repeated` makes and keeps
            first = 0 if packed.first_qkv is None else packed.first_qkv.nbytes
            lasting += sets * (packed.rows.nbytes + first)
        return Need(lasting, passing)

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
        if composing.composes(packed.rows):
            self.blocks.stack.check_composes()
            self.route.check_composes()
        if prompts is None:
            prompts = packed.rows.new_empty(len(packed.layout.sets), 1, 0, self.blocks.width)
        prompts = prompts.to(packed.rows.dtype).transpose(0, 1)  # (depth, S, n, d)
        return self.head(self.route.texts(self.blocks, prompts, packed))[packed.inverse]
