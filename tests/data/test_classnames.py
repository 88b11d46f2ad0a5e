"""Class names: what means nothing, WordNet's, and those of files."""

import json
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upt_fast.data import scan_folder
from upt_fast.data.classnames import given_names, means_nothing, plain_name
from upt_fast.data.wordnet import lemmas_of, wordnet_names

FOLDERS = ("n01440764", "0", "red_fox", "café")
NAMES = ("tench", "zero", "red fox", "a café")
PAIRS = dict(zip(FOLDERS, NAMES, strict=True))


def make_classes(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "0.jpg").touch()
    return root


def warnings_of(root: Path, classnames=None) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scan_folder(root, classnames=classnames)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    "name", ["n01440764", "0", "007", "747", "a", "Z", "é", "class_3", "Class 12", "label7", "1.5"]
)
def test_names_that_mean_nothing(name):
    assert means_nothing(name)


@pytest.mark.parametrize(
    "name", ["cat", "ox", "7up", "boeing_747", "n0144", "class", "猫", "3d printer", "nine", "id_card"]
)
def test_names_that_mean_something(name):
    assert not means_nothing(name)


def test_meaningless_folders_are_told_with_three_examples(tmp_path):
    root = make_classes(tmp_path, "0", "1", "10", "2", "b", "cat", "n99999999")
    (said,) = warnings_of(root)
    assert f"6 of 7 class folders of {root} have names that mean nothing to CLIP: '0', '1', '10' and 3 more" in said
    assert "--classnames FILE" in said
    assert scan_folder(root, classnames="folders").classnames[:2] == ("0", "1")
    assert warnings_of(root, "folders") == []
    assert (
        warnings_of(root, {folder: f"thing {folder}" for folder in scan_folder(root, classnames="folders").folders})
        == []
    )
    assert warnings_of(make_classes(tmp_path / "fine", "cat", "dog")) == []


def test_wordnet_ids_are_read_by_name(tmp_path):
    root = make_classes(tmp_path, "n01440764", "n01443537", "n01484850", "n02102040", "dog")
    (said,) = warnings_of(root)
    assert "4 class folder(s)" in said
    assert "n01440764 is 'tench', n01443537 is 'goldfish', n01484850 is 'great white shark';" in said
    with pytest.warns(UserWarning, match="WordNet ids"):
        listing = scan_folder(root)
    assert listing.folders == ("dog", "n01440764", "n01443537", "n01484850", "n02102040")
    assert listing.classnames == ("dog", "tench", "goldfish", "great white shark", "English springer")
    assert [(item.classname, item.label) for item in listing.splits["all"]] == [
        (name, label) for label, name in enumerate(listing.classnames)
    ]
    assert scan_folder(root, classnames="folders").classnames == listing.folders


def test_wordnet_names_are_told_apart():
    crane_bird, crane_machine, cardigan_dog, cardigan_wool = "n02012849", "n03126707", "n02113186", "n02963159"
    names = wordnet_names([crane_bird, crane_machine, cardigan_dog, cardigan_wool, "n99999999", "cat"])
    assert list(names) == [crane_bird, crane_machine, cardigan_dog, cardigan_wool]
    assert names[crane_bird].startswith("crane, large long-necked wading bird")
    assert names[crane_machine].startswith("crane, lifts and moves heavy objects")
    assert names[cardigan_dog] == "Cardigan Welsh corgi"
    assert names[cardigan_wool].startswith("cardigan, knitted jacket")
    assert wordnet_names([crane_bird]) == {crane_bird: "crane"}
    assert lemmas_of("n02113186") == ("Cardigan", "Cardigan Welsh corgi")


def test_names_of_all_of_imagenet():
    timm_data = pytest.importorskip("timm.data")
    ids = timm_data.ImageNetInfo("imagenet-1k").label_names()
    names = wordnet_names(ids)
    assert list(names) == list(ids)
    assert len({name.casefold() for name in names.values()}) == 1000
    assert not any(means_nothing(name) for name in names.values())


def test_without_timm_s_file_ids_mean_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("upt_fast.data.wordnet._table", lambda kind: {})
    root = make_classes(tmp_path, "n01440764", "n01443537")
    (said,) = warnings_of(root)
    assert "2 of 2 class folders" in said


CSV = "".join(f"{folder},{name}\n" for folder, name in PAIRS.items())


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.json", json.dumps(PAIRS)),
        ("a.json", json.dumps(PAIRS, ensure_ascii=False, indent=1)),
        ("a.csv", CSV),
        ("a.csv", "folder,name\n" + CSV),
        ("a.csv", "WNID,Class Name\r\n" + CSV.replace("\n", "\r\n")),
        ("a.csv", "Class_ID;label\n" + CSV.replace(",", ";")),
        ("a.tsv", CSV.replace(",", "\t")),
        ("a.txt", "\n" + CSV.replace(",", ", ") + "\n , \n\n"),
        ("a.csv", "".join(f'"{folder}" , "{name}"\n' for folder, name in PAIRS.items()).replace('" , "', '","')),
        ("a.csv", CSV.replace("red_fox", "red fox").replace("café,", "cafe\u0301/,")),
        ("a.csv", "\ufeff" + CSV),
    ],
    ids=["json", "json_unicode", "csv", "header", "crlf", "semicolons", "tabs", "blanks", "quotes", "forms", "bom"],
)
def test_files(tmp_path, name, data):
    (tmp_path / name).write_bytes(data.encode())
    assert given_names(tmp_path / name, FOLDERS) == NAMES
    assert given_names(str(tmp_path / name), FOLDERS[::-1]) == NAMES[::-1]  # the order is the folders'


@given(
    st.lists(st.tuples(st.text(min_size=1), st.text().filter(plain_name)), unique_by=lambda pair: plain_name(pair[1]))
)
def test_any_names_come_back_through_a_mapping(pairs):
    names = dict(pairs)
    assert given_names(names, tuple(names)) == tuple(name.strip() for name in names.values())


def test_a_name_with_a_comma(tmp_path):
    (tmp_path / "a.csv").write_text('n1,"tench, Tinca tinca"\nn2,"the ""big"" one"\n')
    assert given_names(tmp_path / "a.csv", ("n1", "n2")) == ("tench, Tinca tinca", 'the "big" one')
    (tmp_path / "a.csv").write_text('n1;"tench, Tinca tinca"\nn2;x, y\n')
    assert given_names(tmp_path / "a.csv", ("n1", "n2")) == ("tench, Tinca tinca", "x, y")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "a.csv",
            b"cat,Cat\ndgo,Dog\n",
            r"names 1 folder\(s\) that are not there: 'dgo' \(did you mean dog\?\).*'dog'",
        ),
        ("a.csv", b"bird,Bird\ncat,Cat\ndog,Dog\n", r"names 1 folder\(s\) that are not there: 'bird'"),
        ("a.csv", b"cat,Cat\n", r"1 folder\(s\) have no name: 'dog'; wanted each of its 2 class folders \(cat, dog\)"),
        ("a.json", b"{}", r"2 folder\(s\) have no name: 'cat', 'dog'"),
        ("a.csv", b"cat,Cat\ndog,Dog\ncat,Tiger\n", "folder 'cat' is there twice"),
        ("a.json", b'{"cat": "Cat", "dog": "Dog", "cat": "Tiger"}', "folder 'cat' is there twice"),
        ("a.csv", b"cat,pet\ndog,pet\n", "the folders 'cat' and 'dog' have the same name 'pet'"),
        ("a.csv", b"cat,old_pet\ndog, old pet\n", "the folders 'cat' and 'dog' have the same name 'old pet'"),
        ("a.csv", b"cat,\ndog,Dog\n", "the name of folder 'cat' is '', empty"),
        ("a.json", b'{"cat": "_", "dog": "Dog"}', "the name of folder 'cat' is '_', empty"),
        ("a.json", b'{"cat": "Cat", "dog": 3}', "'dog' has 3, int; wanted texts"),
        ("a.json", b'{"cat": ["n1", "Cat"], "dog": "Dog"}', r"'cat' has \['n1', 'Cat'\], list; wanted texts"),
        ("a.json", b'{"cat": "Cat"', "is no JSON: .*wanted an object"),
        ("a.json", b'["Cat", "Dog"]', "holds list; wanted an object"),
        ("a.json", b"cat,Cat\ndog,Dog\n", "is no JSON"),
        ("a.json", b"[" * 100000, "is nested too deeply|is no JSON"),
        ("a.csv", b"cat\ndog\n", r"row 1 has 1 column\(s\): 'cat'; wanted two"),
        ("a.csv", b"cat,Cat\ndog,Dog, big\n", r"row 2 has 3 column\(s\): 'dog,Dog, big'.*quotes"),
        ("a.csv", b'cat,"Cat\ndog,Dog\n', "is no CSV: unexpected end of data"),
        ("a.csv", "cat,Cät\ndog,Dog\n".encode("latin-1"), r"is not UTF-8 text \(byte 0xe4 at 5\); save it as UTF-8"),
        ("a.csv", "cat,Cat\ndog,Dog\n".encode("utf-16"), "is not UTF-8 text"),
        ("a.csv", b" \n", "is empty; wanted rows"),
        ("a.csv", None, "cannot read it: No such file or directory"),
        ("a.csv", b"Ordner,Name\ncat,Cat\ndog,Dog\n", "not there: 'Ordner'"),
    ],
)
def test_files_that_do_not_fit(tmp_path, name, data, message):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        given_names(tmp_path / name, ("cat", "dog"))
    assert f"class names {tmp_path / name}" in str(caught.value)


def test_a_folder_called_as_a_heading_is_a_folder(tmp_path):
    (tmp_path / "a.csv").write_text("label,a label\nsign,a sign\n")
    assert given_names(tmp_path / "a.csv", ("label", "sign")) == ("a label", "a sign")


def test_leaves_of_the_same_name_get_names_by_their_paths(tmp_path):
    root = make_classes(tmp_path, "bird/crane", "machine/crane", "machine/car")
    with pytest.raises(ValueError, match=r"'bird/crane' and 'machine/crane' .* --classnames FILE"):
        scan_folder(root, "leaf")
    names = {"bird/crane": "crane bird", "machine/crane": "construction crane", "car": "car"}
    listing = scan_folder(root, "leaf", names)
    assert dict(zip(listing.folders, listing.classnames, strict=True)) == {
        "bird/crane": "crane bird",
        "machine/car": "car",
        "machine/crane": "construction crane",
    }
    with pytest.raises(ValueError, match="not there: 'crane'"):  # which of them is not told
        scan_folder(root, "leaf", {**names, "crane": "crane"})
