"""The frozen residual blocks of one tower, folded (folding.py) and stacked over layers.

Nothing here has a weight gradient, so autograd saves per token and layer only the inputs of the two LayerNorms, the
attention's q, k, v and output, and the activation's input: 10 D numbers, whatever the activation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from upt_fast.clip.frozen import FrozenBlock
from upt_fast.common.memory_pool import MemoryPool
from upt_fast.engine import ops
from upt_fast.engine.towers.stacks import Fp8Stack, PlainStack
from upt_fast.engine.weights import BlockWeights, recomputed
from upt_fast.engine.workspace import Workspace

MEMORY_LEVELS = ("fast", "balanced", "lean")


class FrozenBlocks(nn.Module):
    """L frozen pre-LayerNorm blocks of width D, H heads and M hidden features.

    Args:
        blocks: the tower's blocks.
        num_heads: H.
        activation: "quick_gelu", "gelu" or "gelu_tanh".
        dtype: dtype of the folded weights, in which the blocks compute.
        memory: "fast": keep what backward needs; "balanced": recompute the MLP's hidden features in backward;
            "lean": recompute the whole block from its input.
        quantized: the linears' weights are in fp8 (upt_fast/engine/fp8.py) beside dtype, and whole blocks run op by op.
        packs: whether the compiled operations may have weights of their own.
        length: rows of an image; 0: the rows are those of packed class names.
    """

    def __init__(
        self,
        blocks: tuple[FrozenBlock, ...],
        num_heads: int,
        activation: str,
        dtype: torch.dtype,
        memory: str = "fast",
        quantized: bool = False,
        packs: bool = True,
        length: int = 0,
    ) -> None:
        super().__init__()
        self.num_layers, self.num_heads, self.activation, self.memory = len(blocks), num_heads, activation, memory
        self.width = blocks[0].out_proj_weight.shape[0]
        self.packs, self.length, self.quantized = packs, length, quantized
        self._pool = MemoryPool()
        self.eps_1 = tuple(b.ln_1.eps for b in blocks)
        self.eps_2 = tuple(b.ln_2.eps for b in blocks)
        self.stack: PlainStack = Fp8Stack() if quantized else PlainStack()
        folded = [self.stack.fold(b, num_heads, activation, dtype) for b in blocks]
        for name in list(folded[0]):
            self.register_buffer(name, torch.stack([f.pop(name) for f in folded]), persistent=False)
        self.stack = self.stack.placed(self, packs)

    qkv_weight: Tensor  # (L, 3D, D) rows q, k, v
    qkv_bias: Tensor  # (L, 3D) zero for k and v
    out_weight: Tensor  # (L, D, D)
    out_bias: Tensor  # (L, D)
    fc_weight: Tensor  # (L, M, D)
    fc_bias: Tensor  # (L, M)
    proj_weight: Tensor  # (L, D, M)
    proj_bias: Tensor  # (L, D)
    # quantised, in the place of the four weights: those of Fp8Weight for "q", "kv", "out", "fc" and "proj", as
    # {name}_{field} (L, ...), and
    kv_weight: Tensor  # (L, 2D, D) rows k, v in dtype, for prompt_kv

    def layer(self, i: int) -> BlockWeights:
        """The weights of layer i, views of the buffers."""
        return self.stack.layer(self, i)

    def stack_for(self, packs: bool) -> PlainStack:
        """The kind of weights where the compiled operations may have their own, or may not; today's if it is that."""
        return self.stack if packs == self.packs else self.stack.placed(self, packs)

    def prompt_kv(self, prompts: Tensor, first: int = 0) -> Tensor:
        """Keys and values of prompts that act as nothing else, of several layers in one product.

        Args:
            prompts: (I, S, P, D), prompts[i] entering layer first + i.
            first: the first layer.
        Returns:
            (I, S, P, 2, H, K), keys then values.
        """
        depth, sets, length, width = prompts.shape
        eps = self.eps_1[first : first + depth]
        if len(set(eps)) == 1:
            h = ops.layer_norm(prompts, eps[0])
        else:
            h = torch.stack([ops.layer_norm(p, e) for p, e in zip(prompts, eps, strict=True)])
        weight = self.stack.kv_weight(self, slice(first, first + depth))
        kv = torch.bmm(h.reshape(depth, sets * length, width), weight.transpose(1, 2))
        return kv.view(depth, sets, length, 2, self.num_heads, width // self.num_heads)

    def workspace(self, label: str = "rows", checkpointed: bool = True, end: int | None = None) -> Workspace:
        """Memory for one pass through the layers.

        Args:
            label: of the kind of pass.
            checkpointed: whether :meth:`run` runs the layers, which recomputes them where memory is "lean".
            end: the layer before which the pass ends; None: the last.
        """
        keeps = not (checkpointed and self.memory == "lean")
        end = self.num_layers - 1 if end is None else min(end, self.num_layers - 1)
        return Workspace(end if keeps else 0, self._pool, label)

    def run(self, layer: Callable[..., Any], *args: Any) -> Any:
        """Call layer(*args), recomputed in backward where ``memory="lean"`` asks for it."""
        return recomputed(self.memory, self.qkv_bias, layer, *args)

    def release(self) -> None:
        """Let go of the memory that passes reuse."""
        self._pool.clear()

    def train(self, mode: bool = True) -> FrozenBlocks:
        if not mode or not self.training:  # evaluation's memory is of other sizes than training's
            self.release()
        return super().train(mode)

    def _apply(self, fn: Callable, recurse: bool = True) -> FrozenBlocks:
        self.stack.check_move(fn, self)
        super()._apply(fn, recurse)
        self.stack = self.stack.placed(self, self.packs)
        return self
