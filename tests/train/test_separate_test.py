"""Runs without test images, and with test images from another directory."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from runs_on_disk import write_images

from upt_fast.cli import main
from upt_fast.train import TrainConfig, evaluate_run, train

CLASSES = ("blue_thing", "green", "red")


@pytest.fixture(scope="module")
def flat(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("flat")
    for label, name in enumerate(CLASSES):
        write_images(root / name, 2 - label, 4, 100 * label)
    return root


@pytest.fixture
def other(tmp_path) -> Path:
    """The same classes, one with a space in the place of the underscore, and images of the same names."""
    for label, name in enumerate(("blue thing", "green", "red")):
        write_images(tmp_path / "other" / name, 2 - label, 3, 1000 + 100 * label)
    return tmp_path / "other"


def settings(data: Path, out: Path, **changes) -> dict:
    values = {
        "data": str(data),
        "out": str(out),
        "clip": "tiny-digits",
        "shots": "all",
        "epochs": 2,
        "batch_size": 4,
        "depth_text": 1,
        "depth_vision": 1,
        "device": "cpu",
        "progress": False,
    }
    return {**values, **changes}


def arguments(values: dict) -> list[str]:
    words = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    return ["train", *(word.replace("=False", "=false") for word in words)]


def read(out: Path, name: str) -> dict:
    return json.loads((out / name).read_text())


def test_training_on_every_image(flat, tmp_path, capsys):
    """Without a test all of a flat tree is trained on, and every file says so."""
    out = tmp_path / "run"
    assert main([*arguments(settings(flat, out)), "--test", "none"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"no test images  results in {out / 'results.json'}\n"
    assert "training on 12 images of 3 classes, none for validation; no test" in captured.err
    results, split = read(out, "results.json"), read(out, "split.json")
    assert (results["test"], results["test_of"], results["test_images_from"]) == (None, {}, "none")
    assert (len(split["train"]), split["test_split"], split["num_test"]) == (12, "none", 0)
    with pytest.raises(ValueError, match="has no image that the run was not trained on"):
        evaluate_run(out, flat, device="cpu", progress=False)
    assert main([*arguments(settings(flat, out)), "--test", "none", "--resume"]) == 0
    assert main([*arguments(settings(flat, out)), "--resume"]) == 2
    assert "(test: 'none' there, 'data' here)" in capsys.readouterr().err


def test_a_test_folder_is_left_alone(flat, tmp_path):
    """shots are those of training, validation stays, and a damaged test image is nobody's."""
    root = tmp_path / "data"
    for split in ("train", "val", "test"):
        shutil.copytree(flat, root / split)
    (root / "test" / "red" / "0.jpg").write_bytes(b"no image")
    (root / "test" / "red" / "gone").symlink_to(tmp_path / "nowhere")
    results = train(TrainConfig.from_dict(settings(root, tmp_path / "run", shots=2, test="none")))
    assert (results["num_train"], results["num_val"], results["test"], results["skipped"]) == (6, 6, None, [])
    assert results["best"]["chosen_by"] == "validation accuracy"


def test_a_job_without_test_images(flat, tmp_path, capsys):
    tasks = {**settings(flat, tmp_path), "test": ["none", "data"], "shots": 3}
    del tasks["out"], tasks["progress"]
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(tasks))
    command = ["train", "--tasks", str(tmp_path / "tasks.yaml"), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    found = read(tmp_path / "out", "results.json")["tasks"]
    assert {name: entry["accuracy"] is None for name, entry in found.items()} == {"testnone": True, "testdata": False}
    assert main([*command, "--resume"]) == 0
    assert "2 of 2 tasks done" in capsys.readouterr().out


def test_another_directory_is_tested_on(flat, other, tmp_path, capsys):
    out = tmp_path / "run"
    values = settings(flat, out, test_data=str(other))
    assert main(arguments(values)) == 0
    assert "training on 12 images of 3 classes, none for validation; testing on 9 images" in capsys.readouterr().err
    results, split = read(out, "results.json"), read(out, "split.json")
    assert (results["test"]["num_images"], results["test_images_from"]) == (9, str(other))
    assert set(results["test"]["class_accuracy"]) == {"blue thing", "green", "red"}
    assert (split["test_split"], split["num_test"], split["test"][0]) == ("test_data", 9, "test_data:blue thing/0.jpg")
    evaluation, _ = evaluate_run(out, other, device="cpu", progress=False)
    assert evaluation.class_accuracy == results["test"]["class_accuracy"]
    # the directory may move, its images may not change
    other.rename(tmp_path / "moved")
    (out / "results.json").unlink()
    values = {**values, "resume": True, "test_data": str(tmp_path / "moved")}
    assert train(TrainConfig.from_dict(values))["test"] == results["test"]
    (out / "results.json").unlink()
    (tmp_path / "moved" / "red" / "0.jpg").unlink()
    with pytest.raises(ValueError, match=r"cannot resume .*\(num_test, test differ\)"):
        train(TrainConfig.from_dict(values))
    with pytest.raises(ValueError, match=r"test_data: '.*' there, None here"):
        train(TrainConfig.from_dict({**values, "test_data": None}))


def test_its_test_folder_is_taken(flat, other, tmp_path):
    shutil.copytree(other, tmp_path / "splits" / "test")
    shutil.copytree(other, tmp_path / "splits" / "train")
    results = train(TrainConfig.from_dict(settings(flat, tmp_path / "run", test_data=str(tmp_path / "splits"))))
    assert results["test"]["num_images"] == 9


@pytest.mark.parametrize("drop", [False, True])
def test_copies_of_training_images(flat, other, tmp_path, capsys, drop):
    shutil.copy(flat / "red" / "0.jpg", other / "red" / "0.jpg")
    values = settings(flat, tmp_path / "run", test_data=str(other), duplicates="drop" if drop else "keep")
    assert main(arguments(values)) == 0
    said = capsys.readouterr().err
    assert "1 test image(s) are copies of training images: red/0.jpg = test_data:red/0.jpg" in said
    results = read(tmp_path / "run", "results.json")
    assert results["test"]["num_images"] == 9 - drop
    assert ("without 1 that are copies" in results["test_images_from"]) == drop
    evaluation, where = evaluate_run(tmp_path / "run", other, device="cpu", progress=False)
    assert evaluation.num_images == 9 - drop
    assert ("without 1" in where) == drop


def test_the_training_directory_itself_leaves_no_test(flat, tmp_path):
    values = settings(flat, tmp_path / "run", test_data=str(flat), duplicates="drop")
    with pytest.raises(ValueError, match="all 12 test images are copies of training images"):
        train(TrainConfig.from_dict(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: shutil.rmtree(root / "red"), "has no images of red; wanted the 3 classes of"),
        (lambda root: (root / "red").rename(root / "violet"), "has no images of red and has others: violet; wanted"),
        (lambda root: shutil.copytree(root / "red", root / "x"), "has others: x; wanted the 3 classes of"),
        (
            lambda root: shutil.copytree(root / "blue thing", root / "blue_thing"),
            "has folders that mean one class: blue thing, blue_thing; wanted",
        ),
        (lambda root: root.rename(root.parent / "elsewhere"), "test_data: dataset "),
        (lambda root: (root / "red" / "1.png").write_bytes(b"no"), "1 image(s) cannot be read"),
    ],
    ids=["missing", "renamed", "extra", "twice", "nowhere", "damaged"],
)
def test_bad_directories(flat, other, tmp_path, capsys, change, message):
    change(other)
    assert main(arguments(settings(flat, tmp_path / "run", test_data=str(other)))) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("upt-fast: error: ")
    assert message in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--test", "none", "--test-data", "x"], "test_data='x' with test='none'; wanted"),
        (["--test-data="], "test_data=''"),
        (["--test", "some"], "--test"),
    ],
)
def test_bad_settings(flat, tmp_path, capsys, words, message):
    assert main([*arguments(settings(flat, tmp_path / "run")), *words]) == 2
    assert message in capsys.readouterr().err


def test_runs_of_before_there_was_a_choice_resume(flat, tmp_path):
    values = settings(flat, tmp_path / "run", shots=3)
    results = train(TrainConfig.from_dict(values))
    old = read(tmp_path / "run", "config.json")
    for name in ("test", "test_data"):
        del old[name]
    (tmp_path / "run" / "config.json").write_text(json.dumps(old))
    (tmp_path / "run" / "results.json").unlink()
    assert train(TrainConfig.from_dict({**values, "resume": True})) == results
    evaluation, _ = evaluate_run(tmp_path / "run", flat, device="cpu", progress=False)
    assert evaluation.num_images == 3
