"""Attention inside of a block's forward and backward pass: PyTorch's for CPUs in pieces, or the compiled operation."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from upt_fast.engine.workspace import pieces


class Attended(NamedTuple):
    """What a block's attention half leaves for backward."""

    mean: Tensor
    rstd: Tensor
    q: Tensor  # (B L, D)
    k: Tensor  # (B, P + L, D)
    v: Tensor
    out: Tensor  # (B L, D)
    lse: Tensor  # (B, H, L)


class Attention(Protocol):
    """Who computes attention of q (B L, D) over k and v (B, P + L, D) in H heads, without mask."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, num_heads: int, out: Tensor, lse: Tensor) -> None:
        """Into out (B L, D), and the logarithms of the scores' sums into lse (B, H, L)."""

    def backward(
        self,
        dout: Tensor,
        saved: Attended,
        num_heads: int,
        dqkv: Tensor,
        wanted: bool,
        dk_prefix: Tensor,
        dv_prefix: Tensor,
    ) -> None:
        """Gradients into dqkv (B, L, 3, H, K), where they are wanted, and into those of the prefix (B, P, H, K)."""


class FlashAttention(NamedTuple):
    """See :class:`Attention`; PyTorch's, image by image."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, num_heads: int, out: Tensor, lse: Tensor) -> None:
        batch = len(k)
        for i in pieces(q.view(batch, -1, q.shape[1])):
            heads = [_split_heads(t, batch, num_heads)[i] for t in (q, k, v)]
            result, lse[i] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads, scale=1.0)
            _split_heads(out, batch, num_heads)[i] = result

    def backward(
        self,
        dout: Tensor,
        saved: Attended,
        num_heads: int,
        dqkv: Tensor,
        wanted: bool,
        dk_prefix: Tensor,
        dv_prefix: Tensor,
    ) -> None:
        batch, prefix = len(saved.k), dk_prefix.shape[1]
        tensors = [_split_heads(t, batch, num_heads) for t in (dout, saved.q, saved.k, saved.v, saved.out)]
        for i in pieces(saved.q.view(batch, -1)):
            grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *(t[i] for t in tensors), saved.lse[i], 0.0, False, scale=1.0
            )
            dq, dk, dv = (d.transpose(1, 2) for d in grads)
            if wanted:
                for own, d in zip(dqkv[i].unbind(2), (dq, dk[:, prefix:], dv[:, prefix:]), strict=True):
                    own.copy_(d)
            dk_prefix[i], dv_prefix[i] = dk[:, :prefix], dv[:, :prefix]


class CompiledAttention(NamedTuple):
    """See :class:`Attention`; kernels/cpu/attention.cpp."""

    fill: bool = False  # its products in bfloat16 take whole tiles

    def forward(self, q: Tensor, k: Tensor, v: Tensor, num_heads: int, out: Tensor, lse: Tensor) -> None:
        torch.ops.upt_fast_cpu.attention(q, k, v, num_heads, self.fill, out, lse)

    def backward(
        self,
        dout: Tensor,
        saved: Attended,
        num_heads: int,
        dqkv: Tensor,
        wanted: bool,
        dk_prefix: Tensor,
        dv_prefix: Tensor,
    ) -> None:
        torch.ops.upt_fast_cpu.attention_backward(
            dout, *saved[2:5], num_heads, self.fill, saved.out, saved.lse, dqkv, dk_prefix, dv_prefix
        )


def _split_heads(x: Tensor, batch: int, num_heads: int) -> Tensor:
    """(B * L, D) or (B, L, D) -> (B, H, L, K), a view."""
    return x.view(batch, -1, num_heads, x.shape[-1] // num_heads).transpose(1, 2)
