"""Evaluations keep decoded images as runs do, and their results are the same."""

import json
from pathlib import Path

import pytest
from PIL import Image
from runs_on_disk import write_dataset

from upt_fast.cli import main
from upt_fast.train import TrainConfig, evaluate_run, load_run, train

CLASSES = ("blue", "green", "red")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), CLASSES, step=50, train=3, test=5)


@pytest.fixture(autouse=True)
def stores(tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("stores") / "images"
    monkeypatch.setenv("UPT_FAST_IMAGE_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module", params=["coop", "vpt_deep"])
def runs(data, tmp_path_factory, request) -> dict[str, Path]:
    """A run of each kind of cache; of one method that leaves images' features as they are, and of another."""
    folder = tmp_path_factory.mktemp("runs")
    for cache in ("scaled", "exact"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("UPT_FAST_IMAGE_CACHE", str(folder / "images"))
            values = {"data": str(data), "out": str(folder / cache), "clip": "tiny-digits", "method": request.param}
            values |= {"shots": 2, "epochs": 1, "batch_size": 4, "device": "cpu", "progress": False, "cache": cache}
            train(TrainConfig(feature_store="off", **values))
    return {cache: folder / cache for cache in ("scaled", "exact")}


def evaluated(checkpoint: Path, data: Path, **options):
    return evaluate_run(checkpoint, data, feature_store="off", device="cpu", progress=False, **options)[0]


def without_decoding(monkeypatch) -> None:
    monkeypatch.setattr(Image, "open", None)


@pytest.mark.parametrize("cache", [None, "scaled", "exact"])
@pytest.mark.parametrize("of", ["scaled", "exact"])
def test_results_are_those_of_the_run(runs, data, stores, of, cache):
    found = evaluated(runs[of], data, cache=cache)
    wanted = json.loads((runs[of] / "results.json").read_text())["test"]
    assert (found.accuracy, found.loss) == (wanted["accuracy"], wanted["loss"])
    assert stores.exists() == ((cache or of) == "scaled")


def test_the_second_evaluation_decodes_nothing(runs, data, monkeypatch):
    first = evaluated(runs["scaled"], data)
    without_decoding(monkeypatch)
    assert evaluated(runs["scaled"], data) == first
    assert evaluated(runs["exact"], data, cache="scaled").num_images == 15
    with pytest.raises(ValueError, match=r"15 image\(s\) cannot be read"):
        evaluated(runs["exact"], data)


def test_the_run_s_own_test_images_are_there(runs, data, monkeypatch):
    monkeypatch.setenv("UPT_FAST_IMAGE_CACHE", str(runs["scaled"].parent / "images"))
    without_decoding(monkeypatch)
    assert evaluated(runs["scaled"], data).num_images == 15


@pytest.mark.parametrize("num_workers", [0, 2])
def test_without_room(runs, data, num_workers):
    wanted = evaluated(runs["scaled"], data)
    assert evaluated(runs["scaled"], data, cache_gib=0.0, num_workers=num_workers) == wanted


def test_a_saved_model_has_no_run(runs, data, stores, tmp_path):
    load_run(runs["exact"], "cpu").save_pretrained(tmp_path / "saved")
    assert evaluated(tmp_path / "saved", data) == evaluated(runs["exact"], data)
    assert stores.exists()


def test_images_that_cannot_be_read(runs, data, tmp_path):
    (tmp_path / "red").mkdir()
    (tmp_path / "red" / "0.png").write_bytes(b"no image")
    for cache in ("scaled", "exact"):
        with pytest.raises(ValueError, match=r"1 image\(s\) cannot be read: .*0.png"):
            evaluated(runs["scaled"], tmp_path, cache=cache)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cache", "some"], "cache='some'"),
        (["--cache", "stream"], "is no folder of shards"),
        (["--cache-gib", "-1"], "cache_gib=-1.0; wanted a non-negative number"),
    ],
)
def test_bad_options(runs, data, capfd, options, message):
    assert main(["eval", "--checkpoint", str(runs["scaled"]), "--data", str(data), *options]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_command_line(runs, data, stores, capsys):
    command = ["eval", "--checkpoint", str(runs["exact"]), "--data", str(data), "--feature-store", "off", "--json"]
    assert main([*command, "--cache", "scaled", "--cache-gib", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["num_images"] == 15
    assert list(stores.glob("*/pixels-*"))
