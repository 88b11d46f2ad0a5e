"""Causal attention of packed class rows over [prefix of their set ; own rows so far], several classes in a tile.

    out_i = sum_j softmax_j(q_i . k_j) v_j  over the P keys of the set's prefix and those of i's class up to i itself

Class names have 3 to 5 rows, so that a tile holds several whole classes of one set: their consecutive rows, and as keys
[prefix ; the same rows], 32 in all, of which row i sees the prefix and j = first(i) ... i, first(i) being where its
class begins. The prefix is read once per tile, where a buffer [prefix ; own rows] per class copies it for each: 2 P D
numbers per class written, read, and summed again in backward. PackedTiles (upt_fast/layout.py) holds the division.

A tile has all keys of its queries and all queries of its own keys. So softmax is one pass, backward computes it again
and keeps nothing but the inputs, and one program gives every gradient of its rows. Those of the prefix leave it as fp32
sums over the tile, which a second kernel adds over the tiles of each set, in order: equal runs give equal bits.

Zero times NaN is NaN: a product would carry what is not finite in one class to the others of its tile. So numbers that
are not finite are multiplied as 0, and every score that they touch is NaN instead: their class is lost, no other.

Where the longest class and its prefix have more than 32 rows, or heads more than 64 columns (no CLIP's text tower), the
kernels of prompt_attention.py take all classes, each as a sequence of its own, block by block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from upt_fast.kernels._launch import DTYPES, Workload, launch
from upt_fast.kernels.prompt_attention import (
    LOG2E,
    MAX_HEAD_DIM,
    Packed,
    describe,
    dot_settings,
    load_rows,
    needed_gradients,
    prefix_attention_bwd,
    prefix_attention_fwd,
    store_rows,
    strides,
    sum_by_set,
    unit_stride,
)

from upt_fast.layout import TILE_ROWS, PackedLayout, PackedTiles

TILE_HEAD_DIM = 64


@triton.jit
def _finite(x):
    """x with 0 for what is not finite, and for each row NaN where it has such a number, else 0."""
    poison = tl.sum(x.to(tl.float32) * 0.0, axis=1)
    return tl.where(tl.abs(x) < float("inf"), x, 0.0).to(x.dtype), poison


@triton.jit
def _places(tiles_ptr, classes_ptr, first_rows_ptr, P, LAST_ONLY: tl.constexpr, BLOCK: tl.constexpr):
    """Of this program's tile: set, queries and their mask, own rows of the keys and theirs, and who sees what."""
    tile = tiles_ptr + tl.program_id(0) * 5
    first, end = tl.load(tile).to(tl.int64), tl.load(tile + 1).to(tl.int64)
    places = tl.arange(0, BLOCK)
    if LAST_ONLY:
        queries = tl.load(tile + 2).to(tl.int64) + places
        query_mask = queries < tl.load(tile + 3)
        rows = tl.load(classes_ptr + queries * 5 + 1, query_mask, other=1).to(tl.int64) - 1
    else:
        queries = first + places
        query_mask = queries < end
        rows = queries
    starts = tl.load(first_rows_ptr + rows, query_mask, other=0)
    keys = first + places - P
    own = (places >= P) & (keys < end)
    sees = (places < P)[None, :] | (
        own[None, :] & (keys[None, :] >= starts[:, None]) & (keys[None, :] <= rows[:, None])
    )
    return tl.load(tile + 4).to(tl.int64), queries, query_mask, keys, own, sees & query_mask[:, None]


@triton.jit
def _keys(
    own_ptr,
    prefix_ptr,
    stride_row,
    stride_prefix_row,
    keys,
    own,
    P,
    K,
    UPCAST: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The tile's rows [prefix ; own rows], finite, and NaN for each row that was not."""
    places = tl.arange(0, BLOCK)
    x = load_rows(own_ptr, stride_row, keys, own, K, UPCAST, EVEN_K, BLOCK_K)
    x += load_rows(prefix_ptr, stride_prefix_row, places, places < P, K, UPCAST, EVEN_K, BLOCK_K)
    return _finite(x)


@triton.jit
def _softmax(q, k, poison, sees, PRECISION: tl.constexpr):
    """Probabilities of the keys that each query sees; 0 for others."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * LOG2E
    s = tl.where(sees, s + poison, float("-inf"))
    peak = tl.max(s, axis=1)
    # rows beyond the tile's see nothing
    p = tl.exp2(s - tl.where(peak == float("-inf"), 0.0, peak)[:, None])
    total = tl.sum(p, axis=1)
    return tl.where(sees, p / tl.where(total == 0, 1.0, total)[:, None], 0.0)


@triton.jit
def _packed_attention_fwd_kernel(
    q_ptr,  # (N, H, K), or (C, H, K) if LAST_ONLY
    k_ptr,  # (N, H, K)
    v_ptr,  # (N, H, K)
    prefix_k_ptr,  # (S, P, H, K)
    prefix_v_ptr,  # (S, P, H, K)
    tiles_ptr,  # (T, 5) int32: first row, end row, first class, end class, set
    classes_ptr,  # (C, 5) int32, the same with a class each
    first_rows_ptr,  # (N,) int32
    out_ptr,  # like q
    stride_q_row,
    stride_q_head,
    stride_k_row,
    stride_k_head,
    stride_v_row,
    stride_v_head,
    stride_prefix_k_set,
    stride_prefix_k_row,
    stride_prefix_k_head,
    stride_prefix_v_set,
    stride_prefix_v_row,
    stride_prefix_v_head,
    P,
    H,
    K,
    LAST_ONLY: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    head = tl.program_id(1)
    prefix_set, queries, query_mask, keys, own, sees = _places(
        tiles_ptr, classes_ptr, first_rows_ptr, P, LAST_ONLY, BLOCK
    )
    prefix_k_ptr += prefix_set * stride_prefix_k_set + head * stride_prefix_k_head
    prefix_v_ptr += prefix_set * stride_prefix_v_set + head * stride_prefix_v_head
    q_ptr += head * stride_q_head
    k_ptr += head * stride_k_head
    v_ptr += head * stride_v_head
    q, poison_q = _finite(load_rows(q_ptr, stride_q_row, queries, query_mask, K, UPCAST, EVEN_K, BLOCK_K))
    k, poison_k = _keys(
        k_ptr, prefix_k_ptr, stride_k_row, stride_prefix_k_row, keys, own, P, K, UPCAST, EVEN_K, BLOCK, BLOCK_K
    )
    v, poison_v = _keys(
        v_ptr, prefix_v_ptr, stride_v_row, stride_prefix_v_row, keys, own, P, K, UPCAST, EVEN_K, BLOCK, BLOCK_K
    )
    p = _softmax(q, k, poison_q[:, None] + (poison_k + poison_v)[None, :], sees, PRECISION)
    out = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    store_rows(out_ptr + head * K, H * K, queries, query_mask, out, K, BLOCK_K)


@triton.jit
def _packed_attention_bwd_kernel(
    q_ptr,  # (N, H, K), or (C, H, K) if LAST_ONLY
    k_ptr,  # (N, H, K)
    v_ptr,  # (N, H, K)
    prefix_k_ptr,  # (S, P, H, K)
    prefix_v_ptr,  # (S, P, H, K)
    tiles_ptr,  # (T, 5) int32: first row, end row, first class, end class, set
    classes_ptr,  # (C, 5) int32, the same with a class each
    first_rows_ptr,  # (N,) int32
    dout_ptr,  # like q
    dq_ptr,  # like q, written if NEEDS_Q
    dk_ptr,  # (N, H, K), written if NEEDS_OWN
    dv_ptr,  # (N, H, K), written if NEEDS_OWN
    partial_ptr,  # (2, T, P, H, K) fp32, written if NEEDS_PREFIX
    stride_q_row,
    stride_q_head,
    stride_k_row,
    stride_k_head,
    stride_v_row,
    stride_v_head,
    stride_prefix_k_set,
    stride_prefix_k_row,
    stride_prefix_k_head,
    stride_prefix_v_set,
    stride_prefix_v_row,
    stride_prefix_v_head,
    stride_dout_row,
    stride_dout_head,
    P,
    H,
    K,
    NEEDS_Q: tl.constexpr,
    NEEDS_OWN: tl.constexpr,
    NEEDS_PREFIX: tl.constexpr,
    LAST_ONLY: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    head = tl.program_id(1)
    prefix_set, queries, query_mask, keys, own, sees = _places(
        tiles_ptr, classes_ptr, first_rows_ptr, P, LAST_ONLY, BLOCK
    )
    prefix_k_ptr += prefix_set * stride_prefix_k_set + head * stride_prefix_k_head
    prefix_v_ptr += prefix_set * stride_prefix_v_set + head * stride_prefix_v_head
    q_ptr += head * stride_q_head
    k_ptr += head * stride_k_head
    v_ptr += head * stride_v_head
    dout_ptr += head * stride_dout_head
    q, poison_q = _finite(load_rows(q_ptr, stride_q_row, queries, query_mask, K, UPCAST, EVEN_K, BLOCK_K))
    dout, poison_dout = _finite(load_rows(dout_ptr, stride_dout_row, queries, query_mask, K, UPCAST, EVEN_K, BLOCK_K))
    k, poison_k = _keys(
        k_ptr, prefix_k_ptr, stride_k_row, stride_prefix_k_row, keys, own, P, K, UPCAST, EVEN_K, BLOCK, BLOCK_K
    )
    v, poison_v = _keys(
        v_ptr, prefix_v_ptr, stride_v_row, stride_prefix_v_row, keys, own, P, K, UPCAST, EVEN_K, BLOCK, BLOCK_K
    )
    p = _softmax(q, k, (poison_q + poison_dout)[:, None] + (poison_k + poison_v)[None, :], sees, PRECISION)
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    ds = tl.where(sees, p * (dp - tl.sum(p * dp, axis=1)[:, None]), 0.0).to(k.dtype)
    if NEEDS_Q:
        dq = tl.dot(ds, k, input_precision=PRECISION)
        store_rows(dq_ptr + head * K, H * K, queries, query_mask, dq, K, BLOCK_K)
    if NEEDS_OWN or NEEDS_PREFIX:
        places = tl.arange(0, BLOCK)
        at = (tl.program_id(0).to(tl.int64) * P * H + head) * K
        dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION)
        if NEEDS_OWN:
            store_rows(dk_ptr + head * K, H * K, keys, own, dk, K, BLOCK_K)
        if NEEDS_PREFIX:
            store_rows(partial_ptr + at, H * K, places, places < P, dk, K, BLOCK_K)
        dv = tl.dot(tl.trans(p.to(dout.dtype)), dout, input_precision=PRECISION)
        if NEEDS_OWN:
            store_rows(dv_ptr + head * K, H * K, keys, own, dv, K, BLOCK_K)
        if NEEDS_PREFIX:
            at += tl.num_programs(0).to(tl.int64) * P * H * K
            store_rows(partial_ptr + at, H * K, places, places < P, dv, K, BLOCK_K)


def _fit_in_tiles(prefix_k: Tensor, longest: int) -> bool:
    return prefix_k.shape[1] + longest <= TILE_ROWS and prefix_k.shape[-1] <= TILE_HEAD_DIM


def _arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    tiles: Tensor,
    classes: Tensor,
    first_rows: Tensor,
) -> dict[str, Any]:
    """Arguments that both kernels take, and settings."""
    q, k, v, prefix_k, prefix_v = (unit_stride(t) for t in (q, k, v, prefix_k, prefix_v))
    return {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "prefix_k_ptr": prefix_k,
        "prefix_v_ptr": prefix_v,
        "tiles_ptr": tiles,
        "classes_ptr": classes,
        "first_rows_ptr": first_rows,
        **strides("", q=q, k=k, v=v),
        **strides("set", prefix_k=prefix_k, prefix_v=prefix_v),
        "P": prefix_k.shape[1],
        "H": q.shape[1],
        "K": q.shape[2],
        "LAST_ONLY": len(q) != len(k),
        **dot_settings(q),
        "PRECISION": "ieee",  # tf32 would win nothing on tiles so small, and its operands fill the registers
        "BLOCK": TILE_ROWS,
        "num_warps": 8 if q.dtype == torch.float32 else 4,
    }


def tiles_fwd(q: Tensor, *others: Tensor) -> Tensor:
    """The output, like q, where whole classes fit in tiles; others: as _arguments takes them."""
    out = q.new_empty(q.shape)
    arguments = _arguments(q, *others)
    launch(_packed_attention_fwd_kernel, (len(arguments["tiles_ptr"]), q.shape[1]), out_ptr=out, **arguments)
    return out


def tiles_bwd(
    dout: Tensor, q: Tensor, k: Tensor, *others: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, of k and v, and what each tile adds to those of the prefixes (2, T, P, H, K) float32."""
    needs_q, needs_own, needs_prefix = needs
    dout, arguments = unit_stride(dout), _arguments(q, k, *others)
    tiles, P = len(arguments["tiles_ptr"]), arguments["P"]
    dq = q.new_empty(q.shape if needs_q else 0)
    dk, dv = (q.new_empty(k.shape if needs_own else 0) for _ in "kv")
    partial = q.new_empty(2, tiles, P if needs_prefix else 0, *q.shape[1:], dtype=torch.float32)
    launch(
        _packed_attention_bwd_kernel,
        (tiles, q.shape[1]),
        dout_ptr=dout,
        dq_ptr=dq,
        dk_ptr=dk,
        dv_ptr=dv,
        partial_ptr=partial,
        **strides("", dout=dout),
        NEEDS_Q=needs_q,
        NEEDS_OWN=needs_own,
        NEEDS_PREFIX=needs_prefix,
        **arguments,
    )
    return dq, dk, dv, partial


def _sets(prefix_k: Tensor, tiles: Tensor) -> Tensor | None:
    return tiles[:, 4] if len(prefix_k) > 1 else None


@torch.library.custom_op("upt_fast::packed_attention_fwd", mutates_args=())
def _fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    tiles: Tensor,
    classes: Tensor,
    first_rows: Tensor,
    longest: int,
) -> tuple[Tensor, Tensor]:
    """The output, and of prefix_attention_fwd's where classes do not fit in tiles, what backward needs."""
    if _fit_in_tiles(prefix_k, longest):
        out = tiles_fwd(q, k, v, prefix_k, prefix_v, tiles, classes, first_rows)
        return out, q.new_empty(0, dtype=torch.float32)
    packed = Packed(classes, longest, len(q) != len(k))
    inputs = q[None], k[None], v[None], prefix_k, prefix_v, _sets(prefix_k, classes)
    out, softmax = prefix_attention_fwd(*inputs, packed)
    return out.view(q.shape), softmax


@torch.library.custom_op("upt_fast::packed_attention_bwd", mutates_args=())
def _bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    tiles: Tensor,
    classes: Tensor,
    first_rows: Tensor,
    out: Tensor | None,
    softmax: Tensor | None,
    longest: int,
    needs_q: bool,
    needs_own: bool,
    needs_prefix: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, of k and v, and of both prefixes (2, S, P, H, K); empty where they are not needed."""
    needs = needs_q, needs_own, needs_prefix
    if out is None or softmax is None:
        index = tiles, classes, first_rows
        dq, dk, dv, partial = tiles_bwd(dout, q, k, v, prefix_k, prefix_v, *index, needs=needs)
        dprefix = (
            sum_by_set(partial, _sets(prefix_k, tiles), len(prefix_k), q.dtype) if needs_prefix else q.new_empty(0)
        )
        return dq, dk, dv, dprefix
    packed = Packed(classes, longest, len(q) != len(k))
    saved = dout[None], q[None], k[None], v[None], prefix_k, prefix_v, _sets(prefix_k, classes), out[None], softmax
    dq, dk, dv, dprefix = prefix_attention_bwd(*saved, *needs, packed)
    own = k.shape if needs_own else (0,)
    return dq.view(q.shape if needs_q else 0), dk.view(own), dv.view(own), dprefix


@_fwd.register_fake
def _(q, k, v, prefix_k, prefix_v, tiles, classes, first_rows, longest):  # type: ignore[no-untyped-def]
    short = _fit_in_tiles(prefix_k, longest)
    return q.new_empty(q.shape), q.new_empty((0,) if short else (1, q.shape[1], 2, q.shape[0]), dtype=torch.float32)


@_bwd.register_fake
def _(  # type: ignore[no-untyped-def]
    dout,
    q,
    k,
    v,
    prefix_k,
    prefix_v,
    tiles,
    classes,
    first_rows,
    out,
    softmax,
    longest,
    needs_q,
    needs_own,
    needs_prefix,
):
    own = k.shape if needs_own else (0,)
    shapes = q.shape if needs_q else (0,), own, own, (2, *prefix_k.shape) if needs_prefix else (0,)
    return tuple(q.new_empty(shape) for shape in shapes)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.longest = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    short = _fit_in_tiles(tensors[3], ctx.longest)
    ctx.save_for_backward(*tensors, *((None, None) if short else output))


def _backward(ctx, dout, _):  # type: ignore[no-untyped-def]
    if dout is None:
        return (None,) * 9
    saved = ctx.saved_tensors
    gradients = needed_gradients(ctx.needs_input_grad[:5], lambda *needs: _bwd(dout, *saved, ctx.longest, *needs))
    return *gradients, None, None, None, None


_fwd.register_autograd(_backward, setup_context=_setup_context)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, tiles: PackedTiles) -> Tensor:
    """Causal attention of packed class rows over [the set's shared prefix ; the class's own rows so far].

    Args:
        q: (N, H, K) queries of all rows, already scaled; or (C, H, K), of each class's last row alone. K at most 128.
            Any strides, as have the others.
        k: (N, H, K) keys of all rows.
        v: (N, H, K) values.
        prefix_k: (S, P, H, K) keys in front of every class of a set.
        prefix_v: (S, P, H, K) values.
        tiles: the layout's, for this P, on the same device.
    Returns:
        (N, H, K) or (C, H, K), as q.
    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    given = {"q": q, "k": k, "v": v, "prefix_k": prefix_k, "prefix_v": prefix_v}
    rows, classes = len(tiles.first_rows), len(tiles.classes)
    fits = (
        q.ndim == 3
        and q.shape[-1] <= MAX_HEAD_DIM
        and k.shape == v.shape == (rows, *q.shape[1:])
        and len(q) in (rows, classes)
        and prefix_k.shape == prefix_v.shape == (tiles.sets, tiles.prefix, *q.shape[1:])
        and all(t.dtype == q.dtype and t.device == q.device for t in given.values())
        and all(t.device == q.device for t in tiles[:3])
        and q.dtype in DTYPES
    )
    if not fits:
        raise ValueError(
            f"{describe(**given)}; wanted k and v ({rows}, H, K), q ({rows}, H, K) or ({classes}, H, K), both prefixes "
            f"({tiles.sets}, {tiles.prefix}, H, K), of one dtype (float32, float16 or bfloat16), K at most "
            f"{MAX_HEAD_DIM}, all on the tiles' device {tiles.tiles.device}"
        )
    return _fwd(q, k, v, prefix_k, prefix_v, *tiles[:4])[0]


def workloads() -> Iterator[Workload]:
    """The text tower of B/16 at 1000 classes, its last layer, and heads whose columns a block does not fill."""
    layout = PackedLayout((((246, 3), (508, 4), (154, 5), (50, 6), (42, 8)),))
    tiles = PackedTiles.of(layout, 5)
    index = [t.to("meta") for t in tiles[:3]]
    for name, heads, width, pooled in (("B/16", 8, 64, False), ("pooled", 8, 64, True), ("demo", 4, 48, False)):
        for dtype in (torch.float32, torch.bfloat16):
            label = f"{name} {str(dtype).removeprefix('torch.')}"
            _, k, v = torch.empty(layout.num_rows, 3, heads, width, dtype=dtype, device="meta").unbind(1)
            queries = layout.num_classes if pooled else layout.num_rows
            q = torch.empty(queries, heads, width, dtype=dtype, device="meta")
            prefixes = torch.empty(1, 5, 2, heads, width, dtype=dtype, device="meta").unbind(2)
            inputs = q, k, v, *prefixes, *index
            yield f"forward {label}", lambda a=inputs: tiles_fwd(*a)
            for kind, needs in (("all", (True, True, True)), ("prompts", (False, False, True))):
                yield f"backward {kind} {label}", lambda a=inputs, n=needs: tiles_bwd(a[0], *a, needs=n)
