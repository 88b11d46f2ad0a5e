"""Groups of packed classes, which pass the text tower one after another.

A causal text knows no other text, so any group of classes has the features that it has among all. Packed rows are
sorted by length, so a group is a slice of them: its rows and constants are views, and its classes are about as long.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from upt_fast.engine.layout import BufferPlaces, PackedLayout, PackedTiles
from upt_fast.engine.towers.packing import PackedClasses, RepeatedClasses


class ClassGroup(NamedTuple):
    """Classes first ... end - 1 in packed order, once for each of some prompt sets."""

    first: int
    end: int
    packed: RepeatedClasses


def bounds(count: int, limit: int) -> list[tuple[int, int]]:
    """The first and the end of each of the fewest parts of at most limit that make up a count; equal to within one."""
    parts = max(1, -(-count // limit))
    ends = [count * (i + 1) // parts for i in range(parts)]
    return list(zip([0, *ends], ends, strict=False))


def shares(packed: PackedClasses, count: int) -> list[tuple[int, int]]:
    """The first class, in packed order, and the end of each of count parts that have about as many rows; some may be
    empty.

    Args:
        packed: classes of one set.
        count: at least 1.
    """
    rows = list(itertools.accumulate(_lengths(packed), initial=0))
    ends = [min(range(len(rows)), key=lambda c: abs(rows[c] * count - rows[-1] * (i + 1))) for i in range(count)]
    return list(zip([0, *ends], ends, strict=False))


def _lengths(packed: PackedClasses) -> list[int]:
    """Rows of each class, in packed order."""
    (runs,) = packed.layout.sets
    return [length for count, length in runs for _ in range(count)]


def split(packed: PackedClasses, limit: int, with_places: bool, of: tuple[int, int] | None = None) -> list[ClassGroup]:
    """Classes in groups of at most limit.

    Args:
        packed: classes of one set.
        limit: at least 1.
        with_places: whether ``places`` and ``tiles`` are needed.
        of: the first and the end of those classes, in packed order; None: all.
    """
    lengths = _lengths(packed)
    rows = list(itertools.accumulate(lengths, initial=0))
    start_of, end_of = (0, len(lengths)) if of is None else of
    found = []
    for first, end in ((start_of + a, start_of + b) for a, b in bounds(end_of - start_of, limit) if b > a):
        layout = PackedLayout((tuple((len(list(n)), length) for length, n in itertools.groupby(lengths[first:end])),))
        found.append(ClassGroup(first, end, _cut(packed, first, end, rows[first], rows[end], layout, with_places)))
    return found


def _cut(
    packed: PackedClasses, first: int, end: int, start: int, stop: int, layout: PackedLayout, with_places: bool
) -> RepeatedClasses:
    """Classes first ... end - 1, whose rows are start ... stop - 1."""
    prefix = 1 + packed.num_shared
    places = tiles = None
    if with_places:
        places = BufferPlaces(*(t.to(packed.rows.device) for t in BufferPlaces.of(layout, prefix)))
        tiles = PackedTiles.of(layout, prefix).to(packed.rows.device)
    order = packed.inverse.new_tensor(range(end - first))
    return RepeatedClasses(
        layout=layout,
        num_shared=packed.num_shared,
        num_inner=packed.num_inner,
        rows=packed.rows[start:stop],
        last_rows=packed.last_rows[first:end] - start,
        inner_rows=packed.inner_rows[first:end] - start,
        inner_sets=packed.inner_sets[first:end],  # which prompts each class reads does not change
        inverse=order,
        sos=packed.sos,
        prompt_positions=packed.prompt_positions,
        sos_kv=packed.sos_kv,
        first_qkv=None if packed.first_qkv is None else packed.first_qkv[:, start:stop],
        places=places,
        tiles=tiles,
    )


def in_given_order(groups: list[Tensor], packed: PackedClasses, dim: int = 0) -> Tensor:
    """What belongs to the classes of all groups as one tensor; in dimension dim classes come as the user gave them."""
    return torch.cat(groups, dim).index_select(dim, packed.inverse)
