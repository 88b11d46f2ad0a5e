"""UPTConfig checks itself."""

import dataclasses

import pytest

from upt_fast.common.checks import require_choice, require_int
from upt_fast.methods.upt import UPTConfig


def test_defaults_and_round_trip():
    config = UPTConfig()
    assert (config.preset, config.n_text, config.n_visual, config.class_token_position) == ("paper", 4, 4, "end")
    other = UPTConfig("released", n_text=2, depth_text=1, attention_heads=2, dropout=0.5)
    assert UPTConfig(**other.to_dict()) == other != config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.n_text = 3


@pytest.mark.parametrize(
    ("options", "depths"),
    [
        ({}, (3, 5)),
        ({"depth_text": 2}, (2, 5)),
        ({"depth_vision": 1}, (3, 1)),
        ({"depth_text": 3, "depth_vision": 5}, (3, 5)),
        ({"preset": "released"}, (1, 1)),
        ({"preset": "released", "depth_text": 1}, (1, 1)),
    ],
)
def test_depths(options, depths):
    assert UPTConfig(**options).depths(3, 5) == depths


@pytest.mark.parametrize(
    ("options", "name", "layers"), [({"depth_text": 4}, "depth_text=4", 3), ({"depth_vision": 6}, "depth_vision=6", 5)]
)
def test_depth_beyond_the_tower(options, name, layers):
    with pytest.raises(ValueError, match=f"{name}.*{layers} layers.*1 to {layers}"):
        UPTConfig(**options).depths(3, 5)


@pytest.mark.parametrize(
    ("options", "dropout"), [({}, 0.0), ({"preset": "released"}, 0.1), ({"preset": "released", "dropout": 0.0}, 0.0)]
)
def test_dropout(options, dropout):
    assert UPTConfig(**options).dropout_p == dropout


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"preset": "v6"}, "preset='v6'; wanted one of 'paper', 'released'"),
        ({"preset": None}, "preset=None"),
        ({"class_token_position": "start"}, "'start'; wanted one of 'end', 'middle', 'front'"),
        ({"n_text": 0}, "n_text=0; wanted a whole number of at least 1"),
        ({"n_visual": 0}, "n_visual=0; wanted a whole number of at least 1"),
        ({"n_text": 2.0}, "n_text=2.0"),
        ({"n_text": "4"}, "n_text='4'"),
        ({"n_text": True}, "n_text=True"),
        ({"attention_heads": 0}, "attention_heads=0"),
        ({"depth_text": 0}, "depth_text=0"),
        ({"depth_vision": -2}, "depth_vision=-2"),
        ({"preset": "released", "depth_text": 2}, "depth_text=2.*input layer only"),
        ({"dropout": 1.0}, "dropout=1.0; wanted a probability"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"dropout": float("nan")}, "dropout=nan"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_bad_options(options, wanted):
    with pytest.raises(ValueError, match=wanted):
        UPTConfig(**options)


def test_dropout_that_is_no_number():
    with pytest.raises(ValueError, match=r"dropout='0.1'"):
        UPTConfig(dropout="0.1")


def test_checks():
    require_choice("x", "a", ("a", "b"))
    require_int("x", 3, 3)
    with pytest.raises(ValueError, match="x='c'; wanted one of 'a', 'b'"):
        require_choice("x", "c", ("a", "b"))
    with pytest.raises(ValueError, match="x=2; wanted a whole number of at least 3"):
        require_int("x", 2, 3)
