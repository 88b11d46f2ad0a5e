"""How the rows of packed classes divide into sets and classes."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedLayout:
    """Rows of classes packed without padding, by prompt set and, within a set, by length.

    Attributes:
        sets: for each prompt set its runs of equal length, as (number of classes, rows per class), in order.
    """

    sets: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def num_classes(self) -> int:
        return sum(count for runs in self.sets for count, _ in runs)

    @property
    def num_rows(self) -> int:
        return sum(count * length for runs in self.sets for count, length in runs)

    @cached_property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """(C + 1,) each class's first row, (S + 1,) each set's first class, and the ends; int64 on the CPU."""
        lengths = [length for runs in self.sets for count, length in runs for _ in range(count)]
        classes = [sum(count for count, _ in runs) for runs in self.sets]
        first_rows, first_classes = (list(itertools.accumulate(n, initial=0)) for n in (lengths, classes))
        with torch.inference_mode(False):  # kept for passes with and without autograd
            return torch.tensor(first_rows, device="cpu"), torch.tensor(first_classes, device="cpu")


@functools.lru_cache(maxsize=64)
def buffer_ends(layout: PackedLayout, prefix: int, last_only: bool, device: str) -> tuple[Tensor, Tensor, int, int]:
    """Where each class's queries and keys end, as attention of sequences of several lengths wants it.

    Args:
        layout: of C classes.
        prefix: rows in front of each class's own, in buffers of keys.
        last_only: the queries are those of each class's last row.
        device: of the results.
    Returns:
        (C + 1,) int32, the first query of each class and their number; the same of keys; the most queries of a class,
        and the most keys.
    """
    lengths = [length for runs in layout.sets for count, length in runs for _ in range(count)]
    queries, keys = [1 if last_only else length for length in lengths], [prefix + length for length in lengths]
    with torch.inference_mode(False):  # kept for passes with and without autograd
        ends = (
            torch.tensor(list(itertools.accumulate(n, initial=0)), dtype=torch.int32, device=device)
            for n in (queries, keys)
        )
        return (*ends, max(queries), max(keys))  # type: ignore[return-value]


class BufferPlaces(NamedTuple):
    """Where packed rows and shared rows lie in a buffer [shared rows of its set ; own rows] for each of C classes."""

    source: Tensor  # (N + C P,) int64: for each buffer row the own row, or -1 - (set * P + shared row)
    own_rows: Tensor  # (N,) int64: for each own row its buffer row
    first_rows: Tensor  # (C,) int64: for each class its first buffer row
    bounds: Tensor  # (S + 1,) int64: classes bounds[s] ... bounds[s + 1] - 1 are set s's

    @classmethod
    def of(cls, layout: PackedLayout, prefix: int) -> BufferPlaces:
        """The places for P = prefix shared rows in front of every class."""
        source: list[int] = []
        own_rows: list[int] = []
        first_rows, bounds = [], [0]
        for s, runs in enumerate(layout.sets):
            for length in (length for count, length in runs for _ in range(count)):
                first_rows.append(len(source))
                source += [-1 - (s * prefix + p) for p in range(prefix)]
                first_own = len(own_rows)
                own_rows += range(len(source), len(source) + length)
                source += range(first_own, first_own + length)
            bounds.append(len(first_rows))
        return cls(*(torch.tensor(t, dtype=torch.int64, device="cpu") for t in (source, own_rows, first_rows, bounds)))


TILE_ROWS = 32


class PackedTiles(NamedTuple):
    """Packed classes divided into tiles of whole classes of one set.

    With the shared rows in front a tile has at most TILE_ROWS rows; a class that does not fit is a tile of its own.
    """

    tiles: Tensor  # (T, 5) int32: first row, end row, first class, end class, set
    classes: Tensor  # (C, 5) int32, the same with a class each
    first_rows: Tensor  # (N,) int32: for each row the first of its class
    longest: int  # rows of the longest class
    prefix: int  # P, shared rows in front of each class
    sets: int  # S

    @classmethod
    def of(cls, layout: PackedLayout, prefix: int) -> PackedTiles:
        """The tiles for P = prefix shared rows in front of every class."""
        tiles: list[list[int]] = []
        classes: list[list[int]] = []
        first_rows: list[int] = []
        for s, runs in enumerate(layout.sets):
            for length in (length for count, length in runs for _ in range(count)):
                row, number = len(first_rows), len(classes)
                first_rows += [row] * length
                classes.append([row, row + length, number, number + 1, s])
                if tiles and tiles[-1][4] == s and prefix + row + length - tiles[-1][0] <= TILE_ROWS:
                    tiles[-1][1], tiles[-1][3] = row + length, number + 1
                else:
                    tiles.append(list(classes[-1]))
        longest = max((end - first for first, end, *_ in classes), default=0)
        numbers, of_classes, first = (
            torch.tensor(t, dtype=torch.int32, device="cpu") for t in (tiles, classes, first_rows)
        )
        return cls(numbers.view(-1, 5), of_classes.view(-1, 5), first, longest, prefix, len(layout.sets))

    def to(self, device: torch.device | str) -> PackedTiles:
        """The same with tensors on a device."""
        tensors = {name: getattr(self, name).to(device) for name in ("tiles", "classes", "first_rows")}
        return self._replace(**tensors)
