"""A linear with the activation in its epilogue, and the gradient of the linear after it with the derivative in its own.

    forward:   u = x W_1^T + b_1,  a = act(u)          y  = a W_2^T + b_2   (PyTorch's product)
    backward:  du = (dy W_2) act'(u)                   dx = du W_1          (PyTorch's product)

with act as in activation.py; for quick_gelu the factors 1.702 are in the weights. All weights are frozen.

Apart, forward writes u, reads it and writes a; backward writes da, reads da and u and writes du. Here forward does not
read u and, where nothing needs it (no gradients, or memory="balanced"), does not write it either; backward neither
writes nor reads da, which is not rounded.

The kernels are persistent: as many programs as the GPU holds at once walk over the tiles of the output, in groups of
rows that share what they read in the L2 cache. A tile's epilogue goes in pieces of its columns: in one piece, tiles of
128 x 256 take more registers than there are.

Which tile a shape takes is measured once per GPU, dtype and shape class (rows up to a power of two) and kept in
``$UPT_FAST_CACHE``, by default ``~/.cache/upt_fast``. Nothing is measured without a GPU, while a CUDA graph is being
captured, or where torch.use_deterministic_algorithms asks for equal bits in equal runs: another tile can sum in another
order. Then the first tile with enough work for every multiprocessor is taken.
"""

from __future__ import annotations

import fcntl
import functools
import json
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from upt_fast.kernels._launch import DTYPES, INTERPRETED, Workload, launch, rows_of, shared_limit
from upt_fast.kernels.activation import activate, activation_slope, check_kind

from upt_fast.common.files import cache_folder, write_text


class Tile(NamedTuple):
    """A program's part of the output, block_m by block_n, of which it sums block_k products at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# by how numbers are multiplied, the largest first; kernels/report.py compiles each, and none spills. In tf32 128 x 256
# does, and so does 128 x 128 by four warps.
TILES = {
    "half": (
        Tile(128, 256, 64, 8, 4),
        Tile(128, 256, 32, 8, 4),
        Tile(128, 128, 64, 8, 4),
        Tile(128, 128, 32, 8, 3),
        Tile(64, 128, 64, 8, 3),
        Tile(64, 64, 64, 4, 3),
    ),
    "tf32": (Tile(128, 128, 32, 8, 4), Tile(64, 128, 32, 8, 3), Tile(64, 64, 32, 4, 3)),
    "ieee": (Tile(128, 128, 16, 8, 3), Tile(64, 64, 16, 4, 3), Tile(32, 64, 16, 8, 2)),
}
INTERPRETER_TILE, INTERPRETER_PROGRAMS = Tile(64, 128, 64, 4, 1), 3
GROUP_ROWS = 8  # tiles


@triton.jit
def _corner(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """First row and column of a tile: down a group of GROUP_M tiles, then to the next column of tiles."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    first = tile // (GROUP_M * tiles_n) * GROUP_M
    size = tl.minimum(tl.cdiv(M, BLOCK_M) - first, GROUP_M)
    tile %= GROUP_M * tiles_n
    return (first + tile % size) * BLOCK_M, tile // size * BLOCK_N


@triton.jit
def _product(
    x_ptr,  # (M, K)
    w_ptr,  # (N, K) by its strides
    row,
    col,
    stride_x_row,
    stride_w_n,
    stride_w_k,
    M,
    N,
    K,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of x W^T: (BLOCK_M, BLOCK_N) fp32."""
    # rows beyond the last repeat it and are not stored: loads need no mask of rows
    rows = tl.minimum(row + tl.arange(0, BLOCK_M), M - 1).to(tl.int64)[:, None]
    cols = (col + tl.arange(0, BLOCK_N))[None, :]
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        x_ptrs = x_ptr + rows * stride_x_row + ks[None, :]
        w_ptrs = w_ptr + cols.to(tl.int64) * stride_w_n + ks[:, None].to(tl.int64) * stride_w_k
        x = tl.load(x_ptrs) if EVEN_K else tl.load(x_ptrs, ks[None, :] < K, other=0.0)
        w = tl.load(w_ptrs) if EVEN_K and EVEN_N else tl.load(w_ptrs, (ks[:, None] < K) & (cols < N), other=0.0)
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        product = tl.dot(x, w, product, input_precision=PRECISION)
    return product


@triton.jit
def _halves(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(x, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def _places(row, col, M, N, EVEN_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows, columns and mask of a tile."""
    rows = (row + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    cols = (col + tl.arange(0, BLOCK_N))[None, :]
    return rows, cols, (rows < M) if EVEN_N else (rows < M) & (cols < N)


@triton.jit
def _store_activation(
    product,
    b_ptr,
    u_ptr,
    a_ptr,
    row,
    col,
    M,
    N,
    KIND: tl.constexpr,
    HAS_U: tl.constexpr,
    EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PIECES: tl.constexpr,
):
    if PIECES > 1:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = _halves(product, BLOCK_M, BLOCK_N)
        _store_activation(left, b_ptr, u_ptr, a_ptr, row, col, M, N, KIND, HAS_U, EVEN_N, BLOCK_M, HALF, PIECES // 2)
        _store_activation(
            right, b_ptr, u_ptr, a_ptr, row, col + HALF, M, N, KIND, HAS_U, EVEN_N, BLOCK_M, HALF, PIECES // 2
        )
    else:
        rows, cols, mask = _places(row, col, M, N, EVEN_N, BLOCK_M, BLOCK_N)
        b = tl.load(b_ptr + cols) if EVEN_N else tl.load(b_ptr + cols, cols < N, other=0.0)
        z = product + b.to(tl.float32)
        if HAS_U:
            tl.store(u_ptr + rows * N + cols, z, mask)
        tl.store(a_ptr + rows * N + cols, activate(z, KIND), mask)


@triton.jit
def _store_slope(
    product,
    u_ptr,
    du_ptr,
    row,
    col,
    stride_u_row,
    M,
    N,
    KIND: tl.constexpr,
    EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PIECES: tl.constexpr,
):
    if PIECES > 1:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = _halves(product, BLOCK_M, BLOCK_N)
        _store_slope(left, u_ptr, du_ptr, row, col, stride_u_row, M, N, KIND, EVEN_N, BLOCK_M, HALF, PIECES // 2)
        _store_slope(
            right, u_ptr, du_ptr, row, col + HALF, stride_u_row, M, N, KIND, EVEN_N, BLOCK_M, HALF, PIECES // 2
        )
    else:
        rows, cols, mask = _places(row, col, M, N, EVEN_N, BLOCK_M, BLOCK_N)
        z = tl.load(u_ptr + rows * stride_u_row + cols, mask, other=0.0).to(tl.float32)
        tl.store(du_ptr + rows * N + cols, product * activation_slope(z, KIND), mask)


@triton.jit
def _linear_act_kernel(
    x_ptr,  # (M, K)
    w_ptr,  # (N, K)
    b_ptr,  # (N,)
    u_ptr,  # (M, N) or None
    a_ptr,  # (M, N)
    stride_x_row,
    stride_w_n,
    stride_w_k,
    M,
    N,
    K,
    KIND: tl.constexpr,
    HAS_U: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    PIECES: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    for tile in range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        row, col = _corner(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        product = _product(
            x_ptr, w_ptr, row, col, stride_x_row, stride_w_n, stride_w_k, M, N, K,
            UPCAST, PRECISION, EVEN_N, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        _store_activation(product, b_ptr, u_ptr, a_ptr, row, col, M, N, KIND, HAS_U, EVEN_N, BLOCK_M, BLOCK_N, PIECES)


@triton.jit
def _linear_dact_kernel(
    dy_ptr,  # (M, K)
    w_ptr,  # (K, N), by its strides (N, K)
    u_ptr,  # (M, N)
    du_ptr,  # (M, N)
    stride_dy_row,
    stride_w_n,
    stride_w_k,
    stride_u_row,
    M,
    N,
    K,
    KIND: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    PIECES: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    for tile in range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        row, col = _corner(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        da = _product(
            dy_ptr, w_ptr, row, col, stride_dy_row, stride_w_n, stride_w_k, M, N, K,
            UPCAST, PRECISION, EVEN_N, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        _store_slope(da, u_ptr, du_ptr, row, col, stride_u_row, M, N, KIND, EVEN_N, BLOCK_M, BLOCK_N, PIECES)


def precision_of(dtype: torch.dtype) -> str:
    """A key of TILES: how numbers of this dtype are multiplied; float32 as PyTorch's own products are."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def tiles_that_fit(precision: str, limit: int) -> list[Tile]:
    """The tiles of TILES[precision] whose operands fit in limit bytes of shared memory."""
    size = 2 if precision == "half" else 4
    return [t for t in TILES[precision] if t.num_stages * (t.block_m + t.block_n) * t.block_k * size <= limit]


def default_tile(tiles: Sequence[Tile], M: int, N: int, multiprocessors: int) -> Tile:
    """The first of tiles of which an (M, N) output has one for each multiprocessor; else the last."""
    counts = (triton.cdiv(M, t.block_m) * triton.cdiv(N, t.block_n) for t in tiles)
    return next((t for t, count in zip(tiles, counts, strict=True) if count >= multiprocessors), tiles[-1])


def table_path(gpu: str) -> Path:
    """Where the tiles that were measured on a GPU of this name are kept."""
    folder = cache_folder()
    return folder / f"linear_gelu-{re.sub(r'[^A-Za-z0-9]+', '-', gpu).strip('-')}.json"


def read_table(gpu: str) -> dict[str, Tile]:
    """What was measured on GPUs of this name with this triton; nothing, and a warning, where the file is not good."""
    path = table_path(gpu)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not {"triton", "tiles"} <= found.keys():
            raise ValueError('wanted {"triton": ..., "tiles": {...}}')
        # what another triton compiles may run at another speed
        tiles = found["tiles"] if found["triton"] == triton.__version__ else {}
        if not isinstance(tiles, dict):
            raise ValueError(f'"tiles" is {type(tiles).__name__}, wanted an object')
        for key, tile in tiles.items():
            numbers = isinstance(tile, list) and all(type(number) is int for number in tile)
            if not numbers or len(tile) != len(Tile._fields):
                raise ValueError(f"{key}: {tile}; wanted the integers {', '.join(Tile._fields)}")
        return {key: Tile(*tile) for key, tile in tiles.items()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        warnings.warn(f"{path} is ignored, tiles are measured anew: {error}", stacklevel=2)
        return {}


def _write_tile(gpu: str, key: str, tile: Tile) -> None:
    """Add to the table of a GPU what was measured; other processes may do the same."""
    path = table_path(gpu)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)
            table = read_table(gpu) | {key: tile}
            write_text(path, json.dumps({"gpu": gpu, "triton": triton.__version__, "tiles": table}, indent=1) + "\n")
    except OSError as error:
        warnings.warn(f"{path} is not written, each process measures anew: {error}", stacklevel=2)


_tables: dict[Path, dict[str, Tile]] = {}


def tuned_tile(gpu: str, key: str, tiles: Sequence[Tile], measure: Callable[[Tile], float]) -> Tile:
    """The fastest of some tiles: from the table of a GPU, or measured now and kept there.

    Args:
        gpu: its name.
        key: what runs: kernel, dtype, shape class.
        tiles: to choose from.
        measure: takes a tile and returns its time; infinity where it cannot run.
    """
    path = table_path(gpu)
    if path not in _tables:
        _tables[path] = read_table(gpu)
    table = _tables[path]
    if table.get(key) not in tiles:  # absent, or no candidate any more
        times = {tile: measure(tile) for tile in tiles}
        table[key] = min(times, key=times.__getitem__)
        if times[table[key]] < float("inf"):
            _write_tile(gpu, key, table[key])
    return table[key]


def _milliseconds(run: Callable[[], None]) -> float:
    try:
        return float(triton.testing.do_bench(run, warmup=10, rep=50, return_mode="median"))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # this GPU's compiler or driver refuses the tile, in one of many ways
        return float("inf")


@functools.cache
def _gpu(device: torch.device) -> tuple[str, int]:
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.multi_processor_count


def _pieces(tile: Tile, backward: bool) -> int:
    """Pieces of the epilogue: of 32 numbers a thread, or 16 where backward's sums leave few registers."""
    numbers = tile.block_m * tile.block_n // (32 * tile.num_warps)
    return max(1, numbers // (16 if backward and numbers > 64 else 32))


def _run(kernel: Any, name: str, rows: Tensor, N: int, tile: Tile | None, precision: str, **arguments: Any) -> None:
    """Launch a kernel on rows (M, K), with tile or the one that is best for the shape."""
    M, K = rows.shape
    multiprocessors = INTERPRETER_PROGRAMS if INTERPRETED else 132
    if rows.is_cuda:
        gpu, multiprocessors = _gpu(rows.device)

    def run(tile: Tile) -> None:
        # four warps leave room for a second program
        programs = multiprocessors * max(1, 8 // tile.num_warps)
        launch(
            kernel,
            (min(triton.cdiv(M, tile.block_m) * triton.cdiv(N, tile.block_n), programs),),
            **arguments,
            M=M,
            N=N,
            K=K,
            UPCAST=INTERPRETED and rows.dtype == torch.bfloat16,  # the interpreter cannot multiply it
            PRECISION="tf32" if precision == "tf32" else "ieee",
            EVEN_N=N % tile.block_n == 0,
            EVEN_K=K % tile.block_k == 0,
            PIECES=_pieces(tile, kernel is _linear_dact_kernel),
            GROUP_M=GROUP_ROWS,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )

    if tile is None and INTERPRETED:
        tile = INTERPRETER_TILE
    elif tile is None:
        tiles = tiles_that_fit(precision, shared_limit(rows.device))
        tile = default_tile(tiles, M, N, multiprocessors)
        fixed = torch.are_deterministic_algorithms_enabled() or not rows.is_cuda or M == 0
        if not fixed and not torch.cuda.is_current_stream_capturing():
            dtype = "tf32" if precision == "tf32" else str(rows.dtype).removeprefix("torch.")
            key = f"{name} {dtype} {max(64, triton.next_power_of_2(M))}x{N}x{K}"
            try:
                with torch.cuda.device_of(rows):
                    tile = tuned_tile(gpu, key, tiles, lambda t: _milliseconds(functools.partial(run, t)))
            except torch.OutOfMemoryError:  # the measurement's own buffer
                pass
    run(tile)


def _check(x: Tensor, others: dict[str, tuple[Tensor, tuple[int, ...]]], kind: str) -> None:
    """Refuse tensors that differ from x (..., K) in dtype or device, or have not the shape that was wanted."""
    if x.dtype not in DTYPES:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"{str(x.dtype).removeprefix('torch.')} rows; wanted one of {wanted}")
    for name, (t, shape) in others.items():
        if tuple(t.shape) != shape:
            raise ValueError(f"{name} {tuple(t.shape)} for rows {tuple(x.shape)}; wanted {shape}")
        if t.dtype != x.dtype or t.device != x.device:
            raise ValueError(f"{name} is {t.dtype} on {t.device}; wanted the rows' {x.dtype} on {x.device}")
    check_kind(kind)


def _outputs(w: Tensor, dim: int) -> int:
    """A weight's number of outputs, in its dimension dim."""
    if w.dim() != 2:
        raise ValueError(f"a weight {tuple(w.shape)}; wanted two dimensions")
    return w.shape[dim]


def linear_act(
    x: Tensor,
    w: Tensor,
    b: Tensor,
    kind: str,
    keep: bool = True,
    tile: Tile | None = None,
    precision: str | None = None,
) -> tuple[Tensor, Tensor]:
    """act(u) and u = x W^T + b, which stays empty, (0,), unless it is to be kept.

    Args:
        x: (..., K).
        w: (N, K), any strides.
        b: (N,).
        kind: a name of ACTIVATIONS.
        keep: write u.
        tile: None: the fastest.
        precision: a key of TILES; None: as PyTorch's products.
    Returns:
        a and u, (..., N) in x's dtype.
    """
    N = _outputs(w, 0)
    _check(x, {"weight": (w, (N, x.shape[-1])), "bias": (b, (N,))}, kind)
    rows = rows_of(x)
    shape = (*x.shape[:-1], N)
    a, u = x.new_empty(shape), x.new_empty(shape if keep else 0)
    _run(
        _linear_act_kernel,
        "linear_act" if keep else "linear_act without u",
        rows,
        N,
        tile,
        precision or precision_of(x.dtype),
        x_ptr=rows,
        w_ptr=w,
        b_ptr=b.contiguous(),
        u_ptr=u if keep else None,
        a_ptr=a,
        stride_x_row=rows.stride(0),
        stride_w_n=w.stride(0),
        stride_w_k=w.stride(1),
        KIND=kind,
        HAS_U=keep,
    )
    return a, u


def linear_dact(
    dy: Tensor, w: Tensor, u: Tensor, kind: str, tile: Tile | None = None, precision: str | None = None
) -> Tensor:
    """du = (dy W) act'(u).

    Args:
        dy: (..., K), the gradient behind the linear that follows the activation.
        w: (K, N), that linear's weight, any strides.
        u: (..., N), the activation's input.
        kind: a name of ACTIVATIONS.
        tile: None: the fastest.
        precision: a key of TILES; None: as PyTorch's products.
    Returns:
        (..., N) in dy's dtype.
    """
    N = _outputs(w, 1)
    shape = (*dy.shape[:-1], N)
    _check(dy, {"weight": (w, (dy.shape[-1], N)), "u": (u, shape)}, kind)
    dy_rows, u_rows = rows_of(dy), rows_of(u)
    du = dy.new_empty(shape)
    _run(
        _linear_dact_kernel,
        "linear_dact",
        dy_rows,
        N,
        tile,
        precision or precision_of(dy.dtype),
        dy_ptr=dy_rows,
        w_ptr=w,
        u_ptr=u_rows,
        du_ptr=du,
        stride_dy_row=dy_rows.stride(0),
        stride_w_n=w.stride(1),
        stride_w_k=w.stride(0),
        stride_u_row=u_rows.stride(0),
        KIND=kind,
    )
    return du


def linear_gelu_fwd(
    h: Tensor, fc_weight: Tensor, fc_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor, kind: str, keep: bool
) -> tuple[Tensor, Tensor]:
    """y = act(u) W_2^T + b_2 and u = h W_1^T + b_1, which stays empty unless it is to be kept."""
    a, u = linear_act(h, fc_weight, fc_bias, kind, keep)
    return F.linear(a, proj_weight, proj_bias), u


def linear_gelu_bwd(
    dy: Tensor,
    u: Tensor | None,
    h: Tensor | None,
    fc_weight: Tensor,
    fc_bias: Tensor,
    proj_weight: Tensor,
    kind: str,
) -> Tensor:
    """dh from the gradient of y and u, or h of which u is computed again."""
    if u is None:
        assert h is not None
        u = F.linear(h, fc_weight, fc_bias)
    return linear_dact(dy, proj_weight, u, kind) @ fc_weight


_fwd = torch.library.custom_op("upt_fast::linear_gelu_fwd", linear_gelu_fwd, mutates_args=())
_bwd = torch.library.custom_op("upt_fast::linear_gelu_bwd", linear_gelu_bwd, mutates_args=())


@_fwd.register_fake
def _(
    h: Tensor, fc_weight: Tensor, fc_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor, kind: str, keep: bool
) -> tuple[Tensor, Tensor]:
    u = h.new_empty((*h.shape[:-1], len(fc_weight)) if keep else 0)
    return h.new_empty((*h.shape[:-1], len(proj_weight))), u


@_bwd.register_fake
def _(
    dy: Tensor,
    u: Tensor | None,
    h: Tensor | None,
    fc_weight: Tensor,
    fc_bias: Tensor,
    proj_weight: Tensor,
    kind: str,
) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], fc_weight.shape[1]))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    h, fc_weight, fc_bias, proj_weight, _, ctx.kind, keep = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1] if keep else None, None if keep else h, fc_weight, fc_bias, proj_weight)


def _backward(ctx, dy, _):  # type: ignore[no-untyped-def]
    return None if dy is None else _bwd(dy, *ctx.saved_tensors, ctx.kind), *[None] * 6


_fwd.register_autograd(_backward, setup_context=_setup_context)


def linear_gelu_linear(
    h: Tensor, fc_weight: Tensor, fc_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor, kind: str, keep: bool = True
) -> Tensor:
    """act(h W_1^T + b_1) W_2^T + b_2, differentiable in h; the weights are frozen.

    Args:
        h: (..., D).
        fc_weight: (N, D), W_1.
        fc_bias: (N,).
        proj_weight: (D', N), W_2.
        proj_bias: (D',).
        kind: as in upt_fast.engine.ops.activation.
        keep: keep u (..., N) for backward; else h alone, and backward computes u again.
    Returns:
        (..., D') in h's dtype; under autocast in autocast's.
    Raises:
        ValueError: shapes do not fit, or dtypes or devices differ.
    """
    if torch.is_autocast_enabled(h.device.type):
        dtype = torch.get_autocast_dtype(h.device.type)
        h, fc_weight, fc_bias, proj_weight, proj_bias = (
            t.to(dtype) for t in (h, fc_weight, fc_bias, proj_weight, proj_bias)
        )
    hidden, out = _outputs(fc_weight, 0), _outputs(proj_weight, 0)
    _check(
        h,
        {
            "fc_weight": (fc_weight, (hidden, h.shape[-1])),
            "fc_bias": (fc_bias, (hidden,)),
            "proj_weight": (proj_weight, (out, hidden)),
            "proj_bias": (proj_bias, (out,)),
        },
        kind,
    )
    keep = keep and torch.is_grad_enabled() and h.requires_grad
    return _fwd(h, fc_weight, fc_bias, proj_weight, proj_bias, kind, keep)[0]


def workloads() -> Iterator[Workload]:
    """ViT-B/16's image tower at batch 32: every tile with the activation that takes most registers, others at one."""

    def run(forward: bool, dtype: torch.dtype, kind: str, keep: bool, every: bool, precision: str) -> None:
        rows, width, hidden = 32 * 197, 768, 3072
        x, u, w, v, b = (
            torch.empty(shape, dtype=dtype, device="meta")
            for shape in ((rows, width), (rows, hidden), (hidden, width), (width, hidden), (hidden,))
        )
        tiles: Sequence[Tile | None] = tiles_that_fit(precision, shared_limit(x.device)) if every else [None]
        for tile in tiles:
            if forward:
                linear_act(x, w, b, kind, keep, tile, precision)
            else:
                linear_dact(x, v, u, kind, tile, precision)

    for direction in ("forward", "backward"):
        partial = functools.partial(run, direction == "forward")
        for dtype, precision in ((torch.bfloat16, "half"), (torch.float32, "tf32"), (torch.float32, "ieee")):
            label = "bfloat16" if precision == "half" else f"float32 {precision}"
            every = functools.partial(partial, dtype, "gelu", True, True, precision)
            yield f"{direction} gelu {label}, every tile", every
        for kind in ("quick_gelu", "gelu_tanh"):
            yield (
                f"{direction} {kind} bfloat16",
                functools.partial(partial, torch.bfloat16, kind, True, False, "half"),
            )
    yield "forward gelu bfloat16 without u", lambda: run(True, torch.bfloat16, "gelu", False, False, "half")
