"""How the rows of packed classes divide into sets and classes."""

from __future__ import annotations

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
            return torch.tensor(first_rows), torch.tensor(first_classes)


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
        return cls(*(torch.tensor(t, dtype=torch.int64) for t in (source, own_rows, first_rows, bounds)))
