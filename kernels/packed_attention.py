"""Causal attention of packed class rows over [prefix of their set ; own rows so far], several classes in a tile.

    out_i = sum_j softmax_j(q_i . k_j) v_j  over the P keys of the set's prefix and those of i's class up to i itself

Class names have 3 to 5 rows, so that a tile holds several whole classes of one set: their consecutive rows, and as keys
[prefix ; the same rows], 32 in all, of which row i sees the prefix and j = first(i) ... i, first(i) being where its
class begins. The prefix is read once per tile, where a buffer [prefix ; own rows] per class copies it for each: 2 P D
numbers per class written, read, and summed again in backward. PackedTiles (engine/layout.py) holds the division.

A tile has all keys of its queries and all queries of its own keys. So softmax is one pass, backward computes it again
and keeps nothing but the inputs, and one program gives every gradient of its rows. Those of the prefix leave it as fp32
sums over the tile, which a second kernel adds over the tiles of each set, in order: equal runs give equal bits.

Zero times NaN is NaN: a product would carry what is not finite in one class to the others of its tile. So numbers that
are not finite are multiplied as 0, and every score that they touch is NaN instead: their class is lost, no other.

Where the longest class and its prefix have more than 32 rows, or heads more than 64 columns (no CLIP's text tower), the
kernels of prefix_attention.py take all classes, each as a sequence of its own, block by block.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from upt_fast.kernels._attention import (
    LOG2E,
    MAX_HEAD_DIM,
    describe,
    dot_settings,
    empty_gradients,
    load_keys,
    load_rows,
    needed_gradients,
    rows_of_heads,
    store_rows,
    sum_by_set,
)
from upt_fast.kernels._launch import DTYPES, Workload, launch
from upt_fast.kernels.prefix_attention import attend

from upt_fast.engine.layout import TILE_ROWS, PackedLayout, PackedTiles

TILE_HEAD_DIM = 64


@triton.jit
def _finite(x):
    """x with 0 for what is not finite, and for each row NaN where it has such a number, else 0."""
    poison = tl.sum(x.to(tl.float32) * 0.0, axis=1)
    return tl.where(tl.abs(x) < float("inf"), x, 0.0).to(x.dtype), poison


@triton.jit
def _load_tile(
    q_ptr,
    k_ptr,
    v_ptr,
    prefix_k_ptr,
    prefix_v_ptr,
    tiles_ptr,
    classes_ptr,
    first_rows_ptr,
    stride_q_row,
    stride_k_row,
    stride_v_row,
    stride_prefix_k_row,
    stride_prefix_v_row,
    P,
    K,
    LAST_ONLY: tl.constexpr,
    UPCAST: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """This program's tile: queries and their mask, first and end row, who sees what; q, k, v, and who is poisoned."""
    tile = tiles_ptr + tl.program_id(0) * 5
    head = tl.program_id(1)
    first, end = tl.load(tile).to(tl.int64), tl.load(tile + 1).to(tl.int64)
    places = tl.arange(0, BLOCK)
    if LAST_ONLY:
        queries = tl.load(tile + 2).to(tl.int64) + places
        mask = queries < tl.load(tile + 3)
        rows = tl.load(classes_ptr + queries * 5 + 1, mask, other=1).to(tl.int64) - 1
    else:
        queries = first + places
        mask = queries < end
        rows = queries
    starts = tl.load(first_rows_ptr + rows, mask, other=0)
    keys = first + places - P
    sees = (places < P)[None, :] | (
        (places >= P)[None, :] & (keys[None, :] >= starts[:, None]) & (keys[None, :] <= rows[:, None])
    )
    prefix_row = tl.load(tile + 4).to(tl.int64) * P
    q, poison_q = _finite(load_rows(q_ptr + head * K, stride_q_row, queries, mask, K, UPCAST, EVEN_K, BLOCK_K))
    k, poison_k = _finite(
        load_keys(
            k_ptr + first * stride_k_row + head * K, prefix_k_ptr + prefix_row * stride_prefix_k_row + head * K,
            stride_k_row, stride_prefix_k_row, places, P, end - first, K, True, UPCAST, EVEN_K, BLOCK_K,
        )
    )  # fmt: skip
    v, poison_v = _finite(
        load_keys(
            v_ptr + first * stride_v_row + head * K, prefix_v_ptr + prefix_row * stride_prefix_v_row + head * K,
            stride_v_row, stride_prefix_v_row, places, P, end - first, K, True, UPCAST, EVEN_K, BLOCK_K,
        )
    )  # fmt: skip
    poison = poison_q[:, None] + (poison_k + poison_v)[None, :]
    return queries, mask, first, end, sees & mask[:, None], q, k, v, poison


@triton.jit
def _softmax(q, k, poison, sees):
    """Probabilities of the keys that each query sees; 0 for others."""
    s = tl.where(sees, tl.dot(q, tl.trans(k), input_precision="ieee") * LOG2E + poison, float("-inf"))
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
    stride_k_row,
    stride_v_row,
    stride_prefix_k_row,
    stride_prefix_v_row,
    P,
    H,
    K: tl.constexpr,
    LAST_ONLY: tl.constexpr,
    UPCAST: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    queries, mask, _, _, sees, q, k, v, poison = _load_tile(
        q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr, tiles_ptr, classes_ptr, first_rows_ptr,
        stride_q_row, stride_k_row, stride_v_row, stride_prefix_k_row, stride_prefix_v_row,
        P, K, LAST_ONLY, UPCAST, EVEN_K, BLOCK, BLOCK_K,
    )  # fmt: skip
    out = tl.dot(_softmax(q, k, poison, sees).to(v.dtype), v, input_precision="ieee")
    store_rows(out_ptr + tl.program_id(1) * K, H * K, queries, mask, out, K, BLOCK_K)


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
    stride_k_row,
    stride_v_row,
    stride_prefix_k_row,
    stride_prefix_v_row,
    stride_dout_row,
    P,
    H,
    K: tl.constexpr,
    NEEDS_Q: tl.constexpr,
    NEEDS_OWN: tl.constexpr,
    NEEDS_PREFIX: tl.constexpr,
    LAST_ONLY: tl.constexpr,
    UPCAST: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    head = tl.program_id(1)
    queries, mask, first, end, sees, q, k, v, poison = _load_tile(
        q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr, tiles_ptr, classes_ptr, first_rows_ptr,
        stride_q_row, stride_k_row, stride_v_row, stride_prefix_k_row, stride_prefix_v_row,
        P, K, LAST_ONLY, UPCAST, EVEN_K, BLOCK, BLOCK_K,
    )  # fmt: skip
    dout = load_rows(dout_ptr + head * K, stride_dout_row, queries, mask, K, UPCAST, EVEN_K, BLOCK_K)
    dout, poison_dout = _finite(dout)
    p = _softmax(q, k, poison + poison_dout[:, None], sees)
    places = tl.arange(0, BLOCK)
    own = (places >= P) & (first + places - P < end)
    at = (tl.program_id(0).to(tl.int64) * P * H + head) * K
    if NEEDS_OWN or NEEDS_PREFIX:
        dv = tl.dot(tl.trans(p.to(dout.dtype)), dout, input_precision="ieee")
        if NEEDS_OWN:
            store_rows(dv_ptr + head * K, H * K, first + places - P, own, dv, K, BLOCK_K)
        if NEEDS_PREFIX:
            values = partial_ptr + at + tl.num_programs(0).to(tl.int64) * P * H * K
            store_rows(values, H * K, places, places < P, dv, K, BLOCK_K)
    dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
    ds = tl.where(sees, p * (dp - tl.sum(p * dp, axis=1)[:, None]), 0.0).to(k.dtype)
    if NEEDS_Q:
        store_rows(dq_ptr + head * K, H * K, queries, mask, tl.dot(ds, k, input_precision="ieee"), K, BLOCK_K)
    if NEEDS_OWN or NEEDS_PREFIX:
        dk = tl.dot(tl.trans(ds), q, input_precision="ieee")
        if NEEDS_OWN:
            store_rows(dk_ptr + head * K, H * K, first + places - P, own, dk, K, BLOCK_K)
        if NEEDS_PREFIX:
            store_rows(partial_ptr + at, H * K, places, places < P, dk, K, BLOCK_K)


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
    settings = dot_settings(q)
    # tf32 would win nothing on tiles so small, and its operands fill the registers
    del settings["PRECISION"]
    return {
        **rows_of_heads(q=q, k=k, v=v, prefix_k=prefix_k, prefix_v=prefix_v),
        "tiles_ptr": tiles,
        "classes_ptr": classes,
        "first_rows_ptr": first_rows,
        "P": prefix_k.shape[1],
        "H": q.shape[1],
        "K": q.shape[2],
        "LAST_ONLY": len(q) != len(k),
        **settings,
        "BLOCK": TILE_ROWS,
    }


def packed_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    tiles: Tensor,
    classes: Tensor,
    first_rows: Tensor,
) -> Tensor:
    """:func:`packed_attention` where whole classes fit in tiles, which are those of PackedTiles."""
    out = q.new_empty(q.shape)
    arguments = _arguments(q, k, v, prefix_k, prefix_v, tiles, classes, first_rows)
    num_warps = 8 if q.dtype == torch.float32 else 4
    launch(_packed_attention_fwd_kernel, (len(tiles), q.shape[1]), out_ptr=out, **arguments, num_warps=num_warps)
    return out


def packed_attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    tiles: Tensor,
    classes: Tensor,
    first_rows: Tensor,
    needs_q: bool,
    needs_own: bool,
    needs_prefix: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, of k and v, and of both prefixes (2, S, P, H, K); empty where they are not needed."""
    arguments = _arguments(q, k, v, prefix_k, prefix_v, tiles, classes, first_rows) | rows_of_heads(dout=dout)
    dq, dk, dv = empty_gradients(q, k, needs_q, needs_own)
    P = prefix_k.shape[1] * needs_prefix
    partial = q.new_empty(2, len(tiles), P, *q.shape[1:], dtype=torch.float32)
    arguments |= {"dq_ptr": dq, "dk_ptr": dk, "dv_ptr": dv, "partial_ptr": partial}
    needs = {"NEEDS_Q": needs_q, "NEEDS_OWN": needs_own, "NEEDS_PREFIX": needs_prefix}
    launch(_packed_attention_bwd_kernel, (len(tiles), q.shape[1]), **arguments, **needs, num_warps=8)
    if not needs_prefix:
        return dq, dk, dv, q.new_empty(0)
    return dq, dk, dv, sum_by_set(partial, _sets(prefix_k, tiles), prefix_k)


def _sets(prefix_k: Tensor, tiles: Tensor) -> Tensor | None:
    return tiles[:, 4] if len(prefix_k) > 1 else None


_fwd = torch.library.custom_op("upt_fast::packed_attention_fwd", packed_attention_fwd, mutates_args=())
_bwd = torch.library.custom_op("upt_fast::packed_attention_bwd", packed_attention_bwd, mutates_args=())


@_fwd.register_fake
def _(q, *_):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape)


@_bwd.register_fake
def _(_, q, k, v, prefix_k, *others):  # type: ignore[no-untyped-def]
    needs_q, needs_own, needs_prefix = others[-3:]
    return *empty_gradients(q, k, needs_q, needs_own), q.new_empty((2, *prefix_k.shape) if needs_prefix else (0,))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, dout):  # type: ignore[no-untyped-def]
    compute = functools.partial(_bwd, dout, *ctx.saved_tensors)
    return *needed_gradients(ctx.needs_input_grad[:5], compute), *[None] * 3


_fwd.register_autograd(_backward, setup_context=_setup_context)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, tiles: PackedTiles) -> Tensor:
    """Causal attention of packed class rows over [the set's shared prefix ; the class's own rows so far].

    Args:
        q: (N, H, K) queries of all rows, already scaled; or (C, H, K), of each class's last row alone. K at most 128.
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
    if tiles.prefix + tiles.longest <= TILE_ROWS and q.shape[-1] <= TILE_HEAD_DIM:
        return _fwd(*given.values(), *tiles[:3])
    sets = _sets(prefix_k, tiles.classes)
    return attend(*given.values(), sets, tiles.classes, tiles.longest)[0]


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
            yield f"forward {label}", functools.partial(packed_attention_fwd, *inputs)
            yield f"backward all {label}", functools.partial(packed_attention_bwd, q, *inputs, True, True, True)
            yield f"backward prompts {label}", functools.partial(packed_attention_bwd, q, *inputs, False, False, True)
