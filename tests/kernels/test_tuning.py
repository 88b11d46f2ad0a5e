"""The table of measured tiles: measured once, shared by processes, and no trouble when its file is."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import triton
from upt_fast.kernels import _tuning
from upt_fast.kernels._linear_tiles import TILES, Tile
from upt_fast.kernels._tuning import TileTable, table_path, tile_table

GPU = "A GPU (of 80 GB)"
CANDIDATES = TILES["half"][:3]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """An empty folder for tables, and nothing remembered."""
    monkeypatch.setenv("UPT_FAST_CACHE", str(tmp_path / "cache"))
    forget()
    return tmp_path / "cache"


def forget() -> None:
    """As in another process."""
    _tuning._opened.cache_clear()


def stored(gpu: str) -> dict[str, Tile]:
    """What another process would read."""
    return TileTable(gpu, table_path(gpu)).tiles


class Clock:
    """Times by tile, and which were asked for."""

    def __init__(self, *times: float):
        self.times, self.asked = dict(zip(CANDIDATES, times, strict=True)), []

    def __call__(self, tile: Tile) -> float:
        self.asked.append(tile)
        return self.times[tile]


def tuned(clock, key="linear_act bfloat16 8192x3072x768"):
    return tile_table(GPU).fastest(key, CANDIDATES, clock)


def test_the_fastest_is_measured_once(cache):
    clock = Clock(3.0, 1.0, 2.0)
    assert tuned(clock) == tuned(clock) == CANDIDATES[1]
    assert clock.asked == list(CANDIDATES)
    forget()
    assert tuned(clock) == CANDIDATES[1]
    assert clock.asked == list(CANDIDATES)
    assert tuned(other := Clock(1.0, 2.0, 3.0), "another shape") == CANDIDATES[0]
    assert other.asked == list(CANDIDATES)
    path = table_path(GPU)
    assert path == cache / "linear_gelu-A-GPU-of-80-GB.json"
    assert json.loads(path.read_text()) == {
        "gpu": GPU,
        "triton": triton.__version__,
        "tiles": {"linear_act bfloat16 8192x3072x768": [*CANDIDATES[1]], "another shape": [*CANDIDATES[0]]},
    }


def test_each_gpu_has_its_table():
    assert tile_table(GPU).fastest("key", CANDIDATES, Clock(3.0, 1.0, 2.0)) == CANDIDATES[1]
    assert tile_table("B").fastest("key", CANDIDATES, Clock(1.0, 2.0, 3.0)) == CANDIDATES[0]
    assert table_path("B") != table_path(GPU)


def test_where_the_table_is(monkeypatch, tmp_path):
    monkeypatch.delenv("UPT_FAST_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert table_path("B").parent == tmp_path / ".cache" / "upt_fast"


CORRUPT = {
    "empty": "",
    "cut": '{"gpu": "A", "tiles": {"k',
    "list": "[]",
    "no_tiles": '{"triton": "0"}',
    "tiles_list": f'{{"triton": "{triton.__version__}", "tiles": []}}',
    "short_tile": f'{{"triton": "{triton.__version__}", "tiles": {{"key": [128, 256]}}}}',
    "text_tile": f'{{"triton": "{triton.__version__}", "tiles": {{"key": [128, 256, 64, 8, "4"]}}}}',
    "no_text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("content", CORRUPT.values(), ids=CORRUPT)
def test_a_corrupt_table_is_ignored_and_replaced(content, cache):
    cache.mkdir()
    path = table_path(GPU)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.warns(UserWarning, match=f"{path.name} is ignored, tiles are measured anew: "):
        assert tuned(Clock(3.0, 1.0, 2.0), "key") == CANDIDATES[1]
    forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned(Clock(1.0, 2.0, 3.0), "key") == CANDIDATES[1]


@pytest.mark.parametrize(
    ("version", "tile"),
    [("0.0", CANDIDATES[0]), (triton.__version__, Tile(16, 16, 16, 1, 1))],
    ids=["another_triton", "no_candidate"],
)
@pytest.mark.filterwarnings("error")
def test_what_does_not_hold_any_more_is_measured_anew(version, tile, cache):
    cache.mkdir()
    table_path(GPU).write_text(json.dumps({"triton": version, "tiles": {"key": tile}}))
    assert tuned(Clock(3.0, 1.0, 2.0), "key") == CANDIDATES[1]
    forget()
    assert tuned(Clock(1.0, 2.0, 3.0), "key") == CANDIDATES[1]


def test_tiles_that_cannot_run():
    inf = float("inf")
    assert tuned(Clock(inf, inf, 2.0), "some") == CANDIDATES[2]
    assert tuned(Clock(inf, inf, inf), "none") == CANDIDATES[0]
    assert list(stored(GPU)) == ["some"]


def test_a_folder_that_cannot_be_written(cache):
    cache.write_text("a file")
    with pytest.warns(UserWarning, match="is not written, each process measures anew: "):
        assert tuned(Clock(3.0, 1.0, 2.0)) == CANDIDATES[1]
    assert tuned(Clock(1.0, 2.0, 3.0)) == CANDIDATES[1]  # this process remembers


PROCESS = """
import sys, time
from pathlib import Path
from upt_fast.kernels._linear_tiles import TILES
from upt_fast.kernels._tuning import tile_table

name, folder = sys.argv[1], Path(sys.argv[2])
(folder / name).touch()
while len(list(folder.iterdir())) < 2:
    time.sleep(0.01)
for n in range(20):
    tile = TILES["half"][n % 3]
    found = tile_table("B").fastest(f"{name} {n}", TILES["half"], lambda t: float(t != tile))
    assert found == tile
"""


@pytest.mark.filterwarnings("error")
def test_two_processes_lose_nothing(tmp_path, cache):
    """Each adds to the table what it measured, at the same time as the other."""
    (tmp_path / "ready").mkdir()
    command = [sys.executable, "-W", "error::UserWarning", "-c", PROCESS]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    running = [subprocess.Popen([*command, name, str(tmp_path / "ready")], env=env) for name in "ab"]
    assert [process.wait(timeout=300) for process in running] == [0, 0]
    table = stored("B")
    assert table == {f"{name} {n}": TILES["half"][n % 3] for name in "ab" for n in range(20)}
    assert {path.suffix for path in Path(cache).iterdir()} == {".json", ".lock"}
