"""Class names -> packed rows: what of each class's 77-token text must run per class, without padding.

In a causal tower a row depends on earlier rows only. So everything after the pooled row is dropped, the start token's
keys and values are constants, prompts in front of the name are the same for all classes of a set, and each class adds
only its own rows: name, full stop, end token (and the prompts behind the name, for class_token_position "middle" and
"front"). Classes are sorted by set and number of rows, so that runs of equal length are neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from upt_fast.clip.tokens import ClassTokens, real_numbers
from upt_fast.engine.autograd import composing
from upt_fast.engine.layout import BufferPlaces, PackedLayout, PackedTiles


class PackedClasses(nn.Module):
    """The packed rows of C classes; all tensors are constants that move with the module and are never saved.

    Args:
        tokens: token ids of the classes, with n_text placeholders after the first token.
        n_text: prompt tokens of each class.
        class_token_position: "end", "middle" or "front".
        token_embedding: (V, d).
        positional_embedding: (T, d).
        dtype: dtype of the rows.
        class_sets: the prompt set of each class; None: all in set 0.
        per_class: each class has prompts of its own, which are then rows of that class.
    """

    def __init__(
        self,
        tokens: ClassTokens,
        n_text: int,
        class_token_position: str,
        token_embedding: Tensor,
        positional_embedding: Tensor,
        dtype: torch.dtype,
        class_sets: Sequence[int] | None = None,
        per_class: bool = False,
    ) -> None:
        super().__init__()
        self.tokens, self.n_text, self.class_token_position = tokens, n_text, class_token_position
        # prompts in front of the name are shared by the classes, unless each has its own; the others are rows of each
        num_before = {"end": n_text, "middle": n_text // 2, "front": 0}[class_token_position]
        self.num_shared = 0 if per_class else num_before
        self.per_class = per_class
        num_inner, inner_before = n_text - self.num_shared, num_before - self.num_shared
        sets = [0] * len(tokens.pooled) if class_sets is None else list(class_sets)
        lengths = [pooled - self.num_shared for pooled in tokens.pooled]  # rows from the name to the pooled row
        order = sorted(range(len(lengths)), key=lambda c: (sets[c], lengths[c]))

        runs: list[list[list[int]]] = [[] for _ in range(max(sets) + 1)]
        with real_numbers():
            ids: list[list[int]] = tokens.ids.tolist()
        rows, inner_rows = [], []
        num_rows = 0
        for c in order:
            run = runs[sets[c]]
            if not run or run[-1][1] != lengths[c]:
                run.append([0, lengths[c]])
            run[-1][0] += 1
            text = token_embedding[torch.tensor(ids[c][1 + n_text :], device=token_embedding.device)].to(dtype)
            name = tokens.name_lengths[c] if num_inner > inner_before else 0
            hole = text.new_zeros(num_inner, text.shape[1])
            row = torch.cat([hole[:inner_before], text[:name], hole[inner_before:], text[name:]])[: lengths[c]]
            first = 1 + self.num_shared
            rows.append(row + positional_embedding[first : first + lengths[c]].to(dtype))
            inner_rows += [[num_rows + j + (name if j >= inner_before else 0) for j in range(num_inner)]]
            num_rows += lengths[c]

        device = token_embedding.device
        self.layout = PackedLayout(tuple(tuple((n, length) for n, length in run) for run in runs))
        self.num_inner = num_inner
        last_rows = torch.tensor([lengths[c] for c in order], device=device).cumsum(0) - 1
        self._constant("rows", torch.cat(rows))
        self._constant("last_rows", last_rows)
        self._constant("inner_rows", torch.tensor(inner_rows, device=device, dtype=torch.int64))
        self._constant("inner_sets", torch.tensor(order if per_class else [sets[c] for c in order], device=device))
        self._constant("inverse", torch.tensor(order, device=device).argsort())
        self._constant("sos", (token_embedding[ids[0][0]].to(dtype) + positional_embedding[0].to(dtype))[None])
        self._constant("prompt_positions", positional_embedding[1 : 1 + self.num_shared].to(dtype))
        for field, places in BufferPlaces.of(self.layout, 1 + self.num_shared)._asdict().items():
            self._constant(f"places_{field}", places.to(device))
        tiles = PackedTiles.of(self.layout, 1 + self.num_shared)
        self._tile_sizes = tiles[3:]
        for field, tensor in zip(tiles._fields, tiles[:3], strict=False):
            self._constant(f"tiles_{field}", tensor.to(device))
        # filled by the text tower: keys and values of the start token in every layer, layer 0's q, k, v of the rows
        self._constant("sos_kv", None)
        self._constant("first_qkv", None)
        self._repeated: dict[int, RepeatedClasses] = {}

    rows: Tensor  # (N, d) embeddings plus positions; rows that prompts will fill hold the position alone
    last_rows: Tensor  # (C,) each class's pooled row
    inner_rows: Tensor  # (C, num_inner) rows that prompts fill
    inner_sets: Tensor  # (C,) prompt set of each class, or with per_class its place among all classes
    inverse: Tensor  # (C,) packed place of each class, in the order the user gave
    sos: Tensor  # (1, d)
    prompt_positions: Tensor  # (num_shared, d)
    tiles_tiles: Tensor  # as in PackedTiles
    tiles_classes: Tensor
    tiles_first_rows: Tensor
    sos_kv: Tensor | None  # (L, 2, H, K)
    first_qkv: Tensor | None  # (3, N, H, K)

    @property
    def places(self) -> BufferPlaces:
        """Where the rows of [start token and shared prompts ; own rows] of all classes lie in one buffer."""
        return BufferPlaces(*(getattr(self, f"places_{name}") for name in BufferPlaces._fields))

    @property
    def tiles(self) -> PackedTiles:
        """The classes behind [start token and shared prompts], by tiles."""
        return PackedTiles(self.tiles_tiles, self.tiles_classes, self.tiles_first_rows, *self._tile_sizes)

    def repeated(self, sets: int, with_places: bool) -> PackedClasses | RepeatedClasses:
        """The same classes once for each of several prompt sets, set by set; those of the last two numbers are kept.

        Args:
            sets: S, at least 1.
            with_places: whether ``places`` and ``tiles`` are needed.
        """
        assert len(self.layout.sets) == 1
        assert not self.per_class
        if sets == 1:
            return self
        # a compiled graph keeps them; what a transform sees is not to be kept
        if torch.compiler.is_compiling() or composing.composes(self.rows):
            return _repeat(self, sets, with_places)
        if sets not in self._repeated:
            if len(self._repeated) > 1:
                del self._repeated[next(iter(self._repeated))]
            self._repeated[sets] = _repeat(self, sets, with_places)
        return self._repeated[sets]

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        self._repeated.clear()
        return super()._apply(fn, recurse)

    def _constant(self, name: str, value: Tensor | None) -> None:
        self.register_buffer(name, value, persistent=False)


class RepeatedClasses(NamedTuple):
    """:class:`PackedClasses` once for each of several prompt sets."""

    layout: PackedLayout
    num_shared: int
    num_inner: int
    rows: Tensor
    last_rows: Tensor
    inner_rows: Tensor
    inner_sets: Tensor
    inverse: Tensor
    sos: Tensor
    prompt_positions: Tensor
    sos_kv: Tensor | None
    first_qkv: Tensor | None
    places: BufferPlaces | None
    tiles: PackedTiles | None

    def repeated(self, sets: int, with_places: bool) -> RepeatedClasses:
        """The same once for each of several prompt sets, set by set; nothing is kept."""
        return self if sets == 1 else _repeat(self, sets, with_places)


def _repeat(packed: PackedClasses | RepeatedClasses, sets: int, with_places: bool) -> RepeatedClasses:
    num_rows, num_classes = len(packed.rows), len(packed.last_rows)

    def offset(index: Tensor, step: int) -> Tensor:
        steps = step * torch.arange(sets, device=index.device).view(-1, *[1] * index.ndim)
        return (index + steps).flatten(0, 1)

    layout = PackedLayout(packed.layout.sets * sets)
    places = tiles = None
    if with_places:
        of = BufferPlaces.of(layout, 1 + packed.num_shared)
        places = BufferPlaces(*(t.to(packed.rows.device) for t in of))
        tiles = PackedTiles.of(layout, 1 + packed.num_shared).to(packed.rows.device)
    return RepeatedClasses(
        layout=layout,
        num_shared=packed.num_shared,
        num_inner=packed.num_inner,
        rows=packed.rows.repeat(sets, 1),
        last_rows=offset(packed.last_rows, num_rows),
        inner_rows=offset(packed.inner_rows, num_rows),
        inner_sets=offset(packed.inner_sets, 1),
        inverse=offset(packed.inverse, num_classes),
        sos=packed.sos,
        prompt_positions=packed.prompt_positions,
        sos_kv=packed.sos_kv,
        # layer 0 is computed for one set and shared by all
        first_qkv=None if packed.first_qkv is None else packed.first_qkv.repeat(1, sets, 1, 1),
        places=places,
        tiles=tiles,
    )
