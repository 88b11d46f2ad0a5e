"""A block's and a head's weights, folded for speed: fewer operations, the same function.

Folded once, in float64, and exact: LayerNorm's affine goes into the linear that follows, attention's scale into W_q,
LayerScale into the linear before it; the value bias passes through the softmax, whose rows sum to one, into the output
bias; the key bias shifts all scores of a query alike and is dropped; QuickGELU(u) = u sigmoid(1.702 u) is
silu(1.702 u) / 1.702, whose factors go into the linears around it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upt_fast.clip.frozen import FrozenBlock, FrozenNorm
from upt_fast.engine import ops

QUICK_GELU_SLOPE = 1.702


def fold_norm(weight: Tensor, bias: Tensor | None, norm: FrozenNorm | None) -> tuple[Tensor, Tensor]:
    """(W, b) in float64 such that W n + b = weight norm(x) + bias, n being x normalised without affine.

    Args:
        weight: (N, D) of the linear after the LayerNorm.
        bias: (N,) or None.
        norm: the LayerNorm, or None for none.
    """
    w = weight.double()
    b = w.new_zeros(len(w)) if bias is None else bias.double()
    if norm is not None and norm.bias is not None:
        b = b + w @ norm.bias.double()
    if norm is not None and norm.weight is not None:
        w = w * norm.weight.double()
    return w, b


def fold_block(block: FrozenBlock, num_heads: int, activation: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """A block's tensors by the names of :class:`FrozenBlocks` (blocks.py)'s buffers, rounded to dtype."""
    width = block.out_proj_weight.shape[0]
    qkv_weight, qkv_bias = fold_norm(block.in_proj_weight, block.in_proj_bias, block.ln_1)
    scale = (width // num_heads) ** -0.5
    query_scale = qkv_weight.new_ones(3 * width)
    query_scale[:width] = scale
    qkv_weight, qkv_bias = qkv_weight * query_scale[:, None], qkv_bias * query_scale
    value_bias = qkv_bias[2 * width :]
    qkv_bias = F.pad(qkv_bias[:width], (0, 2 * width))

    out_weight, out_bias = fold_norm(block.out_proj_weight, block.out_proj_bias, None)
    out_bias = out_bias + out_weight @ value_bias
    fc_weight, fc_bias = fold_norm(block.fc_weight, block.fc_bias, block.ln_2)
    proj_weight, proj_bias = fold_norm(block.proj_weight, block.proj_bias, None)
    if block.ls_1 is not None:
        out_weight, out_bias = out_weight * block.ls_1.double()[:, None], out_bias * block.ls_1.double()
    if block.ls_2 is not None:
        proj_weight, proj_bias = proj_weight * block.ls_2.double()[:, None], proj_bias * block.ls_2.double()
    if activation == "quick_gelu":
        fc_weight, fc_bias = fc_weight * QUICK_GELU_SLOPE, fc_bias * QUICK_GELU_SLOPE
        proj_weight = proj_weight / QUICK_GELU_SLOPE
    weights = {
        "qkv_weight": qkv_weight,
        "qkv_bias": qkv_bias,
        "out_weight": out_weight,
        "out_bias": out_bias,
        "fc_weight": fc_weight,
        "fc_bias": fc_bias,
        "proj_weight": proj_weight,
        "proj_bias": proj_bias,
    }
    return {name: weight.to(dtype) for name, weight in weights.items()}


class FrozenHead(nn.Module):
    """A tower's last LayerNorm and projection, folded.

    Args:
        norm: the LayerNorm over D features.
        projection: (D, e), or None: the features are the normalised rows.
        bias: (e,) or None.
        dtype: dtype of the folded weights.
    """

    def __init__(self, norm: FrozenNorm, projection: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps, self.norm_only = norm.eps, projection is None
        self.weight: Tensor
        self.bias: Tensor | None
        if projection is None:
            self.register_buffer("weight", None if norm.weight is None else norm.weight.to(dtype), persistent=False)
            self.register_buffer("bias", None if norm.bias is None else norm.bias.to(dtype), persistent=False)
            return
        weight, folded = fold_norm(projection.t(), bias, norm)
        self.register_buffer("weight", weight.to(dtype), persistent=False)
        self.register_buffer("bias", folded.to(dtype), persistent=False)

    def forward(self, x: Tensor, mean_dim: int | None = None) -> Tensor:
        """Features of rows.

        Args:
            x: (..., D).
            mean_dim: a dimension to average over between LayerNorm and projection.
        Returns:
            (..., e), without mean_dim.
        """
        if self.norm_only:
            x = F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        else:
            x = ops.layer_norm(x, self.eps)
        if mean_dim is not None:
            x = x.mean(mean_dim)
        return x if self.norm_only else F.linear(x, self.weight, self.bias)
