"""The feature store: what it gives is what was put there, or nothing."""

import errno
import hashlib
import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch

from upt_fast.data import feature_store
from upt_fast.data.feature_store import SUFFIX, FeatureStore, open_store

ABOUT = {"weights": "a"}
MIB = 2**20


def names(*numbers: int) -> list[bytes]:
    return [hashlib.sha256(str(number).encode()).digest() for number in numbers]


def rows(*numbers: int, width: int = 8, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Features that are a function of the numbers."""
    return torch.stack([torch.randn(width, generator=torch.Generator().manual_seed(i)) for i in numbers]).to(dtype)


def packs(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*/*{SUFFIX}"))


@pytest.fixture
def store(tmp_path) -> FeatureStore:
    return FeatureStore(tmp_path / "store", MIB)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_what_is_kept_comes_back_to_the_bit(store, dtype):
    wanted = rows(1, 2, 3, dtype=dtype)
    store.section(ABOUT).write(names(1, 2), wanted[:2])
    store.section(ABOUT).write(names(3), wanted[2:])
    found = FeatureStore(store.folder, MIB).section(ABOUT).read(names(3, 1, 2, 4))
    assert set(found) == set(names(1, 2, 3))
    for name, row in zip(names(1, 2, 3), wanted, strict=True):
        assert found[name].dtype == dtype
        assert torch.equal(found[name], row)
    assert not list(store.folder.glob("*/.*"))


def test_keys_are_apart(store):
    store.section(ABOUT).write(names(1), rows(1))
    assert store.section({"weights": "b"}).read(names(1)) == {}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    """The pack of another key, under this one's name and under its own."""
    other = FeatureStore(path.parents[1], MIB).section({"weights": "b"})
    other.write(names(1, 2), rows(8, 9))
    (theirs,) = other.folder.glob(f"*{SUFFIX}")
    path.write_bytes(theirs.read_bytes())
    (path.parent / theirs.name).write_bytes(theirs.read_bytes())


@pytest.mark.parametrize("damage", [cut, flip, empty, foreign])
def test_a_damaged_or_foreign_pack_counts_as_absent(store, damage):
    section = store.section(ABOUT)
    section.write(names(1, 2), rows(1, 2))
    (path,) = packs(store.folder)
    section.write(names(3), rows(3))
    damage(path)
    found = section.read(names(1, 2, 3))
    assert set(found) == set(names(3))
    assert torch.equal(found[names(3)[0]], rows(3)[0])
    assert not path.exists()
    section.write(names(1, 2), rows(1, 2))
    assert set(section.read(names(1, 2))) == set(names(1, 2))


def _write_and_read(folder: Path, first: int) -> None:
    section = FeatureStore(folder, MIB).section(ABOUT)
    for i in range(first, first + 12):
        section.write(names(i % 8, i % 8 + 1), rows(i % 8, i % 8 + 1))
        for number in range(9):
            for row in section.read(names(number)).values():
                assert torch.equal(row, rows(number)[0])


def test_several_processes_write_the_same(store):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write_and_read, args=(store.folder, first)) for first in (0, 3, 5)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    found = store.section(ABOUT).read(names(*range(9)))
    assert all(torch.equal(found[name], row) for name, row in zip(names(*range(9)), rows(*range(9)), strict=True))
    assert len(packs(store.folder)) == 8
    assert not list(store.folder.glob("*/.*"))


def test_the_store_is_bounded(tmp_path):
    """What was used longest ago goes first."""
    store = FeatureStore(tmp_path, 10_000)
    section = store.section(ABOUT)
    for i in range(3):
        section.write(names(i), rows(i, width=500))
        (path,) = [path for path in packs(tmp_path) if time.time() - path.stat().st_mtime < 1000]
        os.utime(path, (i, i) if i else (1, 1))
    assert set(section.read(names(0))) == set(names(0))  # now it is the one used last
    for i in range(3, 8):
        section.write(names(i), rows(i, width=500))
    assert sum(path.stat().st_size for path in packs(tmp_path)) <= 10_000
    left = section.read(names(*range(8)))
    assert names(7)[0] in left
    assert names(1)[0] not in left
    section.write(names(9), rows(9, width=5000))  # more than all there may be
    assert names(9)[0] not in section.read(names(9))


def test_what_is_used_stays(tmp_path):
    store = FeatureStore(tmp_path, 5_000)
    section = store.section(ABOUT)
    for i, modified in ((0, 1), (1, 2)):
        section.write(names(i), rows(i, width=500))
        for path in packs(tmp_path):
            if path.stat().st_mtime > 1000:
                os.utime(path, (modified, modified))
    section.read(names(0))
    section.write(names(2), rows(2, width=500))
    assert set(section.read(names(0, 1, 2))) == set(names(0, 2))


def test_what_a_kill_left_is_removed(store):
    section = store.section(ABOUT)
    section.write(names(1), rows(1))
    old, new = section.folder / ".old.tmp", section.folder / ".new.tmp"
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (1, 1))
    section.write(names(2), rows(2))
    assert not old.exists()
    assert new.exists()
    assert set(section.read(names(1, 2))) == set(names(1, 2))


def test_a_folder_that_cannot_be_means_no_store(tmp_path, caplog):
    (tmp_path / "file").touch()
    section = FeatureStore(tmp_path / "file", MIB).section(ABOUT)
    assert section.read(names(1)) == {}
    section.write(names(1), rows(1))
    section.note("x", True)
    section.write(names(1), rows(1))
    assert section.fact("x") is None
    assert caplog.text.count("image features are not kept in") == 1


def test_a_full_disk_means_no_store(store, monkeypatch, caplog):
    def full(path: Path, content: bytes) -> int:
        path.open("wb").write(content[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    section = store.section(ABOUT)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        section.write(names(1), rows(1))
    assert "No space left on device" in caplog.text
    assert not list(section.folder.iterdir())
    section.write(names(1), rows(1))
    assert set(section.read(names(1))) == set(names(1))


def test_facts(store):
    section = store.section(ABOUT)
    assert section.fact("x") is None
    section.note("x", False)
    assert store.section(ABOUT).fact("x") is False
    assert store.section({"weights": "b"}).fact("x") is None
    for damaged in ("", "{", "[]", '{"about": {}, "facts": {"x": true}}', "null"):
        (section.folder / "about.json").write_text(damaged)
        assert section.fact("x") is None


def test_where_the_store_is(tmp_path, monkeypatch):
    monkeypatch.delenv(feature_store.VARIABLE, raising=False)
    monkeypatch.setenv("UPT_FAST_CACHE", str(tmp_path))
    assert open_store(None, 1.0).folder == tmp_path / "features"
    assert open_store("here", 0.5).limit_bytes == 2**29
    assert open_store("off", 1.0) is None
    assert open_store(None, 0.0) is None
    monkeypatch.setenv(feature_store.VARIABLE, str(tmp_path / "there"))
    assert open_store(None, 1.0).folder == tmp_path / "there"
    assert open_store("here", 1.0).folder == Path("here")
    monkeypatch.setenv(feature_store.VARIABLE, "off")
    assert open_store(None, 1.0) is None
