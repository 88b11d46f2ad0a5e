"""Rows whose layers torch.compile has compiled: one function for all layers of a tower, with weights as arguments.

Of images a layer is one graph. Of class names it is two, around attention of packed rows, whose graph would be another
for every set of classes. Variables are the number of images, from the second one that is seen on, and the number of
packed rows, from the first; all else is fixed. The last layer, of few rows, runs op by op, as do the prompts' own rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from upt_fast.engine import ops
from upt_fast.engine.autograd import composing
from upt_fast.engine.backends import inductor
from upt_fast.engine.backends.asked import Asked
from upt_fast.engine.towers.blocks import FrozenBlocks
from upt_fast.engine.towers.prompts import Packed
from upt_fast.engine.towers.route import Summands, constant_heads, keys_values
from upt_fast.engine.towers.rows import Rows
from upt_fast.engine.weights import BlockWeights, Heads, MLPWeights, Plain
from upt_fast.engine.workspace import Workspace


class Constants(NamedTuple):
    """What a region's code holds, beside the shapes of its arguments."""

    eps_1: float
    eps_2: float
    num_heads: int
    activation: str
    recompute: bool  # the MLP's hidden features, in backward
    asked: Asked


class Regions(Rows):
    """See the module."""

    def refusals(self, device: str, dtype: torch.dtype, blocks: FrozenBlocks) -> list[str]:
        found = inductor.refusals(device, dtype)
        return [f"inductor: {reason}" for reason in ([*found, "fp8"] if blocks.quantized else found)]

    def layer(
        self,
        blocks: FrozenBlocks,
        i: int,
        x: Tensor,
        prefix: Tensor | None,
        set_index: Tensor | None,
        workspace: Workspace,
    ) -> Tensor:
        if _inlined(x):
            return super().layer(blocks, i, x, prefix, set_index, workspace)
        prefix_k, prefix_v = keys_values(prefix)
        arguments = x, prefix_k, prefix_v, set_index, *self._weights(blocks, i)
        fixed = x.shape[1:], None if prefix is None else prefix.shape
        return blocks.run(inductor.region(_image_layer, _kind(arguments, fixed)), *arguments)

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
        if _inlined(x) or i == blocks.num_layers - 1:
            return super().classes(blocks, i, x, y, prefix, packed, workspace)
        weights, heads = self._weights(blocks, i), constant_heads(i, packed)
        if heads is None:
            arguments: tuple[Any, ...] = _of_any_length(x), *weights
            heads = inductor.region(_heads, _kind(arguments, x.shape[1:]))(*arguments)
        prefix_k, prefix_v = prefix.unbind(2)
        q, k, v = heads
        attended = ops.packed_attention(q, k, v, prefix_k, prefix_v, packed.layout, self.asked)
        arguments = _of_any_length(x), _of_any_length(attended), *weights
        return inductor.region(_behind_attention, _kind(arguments, x.shape[1:]))(*arguments), None

    def _weights(self, blocks: FrozenBlocks, i: int) -> tuple[tuple[Tensor, ...], Constants]:
        """Of layer i: tensors and constants."""
        recompute = blocks.memory == "balanced" and torch.is_grad_enabled()
        of = blocks.eps_1[i], blocks.eps_2[i], blocks.num_heads, blocks.activation, recompute, self.asked
        names = "qkv", "out", "fc", "proj"
        tensors = (getattr(blocks, f"{name}_{part}")[i] for name in names for part in ("weight", "bias"))
        return tuple(tensors), Constants(*of)


def _inlined(x: Tensor) -> bool:
    """Whether layers are part of someone else's graph, or to be PyTorch's own operations for someone to see."""
    return torch.compiler.is_compiling() or composing.composes(x) or x.numel() == 0


def _of_any_length(x: Tensor) -> Tensor:
    torch._dynamo.maybe_mark_dynamic(x, 0)
    return x


def _kind(arguments: tuple[Any, ...], fixed: Any) -> tuple[Any, ...]:
    """What has code of its own: fixed shapes, which tensors there are and need gradients, constants, modes."""
    *inputs, weights, constants = arguments
    device, dtype = weights[0].device, weights[0].dtype
    grad = torch.is_grad_enabled()
    needs = tuple(None if t is None else t.requires_grad and grad for t in inputs)
    modes = grad, torch.is_inference_mode_enabled(), composing.autocasts(device.type)
    return fixed, tuple(weights[4].shape), device, dtype, needs, modes, constants


def _heads(x: Tensor, weights: tuple[Tensor, ...], constants: Constants) -> Heads:
    """Queries, keys and values (..., H, K) of rows (..., D) that enter a layer."""
    block = _block(weights, constants)
    return block.qkv.heads(x, block.qkv_bias, block.eps, block.num_heads)


def _behind_attention(x: Tensor, attended: Tensor, weights: tuple[Tensor, ...], constants: Constants) -> Tensor:
    """Rows behind a layer of rows x (..., D), given attention's output (..., H, K)."""
    block = _block(weights, constants)
    rows = block.out.residual(x, attended.flatten(-2), block.out_bias)
    if not constants.recompute:
        return block.mlp.added(rows)

    def mlp(rows: Tensor) -> Tensor:
        return block.mlp.added(rows)

    return checkpoint(mlp, rows, use_reentrant=False, preserve_rng_state=False)


def _image_layer(
    x: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    set_index: Tensor | None,
    weights: tuple[Tensor, ...],
    constants: Constants,
) -> Tensor:
    """See upt_fast.engine.ops.block."""
    q, k, v = _heads(x, weights, constants)
    attended = ops.prefix_attention(q, k, v, prefix_k, prefix_v, set_index, constants.asked)
    return _behind_attention(x, attended, weights, constants)


def _block(weights: tuple[Tensor, ...], constants: Constants) -> BlockWeights:
    qkv, qkv_bias, out, out_bias, fc, fc_bias, proj, proj_bias = weights
    mlp = MLPWeights(Plain(fc), fc_bias, Plain(proj), proj_bias, constants.eps_2, constants.activation)
    return BlockWeights(Plain(qkv), qkv_bias, Plain(out), out_bias, constants.eps_1, constants.num_heads, mlp)
