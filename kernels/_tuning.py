"""Tiles that were measured: the fastest of each shape class on a GPU, in a file that processes share.

The files are ``linear_gelu-<GPU>.json`` in ``$UPT_FAST_CACHE``, by default ``~/.cache/upt_fast``.
"""

from __future__ import annotations

import fcntl
import functools
import json
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import triton
from upt_fast.kernels._linear_tiles import Tile

from upt_fast.common.files import cache_folder, write_text


class TileTable:
    """The fastest tiles on a GPU.

    Args:
        gpu: its name.
        path: of the file.
    Attributes:
        tiles: those that are known, by what runs: kernel, dtype, shape class.
    """

    def __init__(self, gpu: str, path: Path) -> None:
        self.gpu, self.path = gpu, path
        self.tiles = self._read()

    def fastest(self, key: str, tiles: Sequence[Tile], measure: Callable[[Tile], float]) -> Tile:
        """The fastest of some tiles: from the table, or measured now and kept there.

        Args:
            key: what runs.
            tiles: to choose from.
            measure: takes a tile and returns its time; infinity where it cannot run.
        """
        if self.tiles.get(key) not in tiles:  # absent, or no candidate any more
            times = {tile: measure(tile) for tile in tiles}
            self.tiles[key] = min(times, key=times.__getitem__)
            if times[self.tiles[key]] < float("inf"):
                self._write(key)
        return self.tiles[key]

    def _read(self) -> dict[str, Tile]:
        """What was measured with this triton; nothing, and a warning, where the file is not good."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
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
            warnings.warn(f"{self.path} is ignored, tiles are measured anew: {error}", stacklevel=2)
            return {}

    def _write(self, key: str) -> None:
        """Add what was measured to the file; other processes may do the same."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.with_suffix(".lock").open("w") as lock:
                fcntl.lockf(lock, fcntl.LOCK_EX)
                table = {"gpu": self.gpu, "triton": triton.__version__, "tiles": self._read() | {key: self.tiles[key]}}
                write_text(self.path, json.dumps(table, indent=1) + "\n")
        except OSError as error:
            warnings.warn(f"{self.path} is not written, each process measures anew: {error}", stacklevel=2)


def table_path(gpu: str) -> Path:
    """Where the tiles that were measured on a GPU of this name are kept."""
    return cache_folder() / f"linear_gelu-{re.sub(r'[^A-Za-z0-9]+', '-', gpu).strip('-')}.json"


def tile_table(gpu: str) -> TileTable:
    """The table of GPUs of this name, read once."""
    return _opened(gpu, table_path(gpu))


@functools.cache
def _opened(gpu: str, path: Path) -> TileTable:
    return TileTable(gpu, path)
