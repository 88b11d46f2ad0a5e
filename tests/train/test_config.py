"""TrainConfig checks itself."""

import json
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from upt_fast.data import AUGMENTATIONS
from upt_fast.data.folder import CLASSES_FROM
from upt_fast.engine.towers.blocks import MEMORY_LEVELS
from upt_fast.methods import BUILTIN_METHODS, find_method
from upt_fast.train import TrainConfig
from upt_fast.train.options import docstring_args, option_help, option_types

REQUIRED = {"data": "d", "out": "r", "clip": "tiny-digits"}


@pytest.mark.parametrize(
    "values",
    [
        {"shots": 0},
        {"shots": True},
        {"shots": "many"},
        {"epochs": 0},
        {"batch_size": 0},
        {"test_batch_size": -1},
        {"seed": -1},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"lr": float("inf")},
        {"warmup_lr": -1.0},
        {"momentum": 1.0},
        {"optimizer": "adam"},
        {"patience": 0},
        {"patience": True},
        {"label_smoothing": 1.0},
        {"label_smoothing": -0.1},
        {"weight_decay": -1.0},
        {"augment": "mixup"},
        {"precision": "fp4"},
        {"memory": "none"},
        {"device": "tpu"},
        {"num_workers": -1},
        {"cache_gib": -1.0},
        {"feature_store_gib": -1.0},
        {"feature_store": ""},
        {"cache_size": 0},
        {"cache": "some"},
        {"on_corrupt": "ignore"},
        {"final_model": "first"},
        {"preset": "other"},
        {"n_text": 0},
        {"dropout": 1.0},
        {"class_token_position": "top"},
        {"preset": "released", "depth_text": 2},
        {"method": "coop", "n_ctx": 0},
        {"method": "nobody"},
        {"method": ""},
        {"text_batch": 0},
        {"data": ""},
        {"pretrained": ""},
        {"classnames": ""},
        {"classes_from": "middle"},
        {"duplicates": "all"},
        {"accumulate": 0},
        {"accumulate": True},
        {"ema": 1.0},
        {"ema": 0.0},
        {"ema": float("nan")},
        {"test": "some"},
        {"test_data": ""},
        {"wandb": ""},
        {"wandb": "p", "wandb_name": " "},
    ],
    ids=str,
)
def test_bad_values_are_named(values):
    name, value = list(values.items())[-1]
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        TrainConfig.from_dict({**REQUIRED, **values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shoots": 4}, "unknown option shoots; the options of method 'upt': preset, n_text"),
        ({"method": "coop", "n_text": 4}, "unknown option n_text; the options of method 'coop': n_ctx, ctx_init"),
        ({"method": "zeroshot", "lr_text": 1, "depth": 2}, "unknown option lr_text, depth; .* 'zeroshot': templates"),
        ({"method": "zeroshot", "templates": "no place"}, "template 'no place'"),
        ({"method": "nowhere.py:Mine"}, "cannot import nowhere.py"),
    ],
    ids=["train", "method", "two", "template", "file"],
)
def test_bad_options_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_dict({**REQUIRED, **values})


def test_choices_are_those_of_the_parts():
    hints = get_type_hints(TrainConfig)
    assert get_args(hints["augment"]) == AUGMENTATIONS
    assert get_args(hints["classes_from"]) == CLASSES_FROM
    assert get_args(hints["memory"]) == MEMORY_LEVELS


def test_differences_leave_out_what_does_not_matter():
    config = TrainConfig(**REQUIRED)
    there = {**config.to_dict(), "lr": 0.1, "num_workers": 3, "device": "cpu", "out": "/elsewhere", "shots": "all"}
    assert config.differences(there) == ["shots: 'all' there, 16 here", "lr: 0.1 there, 0.002 here"]


def test_settings_of_an_earlier_run_are_those_that_it_had():
    """What is new since is off, as it was then; which project a run is logged to may change, its steps may not."""
    config = TrainConfig(**REQUIRED)
    new = ("test", "test_data", "accumulate", "ema", "wandb", "wandb_name")
    there = {name: value for name, value in config.to_dict().items() if name not in new}
    assert config.differences(there) == []
    assert config.changed(wandb="project", wandb_name="mine").differences(there) == []
    changed = config.changed(test="none", accumulate=2, ema=0.9)
    assert changed.differences(there) == [
        "test: 'data' there, 'none' here",
        "accumulate: 1 there, 2 here",
        "ema: None there, 0.9 here",
    ]
    elsewhere = config.changed(test_data="b")
    assert elsewhere.differences(config.changed(test_data="a").to_dict()) == []
    assert len(elsewhere.differences(there)) == 1


def test_flat_form_has_all_options_of_the_method():
    values = TrainConfig.from_dict({**REQUIRED, "method": "vpt_deep", "templates": ("a {}", "b {}")}).to_dict()
    assert (values["n_ctx"], values["templates"]) == (4, ["a {}", "b {}"])
    assert "options" not in values
    assert "n_text" not in values
    assert Path(values["data"]).is_absolute()
    again = TrainConfig.from_dict(json.loads(json.dumps(values)))
    assert again.to_dict() == values
    assert again.differences(values) == []


def test_differences_of_methods_and_options():
    coop = TrainConfig.from_dict({**REQUIRED, "method": "coop", "n_ctx": 8})
    other = TrainConfig.from_dict({**REQUIRED, "method": "coop", "backend": "torch", "text_batch": 2})
    assert coop.differences(other.to_dict()) == ["n_ctx: 16 there, 8 here"]
    assert coop.differences(TrainConfig(**REQUIRED).to_dict()) == ["method: 'upt' there, 'coop' here"]


def test_help_of_options_is_the_docstring_s():
    text = """Something.

    Args:
        first: one line.
        second (int): a line
            and another: with a colon.

        third:
            below.
    Raises:
        ValueError: never.
    """
    assert docstring_args(text) == {
        "first": "one line.",
        "second": "a line and another: with a colon.",
        "third": "below.",
    }
    assert docstring_args("No arguments.") == docstring_args("") == {}
    for name in BUILTIN_METHODS:
        config = find_method(name).config
        texts = option_help(config)
        assert list(option_types(config)) == [option.name for option in fields(config)]
        assert set(texts) == set(option_types(config))
        assert not any("`" in text or "see " in text or "Config" in text for text in texts.values()), texts
    assert option_help(find_method("mvpt").config)["half_prompts"] == "as for maple"
