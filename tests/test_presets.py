"""The published recipes that ship with the package, read as the command line reads them."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from upt_fast.cli import main
from upt_fast.methods import BUILTIN_METHODS, find_method
from upt_fast.train import TrainConfig
from upt_fast.train.config import train_fields
from upt_fast.train.recipes import list_recipes, recipe_path

FOLDER = Path(__file__).parents[1] / "configs"
# of the released configurations: batch size, epochs, learning rate
NUMBERS = {
    "upt": (32, 200, 0.002),
    "upt_imagenet": (32, 50, 0.002),
    "coop": (32, 200, 0.002),
    "coop_ep10": (32, 10, 0.002),
    "kgcoop": (128, 100, 0.002),
    "cocoop": (1, 10, 0.002),
    "vpt_shallow": (32, 50, 0.002),
    "vpt_deep": (32, 50, 0.002),
    "maple": (4, 5, 0.0035),
    "maple_cross": (4, 2, 0.0026),
    "ivlp": (4, 5, 0.0035),
    "ivlp_language": (4, 5, 0.0025),
    "mvpt": (4, 5, 0.0025),
}


def test_recipes_are_the_folder_s_files():
    assert list_recipes() == sorted(path.stem for path in FOLDER.glob("*.yaml"))
    assert set(list_recipes()) == {*NUMBERS, "zeroshot"}
    named = {yaml.safe_load(recipe_path(name).read_text())["method"] for name in list_recipes()}
    assert named == set(BUILTIN_METHODS)
    for name in BUILTIN_METHODS:
        recipe = yaml.safe_load(recipe_path(find_method(name).recipe).read_text())
        assert recipe["method"] == name


@pytest.mark.parametrize("name", list_recipes())
def test_a_recipe_through_the_parser(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (FOLDER / f"{name}.yaml").read_text()
    for word in ("Numbers: ", "Differs: "):
        assert f"\n# {word}" in text
    values = yaml.safe_load(text)
    assert not {"data", "out", "clip", "pretrained"} & set(values)
    command = ["train", "--config", name, "--data", "d", "--out", "o", "--clip", "tiny-digits"]
    assert main([*command, "--print_config"]) == 0
    parsed = yaml.safe_load(capsys.readouterr().out)
    assert {key: parsed[key] for key in values} == pytest.approx(values)
    config = TrainConfig.from_dict(parsed)
    assert config.to_dict().keys() == parsed.keys()
    method = find_method(values["method"])
    assert set(values) <= {*train_fields(), *(option.name for option in fields(method.config))}
    if name in NUMBERS:
        assert (config.batch_size, config.epochs, config.lr) == NUMBERS[name]
        assert (config.warmup_lr, config.momentum, config.weight_decay) == (1e-5, 0.9, 5e-4)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("coop", {"n_ctx": 16, "ctx_init": None}),
        ("coop_ep10", {"n_ctx": 4, "ctx_init": "a photo of a"}),
        ("cocoop", {"ctx_init": "a photo of a"}),
        ("maple", {"n_ctx": 2, "depth": 9}),
        ("maple_cross", {"n_ctx": 2, "depth": 3}),
        ("ivlp", {"n_text": 2, "n_visual": 2, "depth_text": None, "depth_vision": None}),
        ("ivlp_language", {"n_text": 4, "depth_vision": 0}),
        ("mvpt", {"n_ctx": 8, "depth": None}),
        ("upt", {"preset": "paper", "n_text": 4, "n_visual": 4}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_prompts_of_recipes(name, options):
    values = yaml.safe_load(recipe_path(name).read_text())
    config = TrainConfig.from_dict({**values, "data": "d", "out": "o", "clip": "tiny-digits"}).method_config()
    assert {key: getattr(config, key) for key in options} == options


def test_a_file_of_the_user_s_comes_before_a_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("coop").write_text("method: cocoop\nn_ctx: 2\nlr: 0.5\n")
    command = ["train", "--config", "coop", "--data", "d", "--out", "o", "--clip", "tiny-digits", "--print_config"]
    assert main(command) == 0
    parsed = yaml.safe_load(capsys.readouterr().out)
    assert (parsed["method"], parsed["n_ctx"], parsed["lr"]) == ("cocoop", 2, 0.5)


def test_which_method_counts(tmp_path, capsys):
    rest = ["--data", "d", "--out", "o", "--clip", "tiny-digits", "--print_config"]

    def parsed(*arguments: str) -> dict:
        assert main(["train", *arguments, *rest]) == 0
        return yaml.safe_load(capsys.readouterr().out)

    for arguments in (("--method", "cocoop", "--config"), ("--method=cocoop", "--config")):
        file = tmp_path / "some.yaml"
        file.write_text("method: coop\nn_ctx: 7\n")
        found = parsed(*arguments, str(file))
        assert (found["method"], found["n_ctx"]) == ("cocoop", 7)
    assert parsed(f"--config={file}")["method"] == "coop"
    file.write_text(json.dumps({"method": "maple", "depth": 1}))
    assert parsed("--config", "maple", "--config", str(file), "--n-ctx", "3")["depth"] == 1
    assert parsed("--config", "zeroshot", "--templates", "a {}", "b {}")["templates"] == ["a {}", "b {}"]
    assert parsed("--method", "mvpt", "--templates=a {}")["templates"] == "a {}"
    assert parsed()["method"] == "upt"
