"""The matrix products of a training step by formula, here and in plain PyTorch.

Counted are the FLOPs of matrix products, 2 m n k each, and nothing else: linears and patches, and attention's scores
and sums. The CLIP is frozen, so that

    linear, r rows of a features to b          forward 2 r a b     backward 2 r a b, the rows' gradient
    attention, p pairs of rows of width D      forward 4 p D       backward 8 p D, of q, k, v and the probabilities

and backward has them only where prompts stand before the rows. What flash attention computes again is not counted.

The engine's formulas follow towers/rows.py with ``memory="fast"``, and ``again`` says what other levels add; the
plain ones follow reference/base.py: all tokens of each class and each image, prompts as rows of every sequence. What
they are given is read in tools/step_cost.py and steps/planning.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from upt_fast.clip.frozen import FrozenBlock
from upt_fast.engine.towers.blocks import FrozenBlocks
from upt_fast.engine.towers.prompts import Packed


@dataclass(frozen=True)
class Flops:
    """FLOPs of a forward pass and of its backward pass."""

    forward: int = 0
    backward: int = 0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: int) -> Flops:
        return Flops(self.forward * times, self.backward * times)

    @property
    def total(self) -> int:
        return self.forward + self.backward


def linear(rows: int, wide: int, out: int, grad: bool) -> Flops:
    """Rows of so many features through a frozen matrix; grad: whether backward wants the rows' gradient."""
    flops = 2 * rows * wide * out
    return Flops(flops, flops if grad else 0)


def attention(pairs: int, width: int, grad: bool) -> Flops:
    """Scores and sums of so many pairs of a query and a key, over all heads."""
    return Flops(4 * pairs * width, 8 * pairs * width if grad else 0)


@dataclass(frozen=True)
class Blocks:
    """L equal blocks of width D with M hidden features."""

    layers: int
    width: int
    hidden: int

    @classmethod
    def of(cls, blocks: tuple[FrozenBlock, ...]) -> Blocks:
        hidden, width = blocks[0].fc_weight.shape
        return cls(len(blocks), width, hidden)

    @classmethod
    def on(cls, blocks: FrozenBlocks) -> Blocks:
        """Those of a tower."""
        return cls(blocks.num_layers, blocks.width, blocks.fc_bias.shape[1])

    def again(self, memory: str, rows: int, forward: int) -> int:
        """What backward computes once more, of so many rows in all layers and such a forward pass, by memory level."""
        return {"fast": 0, "balanced": linear(rows, self.width, self.hidden, False).forward, "lean": forward}[memory]

    def qkv(self, rows: int, grad: bool, matrices: int = 3) -> Flops:
        return linear(rows, self.width, matrices * self.width, grad)

    def finish(self, rows: int, grad: bool) -> Flops:
        """Output projection and MLP."""
        return linear(rows, self.width, self.width, grad) + linear(rows, self.width, self.hidden, grad) * 2

    def layer(self, rows: int, pairs: int, grad: bool) -> Flops:
        """A whole block: queries, keys, values of all rows, attention over pairs of them, the rest."""
        return self.qkv(rows, grad) + attention(pairs, self.width, grad) + self.finish(rows, grad)


@dataclass(frozen=True)
class TextCost:
    """The text tower for one prompt set.

    Args:
        blocks: of the tower.
        packed: the C class names.
        length: tokens of a whole text.
        features: e, of the projection; None: there is none.
        depth: layers with prompts of their own; 0: no prompts.
        grad: whether the prompts are trained.
    """

    blocks: Blocks
    packed: Packed
    length: int
    features: int | None
    depth: int
    grad: bool

    def _head(self) -> Flops:
        if self.features is None:
            return Flops()
        return linear(self.packed.layout.num_classes, self.blocks.width, self.features, self.grad)

    def on_engine(self) -> Flops:
        """Packed rows, the prompts in front of the names once."""
        blocks, packed, grad = self.blocks, self.packed, self.grad
        layout, shared, last = packed.layout, packed.num_shared, self.blocks.layers - 1
        depth = max(1, self.depth)
        runs = [run for runs in layout.sets for run in runs]
        rows, prefix = layout.num_rows, 1 + shared
        total = blocks.qkv(depth * shared, grad, matrices=2)  # keys and values of the prompts
        for i in range(blocks.layers):
            if i >= depth:
                total += blocks.qkv(shared, grad, matrices=2)
            if depth - 1 <= i < last:  # propagating prompts, behind the start token
                total += blocks.layer(shared, shared * prefix, grad)
            # rows that enter layer 0 are constants, unless they are prompts
            constant = i == 0 and packed.num_inner == 0
            queries = rows if i < last else layout.num_classes
            if i == last:
                total += blocks.qkv(queries, grad and not constant, 1) + blocks.qkv(rows, grad and not constant, 2)
            elif not constant:
                total += blocks.qkv(rows, grad)
            before = prefix * queries
            own = sum(count * length * (length if i < last else 1) for count, length in runs)
            pairs = attention(before + own, blocks.width, grad)
            if constant and grad:  # gradients of the probabilities and of the prefix
                pairs = Flops(pairs.forward, 2 * blocks.width * (3 * before + own))
            total += pairs + blocks.finish(queries, grad)
        return total + self._head()

    def again(self, memory: str) -> int:
        """What a memory level computes once more in backward."""
        rows = self.packed.layout.num_rows * (self.blocks.layers - 1) + self.packed.layout.num_classes
        forward = self.on_engine().forward - self._head().forward
        return self.blocks.again(memory, rows, forward) if self.grad else 0

    def plain(self) -> Flops:
        """All rows of all classes."""
        rows = self.packed.layout.num_classes * self.length
        return self.blocks.layer(rows, rows * self.length, self.grad) * self.blocks.layers + self._head()


@dataclass(frozen=True)
class VisionCost:
    """The image tower for B images.

    Args:
        blocks: of the tower.
        batch_size: B.
        rows: class token and patches of an image.
        pooled: rows that become its feature.
        patch: numbers in a patch.
        features: e, of the projection; None: there is none.
        sets: prompt sets.
        depth: layers with prompts of their own; 0: no prompts.
        length: prompts of a layer.
        grad: whether the prompts are trained.
    """

    blocks: Blocks
    batch_size: int
    rows: int
    pooled: int
    patch: int
    features: int | None
    sets: int
    depth: int
    length: int
    grad: bool

    def _ends(self) -> Flops:
        """Patches and projection."""
        patches = linear(self.batch_size * (self.rows - 1), self.patch, self.blocks.width, False)
        if self.features is None:
            return patches
        return patches + linear(self.batch_size, self.blocks.width, self.features, self.grad)

    def on_engine(self) -> Flops:
        """Prompts that the next layer replaces are keys and values only, once; the last layer has pooled rows only."""
        blocks, batch, grad, last = self.blocks, self.batch_size, self.grad, self.blocks.layers - 1
        depth, length = max(1, self.depth), self.length
        key_value_only = depth if depth > last else depth - 1
        total = self._ends() + blocks.qkv(key_value_only * self.sets * length, grad, matrices=2)
        for i in range(blocks.layers):
            rows = batch * (self.rows + (length if i >= key_value_only else 0))
            keys = self.rows + length
            varying = grad and (i > 0 or key_value_only == 0)  # not the constants that enter layer 0
            queries = rows if i < last else batch * self.pooled
            if i < last:
                total += blocks.qkv(rows, varying)
            else:
                total += blocks.qkv(queries, varying, 1) + blocks.qkv(rows, varying, 2)
            total += attention(queries * keys, blocks.width, grad) + blocks.finish(queries, grad)
        return total

    def again(self, memory: str) -> int:
        """What a memory level computes once more in backward."""
        rows = self.batch_size * (self.rows * (self.blocks.layers - 1) + self.pooled)
        forward = self.on_engine().forward - self._ends().forward
        return self.blocks.again(memory, rows, forward) if self.grad else 0

    def plain(self) -> Flops:
        """All rows in all layers, prompts among them."""
        length = self.rows + self.length
        rows = self.batch_size * length
        return self._ends() + self.blocks.layer(rows, rows * length, self.grad) * self.blocks.layers
