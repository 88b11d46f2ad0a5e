"""The frozen weights of a block, which act themselves: plain, packed for the compiled operations, in float8.

Each kind knows how rows are multiplied with it; BlockWeights is a block of one kind, as views of the buffers in
towers/blocks.py. A kind is chosen where a tower is built or moved (towers/stacks.py), never in a layer. They have no
properties: torch 2.10 cannot compile those of a NamedTuple.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from upt_fast.engine import ops
from upt_fast.engine.autograd import composing
from upt_fast.engine.autograd.attention import ChoosesAttention, FlashAttention
from upt_fast.engine.autograd.frozen_block import MLP, Block
from upt_fast.engine.autograd.products import GpuProduct, PackedProduct, PlainProduct
from upt_fast.engine.backends import compiled, pytorch
from upt_fast.engine.backends.asked import TORCH, Asked
from upt_fast.engine.cpu.library import PANELS, pack
from upt_fast.engine.fp8 import Fp8Weight
from upt_fast.engine.workspace import Workspace

Heads = tuple[Tensor, Tensor, Tensor]  # queries, keys and values (..., H, K)


class Plain(PlainProduct):
    """A frozen weight W (N, K), multiplied by PyTorch."""

    def unpacked(self) -> Plain:
        """The same, multiplied by PyTorch."""
        return self

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """See upt_fast.engine.ops.linear."""
        return ops.linear(x, self.plain, bias)

    def residual(self, x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
        """See upt_fast.engine.ops.linear_residual."""
        return ops.linear_residual(x, y, self.plain, bias)

    def norm_linear(self, x: Tensor, bias: Tensor | None, eps: float, parts: int) -> tuple[Tensor, ...]:
        """See upt_fast.engine.ops.norm_linear."""
        return pytorch.norm_linear(x, self.plain, bias, eps, parts)

    def heads(self, x: Tensor, bias: Tensor, eps: float, num_heads: int, rows: Tensor | None = None) -> Heads:
        """Queries, keys and values of rows that enter a layer, W being (3D, D).

        Args:
            x: (..., D).
            bias: (3D,), zero for keys and values.
            eps: of the LayerNorm in front.
            num_heads: H.
            rows: (..., D) those that need queries, if not all do.
        """
        h_q = None if rows is None else ops.layer_norm(rows, eps)
        return ops.qkv(ops.layer_norm(x, eps), self.plain, bias[: x.shape[-1]], num_heads, h_q)

    def stream_heads(self, h: Tensor, bias: Tensor, num_heads: int) -> Heads:
        """The same of normalised rows h (..., D), in one product."""
        return self.linear(h, bias).unflatten(-1, (3, num_heads, -1)).unbind(-3)  # type: ignore[return-value]


class PlainOnGpu(GpuProduct, Plain):
    """The same on a GPU, where a block of them is one function in half precision too."""


class _WithPlain:
    """What a packed weight leaves to PyTorch."""

    plain: Tensor

    def unpacked(self) -> Plain:
        """The same, multiplied by PyTorch."""
        return Plain(self.plain)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """See upt_fast.engine.ops.linear."""
        return self.unpacked().linear(x, bias)

    def stream_heads(self, h: Tensor, bias: Tensor, num_heads: int) -> Heads:
        """See :meth:`Plain.stream_heads`."""
        return self.unpacked().stream_heads(h, bias, num_heads)


class Packed(_WithPlain, PackedProduct):
    """A frozen weight W (N, K), multiplied by the compiled operations, but where autograd must see PyTorch's."""

    @classmethod
    def pack(cls, weight: Tensor, forward: int = PANELS[0], backward: int = PANELS[0]) -> Packed:
        """With the panels of both directions; see cpu/library.py."""
        return cls(weight, pack(weight.t(), forward), pack(weight, backward))

    def residual(self, x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
        """See upt_fast.engine.ops.linear_residual."""
        if composing.op_by_op(y):
            return self.unpacked().residual(x, y, bias)
        return compiled.linear_residual(x, y, self, bias)

    def norm_linear(self, x: Tensor, bias: Tensor | None, eps: float, parts: int) -> tuple[Tensor, ...]:
        """See upt_fast.engine.ops.norm_linear."""
        if composing.op_by_op(x) or x.numel() == 0:
            return self.unpacked().norm_linear(x, bias, eps, parts)
        return compiled.norm_linear(x, self, bias, eps, parts)

    def heads(self, x: Tensor, bias: Tensor, eps: float, num_heads: int, rows: Tensor | None = None) -> Heads:
        """See :meth:`Plain.heads`."""
        if rows is not None:
            return self.unpacked().heads(x, bias, eps, num_heads, rows)
        return _split(num_heads, *self.norm_linear(x, bias, eps, parts=3))


class _Last(NamedTuple):
    plain: Tensor
    kv: Packed  # (2D, D)


class PackedLast(_WithPlain, _Last):
    """The weight (3D, D) of the last layer's queries, keys and values, whose queries are those of few rows."""

    def whole(self, x: Tensor) -> bool:
        """See autograd/products.py."""
        return False

    def heads(self, x: Tensor, bias: Tensor, eps: float, num_heads: int, rows: Tensor | None = None) -> Heads:
        """See :meth:`Plain.heads`."""
        if rows is None:
            return self.unpacked().heads(x, bias, eps, num_heads)
        width = x.shape[-1]
        q = ops.linear(ops.layer_norm(rows, eps), self.plain[:width], bias[:width])
        return _split(num_heads, q, *self.kv.norm_linear(x, None, eps, parts=2))


class Fp8Heads(NamedTuple):
    """The weights of queries, and of keys and values, in float8."""

    q: Fp8Weight  # (D, D)
    kv: Fp8Weight  # (2D, D)

    def unpacked(self) -> Fp8Heads:
        """They have no plain form."""
        return self

    def whole(self, x: Tensor) -> bool:
        """See autograd/products.py: their products have an autograd function each."""
        return False

    def heads(self, x: Tensor, bias: Tensor, eps: float, num_heads: int, rows: Tensor | None = None) -> Heads:
        """See :meth:`Plain.heads`."""
        h_q = None if rows is None else ops.layer_norm(rows, eps)
        return self._of(ops.layer_norm(x, eps), bias, num_heads, h_q)

    def stream_heads(self, h: Tensor, bias: Tensor, num_heads: int) -> Heads:
        """See :meth:`Plain.stream_heads`."""
        return self._of(h, bias, num_heads, None)

    def _of(self, h: Tensor, bias: Tensor, num_heads: int, h_q: Tensor | None) -> Heads:
        q = self.q.linear(h if h_q is None else h_q, bias[: h.shape[-1]])
        return _split(num_heads, q, *self.kv.linear(h).chunk(2, dim=-1))


def _split(num_heads: int, *tensors: Tensor) -> Heads:
    """(..., D) -> (..., H, K) each."""
    return tuple(t.unflatten(-1, (num_heads, -1)) for t in tensors)  # type: ignore[return-value]


class MLPWeights(NamedTuple):
    """The folded MLP of a block of width D, with M hidden features."""

    fc: Plain | Packed  # (M, D)
    fc_bias: Tensor
    proj: Plain | Packed  # (D, M)
    proj_bias: Tensor
    eps: float
    activation: str  # "quick_gelu", "gelu" or "gelu_tanh"

    def added(self, x: Tensor, recompute: bool = False, workspace: Workspace | None = None, layer: int = 0) -> Tensor:
        """See upt_fast.engine.ops.mlp."""
        if composing.op_by_op(x) or x.numel() == 0:
            return ops.mlp(x, *self._plain(), self.eps, self.activation)
        return MLP.apply(x, self, recompute, workspace, layer)

    def of_normed(self, h: Tensor, recompute: bool = False, backend: Asked = TORCH) -> Tensor:
        """See upt_fast.engine.ops.linear_gelu."""
        return ops.linear_gelu(h, *self._plain(), self.activation, recompute, backend)

    def _plain(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.fc.plain, self.fc_bias, self.proj.plain, self.proj_bias


class Fp8MLP(NamedTuple):
    """See :class:`MLPWeights`; in float8."""

    fc: Fp8Weight
    fc_bias: Tensor
    proj: Fp8Weight
    proj_bias: Tensor
    eps: float
    activation: str

    def added(self, x: Tensor, recompute: bool = False, workspace: Workspace | None = None, layer: int = 0) -> Tensor:
        """See upt_fast.engine.ops.mlp; the workspace is not used."""
        return x + self.of_normed(ops.layer_norm(x, self.eps), recompute)

    def of_normed(self, h: Tensor, recompute: bool = False, backend: Asked = TORCH) -> Tensor:
        """See upt_fast.engine.ops.linear_gelu; the backend is that of the activation."""
        if recompute and torch.is_grad_enabled() and not composing.composes(h):
            return checkpoint(self.of_normed, h, False, backend, use_reentrant=False, preserve_rng_state=False)
        # the product adds the bias before it rounds
        a = ops.activation(self.fc.linear(h, self.fc_bias), self.activation, None, backend)
        return self.proj.linear(a, self.proj_bias)


class Attend(Protocol):
    """Attention's output for queries, keys and values of a layer's rows."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


class BlockWeights(NamedTuple):
    """A folded block of width D and H heads."""

    qkv: Plain | Packed | PackedLast | Fp8Heads  # (3D, D)
    qkv_bias: Tensor  # (3D,), zero for k and v
    out: Plain | Packed | Fp8Weight  # (D, D)
    out_bias: Tensor
    eps: float
    num_heads: int
    mlp: MLPWeights | Fp8MLP
    attention: ChoosesAttention = FlashAttention()

    def block(
        self,
        x: Tensor,
        prefix_k: Tensor | None,
        prefix_v: Tensor | None,
        set_index: Tensor | None = None,
        memory: str = "fast",
        workspace: Workspace | None = None,
        layer: int = 0,
    ) -> Tensor:
        """See upt_fast.engine.ops.block."""
        if x.numel() > 0 and self.qkv.whole(x) and not composing.op_by_op(x):
            return Block.apply(x, prefix_k, prefix_v, set_index, self, memory, workspace, layer)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ops.prefix_attention(q, k, v, prefix_k, prefix_v, set_index)

        plain = self._replace(qkv=self.qkv.unpacked(), out=self.out.unpacked())
        if memory == "lean" and torch.is_grad_enabled():
            workspace, layer = None, 0  # what it keeps for a layer would outlive the first computation
        return recomputed(memory, x, plain.by_ops, x, attend, memory, workspace, layer)

    def by_ops(
        self,
        x: Tensor,
        attend: Attend,
        memory: str = "fast",
        workspace: Workspace | None = None,
        layer: int = 0,
        rows: Tensor | None = None,
        heads: Heads | None = None,
    ) -> Tensor:
        """The block operation by operation.

        Args:
            x: (..., D) rows that enter the layer.
            attend: gives attention's output (..., H, K).
            memory: "balanced" computes the MLP's hidden features again in backward.
            workspace: memory to use; None: the operations' own.
            layer: this layer's place in the workspace.
            rows: (..., D) those that leave it, if not all do.
            heads: queries, keys and values where they are known.
        """
        q, k, v = self.qkv.heads(x, self.qkv_bias, self.eps, self.num_heads, rows) if heads is None else heads
        rows = self.out.residual(x if rows is None else rows, attend(q, k, v).flatten(-2), self.out_bias)
        return self.mlp.added(rows, memory == "balanced", workspace, layer)


def recomputed(memory: str, like: Tensor, layer: Callable[..., Any], *args: Any) -> Any:
    """layer(*args), computed again in backward where memory is "lean", there is a graph, and like has data."""
    if memory == "lean" and torch.is_grad_enabled() and not composing.composes(like):
        return checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=False)
    return layer(*args)
