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

import torch
from torch import Tensor
from upt_fast.kernels._attention import MAX_HEAD_DIM, describe, empty_gradients, needed_gradients
from upt_fast.kernels._launch import DTYPES, Workload
from upt_fast.kernels._packed_attention_bwd import packed_attention_bwd, sets_of
from upt_fast.kernels._packed_attention_fwd import packed_attention_fwd
from upt_fast.kernels.prefix_attention import attend

from upt_fast.engine.layout import TILE_ROWS, PackedLayout, PackedTiles

TILE_HEAD_DIM = 64

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
    sets = sets_of(prefix_k, tiles.classes)
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
