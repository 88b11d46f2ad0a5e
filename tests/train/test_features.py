"""Image features that are computed once: what is computed with a store and without one is the same to the bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from runs_on_disk import assert_same_run, image_passes, killed_after_epoch, write_dataset

from upt_fast import FastPromptedCLIP
from upt_fast.cli import main
from upt_fast.clip.loading import load_clip
from upt_fast.data import ImageDataset, build_eval_transform
from upt_fast.data.feature_store import SUFFIX, VARIABLE, FeatureStore
from upt_fast.data.folder import scan_folder
from upt_fast.engine.towers.vision import VisionTower
from upt_fast.train import TrainConfig, evaluate, evaluate_run, features, train
from upt_fast.train.features import FeatureDataset, FixedFeatures

METHODS = ["coop", "cocoop", "kgcoop", "zeroshot"]
MIB = 2**20


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), ("one", "three", "two"), step=1000, train=4, val=3, test=5)


def settings(data: Path, out: Path, store: Path | str, **changes) -> TrainConfig:
    values = {
        "data": str(data),
        "out": str(out),
        "clip": "tiny-digits",
        "method": "coop",
        "n_ctx": 3,
        "shots": 4,
        "epochs": 4,
        "batch_size": 4,
        "lr": 0.02,
        "augment": "none",
        "device": "cpu",
        "progress": False,
        "feature_store": str(store),
    }
    values |= changes
    return TrainConfig.from_dict({name: value for name, value in values.items() if name != "n_ctx" or value})


def packs(store: Path) -> list[Path]:
    return sorted(store.glob(f"*/*{SUFFIX}"))


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    return image_passes(monkeypatch)


def make_model(method: str = "coop", dtype: str = "fp32") -> FastPromptedCLIP:
    torch.manual_seed(0)
    loaded = load_clip("tiny-digits")
    return FastPromptedCLIP.from_loaded(loaded, ["one", "three", "two"], method=method, dtype=dtype)


def make_dataset(data: Path, model: FastPromptedCLIP, split: str = "test") -> ImageDataset:
    return ImageDataset(scan_folder(data).splits[split], build_eval_transform(model.preprocess_cfg))


def source_of(model: FastPromptedCLIP, store: Path | None, batch_size: int = 4) -> FixedFeatures:
    kept = None if store is None else FeatureStore(store, MIB)
    return FixedFeatures(model, batch_size, store=kept, progress=False)


@pytest.fixture
def independent(data, tmp_path) -> None:
    """The processor and the libraries at hand let a feature be kept."""
    if source_of(make_model(), tmp_path / "trial").section is None:
        pytest.skip("features depend on the batch here")


def test_features_may_be_kept_here(data, tmp_path):
    """The way in which they are computed is one that the trial accepts, in the precisions of runs and each batch."""
    for dtype in ("fp32", "bf16"):
        for batch_size in (1, 4, 100):
            source = source_of(make_model(dtype=dtype), tmp_path, batch_size)
            assert source.section is not None, (dtype, batch_size)
            assert source.batch_size == min(batch_size, 64)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
def test_a_feature_depends_on_no_neighbour(data, tmp_path, dtype):
    model = make_model(dtype=dtype)
    if source_of(model, tmp_path).section is None:
        pytest.skip("features depend on the batch here")  # float64 with two threads
    dataset, source = make_dataset(data, model), source_of(model, None)
    rows, labels = source.compute(dataset)
    assert labels.tolist() == [item.label for item in dataset.items]
    order = torch.randperm(len(dataset)).tolist()
    shuffled = ImageDataset([dataset.items[i] for i in order], dataset.load)
    assert torch.equal(source.compute(shuffled)[0], rows[order])
    for i in (0, 6, 14):
        assert torch.equal(source.compute(ImageDataset([dataset.items[i]], dataset.load))[0][0], rows[i])


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_with_a_store_has_the_same_bits(data, tmp_path, passes, method, independent):
    model = make_model(method)
    dataset = make_dataset(data, model)
    wanted = evaluate(model, dataset, batch_size=4, progress=False)
    assert passes == [4, 4, 4, 4]  # 15 images, the last batch filled up
    source = source_of(model, tmp_path)
    for count, known_before in ((5, 0), (15, 5), (15, 15)):  # found in part, and whole
        part = ImageDataset(dataset.items[:count], dataset.load)
        source = source_of(make_model(method), tmp_path)
        known = source.look_up([item.path for item in part.items])
        assert sum(entry.row is not None for entry in known) == known_before
        passes.clear()
        found = evaluate(model, FeatureDataset(part, source, known), batch_size=4, progress=False)
        assert len(passes) == -(-(count - known_before) // 4)
    assert found == wanted


def test_what_is_found_is_neither_decoded_nor_computed(data, tmp_path, passes, monkeypatch, independent):
    """A second evaluation, of another method, by the command that people use."""
    train(settings(data, tmp_path / "coop", "off", epochs=1))
    train(settings(data, tmp_path / "kgcoop", "off", epochs=1, method="kgcoop", n_ctx=4))
    without = [evaluate_run(tmp_path / run, data, feature_store="off", device="cpu") for run in ("coop", "kgcoop")]
    store = tmp_path / "store"
    assert evaluate_run(tmp_path / "coop", data, feature_store=str(store), device="cpu") == without[0]

    def decodes(path):
        raise AssertionError(f"{path} was decoded")

    monkeypatch.setattr("upt_fast.data.images.read_rgb", decodes)
    monkeypatch.setattr("upt_fast.data.dataset.read_rgb", decodes)
    passes.clear()
    assert evaluate_run(tmp_path / "kgcoop", data, feature_store=str(store), device="cpu") == without[1]
    assert passes == []


@pytest.mark.parametrize("method", ["coop", "cocoop", "kgcoop"])
def test_training_with_a_store_has_the_same_bits(data, tmp_path, passes, method, independent):
    options = {"method": method, "n_ctx": 4}
    train(settings(data, tmp_path / "off", "off", **options))
    assert passes == [64] * 3  # training, validation and test images, once each
    for run in ("first", "second"):
        passes.clear()
        train(settings(data, tmp_path / run, tmp_path / "store", **options))
        assert len(passes) == {"first": 3, "second": 0}[run]
        assert_same_run(tmp_path / run, tmp_path / "off")


def test_augmented_training_runs_the_image_tower(data, tmp_path, passes, independent):
    """Evaluation alone comes from the store then."""
    for run, store in (("a", "off"), ("b", tmp_path / "store"), ("c", tmp_path / "store")):
        passes.clear()
        train(settings(data, tmp_path / run, store, augment="crop", epochs=2))
        computed = [] if run == "c" else [64]
        assert passes == [4] * 3 + computed + [4] * 3 + computed
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert_same_run(tmp_path / "a", tmp_path / "c")


def damage(store: Path) -> None:
    for path in packs(store):
        path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize("between", [lambda store: None, shutil.rmtree, damage], ids=["kept", "deleted", "damaged"])
def test_resume_is_bit_exact(data, tmp_path, monkeypatch, between):
    store = tmp_path / "store"
    train(settings(data, tmp_path / "whole", "off"))
    with killed_after_epoch(monkeypatch, 2):
        train(settings(data, tmp_path / "cut", store))
    if store.exists():  # not where features depend on the batch
        between(store)
    train(settings(data, tmp_path / "cut", store, resume=True))
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_a_run_of_before_there_was_a_store_resumes(data, tmp_path, monkeypatch):
    """Its config.json has no such settings, and where the store is may change."""
    train(settings(data, tmp_path / "run", "off"))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    del config["feature_store"], config["feature_store_gib"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    (tmp_path / "run" / "results.json").unlink()
    resumed = settings(data, tmp_path / "run", tmp_path / "store", resume=True, feature_store_gib=0.5)
    assert resumed.differences(config) == []
    assert train(resumed) == results


def test_where_features_depend_on_the_batch_nothing_is_kept(data, tmp_path, monkeypatch, caplog):
    """A tower whose rows differ with their place: said so, and all is as without a store."""
    alone = VisionTower.alone

    def by_place(self, images):
        found = alone(self, images)
        return found + 1e-6 * torch.arange(len(found))[:, None]

    monkeypatch.setattr(VisionTower, "alone", by_place)
    train(settings(data, tmp_path / "off", "off"))
    for run in ("first", "second"):
        caplog.clear()
        with caplog.at_level("INFO", logger="upt_fast"):
            train(settings(data, tmp_path / run, tmp_path / "store"))
        assert "image features are not kept: here their last bits depend on the images beside them" in caplog.text
        assert_same_run(tmp_path / run, tmp_path / "off")
    assert not packs(tmp_path / "store")


@pytest.mark.parametrize("neighbour", [False, True], ids=["place", "neighbour"])
def test_the_trial_finds_what_depends_on_the_batch(tmp_path, monkeypatch, neighbour):
    alone = VisionTower.alone

    def dependent(self, images):
        found = alone(self, images)
        found[2] += 1e-6 * (found[1] if neighbour else 1)
        return found

    monkeypatch.setattr(VisionTower, "alone", dependent)
    assert source_of(make_model(), tmp_path).section is None


def test_a_changed_image_is_another(data, tmp_path, independent):
    root = tmp_path / "data"
    shutil.copytree(data, root)
    model = make_model()
    dataset = make_dataset(root, model)
    paths = [item.path for item in dataset.items]
    source = source_of(model, tmp_path / "store")
    FeatureDataset(dataset, source, source.look_up(paths)).tensors()
    paths[0].rename(paths[0].with_name("other.jpg"))
    assert source.look_up([paths[0].with_name("other.jpg")])[0].row is not None
    paths[0].write_bytes(paths[1].read_bytes())
    assert torch.equal(source.look_up(paths)[0].row, source.look_up(paths)[1].row)
    paths[0].write_bytes(paths[0].read_bytes() + b"\0")
    assert source.look_up(paths)[0].row is None


def test_an_image_that_changes_while_it_is_read_is_not_kept(data, tmp_path, independent):
    root = tmp_path / "data"
    shutil.copytree(data, root)
    model = make_model()
    dataset, source = make_dataset(root, model), source_of(model, tmp_path / "store")
    known = source.look_up([item.path for item in dataset.items])
    path = dataset.items[3].path
    before = path.read_bytes()
    path.write_bytes(dataset.items[4].path.read_bytes())
    FeatureDataset(dataset, source, known).tensors()
    path.write_bytes(before)
    rows = [entry.row for entry in source.look_up([item.path for item in dataset.items])]
    assert [i for i, row in enumerate(rows) if row is None] == [3]


def test_keys(data, tmp_path, monkeypatch):
    """Other weights, precision, preprocessing, batch, threads or bits are another key; another method is not."""

    def key(model, batch_size=4):
        source = FixedFeatures(model, batch_size)
        return FeatureStore(tmp_path, MIB).section(source._about(torch.zeros(2))).folder.name

    first = key(make_model())
    assert key(make_model("kgcoop")) == key(make_model("cocoop")) == first
    others = [key(make_model(dtype="bf16")), key(make_model(), batch_size=8)]
    changed = make_model()
    changed.vision_tower.conv_weight[0] += 1e-3
    others.append(key(changed))
    other = make_model()
    other.preprocess_cfg = {**other.preprocess_cfg, "mean": (0.5, 0.5, 0.4)}
    others.append(key(other))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 77)
        others.append(key(make_model()))
    with monkeypatch.context() as patch:
        patch.setattr(features, "_digest", lambda tensor: "other bits")
        others.append(key(make_model()))
    assert len({first, *others}) == 1 + len(others)


@pytest.mark.parametrize("method", ["upt", "vpt_deep"])
def test_methods_that_prompt_images_keep_no_image_features(data, tmp_path, method):
    options = {"vpt_deep": {"n_ctx": 2}, "upt": {"n_ctx": None, "depth_text": 1, "depth_vision": 1}}[method]
    train(settings(data, tmp_path / "run", tmp_path / "store", method=method, epochs=1, **options))
    evaluate_run(tmp_path / "run", data, device="cpu", feature_store=str(tmp_path / "store"))
    assert len(packs(tmp_path / "store")) == (method == "vpt_deep")  # the features of its fixed texts


def test_corrupt_images_are_told_with_a_store(data, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(data, root)
    (root / "test" / "one" / "0.jpg").write_bytes(b"no image")
    for run in ("a", "b"):
        with pytest.raises(ValueError, match=r"1 image\(s\) cannot be read: .*test/one/0\.jpg"):
            train(settings(root, tmp_path / run, tmp_path / "store"))
        results = train(settings(root, tmp_path / f"{run}-skip", tmp_path / "store", on_corrupt="skip"))
        assert results["test"]["num_images"] == 14
    assert_same_run(tmp_path / "a-skip", tmp_path / "b-skip")


def test_a_store_that_cannot_be_written(data, tmp_path, caplog):
    (tmp_path / "file").touch()
    train(settings(data, tmp_path / "off", "off"))
    train(settings(data, tmp_path / "run", tmp_path / "file"))
    assert caplog.text.count("image features are not kept in") == 1
    assert_same_run(tmp_path / "run", tmp_path / "off")


def test_by_command(data, tmp_path, monkeypatch, capsys, independent):
    """By default features are kept in the cache folder; the options say otherwise."""
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("UPT_FAST_CACHE", str(tmp_path / "cache"))
    base = ["--data", str(data), "--device", "cpu"]
    command = ["train", *base, "--out", str(tmp_path / "run"), "--clip", "tiny-digits", "--method", "coop"]
    assert main([*command, "--epochs", "1", "--shots", "2", "--progress", "false", "--feature-store", "off"]) == 0
    assert not list((tmp_path / "cache").glob("features/*"))
    shown = []
    name = "--feature-store"
    for options in ([name, "off"], [], [f"{name}-gib", "0"], [name, str(tmp_path / "s")]):
        capsys.readouterr()
        assert main(["eval", "--checkpoint", str(tmp_path / "run"), *base, "--json", *options]) == 0
        shown.append(json.loads(capsys.readouterr().out))
    assert shown[0] == shown[1] == shown[2] == shown[3]
    assert packs(tmp_path / "cache" / "features")
    assert packs(tmp_path / "s")
