"""Folders as people have them, trained and evaluated on by Python and by the command line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from upt_fast.cli import main
from upt_fast.train import TrainConfig, evaluate_run, load_run, train


def write_images(root: Path, folders: dict[str, int]) -> Path:
    """So many images in each folder, all different."""
    for seed, (folder, count) in enumerate(folders.items()):
        (root / folder).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng(100 * seed + i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{i}.png")
    return root


SETTINGS = {
    "clip": "tiny-digits",
    "shots": 2,
    "epochs": 1,
    "batch_size": 2,
    "depth_text": 1,
    "depth_vision": 1,
    "device": "cpu",
    "progress": False,
}


def settings(data: Path, out: Path, **changes) -> TrainConfig:
    return TrainConfig.from_dict({**SETTINGS, "data": str(data), "out": str(out), **changes})


def command(data: Path, out: Path, *more: str) -> list[str]:
    values = [word for name, value in SETTINGS.items() for word in (f"--{name.replace('_', '-')}", str(value).lower())]
    return ["train", "--data", str(data), "--out", str(out), *values, *more]


def split_of(out: Path) -> dict:
    return json.loads((out / "split.json").read_text())


@pytest.fixture
def linked(tmp_path) -> Path:
    """A subset made of links: the training folder, one of its classes, the images of another."""
    store = write_images(tmp_path / "store", {"cat": 3, "dog": 3, "held_out/cat": 1, "held_out/dog": 1})
    root = tmp_path / "data"
    (root / "train" / "dog").mkdir(parents=True)
    (root / "train" / "cat").symlink_to(store / "cat")
    for i in range(3):
        (root / "train" / "dog" / f"{i}.png").symlink_to(store / "dog" / f"{i}.png")
    (root / "test").symlink_to(store / "held_out")
    return root


def test_links_are_trained_on(linked, tmp_path, capsys):
    assert main(command(linked, tmp_path / "run")) == 0
    assert "links followed: 2 to folders, 3 to images" in capsys.readouterr().err
    assert all(key.startswith("train/") for key in split_of(tmp_path / "run")["train"])
    assert main(["eval", "--checkpoint", str(tmp_path / "run"), "--data", str(linked), "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert "2 images: test folder" in said.out
    assert "links followed: 2 to folders, 3 to images" in said.err


@pytest.mark.parametrize("place", ["train/bird", "train/dog/9.png"])
def test_links_that_lead_nowhere_are_as_corrupt_images(linked, tmp_path, capsys, place):
    (linked / place).symlink_to(tmp_path / "gone")
    assert main(command(linked, tmp_path / "run", "--shots", "all")) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"1 image(s) cannot be read: cannot read {linked / place}: the link leads to" in said
    assert "--on-corrupt skip" in said
    assert not (tmp_path / "run").exists()
    results = train(settings(linked, tmp_path / "run", shots="all", on_corrupt="skip"))
    assert len(results["skipped"]) == 1
    assert place in results["skipped"][0]
    assert results["num_train"] == 6
    evaluation, _ = evaluate_run(tmp_path / "run", linked, device="cpu", progress=False)  # the test is whole
    assert evaluation.num_images == 2
    with pytest.raises(ValueError, match=rf"1 image\(s\) cannot be read: .*{place}: the link leads to"):
        evaluate_run(tmp_path / "run", linked, split="train", device="cpu", progress=False)


def test_evaluation_takes_no_other_split_for_one_that_leads_nowhere(linked, tmp_path):
    train(settings(linked, tmp_path / "run"))
    (linked / "test").unlink()
    (linked / "test").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"1 image\(s\) cannot be read: .*data/test: the link leads to"):
        evaluate_run(tmp_path / "run", linked, device="cpu", progress=False)


def test_groups_of_classes(tmp_path, capsys):
    root = write_images(tmp_path / "data", {"animal/cat": 3, "animal/dog": 3, "car": 3})
    assert main(command(root, tmp_path / "run")) == 2
    assert "--classes-from leaf" in capsys.readouterr().err.splitlines()[-1]
    assert main(command(root, tmp_path / "run", "--classes-from", "leaf")) == 0
    assert split_of(tmp_path / "run")["classnames"] == ["cat", "dog", "car"]
    evaluate = ["eval", "--checkpoint", str(tmp_path / "run"), "--data", str(root), "--device", "cpu", "--json"]
    capsys.readouterr()
    assert main(evaluate) == 0  # as trained
    assert json.loads(capsys.readouterr().out)["images_from"] == "images that training did not use"
    assert main([*evaluate, "--classes-from", "inner"]) == 2
    assert "classes_from='inner'; wanted" in capsys.readouterr().err


def test_classes_from_is_kept_on_resumption(tmp_path):
    root = write_images(tmp_path / "data", {"cat": 3, "dog": 3})
    train(settings(root, tmp_path / "run"))
    (tmp_path / "run" / "results.json").unlink()
    with pytest.raises(ValueError, match="classes_from: 'top' there, 'leaf' here"):
        train(settings(root, tmp_path / "run", resume=True, classes_from="leaf"))
    config = tmp_path / "run" / "config.json"
    older = json.loads(config.read_text())
    for later in ("classes_from", "classnames"):  # a run of before there were such settings
        del older[later]
    config.write_text(json.dumps(older))
    train(settings(root, tmp_path / "run", resume=True))


@pytest.fixture(scope="module")
def numbered(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("numbered") / "data", {"0": 3, "1": 3, "n01440764": 3})


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("names") / "names.csv"
    file.write_text("folder,name\n0,zebra\n1,ant\nn01440764,a fish\n")
    return file


@pytest.fixture(scope="module")
def named_run(numbered, names, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "named"
    train(settings(numbered, out, classnames=str(names)))
    return out


def test_names_of_a_file_are_trained_and_kept(named_run, numbered, names, tmp_path, capsys):
    assert split_of(named_run)["classnames"] == ["zebra", "ant", "a fish"]  # in the order of the folders
    assert split_of(named_run)["folders"] == ["0", "1", "n01440764"]
    assert load_run(named_run, "cpu").classnames == ("zebra", "ant", "a fish")
    wanted = json.loads((named_run / "results.json").read_text())["test"]["class_accuracy"]
    assert set(wanted) == {"zebra", "ant", "a fish"}
    evaluation, _ = evaluate_run(named_run, numbered, device="cpu", progress=False)  # needs no file
    assert evaluation.class_accuracy == wanted
    shutil.copytree(named_run / "last", tmp_path / "copy")  # a checkpoint alone knows as much
    evaluation, where = evaluate_run(tmp_path / "copy", numbered, device="cpu", progress=False)
    assert (where, evaluation.num_images) == ("all images", 9)
    image = str(numbered / "0" / "0.png")
    assert main(["predict", image, "--checkpoint", str(tmp_path / "copy"), "--device", "cpu", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)[0]["classnames"]) == {"zebra", "ant", "a fish"}


def test_data_called_by_the_names_is_matched(named_run, numbered, tmp_path):
    shutil.copytree(numbered / "0", tmp_path / "data" / "zebra")
    shutil.copytree(numbered / "n01440764", tmp_path / "data" / "a_fish")
    evaluation, _ = evaluate_run(named_run, tmp_path / "data", device="cpu", progress=False)
    assert set(evaluation.class_accuracy) == {"zebra", "a fish"}
    shutil.copytree(numbered / "0", tmp_path / "data" / "0")
    with pytest.raises(ValueError, match=r"'0' and 'zebra' of .* both mean class 'zebra'"):
        evaluate_run(named_run, tmp_path / "data", device="cpu", progress=False)


def test_a_file_for_eval_and_predict_calls_classes_otherwise(named_run, numbered, tmp_path, capsys):
    file = tmp_path / "names.json"
    file.write_text(json.dumps({"0": "Zebra!", "1": "Ameise", "n01440764": "Fisch"}))
    options = ["--checkpoint", str(named_run), "--device", "cpu", "--json", "--classnames", str(file)]
    assert main(["eval", "--data", str(numbered), *options]) == 0
    evaluation = json.loads(capsys.readouterr().out)
    wanted = json.loads((named_run / "results.json").read_text())["test"]["class_accuracy"]
    assert list(evaluation["class_accuracy"].values()) == list(wanted.values())  # the model is the same
    assert list(evaluation["class_accuracy"]) == ["Zebra!", "Ameise", "Fisch"]
    assert main(["predict", str(numbered / "1" / "0.png"), *options]) == 0
    assert set(json.loads(capsys.readouterr().out)[0]["classnames"]) == {"Zebra!", "Ameise", "Fisch"}
    file.write_text(json.dumps({"0": "Zebra!", "1": "Ameise"}))
    for argv in (["eval", "--data", str(numbered)], ["predict", str(numbered / "1" / "0.png")]):
        assert main([*argv, *options]) == 2
        assert "1 folder(s) have no name: 'n01440764'" in capsys.readouterr().err.splitlines()[-1]


def test_a_file_matches_other_folders_to_a_model(named_run, numbered, tmp_path):
    for folder, other in (("0", "Streifenpferd"), ("1", "Ameise")):
        shutil.copytree(numbered / folder, tmp_path / "data" / other)
    with pytest.raises(ValueError, match=r"not trained on: Ameise, Streifenpferd; it knows 3.*--classnames FILE"):
        evaluate_run(named_run, tmp_path / "data", device="cpu", progress=False)
    names = {"Streifenpferd": "zebra", "Ameise": "ant"}
    evaluation, _ = evaluate_run(named_run, tmp_path / "data", device="cpu", progress=False, classnames=names)
    assert set(evaluation.class_accuracy) == {"zebra", "ant"}
    names["Ameise"] = "bee"
    with pytest.raises(ValueError, match=r"not trained on: Ameise \(bee\)"):
        evaluate_run(named_run, tmp_path / "data", device="cpu", progress=False, classnames=names)


def test_resuming_with_other_names_is_refused(numbered, names, tmp_path):
    file = tmp_path / "names.csv"
    file.write_text(names.read_text())
    train(settings(numbered, tmp_path / "run", classnames=str(file)))
    (tmp_path / "run" / "results.json").unlink()
    file.write_text(names.read_text().replace("zebra", "horse"))
    with pytest.raises(ValueError, match=r"class names changed \(classnames differ\)"):
        train(settings(numbered, tmp_path / "run", classnames=str(file), resume=True))
    train(settings(numbered, tmp_path / "run", classnames=str(names), resume=True))


def test_a_run_of_before_there_were_names_goes_on(numbered, tmp_path):
    out = tmp_path / "run"
    train(settings(numbered, out, classnames="folders"))
    assert load_run(out, "cpu").classnames == ("0", "1", "n01440764")
    for name in ("results.json", "last/classes.json"):
        (out / name).unlink()
    (out / "split.json").write_text(json.dumps({k: v for k, v in split_of(out).items() if k != "folders"}))
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "classnames"}))
    train(settings(numbered, out, resume=True))
    evaluation, where = evaluate_run(out, numbered, device="cpu", progress=False)
    assert set(evaluation.class_accuracy) == {"0", "1", "n01440764"}
    assert where == "images that training did not use"


@pytest.mark.filterwarnings("always:.*WordNet ids")
def test_wordnet_ids_are_trained_by_name(tmp_path, capsys):
    root = write_images(tmp_path / "data", {"n02012849": 3, "n03126707": 3})
    assert main(command(root, tmp_path / "run")) == 0
    assert "warning: 2 class folder(s)" in (said := capsys.readouterr().err)
    assert said.count("n02012849 is 'crane, large long-necked") == 1
    assert main(["eval", "--checkpoint", str(tmp_path / "run"), "--data", str(root), "--device", "cpu"]) == 0
    assert "WordNet" not in capsys.readouterr().err


def test_models_with_wordnet_s_names_know_its_ids(tmp_path):
    """As one from a released checkpoint, whose names are words, on a folder of ids."""
    root = write_images(tmp_path / "words", {"goldfish": 3, "tench": 3})
    train(settings(root, tmp_path / "run"))
    (tmp_path / "ids").mkdir()
    (tmp_path / "ids" / "n01440764").symlink_to(root / "tench")
    evaluation, _ = evaluate_run(tmp_path / "run", tmp_path / "ids", device="cpu", progress=False)
    assert set(evaluation.class_accuracy) == {"tench"}


def test_a_bad_file_leaves_nothing_behind(numbered, tmp_path, capsys):
    (tmp_path / "names.csv").write_text("0,zebra\n")
    assert main(command(numbered, tmp_path / "run", "--classnames", str(tmp_path / "names.csv"))) == 2
    assert "2 folder(s) have no name: '1', 'n01440764'" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "text", ["{}", "[]", '{"folders": ["0"], "classes_from": "top"}', '{"folders": 3, "classes_from": 1}']
)
def test_damaged_classes_are_told(named_run, numbered, tmp_path, text):
    shutil.copytree(named_run / "last", tmp_path / "copy")
    (tmp_path / "copy" / "classes.json").write_text(text)
    with pytest.raises(ValueError, match=r"classes\.json"):
        evaluate_run(tmp_path / "copy", numbered, device="cpu", progress=False)


@pytest.fixture
def copied(tmp_path) -> Path:
    """Of 6 test images 2 are copies of training images; one image is in two classes."""
    root = write_images(tmp_path / "data", {f"{s}/{c}": 3 for s in ("train", "test") for c in ("cat", "dog")})
    shutil.copy(root / "train" / "cat" / "0.png", root / "test" / "cat" / "1.png")
    shutil.copy(root / "train" / "dog" / "2.png", root / "test" / "dog" / "0.png")
    shutil.copy(root / "test" / "cat" / "2.png", root / "test" / "dog" / "1.png")
    return root


TEST_COPIES = [["test/cat/1.png", "train/cat/0.png"], ["test/dog/0.png", "train/dog/2.png"]]


@pytest.mark.parametrize("drop", [False, True], ids=["keep", "drop"])
def test_the_same_image_twice(copied, tmp_path, capsys, drop):
    out = tmp_path / "run"
    argv = command(copied, out, "--shots", "all")
    assert main([*argv, "--duplicates", "drop"] if drop else argv) == 0
    said = capsys.readouterr().err
    assert "warning: 2 images are the same file in more than one class: test/cat/2.png = test/dog/1.png; one" in said
    assert (
        "warning: 2 test image(s) are copies of training images: test/cat/1.png = train/cat/0.png, test/dog/0" in said
    )
    assert ("--duplicates drop leaves them out" in said) != drop
    assert ("they are left out of the test" in said) == drop
    split = split_of(out)
    assert split["duplicates"] == {
        "two_classes": [["test/cat/2.png", "test/dog/1.png"]],
        "train_test": TEST_COPIES,
        "dropped": [copy for copy, _ in TEST_COPIES] if drop else [],
    }
    results = json.loads((out / "results.json").read_text())
    where = "test folder, without 2 that are copies of training images" if drop else "test folder"
    assert (split["num_test"], results["test"]["num_images"]) == ((4, 4) if drop else (6, 6))
    assert results["test_images_from"] == where
    evaluation, said = evaluate_run(out, copied, device="cpu", progress=False)
    assert (said, evaluation.num_images) == (where, 4 if drop else 6)
    assert evaluation.class_accuracy == results["test"]["class_accuracy"]
    (out / "results.json").unlink()
    assert train(settings(copied, out, shots="all", duplicates="drop" if drop else "keep", resume=True))["test"]


def test_copies_in_what_training_does_not_use(tmp_path):
    root = write_images(tmp_path / "data", {"cat": 4, "dog": 4})
    for name in ("cat", "dog"):
        for i in range(4, 6):
            shutil.copy(root / name / "0.png", root / name / f"{i}.png")
    train(settings(root, tmp_path / "run", shots=3, duplicates="drop"))
    split = split_of(tmp_path / "run")
    trained = {(root / key).read_bytes() for key in split["train"]}
    rest = {path.relative_to(root).as_posix() for path in root.glob("*/*.png")} - set(split["train"])
    assert set(split["duplicates"]["dropped"]) == {key for key in rest if (root / key).read_bytes() in trained}
    assert split["num_test"] == len(rest) - len(split["duplicates"]["dropped"])
    evaluation, where = evaluate_run(tmp_path / "run", root, device="cpu", progress=False)
    assert evaluation.num_images == split["num_test"]
    assert where.startswith("images that training did not use, without")


def test_a_split_of_before_duplicates_were_looked_for(copied, tmp_path):
    out = tmp_path / "run"
    train(settings(copied, out))
    (out / "results.json").unlink()
    older = {key: value for key, value in split_of(out).items() if key not in ("duplicates", "folders")}
    (out / "split.json").write_text(json.dumps(older))
    evaluation, where = evaluate_run(out, copied, device="cpu", progress=False)
    assert (where, evaluation.num_images) == ("test folder", 6)
    assert train(settings(copied, out, resume=True))["test"]["num_images"] == 6
    with pytest.raises(ValueError, match="duplicates: 'keep' there, 'drop' here"):
        train(settings(copied, out, resume=True, duplicates="drop"))
