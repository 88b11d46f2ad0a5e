"""The configs of all methods check themselves and survive JSON."""

import dataclasses
import json
from collections.abc import Callable

import pytest

from upt_fast.methods.cocoop import CoCoOpConfig
from upt_fast.methods.coop import CoOpConfig
from upt_fast.methods.ivlp import IVLPConfig, MVPTConfig
from upt_fast.methods.maple import MaPLeConfig
from upt_fast.methods.templates import IMAGENET_SELECT, expand_templates
from upt_fast.methods.upt import UPTConfig
from upt_fast.methods.vpt import VPTConfig
from upt_fast.methods.zeroshot import ZeroShotConfig
from upt_fast.reference import TWINS

OTHERS = [
    UPTConfig("released", n_text=2),
    UPTConfig(transform="none", shared=True, layerwise=False),
    CoOpConfig(8, class_specific=True, class_token_position="front"),
    CoCoOpConfig(ctx_init="a photo of a"),
    VPTConfig(2, templates=("imagenet_select", "a {}.")),
    MaPLeConfig(3, None, None, True),
    IVLPConfig(depth_vision=0),
    MVPTConfig(4, 3),
    ZeroShotConfig(templates="imagenet_select"),
]


@pytest.mark.parametrize(
    "config", [*(m.config_class() for m in TWINS.values()), *OTHERS], ids=lambda c: type(c).__name__
)
def test_round_trip(config):
    again = type(config).from_options(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.anything = 3
    name = dataclasses.fields(config)[0].name
    with pytest.raises(ValueError, match=f"unknown option depht; wanted some of .*{name}"):
        type(config).from_options({"depht": 3})


def test_defaults():
    assert {name: method.config_class().to_dict() for name, method in TWINS.items() if name != "upt"} == {
        "coop": {"n_ctx": 16, "ctx_init": None, "class_specific": False, "class_token_position": "end"},
        "kgcoop": {
            "templates": "a photo of a {}.",
            "n_ctx": 4,
            "ctx_init": "a photo of a",
            "class_specific": False,
            "class_token_position": "end",
            "weight": 8.0,
        },
        "cocoop": {"n_ctx": 4, "ctx_init": None},
        "vpt_shallow": {"n_ctx": 4, "templates": "a photo of a {}."},
        "vpt_deep": {"n_ctx": 4, "templates": "a photo of a {}."},
        "maple": {"n_ctx": 2, "depth": 9, "ctx_init": "a photo of a", "half_prompts": False},
        "ivlp": {
            "n_text": 2,
            "n_visual": 2,
            "depth_text": None,
            "depth_vision": None,
            "ctx_init": "a photo of a",
            "half_prompts": False,
        },
        "mvpt": {"n_ctx": 8, "depth": None, "half_prompts": False, "templates": "a photo of a {}."},
        "zeroshot": {"templates": "a photo of a {}."},
    }
    upt = TWINS["upt"].config_class().to_dict()
    assert upt == UPTConfig().to_dict() | dict(transform="transformer", shared=False, joint=False, layerwise=True)


BAD: list[tuple[Callable, dict, str]] = [
    (CoOpConfig, {"n_ctx": 0}, "n_ctx=0; wanted a whole number of at least 1"),
    (CoOpConfig, {"n_ctx": True}, "n_ctx=True"),
    (CoOpConfig, {"ctx_init": 4}, "ctx_init=4; wanted words, for example 'a photo of a', or None"),
    (CoOpConfig, {"ctx_init": " _ "}, "ctx_init=' _ '; wanted words"),
    (CoOpConfig, {"class_specific": 1}, "class_specific=1; wanted True or False"),
    (CoOpConfig, {"class_token_position": "start"}, "wanted one of 'end', 'middle', 'front'"),
    (CoCoOpConfig, {"n_ctx": 1.0}, "n_ctx=1.0"),
    (CoCoOpConfig, {"ctx_init": b"a"}, "ctx_init=b'a'"),
    (VPTConfig, {"n_ctx": -1}, "n_ctx=-1"),
    (VPTConfig, {"templates": "a photo"}, "template 'a photo'; wanted a text with one {} .* or one of 'default', 'ima"),
    (MaPLeConfig, {"n_ctx": 0}, "n_ctx=0"),
    (MaPLeConfig, {"depth": 0}, "depth=0; wanted a whole number of at least 1"),
    (MaPLeConfig, {"half_prompts": "yes"}, "half_prompts='yes'"),
    (MaPLeConfig, {"ctx_init": 1}, "ctx_init=1"),
    (IVLPConfig, {"n_visual": 0}, "n_visual=0"),
    (IVLPConfig, {"n_text": 0}, "n_text=0"),
    (IVLPConfig, {"depth_text": 0}, "depth_text=0; wanted a whole number of at least 1"),
    (IVLPConfig, {"depth_vision": -1}, "depth_vision=-1; wanted a whole number of at least 0"),
    (IVLPConfig, {"half_prompts": None}, "half_prompts=None"),
    (IVLPConfig, {"ctx_init": 1}, "ctx_init=1"),
    (MVPTConfig, {"depth": 0}, "depth=0"),
    (MVPTConfig, {"n_ctx": 0}, "n_ctx=0"),
    (MVPTConfig, {"half_prompts": 0}, "half_prompts=0"),
    (MVPTConfig, {"templates": ()}, r"templates=\(\); wanted a template such as 'a photo of a {}.', or several"),
    (ZeroShotConfig, {"templates": None}, "templates=None"),
    (ZeroShotConfig, {"templates": ["a {}.", 3]}, "template 3; wanted"),
    (ZeroShotConfig, {"templates": "a {} and a {}."}, "template 'a {} and a {}.'"),
    (ZeroShotConfig, {"templates": "a {name}."}, "template 'a {name}.'"),
    (UPTConfig, {"n_text": 0}, "n_text=0"),
    (UPTConfig, {"transform": "cnn"}, "transform='cnn'; wanted one of 'transformer', 'mlp', 'none'"),
    (UPTConfig, {"shared": 1}, "shared=1; wanted True or False"),
    (UPTConfig, {"layerwise": None}, "layerwise=None; wanted True or False"),
    (UPTConfig, {"preset": "released", "joint": True}, "joint=True with preset='released'; wanted preset='pa"),
    (UPTConfig, {"preset": "released", "transform": "mlp"}, "transform='mlp' with preset='released'"),
    (UPTConfig, {"shared": True, "n_text": 3}, "n_text=3 and n_visual=4 with shared=True.*equal numbers"),
    (UPTConfig, {"shared": True, "joint": True}, "joint=True and shared=True; wanted one or the other"),
    (UPTConfig, {"joint": True, "transform": "mlp"}, "transform='mlp' with joint=True.*wanted 'none'"),
]


@pytest.mark.parametrize(
    ("config", "options", "wanted"), BAD, ids=[f"{c.__name__}-{'-'.join(map(str, o.items()))}" for c, o, _ in BAD]
)
def test_bad_options(config, options, wanted):
    with pytest.raises(ValueError, match=wanted):
        config(**options)


def test_words_count_as_the_released_code_counts_them():
    config = CoOpConfig(16, "a_photo  of a", class_specific=True)
    assert (config.prefix, config.n_text, config.per_class) == ("a photo of a", 4, False)
    assert (CoOpConfig(ctx_init="").prefix, CoOpConfig(ctx_init="").n_text) == (None, 16)
    assert CoOpConfig(class_specific=True).per_class
    assert (CoCoOpConfig(8, "a photo").n_text, CoCoOpConfig(8).n_text) == (2, 8)
    assert [MaPLeConfig(n).prefix for n in (1, 4, 5)] == ["a photo of a", "a photo of a", None]
    assert [IVLPConfig(n).prefix for n in (1, 4, 5)] == ["a photo of a", "a photo of a", None]
    assert (MaPLeConfig(3, ctx_init="").prefix, IVLPConfig(ctx_init=None).prefix) == (None, None)
    assert (MaPLeConfig(3).n_text, IVLPConfig(3).n_text) == (3, 3)


def test_depths():
    assert (MaPLeConfig().layers(12, 24), MaPLeConfig(depth=None).layers(12, 24)) == (9, 12)
    assert (IVLPConfig().depths(2, 3), IVLPConfig(depth_text=1, depth_vision=0).depths(2, 3)) == ((2, 3), (1, 0))
    assert (MVPTConfig().layers(5), MVPTConfig(depth=2).layers(5)) == (5, 2)
    assert [VPTConfig(n).tokens_per_layer(layers) for n, layers in ((4, 12), (4, 3), (2, 24))] == [4, 16, 1]
    with pytest.raises(ValueError, match="24 layers do not divide: wanted a multiple of 2"):
        VPTConfig(3).tokens_per_layer(24)


def test_templates():
    assert len(IMAGENET_SELECT) == 7
    assert expand_templates("default") == ("a photo of a {}.",)
    assert expand_templates(("a {}.", "imagenet_select")) == ("a {}.", *IMAGENET_SELECT)
    assert ZeroShotConfig(templates=["a {}."]).templates == ("a {}.",)
