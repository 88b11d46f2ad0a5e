"""TrainConfig checks itself."""

from typing import get_args, get_type_hints

import pytest

from upt_fast.config import CLASS_TOKEN_POSITIONS, PRESETS
from upt_fast.data import AUGMENTATIONS
from upt_fast.towers.blocks import MEMORY_LEVELS
from upt_fast.train import TrainConfig

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
        {"weight_decay": -1.0},
        {"augment": "mixup"},
        {"precision": "fp8"},
        {"memory": "none"},
        {"device": "tpu"},
        {"num_workers": -1},
        {"cache_gib": -1.0},
        {"on_corrupt": "ignore"},
        {"final_model": "first"},
        {"preset": "other"},
        {"n_text": 0},
        {"dropout": 1.0},
        {"class_token_position": "top"},
        {"preset": "released", "depth_text": 2},
        {"data": ""},
        {"pretrained": ""},
    ],
    ids=str,
)
def test_bad_values_are_named(values):
    name, value = list(values.items())[-1]
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        TrainConfig(**{**REQUIRED, **values})


def test_choices_are_those_of_the_parts():
    hints = get_type_hints(TrainConfig)
    assert get_args(hints["augment"]) == AUGMENTATIONS
    assert get_args(hints["memory"]) == MEMORY_LEVELS
    assert get_args(hints["preset"]) == PRESETS
    assert get_args(hints["class_token_position"]) == CLASS_TOKEN_POSITIONS


def test_differences_leave_out_what_does_not_matter():
    config = TrainConfig(**REQUIRED)
    there = {**config.to_dict(), "lr": 0.1, "num_workers": 3, "device": "cpu", "out": "/elsewhere", "shots": "all"}
    assert config.differences(there) == ["shots: 'all' there, 16 here", "lr: 0.1 there, 0.002 here"]
