"""Attention inside of a block's forward and backward pass on a CPU: PyTorch's in pieces, or the compiled operation.

That of GPUs stands in gpu_attention.py.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from upt_fast.engine.autograd.products import New
from upt_fast.engine.workspace import Workspace, pieces

Gradients = tuple[Tensor | None, Tensor, Tensor]  # of the rows' q, k, v (B, L, 3, H, K) and a prefix's (B, P, H, K)

Output = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # what Attended has from out on


class Attended(NamedTuple):
    """What a block's attention half leaves for backward."""

    mean: Tensor
    rstd: Tensor
    q: Tensor  # (B L, D)
    k: Tensor  # (B, P + L, D)
    v: Tensor
    out: Tensor  # (B L, D)
    lse: Tensor  # (B, H, L), or as a GPU's kernel lays it out
    seed: Tensor | None  # of the dropout that there is not; a GPU's kernels want them back
    offset: Tensor | None


class ChoosesAttention(Protocol):
    """Who knows who computes attention; some know themselves."""

    def chosen(self, q: Tensor, k: Tensor, v: Tensor, num_heads: int, needed: bool) -> Attention:
        """Who does it for this input, forward and backward; needed: whether there will be a gradient."""


class Attention(Protocol):
    """Who computes attention of q (B L, D) over k and v (B, P + L, D) in H heads, without mask."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, num_heads: int, new: New, needed: bool) -> Output:
        """needed: whether backward will read it."""

    def backward(
        self, dout: Tensor, saved: Attended, num_heads: int, prefix: int, wanted: bool, space: Workspace
    ) -> Gradients:
        """Gradients by image; those of the own rows, where they are wanted, are one block of memory."""


class FlashAttention(NamedTuple):
    """See :class:`Attention`; PyTorch's, image by image."""

    def chosen(self, q: Tensor, k: Tensor, v: Tensor, num_heads: int, needed: bool) -> Attention:
        return self

    def forward(self, q: Tensor, k: Tensor, v: Tensor, num_heads: int, new: New, needed: bool) -> Output:
        batch = len(k)
        out, lse = _results(q, batch, num_heads, new)
        for i in pieces(q.view(batch, -1, q.shape[1])):
            heads = [split_heads(t, batch, num_heads)[i] for t in (q, k, v)]
            result, lse[i] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads, scale=1.0)
            split_heads(out, batch, num_heads)[i] = result
        return out, lse, None, None

    def backward(
        self, dout: Tensor, saved: Attended, num_heads: int, prefix: int, wanted: bool, space: Workspace
    ) -> Gradients:
        batch = len(saved.k)
        dqkv, dk_prefix, dv_prefix = _gradients(saved, num_heads, prefix, space)
        tensors = [split_heads(t, batch, num_heads) for t in (dout, saved.q, saved.k, saved.v, saved.out)]
        for i in pieces(saved.q.view(batch, -1)):
            grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *(t[i] for t in tensors), saved.lse[i], 0.0, False, scale=1.0
            )
            dq, dk, dv = (d.transpose(1, 2) for d in grads)
            if wanted:
                for own, d in zip(dqkv[i].unbind(2), (dq, dk[:, prefix:], dv[:, prefix:]), strict=True):
                    own.copy_(d)
            dk_prefix[i], dv_prefix[i] = dk[:, :prefix], dv[:, :prefix]
        return dqkv, dk_prefix, dv_prefix


class CompiledAttention(NamedTuple):
    """See :class:`Attention`; kernels/cpu/attention.cpp."""

    fill: bool = False  # its products in bfloat16 take whole tiles

    def chosen(self, q: Tensor, k: Tensor, v: Tensor, num_heads: int, needed: bool) -> Attention:
        return self

    def forward(self, q: Tensor, k: Tensor, v: Tensor, num_heads: int, new: New, needed: bool) -> Output:
        out, lse = _results(q, len(k), num_heads, new)
        torch.ops.upt_fast_cpu.attention(q, k, v, num_heads, self.fill, out, lse)
        return out, lse, None, None

    def backward(
        self, dout: Tensor, saved: Attended, num_heads: int, prefix: int, wanted: bool, space: Workspace
    ) -> Gradients:
        grads = _gradients(saved, num_heads, prefix, space)
        torch.ops.upt_fast_cpu.attention_backward(dout, *saved[2:5], num_heads, self.fill, saved.out, saved.lse, *grads)
        return grads


def split_heads(x: Tensor, batch: int, num_heads: int) -> Tensor:
    """(B * L, D) or (B, L, D) -> (B, H, L, K), a view."""
    return x.view(batch, -1, num_heads, x.shape[-1] // num_heads).transpose(1, 2)


def _results(q: Tensor, batch: int, num_heads: int, new: New) -> tuple[Tensor, Tensor]:
    """Memory for attention's output, and for the logarithms of the scores' sums."""
    exact = q.new_empty(0, dtype=torch.promote_types(q.dtype, torch.float32))
    return new("attended", q, *q.shape), new("lse", exact, batch, num_heads, len(q) // batch)


def _gradients(saved: Attended, num_heads: int, prefix: int, space: Workspace) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for :data:`Gradients`."""
    batch, total, width = saved.k.shape
    dqkv = space.scratch("wide", saved.q, batch, total - prefix, 3, num_heads, width // num_heads)
    dk_prefix, dv_prefix = (saved.q.new_empty(batch, prefix, *dqkv.shape[3:]) for _ in range(2))
    return dqkv, dk_prefix, dv_prefix
