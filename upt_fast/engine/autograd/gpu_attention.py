"""Attention inside of a block's forward and backward pass on a GPU: PyTorch's kernels, called by their own names.

F.scaled_dot_product_attention keeps for backward what autograd saves; inside of a function of our own the log-sum-exp
of the scores comes back from forward and goes into backward. Queries, keys and values are read where the products have
left them, as views (B, H, L, K) with any distance between rows.

flash       FlashAttention-2; float16 and bfloat16
efficient   CUTLASS'; float32 too, in which it is the only one
cudnn       cuDNN's; float16 and bfloat16
math        products and a softmax, which write the scores: float64, and heads of widths that no kernel takes
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from upt_fast.engine.autograd.attention import Attended, Attention, Gradients, Output, split_heads
from upt_fast.engine.autograd.composing import has_data
from upt_fast.engine.autograd.products import New
from upt_fast.engine.workspace import Workspace

_HALF = torch.float16, torch.bfloat16
_SINGLE = torch.float32, *_HALF


class _Kernel:
    """See :class:`Attention`; one kernel, which takes any memory.

    Attributes:
        name: as users write it.
        backend: as PyTorch numbers it.
        dtypes: that it takes; None: any.
        aligned: bytes that the width of a head is a multiple of.
    """

    name = ""
    backend = SDPBackend.MATH
    dtypes: tuple[torch.dtype, ...] | None = None
    aligned = 1

    def refusal(self, q: Tensor, k: Tensor, v: Tensor) -> str:
        """Why it does not take queries, keys and values (B, H, ., K); empty: it does."""
        if self.dtypes is not None and q.dtype not in self.dtypes:
            return f"{_name(q.dtype)} (takes {', '.join(map(_name, self.dtypes))})"
        step = max(1, self.aligned // q.dtype.itemsize)
        if q.shape[-1] % step:
            return f"heads of width {q.shape[-1]} (takes multiples of {step})"
        if not self.name or q.device.type != "cuda" or not has_data(q):
            return ""
        takes = getattr(torch.backends.cuda, f"can_use_{self.name}_attention")
        params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, False)
        if takes(params, False):
            return ""
        takes(params, True)
        return "PyTorch's own check says no, and printed why"

    def run(self, q: Tensor, k: Tensor, v: Tensor, needed: bool) -> Output:
        """Output (B, H, L, K) of such heads, and lse, seed and offset of :class:`Attended`."""
        raise NotImplementedError

    def run_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: Attended
    ) -> tuple[Tensor, ...]:
        """Gradients of q, k and v."""
        raise NotImplementedError

    def chosen(self, q: Tensor, k: Tensor, v: Tensor, num_heads: int, needed: bool) -> Attention:
        return self

    def forward(self, q: Tensor, k: Tensor, v: Tensor, num_heads: int, new: New, needed: bool) -> Output:
        batch = len(k)
        heads = split_heads(q, batch, num_heads), split_heads(k, batch, num_heads), split_heads(v, batch, num_heads)
        out, lse, seed, offset = self.run(*heads, needed)
        return out.transpose(1, 2).reshape(q.shape), lse, seed, offset  # a view: the kernels write row by row

    def backward(
        self, dout: Tensor, saved: Attended, num_heads: int, prefix: int, wanted: bool, space: Workspace
    ) -> Gradients:
        rows = dout, saved.q, saved.k, saved.v, saved.out
        dout, q, k, v, out = (split_heads(t, len(saved.k), num_heads) for t in rows)
        dq, dk, dv = (d.transpose(1, 2) for d in self.run_backward(dout, q, k, v, out, saved))
        own = _side_by_side(dq, dk[:, prefix:], dv[:, prefix:]) if wanted else None
        return own, dk[:, :prefix], dv[:, :prefix]


class Flash(_Kernel):
    name, backend, dtypes, aligned = "flash", SDPBackend.FLASH_ATTENTION, _HALF, 16

    def run(self, q: Tensor, k: Tensor, v: Tensor, needed: bool) -> Output:
        result = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=1.0)
        out, lse, _, _, _, _, seed, offset, _ = result  # between them the places of packed sequences
        return out, lse, seed, offset

    def run_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: Attended
    ) -> tuple[Tensor, ...]:
        rest: tuple[Any, ...] = (None, None, q.shape[2], k.shape[2], 0.0, False, saved.seed, saved.offset)
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, saved.lse, *rest, scale=1.0
        )


class Efficient(_Kernel):
    name, backend, dtypes, aligned = "efficient", SDPBackend.EFFICIENT_ATTENTION, _SINGLE, 16

    def run(self, q: Tensor, k: Tensor, v: Tensor, needed: bool) -> Output:
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, needed, scale=1.0)

    def run_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: Attended
    ) -> tuple[Tensor, ...]:
        rest: tuple[Any, ...] = (saved.seed, saved.offset, 0.0, [True, True, True, False], False)
        return torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            dout, q, k, v, None, out, saved.lse, *rest, scale=1.0
        )[:3]


class Cudnn(_Kernel):
    name, backend, dtypes, aligned = "cudnn", SDPBackend.CUDNN_ATTENTION, _HALF, 16

    def run(self, q: Tensor, k: Tensor, v: Tensor, needed: bool) -> Output:
        result = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, needed, 0.0, False, False, scale=1.0)
        out, lse, _, _, _, _, seed, offset, _ = result
        return out, lse, seed, offset

    def run_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: Attended
    ) -> tuple[Tensor, ...]:
        rest: tuple[Any, ...] = (saved.seed, saved.offset, None, None, None, q.shape[2], k.shape[2], 0.0, False)
        return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            dout, q, k, v, out, saved.lse, *rest, scale=1.0
        )


class Math(_Kernel):
    """Probabilities are computed again in backward; in half precision all is in float32, as in the kernels."""

    def run(self, q: Tensor, k: Tensor, v: Tensor, needed: bool) -> Output:
        wide_q, wide_k, wide_v = _widened(q, k, v)
        scores = torch.matmul(wide_q, wide_k.transpose(2, 3))
        lse = torch.logsumexp(scores, dim=3)
        out = torch.matmul(scores.sub_(lse[..., None]).exp_(), wide_v)
        return out.to(q.dtype), lse, None, None

    def run_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: Attended
    ) -> tuple[Tensor, ...]:
        dtype = q.dtype
        dout, q, k, v, out = _widened(dout, q, k, v, out)
        probs = torch.matmul(q, k.transpose(2, 3)).sub_(saved.lse[..., None]).exp_()
        dscores = torch.matmul(dout, v.transpose(2, 3)).sub_((dout * out).sum(dim=3, keepdim=True)).mul_(probs)
        dq, dk, dv = dscores @ k, dscores.transpose(2, 3) @ q, probs.transpose(2, 3) @ dout
        return dq.to(dtype), dk.to(dtype), dv.to(dtype)


_KERNELS: tuple[_Kernel, ...] = (Flash(), Efficient(), Cudnn())
_BY_BACKEND = {kernel.backend.value: kernel for kernel in (Math(), *_KERNELS)}
NAMES = tuple(kernel.name for kernel in _KERNELS)


@dataclass(frozen=True)
class FusedAttention:
    """The kernel that PyTorch would choose for the input, or one by name.

    Args:
        kernel: "flash", "efficient" or "cudnn"; empty: PyTorch's choice.
    Raises:
        ValueError: there is no such kernel.
    """

    kernel: str = ""

    def __post_init__(self) -> None:
        if self.kernel not in ("", *NAMES):
            raise ValueError(f"attention={self.kernel!r}; wanted one of {', '.join(map(repr, NAMES))}")

    def chosen(self, q: Tensor, k: Tensor, v: Tensor, num_heads: int, needed: bool) -> Attention:
        """See :class:`ChoosesAttention`.

        Raises:
            ValueError: the named kernel does not take the input, with the reason; or no kernel is allowed to.
        """
        q, k, v = (split_heads(t, len(k), num_heads) for t in (q, k, v))
        if not self.kernel:
            return _as_pytorch_would(q, k, v, needed)
        named = next(kernel for kernel in _KERNELS if kernel.name == self.kernel)
        reason = named.refusal(q, k, v)
        if reason:
            raise ValueError(f"attention={self.kernel!r} does not take {_inputs(q, k)}\n    {reason}")
        return named


def _as_pytorch_would(q: Tensor, k: Tensor, v: Tensor, needed: bool) -> _Kernel:
    """The kernel that F.scaled_dot_product_attention would run, which some ask whether there will be a gradient."""
    with torch.set_grad_enabled(needed):
        number = torch._fused_sdp_choice(q.detach().requires_grad_(needed), k, v, scale=1.0)
    kernel = _BY_BACKEND.get(number)
    if kernel is None:
        raise ValueError(f"PyTorch allows no attention kernel for {_inputs(q, k)}")
    step = max(1, kernel.aligned // q.dtype.itemsize)
    return kernel if q.shape[-1] % step == 0 else _BY_BACKEND[SDPBackend.MATH.value]  # PyTorch would pad the heads


def _side_by_side(dq: Tensor, dk: Tensor, dv: Tensor) -> Tensor:
    """(B, L, 3, H, K) of gradients (B, L, H, K), as the product before them takes them.

    Where there is no prefix, efficient attention has made them so already, for queries, keys and values were so.
    """
    batch, length, heads, head = dq.shape
    width, grads = heads * head, (dq, dk, dv)
    together = len({d.untyped_storage()._cdata for d in grads}) == 1
    places = [(d.storage_offset() - dq.storage_offset(), d.stride()) for d in grads]
    strides = 3 * length * width, 3 * width, head, 1
    if together and places == [(i * width, strides) for i in range(3)]:
        return dq.as_strided((batch, length, 3, heads, head), (*strides[:2], width, head, 1))
    return torch.stack(grads, dim=2)


def _widened(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.float() if t.dtype.itemsize < 4 else t for t in tensors)


def _inputs(q: Tensor, k: Tensor) -> str:
    return f"queries {tuple(q.shape)}, keys {tuple(k.shape)} {_name(q.dtype)} {q.device}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
