"""Listing image folders."""

import os
from pathlib import Path

import pytest

from upt_fast.data import few_shot_split, scan_folder


def make_files(root: Path, files: dict[str, int]) -> Path:
    for folder, count in files.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (root / folder / f"{i}.jpg").touch()
    return root


def test_class_folders(tmp_path):
    make_files(tmp_path, {"dog": 2, "cat_big": 1})
    for name in ("notes.txt", ".DS_Store", "cat_big/._0.jpg", "cat_big/a.JPEG", "cat_big/readme.md"):
        (tmp_path / name).touch()
    (tmp_path / ".git").mkdir()
    listing = scan_folder(tmp_path)
    assert listing.classnames == ("cat_big", "dog")
    assert not listing.has_split_folders
    assert [item.key for item in listing.splits["all"]] == ["cat_big/0.jpg", "cat_big/a.JPEG", "dog/0.jpg", "dog/1.jpg"]
    assert [item.label for item in listing.splits["all"]] == [0, 0, 1, 1]


def test_split_folders(tmp_path):
    make_files(tmp_path, {"train/a": 3, "train/b": 3, "val/a": 5, "val/b": 6, "test/b": 1, "notes/x": 1})
    with pytest.warns(UserWarning, match="not read: notes"):
        listing = scan_folder(tmp_path)
    assert listing.classnames == ("a", "b")
    split = few_shot_split(listing, 2, seed=1)
    assert (len(split.train), len(split.val), len(split.test), split.test_name) == (4, 4, 1, "test")
    assert {item.key.split("/")[0] for item in split.train} == {"train"}
    assert len(few_shot_split(listing, 3, seed=1).val) == 6  # min(shots, 4) per class
    everything = few_shot_split(listing, None, seed=1)
    assert (len(everything.train), len(everything.val)) == (6, 11)


def test_a_class_called_train_is_a_class(tmp_path):
    make_files(tmp_path, {"train": 2, "bus": 2})
    assert scan_folder(tmp_path).classnames == ("bus", "train")


def test_the_rest_is_the_test_set(tmp_path):
    listing = scan_folder(make_files(tmp_path, {"a": 5, "b": 2}))
    with pytest.warns(UserWarning, match=r"fewer than 3 images: b \(2\)"):
        split = few_shot_split(listing, 3, seed=1)
    assert (len(split.train), len(split.test), split.test_name) == (5, 2, "rest")
    assert not {item.key for item in split.train} & {item.key for item in split.test}
    with (
        pytest.warns(UserWarning, match="fewer than 9"),
        pytest.raises(ValueError, match=r"shots=9.*leaves none to test"),
    ):
        few_shot_split(listing, 9, seed=1)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no folders"),
        ({"a": 1, "b": 0, "c": 0}, r"2 class folder\(s\) without an image: .*/b, .*/c"),
        ({"train/a": 1, "test/b": 1}, "test has classes that .*train has not: b"),
        ({"a_b": 1, "a b": 1}, "'a b' and 'a_b' .* same class name"),
    ],
    ids=["empty", "empty_class", "unknown_class", "same_name"],
)
def test_bad_folders(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        scan_folder(make_files(tmp_path, files))


def test_bad_roots(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is not a directory"):
        scan_folder(tmp_path / "file")
    with pytest.raises(ValueError, match="does not exist"):
        scan_folder(tmp_path / "nowhere")


@pytest.mark.parametrize("what", ["image", "class", "split"])
def test_links_out_of_the_dataset_are_refused(tmp_path, what):
    outside = make_files(tmp_path / "outside", {"c": 1, "c/deep": 1})
    root = make_files(tmp_path / "root", {"train/a": 1, "train/b": 1} if what == "split" else {"a": 1, "b": 1})
    link, target = {
        "image": (root / "a" / "x.jpg", outside / "c" / "0.jpg"),
        "class": (root / "c", outside / "c"),
        "split": (root / "test", outside / "c"),
    }[what]
    link.symlink_to(target)
    with pytest.raises(ValueError, match="outside of the dataset"):
        scan_folder(root)


def test_links_inside_and_a_linked_root_are_fine(tmp_path):
    root = make_files(tmp_path / "root", {"a": 1, "b": 1})
    (root / "a" / "1.jpg").symlink_to(os.path.join("..", "b", "0.jpg"))
    (tmp_path / "link").symlink_to(root)
    assert len(scan_folder(tmp_path / "link").splits["all"]) == 3
