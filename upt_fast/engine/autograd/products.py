"""Products with a frozen weight inside of our own forward and backward passes: no graph, memory from a workspace.

    forward     act(norm(x) W^T + b),  residual + a W^T + b
    backward    d W,  (d W) act'(u),  dy plus the gradient of x, d being that of norm(x) W^T

PlainProduct does them by PyTorch, piece by piece; GpuProduct by PyTorch on a GPU; PackedProduct by one operation of
kernels/cpu/linear.cpp each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from upt_fast.engine.autograd.functions import product
from upt_fast.engine.cpu.library import ACTIVATIONS, Factor
from upt_fast.engine.workspace import Workspace

New = Callable[..., Tensor]  # (name, like, *shape) -> an uninitialised tensor in like's dtype and device


class Projected(NamedTuple):
    """Queries, keys and values of a block's rows, and the moments of the LayerNorm in front of them."""

    mean: Tensor  # (B L, 1)
    rstd: Tensor
    q: Tensor  # (B L, D)
    k: Tensor  # (B, P + L, D), in front of the own rows room for those of a prefix
    v: Tensor


class Product(Protocol):
    """A frozen weight W (N, K) and how rows are multiplied with it.

    Rows x are (M, K), gradients d (M, N); mean and rstd are (M, 1), the moments of a LayerNorm of eps; label and layer
    name kept memory of a workspace.
    """

    @property
    def plain(self) -> Tensor:
        """(N, K)"""

    def whole(self, x: Tensor) -> bool:
        """Whether a block of rows like x is to be one function: in half precision only where sums round once."""

    def normed(
        self,
        space: Workspace,
        label: str,
        layer: int,
        x: Tensor,
        eps: float,
        bias: Tensor | None,
        out: Tensor,
        activation: str | None = None,
        pre: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """out = act(norm(x) W^T + b); returns mean and 1 / standard deviation.

        pre, where it is given, gets what backward needs of the activation: its derivative from the compiled operations,
        which have the exponential at hand; from PyTorch's what goes into it.
        """

    def slope(
        self, space: Workspace, x: Tensor, eps: float, bias: Tensor, activation: str, pre: Tensor
    ) -> tuple[Tensor, Tensor]:
        """pre of :meth:`normed` alone, computed once more; returns mean and 1 / standard deviation."""

    def project(
        self,
        new: New,
        space: Workspace,
        scratch: Workspace,
        layer: int,
        x: Tensor,
        eps: float,
        bias: Tensor,
        batch: int,
        prefix: int,
    ) -> Projected:
        """Queries, keys and values of x (B L, D), N = 3 D, in new memory; the moments lie in space.

        bias is zero for keys and values; there are B sequences, with P keys and values in front of the own ones.
        """

    def added(self, a: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor) -> Tensor:
        """out = residual + a W^T + b."""

    def times(self, d: Tensor, out: Tensor) -> Tensor:
        """out = d W."""

    def times_slope(self, d: Tensor, pre: Tensor, activation: str, out: Tensor) -> None:
        """out = (d W) act', pre being what :meth:`normed` wrote."""

    def norm_backward(
        self, space: Workspace, d: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, dy: Tensor, spare: Tensor
    ) -> Tensor:
        """dy plus the gradient of x, d being that of norm(x) W^T; spare (M, K) may be overwritten."""


class PlainProduct(NamedTuple):
    """See :class:`Product`."""

    plain: Tensor

    def whole(self, x: Tensor) -> bool:
        return x.dtype.itemsize >= 4 and x.device.type == "cpu"

    def normed(
        self,
        space: Workspace,
        label: str,
        layer: int,
        x: Tensor,
        eps: float,
        bias: Tensor | None,
        out: Tensor,
        activation: str | None = None,
        pre: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        h, mean, rstd = space.normalize(label, layer, x, eps)
        product(h, self.plain, bias, out=out if pre is None else pre)
        if activation is not None:
            _activate(out, out if pre is None else pre, activation)
        return mean, rstd

    def slope(
        self, space: Workspace, x: Tensor, eps: float, bias: Tensor, activation: str, pre: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.normed(Workspace(1), "", 0, x, eps, bias, pre)

    def project(
        self,
        new: New,
        space: Workspace,
        scratch: Workspace,
        layer: int,
        x: Tensor,
        eps: float,
        bias: Tensor,
        batch: int,
        prefix: int,
    ) -> Projected:
        width, length = x.shape[1], len(x) // batch
        q, k, v = _apart(new, x, batch, prefix)
        h, mean, rstd = space.normalize("attention", layer, x, eps)
        product(h, self.plain[:width], bias[:width], out=q)
        kv = product(h, self.plain[width:], out=scratch.scratch("wide", x, len(x), 2 * width))
        for buffer, own in ((k, kv[:, :width]), (v, kv[:, width:])):
            buffer[:, prefix:] = own.view(batch, length, width)
        return Projected(mean, rstd, q, k, v)

    def added(self, a: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor) -> Tensor:
        if a.dtype.itemsize < 4 and residual is not None:
            # rounded once more than the large sum: a second rounding of that would cost accuracy
            return torch.add(residual, F.linear(a, self.plain, bias), out=out)
        return product(a, self.plain, bias, residual, out=out)

    def times(self, d: Tensor, out: Tensor) -> Tensor:
        return product(d, self.plain.t(), out=out)

    def times_slope(self, d: Tensor, pre: Tensor, activation: str, out: Tensor) -> None:
        self.times(d, out)
        if activation == "quick_gelu":
            torch.ops.aten.silu_backward.grad_input(out, pre, grad_input=out)
        else:
            approximate = "tanh" if activation == "gelu_tanh" else "none"
            torch.ops.aten.gelu_backward.grad_input(out, pre, approximate=approximate, grad_input=out)

    def norm_backward(
        self, space: Workspace, d: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, dy: Tensor, spare: Tensor
    ) -> Tensor:
        return space.normalize_backward(self.times(d, spare), x, mean, rstd, dy)


class GpuProduct:
    """What :class:`PlainProduct` does otherwise on a GPU, where a launch costs as much as a small product.

    cuBLAS adds a bias in float32 before it rounds, within the product. It could add a residual so too (beta = 1), but
    PyTorch copies that into the result first, and the bias then needs a pass of its own, which rounds the large sum
    once more. So the residual is what is added by itself: as many launches, and two roundings, of the product and of
    the sum, the same that plain PyTorch has.
    """

    plain: Tensor

    def whole(self, x: Tensor) -> bool:
        return True

    def project(
        self,
        new: New,
        space: Workspace,
        scratch: Workspace,
        layer: int,
        x: Tensor,
        eps: float,
        bias: Tensor,
        batch: int,
        prefix: int,
    ) -> Projected:
        """See :class:`Product`; keys and values lie side by side, and queries beside them where there is no prefix."""
        width = x.shape[1]
        h, mean, rstd = space.normalize("attention", layer, x, eps)
        if not prefix:
            qkv = torch.addmm(bias, h, self.plain.t(), out=new("qkv", x, len(x), 3 * width))
            q, k, v = qkv.chunk(3, dim=1)
            return Projected(mean, rstd, q, k.unflatten(0, (batch, -1)), v.unflatten(0, (batch, -1)))
        q = torch.addmm(bias[:width], h, self.plain[:width].t(), out=new("q", x, len(x), width))
        own = h.view(batch, -1, width)
        kv = new("kv", x, batch, prefix + own.shape[1], 2 * width)
        # one product per image, for it can write behind the prefix, where one for all would have to be copied
        torch.bmm(own, self.plain[width:].t().expand(batch, width, 2 * width), out=kv[:, prefix:])
        return Projected(mean, rstd, q, *kv.chunk(2, dim=2))

    def added(self, a: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor) -> Tensor:
        y = product(a, self.plain, bias, out=out)
        return y if residual is None else y.add_(residual)


class PackedProduct(NamedTuple):
    """See :class:`Product`; with the factors of y = x W^T and of dx = dy W as the CPU operations take them."""

    plain: Tensor  # (N, K)
    forward: Factor  # W^T
    backward: Factor  # W

    def whole(self, x: Tensor) -> bool:
        return True

    def normed(
        self,
        space: Workspace,
        label: str,
        layer: int,
        x: Tensor,
        eps: float,
        bias: Tensor | None,
        out: Tensor,
        activation: str | None = None,
        pre: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        mean, rstd = moments(space, label, layer, x)
        kind = ACTIVATIONS[activation or "none"]
        places = [0], [0], [0]
        torch.ops.upt_fast_cpu.norm_linear(x, eps, *self.forward, bias, kind, pre, [out], *places, mean, rstd)
        return mean, rstd

    def slope(
        self, space: Workspace, x: Tensor, eps: float, bias: Tensor, activation: str, pre: Tensor
    ) -> tuple[Tensor, Tensor]:
        a = space.scratch("wide", x, *pre.shape)
        return self.normed(Workspace(1), "", 0, x, eps, bias, a, activation, pre)

    def project(
        self,
        new: New,
        space: Workspace,
        scratch: Workspace,
        layer: int,
        x: Tensor,
        eps: float,
        bias: Tensor,
        batch: int,
        prefix: int,
    ) -> Projected:
        q, k, v = _apart(new, x, batch, prefix)
        mean, rstd = moments(space, "attention", layer, x)
        length, total = len(x) // batch, k.shape[1]
        places = [0, length, length], [0, total, total], [0, prefix, prefix]
        torch.ops.upt_fast_cpu.norm_linear(x, eps, *self.forward, bias, 0, None, [q, k, v], *places, mean, rstd)
        return Projected(mean, rstd, q, k, v)

    def added(self, a: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor) -> Tensor:
        torch.ops.upt_fast_cpu.linear_residual(a, *self.forward, bias, residual, out)
        return out

    def times(self, d: Tensor, out: Tensor) -> Tensor:
        torch.ops.upt_fast_cpu.linear_residual(d, *self.backward, None, None, out)
        return out

    def times_slope(self, d: Tensor, pre: Tensor, activation: str, out: Tensor) -> None:
        torch.ops.upt_fast_cpu.linear_times(d, *self.backward, pre, out)

    def norm_backward(
        self, space: Workspace, d: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, dy: Tensor, spare: Tensor
    ) -> Tensor:
        dx = space.scratch("grad", x, *x.shape)
        torch.ops.upt_fast_cpu.linear_norm_backward(d, *self.backward, x, mean, rstd, dy, dx)
        return dx


def rows_of(x: Tensor) -> Tensor:
    """(..., D) -> (N, D), contiguous."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def moments(space: Workspace, label: str, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Kept memory for mean and 1 / standard deviation, in float32, of rows (N, D)."""
    like = x.new_empty(0, dtype=torch.float32)
    mean, rstd = (space.kept(f"{label} {kind}", layer, like, len(x), 1) for kind in ("mean", "rstd"))
    return mean, rstd


def _apart(new: New, x: Tensor, batch: int, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for queries, keys and values of x (B L, D), each for itself; see :class:`Projected`."""
    total = prefix + len(x) // batch
    return new("q", x, *x.shape), new("k", x, batch, total, x.shape[1]), new("v", x, batch, total, x.shape[1])


def _activate(out: Tensor, u: Tensor, kind: str) -> None:
    if kind == "quick_gelu":
        torch.ops.aten.silu.out(u, out=out)
    else:
        torch.ops.aten.gelu.out(u, approximate="tanh" if kind == "gelu_tanh" else "none", out=out)
