"""The kinds of weights that a tower's blocks may have: as which buffers they are kept, and how a layer views them.

A kind is chosen once, when the blocks are built, and again when they are moved: in float8 where that was asked for,
packed where the compiled operations run, else plain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from upt_fast.clip.frozen import FrozenBlock
from upt_fast.engine import fp8
from upt_fast.engine.autograd import functions
from upt_fast.engine.autograd.attention import ChoosesAttention, CompiledAttention, FlashAttention
from upt_fast.engine.autograd.composing import has_data
from upt_fast.engine.autograd.gpu_attention import FusedAttention
from upt_fast.engine.backends import compiled
from upt_fast.engine.cpu import counted, ways
from upt_fast.engine.fp8 import Fp8Weight
from upt_fast.engine.towers.folding import fold_block
from upt_fast.engine.weights import BlockWeights, Fp8Heads, Fp8MLP, MLPWeights, Packed, PackedLast, Plain, PlainOnGpu

if TYPE_CHECKING:
    from upt_fast.engine.towers.blocks import FrozenBlocks

# rows at which the CPU's products are chosen: of a batch of images, and of a hundred class names
TYPICAL_BATCH, MOST_ROWS, TEXT_ROWS = 8, 2048, 384


class PlainStack:
    """Weights in the blocks' dtype."""

    kind: type[Plain] = Plain
    attention: ChoosesAttention = FlashAttention()

    def fold(self, block: FrozenBlock, num_heads: int, activation: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """One block's buffers by name."""
        return fold_block(block, num_heads, activation, dtype)

    def placed(self, blocks: FrozenBlocks, packs: bool) -> PlainStack:
        """The kind for the place where the buffers are now; packs: whether the compiled operations may have theirs."""
        weight = blocks.qkv_weight
        if weight.device.type == "cuda":
            return GpuStack()
        if weight.device.type != "cpu" or not has_data(weight):
            return PlainStack()
        if weight.dtype == torch.float32:
            ways.float32_product()  # now, so that a run can write it down
            counted.register_onednn()
        if not packs or compiled.refusals("cpu", weight.dtype, width=blocks.width, num_heads=blocks.num_heads):
            return PlainStack()
        return PackedStack(blocks)

    def layer(self, blocks: FrozenBlocks, i: int) -> BlockWeights:
        """The weights of layer i."""
        weights = blocks.qkv_weight, blocks.out_weight, blocks.fc_weight, blocks.proj_weight
        qkv, out, fc, proj = (self.kind(weight[i]) for weight in weights)
        mlp = MLPWeights(fc, blocks.fc_bias[i], proj, blocks.proj_bias[i], blocks.eps_2[i], blocks.activation)
        bias, heads = blocks.qkv_bias[i], blocks.num_heads
        return BlockWeights(qkv, bias, out, blocks.out_bias[i], blocks.eps_1[i], heads, mlp, self.attention)

    def pools(self, blocks: FrozenBlocks) -> bool:
        """Whether all that a layer works with lies in a pool's blocks: its products take that memory for results."""
        return blocks.qkv_bias.device.type == "cpu" and blocks.qkv_bias.dtype.itemsize >= 4

    def piece_bytes(self, blocks: FrozenBlocks) -> int:
        """Most that a product takes beside its result."""
        return functions.PRODUCT_PIECE_BYTES if functions.takes_onednn(blocks.qkv_bias) else 0

    def kv_weight(self, blocks: FrozenBlocks, layers: slice) -> Tensor:
        """(I, 2D, D) of keys and values of I layers."""
        return blocks.qkv_weight[layers, blocks.width :]

    def check_move(self, fn: Callable[[Tensor], Tensor], blocks: FrozenBlocks) -> None:
        """Raise a ValueError where nn.Module._apply(fn) would ruin the weights."""

    def check_composes(self) -> None:
        """Raise a ValueError where the blocks cannot be computed op by op, as composing asks for."""


class GpuStack(PlainStack):
    """Weights in the blocks' dtype on a GPU.

    Attributes:
        attention: of the blocks; towers that are moved keep it.
    """

    kind = PlainOnGpu
    attention = FusedAttention()

    def placed(self, blocks: FrozenBlocks, packs: bool) -> PlainStack:
        return self if blocks.qkv_weight.device.type == "cuda" else super().placed(blocks, packs)


class PackedStack(PlainStack):
    """Beside the plain weights those of all layers packed for the compiled operations."""

    def __init__(self, blocks: FrozenBlocks) -> None:
        length = blocks.length
        rows = min(TYPICAL_BATCH * length, MOST_ROWS) or TEXT_ROWS
        dtype, width, last = blocks.qkv_weight.dtype, blocks.width, blocks.num_layers - 1
        self.attention = CompiledAttention(bool(length) and ways.fills(blocks.num_heads, width, length, dtype))

        def pack(name: str, weight: Tensor) -> Packed:
            return Packed.pack(weight, *ways.panels(name, weight, rows))

        heads: list[Packed | PackedLast] = [pack("qkv", weight) for weight in blocks.qkv_weight[:last]]
        heads.append(PackedLast(blocks.qkv_weight[last], pack("kv", blocks.qkv_weight[last, width:])))
        stacks = {"out": blocks.out_weight, "fc": blocks.fc_weight, "proj": blocks.proj_weight}
        others = [[pack(name, weight) for weight in stack] for name, stack in stacks.items()]
        self.weights = list(zip(heads, *others, strict=True))

    def layer(self, blocks: FrozenBlocks, i: int) -> BlockWeights:
        plain, (qkv, out, fc, proj) = super().layer(blocks, i), self.weights[i]
        mlp = MLPWeights(fc, plain.mlp.fc_bias, proj, *plain.mlp[3:])
        return plain._replace(qkv=qkv, out=out, mlp=mlp)

    def pools(self, blocks: FrozenBlocks) -> bool:
        return True

    def piece_bytes(self, blocks: FrozenBlocks) -> int:
        return 0


class Fp8Stack(PlainStack):
    """Weights in float8, those of the prompts' keys and values beside them in the blocks' dtype."""

    NAMES = ("q", "kv", "out", "fc", "proj")

    def fold(self, block: FrozenBlock, num_heads: int, activation: str, dtype: torch.dtype) -> dict[str, Tensor]:
        folded = fold_block(block, num_heads, activation, torch.float32)
        found = {name: value.to(dtype) for name, value in folded.items() if name.endswith("_bias")}
        q, kv = folded["qkv_weight"].split([len(folded["out_bias"]), 2 * len(folded["out_bias"])])
        found["kv_weight"] = kv.to(dtype)
        weights = {"q": q, "kv": kv} | {name: folded[f"{name}_weight"] for name in ("out", "fc", "proj")}
        for name, weight in weights.items():
            for field, value in Fp8Weight.quantize(weight)._asdict().items():
                found[f"{name}_{field}"] = value
        return found

    def placed(self, blocks: FrozenBlocks, packs: bool) -> PlainStack:
        return self

    def layer(self, blocks: FrozenBlocks, i: int) -> BlockWeights:
        q, kv, out, fc, proj = (
            Fp8Weight(*(getattr(blocks, f"{name}_{field}")[i] for field in Fp8Weight._fields)) for name in self.NAMES
        )
        mlp = Fp8MLP(fc, blocks.fc_bias[i], proj, blocks.proj_bias[i], blocks.eps_2[i], blocks.activation)
        heads, bias = Fp8Heads(q, kv), blocks.qkv_bias[i]
        return BlockWeights(heads, bias, out, blocks.out_bias[i], blocks.eps_1[i], blocks.num_heads, mlp)

    def kv_weight(self, blocks: FrozenBlocks, layers: slice) -> Tensor:
        return blocks.kv_weight[layers]

    def check_move(self, fn: Callable[[Tensor], Tensor], blocks: FrozenBlocks) -> None:
        fp8.check_apply(fn, blocks.qkv_bias.device)

    def check_composes(self) -> None:
        raise ValueError(
            "dtype='fp8' has no second derivatives and no torch.func transforms, its products being inexact; "
            "wanted another dtype"
        )
