"""Loading CLIPs by name: wrong names get help, right ones get the weights and the activation they were trained with."""

import json

import open_clip
import pytest
import torch

from upt_fast import FastUPT
from upt_fast.clip import load_clip
from upt_fast.clip.tiny_clip import TINY_CLIP_NAME
from upt_fast.testing import random_clip

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "layers": 1, "width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The path of a checkpoint of "ViT-small-test", a model that open_clip knows during the test."""
    from open_clip import factory

    monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", list(factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))
    (tmp_path / "ViT-small-test.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(tmp_path / "ViT-small-test.json")
    torch.save(open_clip.create_model("ViT-small-test").state_dict(), tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


def test_unknown_name_suggests_close_ones():
    with pytest.raises(ValueError, match=r"unknown CLIP model 'ViT-B16'.*did you mean.*ViT-B-16.*tiny-digits"):
        load_clip("ViT-B16", "openai")
    with pytest.raises(ValueError, match=r"'zzz'.*ViT-B-32, ViT-B-16, ViT-L-14 or tiny-digits"):
        load_clip("zzz", "openai")


def test_pretrained_missing_lists_the_tags():
    with pytest.raises(ValueError, match=r"'ViT-B-16' needs pretrained weights.*openai.*laion2b_s34b_b88k"):
        load_clip("ViT-B-16")


def test_unknown_tag_lists_the_tags():
    with pytest.raises(ValueError, match=r"pretrained='openia' is no file and no tag of 'ViT-B-16'.*openai"):
        load_clip("ViT-B-16", "openia")


@pytest.mark.parametrize("name", [TINY_CLIP_NAME, "ViT-B-16"])
def test_unknown_precision(name):
    with pytest.raises(ValueError, match=r"precision='float16'; wanted one of fp32, fp16, bf16"):
        load_clip(name, precision="float16")


@pytest.mark.parametrize("name", [TINY_CLIP_NAME, "hf-hub:org/repo", "local-dir:folder"])
def test_names_that_bring_their_weights_take_no_tag(name):
    with pytest.raises(ValueError, match=r"pretrained='openai'.*brings its own weights"):
        load_clip(name, "openai")


def test_folder_that_is_missing(tmp_path):
    with pytest.raises(ValueError, match=f"folder '{tmp_path}/none' does not exist"):
        load_clip(f"local-dir:{tmp_path}/none")


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_checkpoint_file(small, precision, dtype):
    loaded = load_clip("ViT-small-test", str(small), precision)
    assert (loaded.name, loaded.pretrained) == ("ViT-small-test", str(small))
    state = torch.load(small, weights_only=True)
    assert state.keys() == loaded.model.state_dict().keys()
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, state[name].to(value.dtype)), name
    assert loaded.model.visual.conv1.weight.dtype == dtype
    assert not loaded.model.training
    assert loaded.preprocess_cfg["size"] in (16, (16, 16))
    assert loaded.preprocess_cfg["mean"] == open_clip.OPENAI_DATASET_MEAN
    assert loaded.tokenizer(["cat"]).shape == (1, 77)


def test_checkpoint_of_another_model(small):
    state = torch.load(small, weights_only=True)
    torch.save(state | {"visual.proj": torch.zeros(64, 8)}, small)
    with pytest.raises(ValueError, match=r"could not load 'ViT-small-test' with pretrained='.*weights.pt': "):
        load_clip("ViT-small-test", str(small))
    small.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="could not load 'ViT-small-test'"):
        load_clip("ViT-small-test", str(small))


def test_no_code_is_run_from_a_checkpoint(small):
    class Evil:
        def __reduce__(self):
            return (open, (str(small.with_name("ran")), "w"))

    torch.save({"state_dict": Evil()}, small)
    with pytest.raises(ValueError, match="could not load"):
        load_clip("ViT-small-test", str(small))
    assert not small.with_name("ran").exists()


def test_local_folder(small):
    folder = small.parent / "model"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {"mean": [0.5] * 3}})
    )
    small.rename(folder / "open_clip_pytorch_model.bin")
    loaded = load_clip(f"local-dir:{folder}")
    state = torch.load(folder / "open_clip_pytorch_model.bin", weights_only=True)
    assert torch.equal(loaded.model.visual.proj, state["visual.proj"])
    assert list(loaded.preprocess_cfg["mean"]) == [0.5] * 3


def test_save_and_load_by_name(small, tmp_path):
    model = FastUPT.from_pretrained("ViT-small-test", str(small), classnames=["cat", "dog"], n_text=2).eval()
    model.save_pretrained(tmp_path / "run")
    loaded = FastUPT.load(tmp_path / "run")
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(images), model(images))
    assert loaded.clip_name == "ViT-small-test"
    small.unlink()
    with pytest.raises(ValueError, match="is no file and no tag"):
        FastUPT.load(tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "tag", "quick"),
    [
        ("ViT-B-16", "openai", True),
        ("ViT-B-16", "OpenAI", True),
        ("ViT-B/16", "openai", True),
        ("ViT-B-32", "laion400m_e31", True),
        ("ViT-B-16", "laion2b_s34b_b88k", False),
    ],
)
def test_the_activation_is_the_one_of_the_weights(monkeypatch, name, tag, quick):
    """open_clip's "ViT-B-16" is built with GELU; OpenAI's weights under that name were trained with QuickGELU."""
    built = []

    def create_model(*args, **options):
        built.append(options)
        raise RuntimeError("no download in a test")

    monkeypatch.setattr(open_clip, "create_model", create_model)
    with pytest.raises(ValueError, match="no download in a test"):
        load_clip(name, tag)
    assert bool(built[0].get("quick_gelu")) is quick


def test_the_name_with_a_slash_works(monkeypatch):
    """OpenAI's spelling, which open_clip takes."""
    monkeypatch.setattr(open_clip, "create_model", lambda *args, **options: random_clip())
    monkeypatch.setattr(open_clip, "get_model_preprocess_cfg", lambda model: {"size": 224})
    loaded = load_clip("ViT-B/16", "openai")
    assert loaded.tokenizer(["cat"]).shape == (1, 77)


def test_options_reach_open_clip(monkeypatch):
    seen = {}

    def create_model(name, **options):
        seen.update(options, name=name)
        raise RuntimeError("\nfirst line\nsecond line")

    monkeypatch.setattr(open_clip, "create_model", create_model)
    with pytest.raises(ValueError, match=r"with pretrained='openai': first line$"):
        load_clip("ViT-B-16", "openai", "bf16", "cpu", "cache")
    assert seen["name"] == "ViT-B-16"
    assert seen["require_pretrained"] is True
    assert (seen["precision"], seen["device"], seen["cache_dir"]) == ("bf16", "cpu", "cache")


def test_tiny_clip():
    loaded = load_clip(TINY_CLIP_NAME)
    assert (loaded.name, loaded.pretrained) == (TINY_CLIP_NAME, None)
    model = FastUPT.from_loaded(loaded, ["zero", "one"])
    assert model.clip_name == TINY_CLIP_NAME
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 2)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("RN50", "ModifiedResNet"),
        ("ViT-B-16-SigLIP", "TimmModel"),
        ("roberta-ViT-B-32", "HFTextEncoder"),
        ("coca_ViT-B-32", "CoCa"),
    ],
)
def test_unsupported_architectures_are_refused_before_any_download(monkeypatch, name, part):
    import open_clip

    monkeypatch.setattr(open_clip, "create_model", lambda *args, **kwargs: pytest.fail("weights were asked for"))
    with pytest.raises(ValueError, match=rf"unsupported .*{part}.*supported: open_clip CLIP"):
        load_clip(name, "openai")
