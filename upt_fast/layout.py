"""How the rows of packed classes divide into sets and classes."""

from __future__ import annotations

from dataclasses import dataclass


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
