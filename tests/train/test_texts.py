"""Class features of fixed texts that are kept: what is restored is what would be computed, to the bit."""

import shutil
from pathlib import Path

import pytest
import torch
from runs_on_disk import assert_same_run, write_dataset

from upt_fast import FastPromptedCLIP
from upt_fast.clip.loading import load_clip
from upt_fast.data.feature_store import SUFFIX, FeatureStore
from upt_fast.engine.towers.text import TextTower
from upt_fast.train import TrainConfig, evaluate_run, train
from upt_fast.train.texts import PROBE, keep_texts

NAMES = ["one", "three", "two"]
TEMPLATES = ("a {}.", "the digit {}.")


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """The classes that text towers run, the store's own trial aside."""
    seen, run = [], TextTower.forward

    def counted(self, prompts, packed):
        if len(packed.tokens.pooled) != len(PROBE[1]):
            seen.append(len(packed.tokens.pooled))
        return run(self, prompts, packed)

    monkeypatch.setattr(TextTower, "forward", counted)
    return seen


def make_model(names=NAMES, dtype: str = "fp32", **options) -> FastPromptedCLIP:
    torch.manual_seed(0)
    options = {"method": "zeroshot", "templates": TEMPLATES} | options
    return FastPromptedCLIP.from_loaded(load_clip("tiny-digits"), names, dtype=dtype, **options)


def kept(model: FastPromptedCLIP, folder: Path) -> FastPromptedCLIP:
    keep_texts(model, FeatureStore(folder, 2**20))
    return model


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("method", ["zeroshot", "vpt_deep"])
def test_the_same_bits(tmp_path, passes, method, dtype):
    options = {"method": method} if method == "vpt_deep" else {}
    wanted = make_model(dtype=dtype, **options).encode_text()
    computed = len(passes)
    assert computed >= 1
    for expected in (computed, 0):
        passes.clear()
        found = kept(make_model(dtype=dtype, **options), tmp_path).encode_text()
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)
        assert len(passes) == expected


@pytest.mark.parametrize(
    "other",
    [
        lambda: make_model(["one", "two", "three"]),
        lambda: make_model(["one", "three", "four"]),
        lambda: make_model(templates=("a {}.", "a {}?")),
        lambda: make_model(templates=("a {}.",)),
        lambda: make_model(dtype="bf16"),
        lambda: make_model(memory="lean"),
    ],
    ids=["order", "name", "template", "templates", "precision", "memory"],
)
def test_other_texts_are_computed(tmp_path, passes, other):
    kept(make_model(), tmp_path).encode_text()
    passes.clear()
    wanted, found = other().encode_text(), kept(other(), tmp_path).encode_text()
    assert torch.equal(found, wanted)
    assert len(passes) in (2, 4)  # by both


def test_other_weights_are_another_model_s(tmp_path):
    kept(make_model(), tmp_path).encode_text()
    changed = []
    for _ in range(2):
        model = make_model()
        model.text_tower.blocks.fc_bias.mul_(1.001)
        changed.append(model)
    assert torch.equal(kept(changed[0], tmp_path).encode_text(), changed[1].encode_text())
    assert not torch.equal(changed[1].encode_text(), make_model().encode_text())


def test_a_damaged_pack_is_computed_anew(tmp_path, passes):
    wanted = kept(make_model(), tmp_path).encode_text()
    (pack,) = tmp_path.glob(f"*/*{SUFFIX}")
    pack.write_bytes(pack.read_bytes()[:-3] + b"xyz")
    passes.clear()
    assert torch.equal(kept(make_model(), tmp_path).encode_text(), wanted)
    assert passes


def test_siblings_share_it(tmp_path, passes):
    first = kept(make_model(), tmp_path)
    wanted = first.encode_text()
    sibling = first.sibling(NAMES, method="zeroshot", templates=TEMPLATES)
    passes.clear()
    assert torch.equal(sibling.encode_text(), wanted)
    assert not passes
    keep_texts(sibling, None)
    sibling.set_classnames(NAMES)
    assert torch.equal(sibling.encode_text(), wanted)
    assert passes


@pytest.mark.parametrize("method", ["vpt_deep", "kgcoop"])
def test_runs_with_a_store_and_without(tmp_path, passes, method):
    write_dataset(tmp_path / "data", NAMES, train=4, test=3)
    values = {"data": str(tmp_path / "data"), "clip": "tiny-digits", "method": method, "n_ctx": 4, "shots": 4}
    values |= {"epochs": 2, "batch_size": 4, "lr": 0.02, "device": "cpu", "progress": False}
    counts = {}
    for run, store in (("off", "off"), ("first", tmp_path / "store"), ("second", tmp_path / "store")):
        passes.clear()
        train(TrainConfig.from_dict(values | {"out": str(tmp_path / run), "feature_store": str(store)}))
        counts[run] = len(passes)
        assert_same_run(tmp_path / run, tmp_path / "off")
    assert counts["second"] < counts["first"] == counts["off"]
    if method == "vpt_deep":
        assert counts["second"] == 0
        shutil.rmtree(tmp_path / "store")
        store = str(tmp_path / "store")
        for expected in (counts["first"], 0):
            passes.clear()
            evaluate_run(tmp_path / "off", tmp_path / "data", feature_store=store, device="cpu", progress=False)
            assert len(passes) == expected
