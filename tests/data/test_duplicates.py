"""Images with equal bytes in two classes, or in training and test."""

import itertools
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upt_fast.data import FewShotSplit, ImageItem, drop_test_copies, find_duplicates
from upt_fast.data import duplicates as module

CLASSES = ("cat", "dog")


def make_split(root: Path, files: dict[str, bytes]) -> FewShotSplit:
    """Files by "<split>/<class>/<name>"."""
    parts: dict[str, list[ImageItem]] = {"train": [], "val": [], "test": []}
    for key, data in files.items():
        split, classname, _ = key.split("/")
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).write_bytes(data)
        parts[split].append(ImageItem(root / key, key, CLASSES.index(classname), classname))
    return FewShotSplit(tuple(parts["train"]), tuple(parts["val"]), tuple(parts["test"]), "test")


def test_both_kinds(tmp_path):
    split = make_split(
        tmp_path,
        {
            "train/cat/a": b"same cat",
            "train/cat/b": b"same cat",  # twice in one class of training: nothing to tell
            "train/dog/a": b"a dog, or a cat?",
            "val/cat/a": b"a dog, or a cat?",
            "test/cat/a": b"same cat",
            "test/cat/b": b"other cat",
            "test/dog/a": b"one of the test",
            "test/dog/b": b"one of the test",
        },
    )
    found = find_duplicates(split)
    assert found.keys() == {
        "two_classes": [["train/dog/a", "val/cat/a"]],
        "train_test": [["test/cat/a", "train/cat/a", "train/cat/b"]],
    }
    assert [item.key for item in found.test_copies] == ["test/cat/a"]
    assert found.describe() == {
        "two_classes": "2 images are the same file in more than one class: train/dog/a = val/cat/a",
        "train_test": "1 test image(s) are copies of training images: test/cat/a = train/cat/a = train/cat/b",
    }
    kept = drop_test_copies(split, found)
    assert [item.key for item in kept.test] == ["test/cat/b", "test/dog/a", "test/dog/b"]
    assert (kept.train, kept.val, kept.test_name) == (split.train, split.val, split.test_name)
    assert find_duplicates(kept).keys()["train_test"] == []


def test_none(tmp_path):
    found = find_duplicates(make_split(tmp_path, {"train/cat/a": b"1", "train/dog/a": b"2", "test/cat/a": b"3"}))
    assert found == module.Duplicates()
    assert found.describe() == {}


def test_all_of_the_test(tmp_path):
    split = make_split(tmp_path, {"train/cat/a": b"1", "train/dog/a": b"2", "test/cat/a": b"1", "test/dog/b": b"2"})
    with pytest.raises(ValueError, match="all 2 test images are copies of training images, so none is left"):
        drop_test_copies(split, find_duplicates(split))


@settings(deadline=None, max_examples=60)
@given(
    files=st.lists(
        st.tuples(
            st.sampled_from(("train", "val", "test")),
            st.sampled_from(CLASSES),
            st.sampled_from((0, 1, 2500, 4000)),  # bytes behind those that differ, if any
            st.sampled_from((b"", b"x", b"y")),
            st.booleans(),  # in front of them
        ),
        max_size=12,
    )
)
def test_what_comparing_all_pairs_finds(tmp_path_factory, files):
    named = {
        f"{split}/{name}/{i}": b"." * (size * front) + differs + b"." * size
        for i, (split, name, size, differs, front) in enumerate(files)
    }
    split = make_split(tmp_path_factory.mktemp("files"), named)
    found = find_duplicates(split)
    pairs = [pair for pair in itertools.combinations(named, 2) if named[pair[0]] == named[pair[1]] != b""]
    for kind, column in (("two_classes", 1), ("train_test", 0)):
        wanted = {"train", "test"} if kind == "train_test" else set(CLASSES)
        crossing = {frozenset(pair) for pair in pairs if {key.split("/")[column] for key in pair} == wanted}
        groups = found.keys()[kind]
        inside = {frozenset(pair) for group in groups for pair in itertools.combinations(group, 2)}
        assert crossing <= inside
        assert all(len({named[key] for key in group}) == 1 for group in groups)
        assert all(wanted <= {key.split("/")[column] for key in group} for group in groups)


def test_little_is_read(tmp_path, monkeypatch):
    """Sizes that occur once, or in one class of one split, are not opened; whole files only where pieces agree."""
    files = {f"train/{name}/{i}": bytes([i]) * (5000 + i) for name in CLASSES[:1] for i in range(5)}
    files |= {"train/cat/x": b"." * 7000, "train/cat/y": b"." * 7000}  # equal, but it does not matter
    files |= {"train/cat/z": b"a" * 9000, "test/cat/z": b"b" * 9000}  # of equal size
    files |= {"train/dog/w": b"w" * 9999, "test/dog/w": b"w" * 9999}
    split = make_split(tmp_path, files)
    read: dict[str, list[str]] = {"_pieces": [], "digest_file": []}
    for name, paths in read.items():
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda path, real=real, paths=paths: paths.append(path.name) or real(path))
    found = find_duplicates(split)
    assert found.keys()["train_test"] == [["test/dog/w", "train/dog/w"]]
    assert sorted(read["_pieces"]) == ["w", "w", "z", "z"]
    assert read["digest_file"] == ["w", "w"]


def test_one_file_under_two_names_is_not_read(tmp_path, monkeypatch):
    split = make_split(tmp_path, {"train/cat/a": b"1", "train/dog/a": b"12", "test/cat/a": b"3", "test/dog/a": b"4"})
    for name, source in (("test/cat/a", "train/cat/a"), ("test/dog/a", "train/dog/a")):
        (tmp_path / name).unlink()
        if "cat" in name:
            (tmp_path / name).symlink_to(tmp_path / source)
        else:
            os.link(tmp_path / source, tmp_path / name)
    for name in ("_pieces", "digest_file"):
        monkeypatch.setattr(module, name, lambda path: pytest.fail(f"{path} was read"))
    assert len(find_duplicates(split).test_copies) == 2


def test_what_cannot_be_read_is_passed_over(tmp_path):
    files = {f"{split}/{name}/{i}": b"" for split in ("train", "test") for name in CLASSES for i in range(2)}
    split = make_split(tmp_path, files)
    (tmp_path / "train/cat/0").unlink()
    (tmp_path / "test/cat/0").unlink()
    (tmp_path / "test/cat/0").symlink_to(tmp_path / "gone")
    os.truncate(tmp_path / "train/dog/0", 0)  # empty files are no images
    (tmp_path / "test/dog/1").unlink()
    os.mkfifo(tmp_path / "test/dog/1")
    assert find_duplicates(split) == module.Duplicates()
