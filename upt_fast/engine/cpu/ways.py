"""The ways that CPU operations have to choose from (choices.py), at the shapes of a tower.

Products with frozen weights run in panels of rows by the compiled operations' micro-kernel (library.py), or by
PyTorch's own product with compiled passes around it; attention in bfloat16 with sizes as they are, or filled up to
whole tiles; float32 products outside of the compiled operations by PyTorch's default or by oneDNN.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from upt_fast.engine.cpu.library import ACTIVATIONS, PANELS, pack
from upt_fast.engine.tuning import choices

EPS = 1e-5
# a weight's name -> the operations that it is a factor of, forward and backward
PRODUCTS = {
    "qkv": ("norm_linear", "linear_norm_backward"),
    "kv": ("norm_linear", "linear_norm_backward"),
    "out": ("linear_residual", "linear_residual"),
    "fc": ("norm_linear_silu", "linear_norm_backward"),
    "proj": ("linear_residual", "linear_times"),
}


def panels(product: str, weight: Tensor, rows: int) -> tuple[int, int]:
    """How a tower's weight is multiplied, forward and backward: rows of a panel, or 0: by PyTorch.

    Args:
        product: a name of PRODUCTS.
        weight: (N, K), frozen.
        rows: of a typical batch.
    """
    n, k = weight.shape
    forward, backward = PRODUCTS[product]
    return _panel(forward, k, n, rows, weight.dtype), _panel(backward, n, k, rows, weight.dtype)


def _panel(op: str, k: int, n: int, rows: int, dtype: torch.dtype) -> int:
    """Of the product of rows (M, K) with a factor (K, N)."""

    def run(panel: int) -> Sequence[Tensor]:
        return _run_product(op, k, n, rows, dtype, panel)

    ways = {_name(panel): lambda panel=panel: run(panel) for panel in PANELS}
    try:
        found = choices.choose(f"{op} {rows} x {k} x {n} {_key(dtype)}", ways)
    finally:
        _inputs.cache_clear()
        _factor.cache_clear()
    return next(panel for panel in PANELS if _name(panel) == found)


def _name(panel: int) -> str:
    return f"panels of {panel}" if panel else "PyTorch's product"


def _key(dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {torch.get_num_threads()} threads"


@cache
def _inputs(k: int, n: int, rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Rows (M, K), a factor (K, N), two of (M, N), one number a row twice."""
    torch.manual_seed(0)
    x, factor = torch.randn(rows, k).to(dtype), (torch.randn(k, n) * k**-0.5).to(dtype)
    wide, out = torch.randn(rows, n).to(dtype), torch.empty(rows, n, dtype=dtype)
    return x, factor, wide, out, torch.zeros(rows), torch.ones(rows)


@cache
def _factor(k: int, n: int, rows: int, dtype: torch.dtype, packed: bool) -> Tensor:
    factor = _inputs(k, n, rows, dtype)[1]
    return pack(factor, 1 if packed else 0).values


def _run_product(op: str, k: int, n: int, rows: int, dtype: torch.dtype, panel: int) -> Sequence[Tensor]:
    x, _, wide, out, mean, rstd = _inputs(k, n, rows, dtype)
    factor = _factor(k, n, rows, dtype, panel > 0), panel
    lib = torch.ops.upt_fast_cpu
    if op.startswith("norm_linear"):
        kind, places = ACTIVATIONS["quick_gelu" if op == "norm_linear_silu" else "none"], [[0]] * 3
        slope = wide.clone() if kind else None
        lib.norm_linear(x, EPS, *factor, None, kind, slope, [out], *places, mean.clone(), rstd.clone())
    elif op == "linear_residual":
        lib.linear_residual(x, *factor, None, wide, out)
    elif op == "linear_times":
        lib.linear_times(x, *factor, wide, out)
    else:
        lib.linear_norm_backward(x, *factor, wide, mean, rstd, wide, out)
    return [out]


def fills(num_heads: int, width: int, rows: int, dtype: torch.dtype) -> bool:
    """Whether attention's products in bfloat16 are filled up to whole tiles.

    Args:
        num_heads: H.
        width: D.
        rows: L, of an image.
        dtype: of the rows.
    """
    if dtype != torch.bfloat16:
        return False
    prefix, batch = 4, 2
    shapes = (batch * rows, width), (batch, prefix + rows, width), (batch, prefix + rows, width)

    @cache
    def inputs() -> list[Tensor]:
        torch.manual_seed(0)
        q, k, v = (torch.randn(shape).to(dtype) for shape in shapes)
        return [q * (width // num_heads) ** -0.5, k, v, torch.randn(q.shape).to(dtype)]

    def run(fill: bool) -> Sequence[Tensor]:
        q, k, v, dout = inputs()
        out, lse = torch.empty_like(q), torch.empty(batch, num_heads, rows)
        torch.ops.upt_fast_cpu.attention(q, k, v, num_heads, fill, out, lse)
        grads = [q.new_empty(*q.shape, 3), *(q.new_empty(batch, prefix, width) for _ in range(2))]
        torch.ops.upt_fast_cpu.attention_backward(dout, q, k, v, num_heads, fill, out, lse, *grads)
        return [out, *grads]

    ways = {"as they are": lambda: run(False), "filled": lambda: run(True)}
    return choices.choose(f"attention {rows} rows {num_heads} x {width // num_heads} {_key(dtype)}", ways) == "filled"


def float32_product() -> str:
    """Who multiplies float32 matrices outside of the compiled operations: "mm", PyTorch's default, or "onednn"."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return "mm"
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return "mm"  # oneDNN's was never the faster one there
    rows, width, hidden = 512, 512, 2048

    @cache
    def inputs() -> list[Tensor]:
        torch.manual_seed(0)
        return [torch.randn(rows, width), torch.randn(hidden, width)]

    def onednn() -> Sequence[Tensor]:
        x, weight = inputs()
        return [torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")]

    ways = {"mm": lambda: [torch.mm(inputs()[0], inputs()[1].t())], "onednn": onednn}
    return choices.choose(f"product {rows} x {width} x {hidden} {_key(torch.float32)}", ways)
