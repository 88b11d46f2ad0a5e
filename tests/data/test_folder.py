"""Listing image folders."""

import os
from pathlib import Path

import pytest

from upt_fast.data import few_shot_split, read_rgb, scan_folder
from upt_fast.data.images import ImageDecodeError


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
    make_files(tmp_path, {"train/ant": 3, "train/bee": 3, "val/ant": 5, "val/bee": 6, "test/bee": 1, "notes/x": 1})
    with pytest.warns(UserWarning, match="not read: notes"):
        listing = scan_folder(tmp_path)
    assert listing.classnames == ("ant", "bee")
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
    listing = scan_folder(make_files(tmp_path, {"ant": 5, "bee": 2}))
    with pytest.warns(UserWarning, match=r"fewer than 3 images: bee \(2\)"):
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


@pytest.mark.parametrize("split_folders", [False, True], ids=["classes", "splits"])
def test_links_read_as_what_they_lead_to(tmp_path, split_folders):
    store = make_files(tmp_path / "store", {"x/cat": 2, "y/dog": 2, "held_out/cat": 1, "held_out/dog": 3})
    root = tmp_path / "root"
    top = root / "Train" if split_folders else root
    (top / "dog").mkdir(parents=True)
    (top / "cat").symlink_to(store / "x" / "cat")  # absolute
    for i in range(2):
        (top / "dog" / f"{i}.jpg").symlink_to(os.path.relpath(store / "y" / "dog" / f"{i}.jpg", top / "dog"))
    if split_folders:
        (root / "test").symlink_to(store / "held_out")
    (tmp_path / "link").symlink_to(root)
    listing = scan_folder(tmp_path / "link")
    prefix = "Train/" if split_folders else ""
    assert [item.key for item in listing.splits["train" if split_folders else "all"]] == [
        f"{prefix}{name}/{i}.jpg" for name in ("cat", "dog") for i in range(2)
    ]
    assert all(item.path.exists() for items in listing.splits.values() for item in items)
    assert (listing.folder_links, listing.image_links) == (2 if split_folders else 1, 2)
    if split_folders:
        assert len(listing.splits["test"]) == 4
    assert f"links followed: {listing.folder_links} to folders, 2 to images" in str(listing.describe_links())


def test_no_links_no_word(tmp_path):
    assert scan_folder(make_files(tmp_path, {"cat": 1, "dog": 1})).describe_links() is None


@pytest.mark.parametrize("classes_from", ["top", "leaf"])
@pytest.mark.parametrize("place", ["", "cat", "dog"])
@pytest.mark.parametrize("target", [".", "..", "../..", "/"])
def test_circles_are_not_followed(tmp_path, classes_from, target, place):
    """A link to any folder that it is in changes no image, wherever it stands."""
    root = make_files(tmp_path / "above" / "root", {"cat": 2, "dog": 1})
    link = root / place / "again"
    link.symlink_to(target)
    with pytest.warns(UserWarning, match=rf"1 link\(s\) lead back to a folder .* not followed: {link}$"):
        listing = scan_folder(root, classes_from)
    assert [item.key for item in listing.splits["all"]] == ["cat/0.jpg", "cat/1.jpg", "dog/0.jpg"]
    assert not listing.folder_links


def test_a_circle_by_way_of_another_folder(tmp_path):
    root = make_files(tmp_path / "root", {"cat": 1})
    other = make_files(tmp_path / "other", {"bird": 1})
    (root / "away").symlink_to(other)
    (other / "back").symlink_to(root)
    with pytest.warns(UserWarning, match=rf"1 link\(s\) lead back .* not followed: {root}/away/back$"):
        assert scan_folder(root, "leaf").folders == ("away/bird", "cat")


def test_links_to_each_other_lead_nowhere(tmp_path):
    root = make_files(tmp_path, {"cat": 1, "dog": 1})
    (root / "here").symlink_to("there")
    (root / "there").symlink_to("here")
    listing = scan_folder(root)
    assert listing.folders == ("cat", "dog")
    said = [reason.split(":")[0] for reason in listing.broken["all"]]
    assert said == [f"cannot read {root / name}" for name in ("here", "there")]


def test_two_groups_that_hold_each_other(tmp_path):
    root = make_files(tmp_path, {"pets/cat": 1, "farm/cow": 1})
    (root / "pets" / "more").symlink_to(root / "farm")
    (root / "farm" / "more").symlink_to(root / "pets")
    with pytest.raises(ValueError, match=r"farm/more and .*pets are the same folder|are the same folder of class"):
        scan_folder(root, "leaf")


@pytest.mark.parametrize("place", ["image", "class", "split", "leaf"])
def test_links_that_lead_nowhere_are_told(tmp_path, place):
    root = make_files(
        tmp_path, {"train/cat": 1, "train/dog": 1} if place == "split" else {"pets/cat": 1, "pets/dog": 1}
    )
    root = root if place in ("split", "leaf") else root / "pets"
    link = {
        "image": root / "cat" / "x.jpg",
        "class": root / "bird",
        "split": root / "test",
        "leaf": root / "pets" / "bird",
    }[place]
    link.symlink_to(tmp_path / "gone")
    listing = scan_folder(root, "leaf" if place == "leaf" else "top")
    if place == "image":
        assert link in [item.path for item in listing.splits["all"]]  # fails when it is read
        with pytest.raises(
            ImageDecodeError, match=r"cannot read .*x.jpg: the link leads to .*gone, which is not there"
        ):
            read_rgb(link)
        assert not listing.broken
    else:
        said = f"cannot read {link}: the link leads to {tmp_path / 'gone'}, which is not there"
        assert listing.broken == {"test" if place == "split" else "all": (said,)}
    assert listing.folders == (("pets/cat", "pets/dog") if place == "leaf" else ("cat", "dog"))


def test_a_root_that_leads_nowhere(tmp_path):
    (tmp_path / "data").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"the link leads to .*gone, which is not there"):
        scan_folder(tmp_path / "data")
    make_files(tmp_path / "splits", {"test/cat": 1})
    (tmp_path / "splits" / "train").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"no train folder; nothing to train on; cannot read .*train: the link leads"):
        few_shot_split(scan_folder(tmp_path / "splits"), 1, seed=1)
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "cat").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"no folders.*only/cat: the link leads to .*gone"):
        scan_folder(tmp_path / "only")
    (tmp_path / "group" / "pets").mkdir(parents=True)
    (tmp_path / "group" / "pets" / "cat").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"no folders.*pets/cat: the link leads to .*gone"):
        scan_folder(tmp_path / "group", "leaf")


@pytest.mark.parametrize(
    "names",
    [
        ("Train", "Val", "Test"),
        ("TRAINING", "valid", "Testing"),
        ("training_set", "Validation", "test set"),
        ("trainset", "validation-set", "TestSet"),
    ],
)
def test_split_folders_by_their_usual_names(tmp_path, names):
    listing = scan_folder(make_files(tmp_path, {f"{name}/{c}": 1 for name in names for c in ("cat", "dog")}))
    assert list(listing.splits) == ["train", "val", "test"]
    for name, items in zip(names, listing.splits.values(), strict=True):
        assert [item.key for item in items] == [f"{name}/cat/0.jpg", f"{name}/dog/0.jpg"]


@pytest.mark.parametrize("name", ["traintest", "sets", "trainer", "tests_done", "contest", "devset"])
def test_other_names_are_classes(tmp_path, name):
    assert scan_folder(make_files(tmp_path, {name: 1, "cat": 1})).folders == tuple(sorted((name, "cat")))


@pytest.mark.parametrize(
    ("files", "both"),
    [
        ({"train/cat": 1, "training/cat": 1}, ("train", "training")),
        ({"train/cat": 1, "val/cat": 1, "valid/cat": 1}, ("val", "valid")),
        ({"train/cat": 1, "test/cat": 1, "Test": 1}, ("Test", "test")),
    ],
)
def test_two_folders_for_one_split(tmp_path, files, both):
    make_files(tmp_path, files)
    if len(list(tmp_path.iterdir())) < 2:
        pytest.skip("this file system takes Test for test")
    with pytest.raises(ValueError, match=f"has {both[0]} and {both[1]}, which both mean {both[1][:4].rstrip('in')}"):
        scan_folder(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"cat": 1, "dog": 1, "test/cat": 1}, r"split folder\(s\) test beside class folders \(cat, dog\)"),
        ({"cat": 1, "dog": 1, "train/cat": 1}, r"split folder\(s\) train beside class folders \(cat\)"),
        ({"cat": 1, "dog": 1, "test": 2}, r"split folder\(s\) test beside class folders \(cat, dog\)"),
        ({"cat": 1, "Validation": 0}, r"split folder\(s\) Validation beside class folders \(cat\)"),
        ({"train": 1, "test": 1}, r"split folder\(s\) test, train, without class folders in them"),
    ],
    ids=["test", "train", "images", "empty", "no_classes"],
)
def test_split_folders_beside_class_folders(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        scan_folder(make_files(tmp_path, files))


def test_a_split_without_classes_beside_others_is_not_read(tmp_path):
    make_files(tmp_path, {"train/cat": 1, "train/dog": 1, "test": 3, "docs": 0})
    with pytest.warns(UserWarning, match=r"not read: docs, test \(test: no class folders in it\)"):
        assert list(scan_folder(tmp_path).splits) == ["train"]


def test_a_stray_image_makes_no_class_of_a_split(tmp_path):
    make_files(tmp_path, {"train": 1, "train/cat": 1, "train/dog": 1, "test/cat": 1})
    assert {split: len(items) for split, items in scan_folder(tmp_path).splits.items()} == {"train": 2, "test": 1}


@pytest.mark.parametrize("split", ["", "train/"])
def test_classes_in_groups(tmp_path, split):
    root = make_files(tmp_path, {f"{split}{c}": 2 for c in ("animal/cat", "animal/wild/fox", "car")})
    with pytest.raises(ValueError, match=r"class folders inside.*: animal of .*animal/cat, .*--classes-from leaf"):
        scan_folder(root)
    listing = scan_folder(root, "leaf")
    assert listing.folders == ("animal/cat", "animal/wild/fox", "car")
    assert listing.classnames == ("cat", "fox", "car")
    items = listing.splits["train" if split else "all"]
    assert [(item.key, item.label, item.classname) for item in items[::2]] == [
        (f"{split}animal/cat/0.jpg", 0, "cat"),
        (f"{split}animal/wild/fox/0.jpg", 1, "fox"),
        (f"{split}car/0.jpg", 2, "car"),
    ]
    with pytest.raises(ValueError, match=r"classes_from='middle'"):
        scan_folder(root, "middle")


def test_leaves_of_flat_folders_are_the_folders(tmp_path):
    root = make_files(tmp_path, {"cat": 2, "dog": 1})
    assert scan_folder(root, "leaf") == scan_folder(root)


def test_the_dataset_is_one_folder_further_down(tmp_path):
    make_files(tmp_path, {"archive/train/cat": 1, "archive/test/cat": 1})
    with pytest.raises(ValueError, match=r"If .*/archive is the dataset, pass that folder"):
        scan_folder(tmp_path)


def test_images_below_class_folders_are_told(tmp_path):
    root = make_files(tmp_path, {"cat": 1, "cat/more": 1, "dog": 1})
    with pytest.warns(UserWarning, match="below class folders are not read: cat/more"):
        assert len(scan_folder(root).splits["all"]) == 2
    with pytest.raises(ValueError, match=r"cat holds images and folders of images \(more\)"):
        scan_folder(root, "leaf")


def test_leaves_of_the_same_name(tmp_path):
    root = make_files(tmp_path, {"bird/crane": 1, "machine/crane": 1})
    with pytest.raises(ValueError, match=r"'bird/crane' and 'machine/crane' .* same class name"):
        scan_folder(root, "leaf")


def test_an_empty_leaf(tmp_path):
    with pytest.raises(ValueError, match=r"1 class folder\(s\) without an image: .*animal/dog"):
        scan_folder(make_files(tmp_path, {"animal/cat": 1, "animal/dog": 0}), "leaf")
