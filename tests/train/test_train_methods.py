"""Every method trains, resumes, evaluates and predicts through the command line, one from a file of the user's too."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs_on_disk import killed_after_epoch
from safetensors.torch import load_file

from upt_fast.cli import main
from upt_fast.methods import BUILTIN_METHODS
from upt_fast.train import TrainConfig, load_run

OUTSIDE = '''
from dataclasses import dataclass

import torch
from torch import nn

from upt_fast import MethodConfig, PromptLearner, Prompts


@dataclass(frozen=True)
class TiedConfig(MethodConfig):
    """Options.

    Args:
        n_ctx: prompt tokens of each tower.
        std: of the start,
            100 % normal.
        words: tried in turn.
    """

    n_ctx: int = 2
    std: float = 0.02
    words: tuple[str, ...] = ("a",)


class Tied(PromptLearner):
    method, config_class, title, source = "tied", TiedConfig, "tied prompts", "this test"

    def __init__(self, config, setting):
        super().__init__(config, setting)
        self.n_text = config.n_ctx
        self.ctx = nn.Parameter(torch.empty(config.n_ctx, setting.text_width).normal_(std=config.std))
        self.to_visual = nn.Linear(setting.text_width, setting.vision_width)

    def forward(self):
        return Prompts(text=self.ctx[None, None], visual=self.to_visual(self.ctx)[None, None])
'''
# what fits the small CLIP's 3 and 4 layers
OPTIONS = {
    "upt": ["--depth-text", "2", "--dropout", "0.1"],
    "coop": ["--n-ctx", "3", "--class-token-position", "middle"],
    "cocoop": ["--ctx-init", "a photo of a", "--text-batch", "1"],
    "vpt_shallow": ["--n-ctx", "2"],
    "vpt_deep": ["--n-ctx", "1", "--templates", "a photo of a {}.", "a {}."],
    "maple": ["--depth", "2", "--half-prompts", "true"],
    "ivlp": ["--depth-vision", "0"],
    "mvpt": ["--depth", "3"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for label, name in enumerate(("dark", "light")):
        (root / name).mkdir()
        for i in range(4):
            pixels = np.random.default_rng(10 * label + i).integers(0, 99, (34, 34, 3), dtype=np.uint8)
            Image.fromarray(pixels + np.uint8(150 * label)).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def outside(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("code") / "tied_prompts.py"
    path.write_text(OUTSIDE)
    return f"{path}:Tied"


def command(data: Path, out: Path, method: str, *options: str) -> list[str]:
    return [
        *("train", "--data", str(data), "--out", str(out), "--clip", "tiny-digits", "--method", method),
        *("--shots", "3", "--batch-size", "2", "--epochs", "2", "--lr", "0.02", "--device", "cpu"),
        *("--progress", "false", *OPTIONS.get(method, []), *options),
    ]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    files = sorted((run / "last").glob("*.safetensors"))
    return {f"{file.stem}/{key}": value for file in files for key, value in load_file(file).items()}


@pytest.mark.parametrize("method", [name for name in BUILTIN_METHODS if name != "zeroshot"])
def test_every_method_trains(data, tmp_path, capsys, method):
    run = tmp_path / "run"
    assert main(command(data, run, method)) == 0
    results = json.loads((run / "results.json").read_text())
    assert results["epoch"] == 2
    assert results["trainable_parameters"] > 0
    momentum = {name: value for name, value in tensors(run).items() if "momentum" in name}
    assert momentum
    assert any(value.abs().max() > 0 for value in momentum.values())
    written = json.loads((run / "config.json").read_text())
    assert written["method"] == method
    config = TrainConfig.from_dict(written)
    assert config.to_dict() == written
    assert load_run(run).config == config.method_config()
    capsys.readouterr()
    assert main(["eval", "--checkpoint", str(run), "--data", str(data), "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == results["test"]["accuracy"]
    assert main(["predict", str(data / "light" / "0.png"), "--checkpoint", str(run), "--device", "cpu"]) == 0
    assert main(["train", "--config", str(run / "config.json"), "--resume"]) == 0
    assert "is finished: 2 epochs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("coop", ()),
        ("maple", ()),
        ("outside", ()),
        ("coop", ("--optimizer", "adamw", "--label-smoothing", "0.1")),
    ],
    ids=["coop", "maple", "outside", "coop-adamw"],
)
def test_resume_is_bit_exact(data, tmp_path, monkeypatch, outside, method, options):
    name = outside if method == "outside" else method
    assert main(command(data, tmp_path / "whole", name, "--epochs", "4", *options)) == 0
    with killed_after_epoch(monkeypatch, 2):
        main(command(data, tmp_path / "cut", name, "--epochs", "4", *options))
    assert not (tmp_path / "cut" / "results.json").exists()
    assert main(["train", "--config", str(tmp_path / "cut" / "config.json"), "--resume"]) == 0
    whole, resumed = tensors(tmp_path / "whole"), tensors(tmp_path / "cut")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())
    results = [json.loads((tmp_path / run / "results.json").read_text()) for run in ("whole", "cut")]
    assert results[0] == results[1]


def test_resume_needs_the_same_method_and_options(data, tmp_path, capfd):
    run = tmp_path / "run"
    assert main(command(data, run, "coop")) == 0
    capfd.readouterr()
    assert main(command(data, run, "coop", "--n-ctx", "5", "--resume")) == 2
    assert "n_ctx: 3 there, 5 here" in capfd.readouterr().err
    assert main(command(data, run, "cocoop", "--resume")) == 2
    err = capfd.readouterr().err
    assert "(method: 'coop' there, 'cocoop' here)" in err
    assert main(command(data, run, "coop", "--backend", "torch", "--text-batch", "3", "--resume")) == 0


def test_a_method_of_the_user_s_own(data, tmp_path, capsys, monkeypatch, outside):
    run = tmp_path / "run"
    file, _, name = outside.rpartition(":")
    monkeypatch.chdir(Path(file).parent)
    options = ("--n-ctx", "3", "--words", "a", "b c")
    assert main(command(data, run, f"tied_prompts.py:{name}", *options)) == 0
    monkeypatch.chdir(tmp_path)
    written = json.loads((run / "config.json").read_text())
    assert (written["method"], written["n_ctx"], written["words"]) == (outside, 3, ["a", "b c"])
    results = json.loads((run / "results.json").read_text())
    assert results["trainable_parameters"] == 3 * 128 + 128 * 128 + 128
    capsys.readouterr()
    arguments = ["--checkpoint", str(run), "--method", outside, "--device", "cpu", "--json"]
    assert main(["eval", *arguments, "--data", str(data)]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == results["test"]["accuracy"]
    assert main(["predict", str(data / "dark" / "1.png"), *arguments, "--top-k", "1"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 1
    assert main(["train", "--method", outside, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "options of method tied (tied prompts)" in shown
    assert "--std STD of the start, 100 % normal (type: float, default: 0.02)" in shown


def test_a_checkpoint_imports_no_code(data, tmp_path, outside):
    run = tmp_path / "run"
    assert main(command(data, run, outside)) == 0
    arguments = ["eval", "--checkpoint", str(run), "--data", str(data), "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "upt_fast", *arguments], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 2
    assert "method 'tied' is not known here" in done.stderr
    assert done.stderr.count("\n") == 1
    done = subprocess.run(
        [sys.executable, "-m", "upt_fast", *arguments, "--method", outside],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr


def test_an_installed_method(data, tmp_path, monkeypatch, capsys):
    for name in ("by_entry", "by_module"):
        (tmp_path / f"{name}_code.py").write_text(OUTSIDE.replace('"tied"', f'"{name}"'))
    (tmp_path / "tied-1.0.dist-info").mkdir()
    (tmp_path / "tied-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: tied\nVersion: 1.0\n")
    (tmp_path / "tied-1.0.dist-info" / "entry_points.txt").write_text(
        "[upt_fast.methods]\nby_entry = by_entry_code:Tied\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for method in ("by_entry", "by_module_code:Tied"):
        run = tmp_path / method
        assert main(command(data, run, method, "--n-ctx", "1", "--epochs", "1")) == 0
        assert json.loads((run / "config.json").read_text())["method"] == method
        # known by its name from here on, in this process; an entry point in every one
        assert main(["eval", "--checkpoint", str(run), "--data", str(data), "--device", "cpu"]) == 0
    assert main(["methods", "--clip", "tiny-digits", "--classes", "3"]) == 0
    table = capsys.readouterr().out
    assert "by_entry" in table
    assert "tied prompts" in table


def test_zero_shot_trains_nothing(data, tmp_path, capfd):
    run = tmp_path / "run"
    assert main(command(data, run, "zeroshot", "--templates", "imagenet_select", "a drawing of a {}.")) == 0
    assert "zeroshot has nothing to train; testing on 2 images" in capfd.readouterr().err
    results = json.loads((run / "results.json").read_text())
    assert (results["epoch"], results["trainable_parameters"]) == (0, 0)
    assert results["best"] == {"epoch": 0, "chosen_by": "nothing: the method has no parameters", "value": None}
    assert not (run / "metrics.jsonl").exists()
    assert len(load_run(run).prompt_learner.templates) == 8
    resume = ["train", "--config", str(run / "config.json"), "--resume"]
    assert main(resume) == 0
    assert "is finished: nothing was to train" in capfd.readouterr().err
    (run / "results.json").unlink()  # as if it was killed before it ended
    assert main(resume) == 0
    assert json.loads((run / "results.json").read_text()) == results
    capfd.readouterr()
    arguments = ["--checkpoint", str(run), "--device", "cpu", "--json"]
    assert main(["eval", *arguments, "--data", str(data)]) == 0
    assert json.loads(capfd.readouterr().out)["accuracy"] == results["test"]["accuracy"]
    assert main(["predict", str(data / "dark" / "1.png"), *arguments]) == 0
    assert json.loads(capfd.readouterr().out)[0]["classnames"]


CLASHING = OUTSIDE.replace('"tied"', '"clashing"').replace("std", "lr")
WITHOUT_JSON = OUTSIDE.replace('"tied"', '"no_json"').replace('("a",)', "frozenset()")
DEMANDING = OUTSIDE.replace('"tied"', '"demanding"').replace("n_ctx: int = 2", "n_ctx: int")


@pytest.mark.parametrize(
    ("code", "name", "message"),
    [
        (CLASHING, "Tied", "method 'clashing' has options that every run has already: lr"),
        (WITHOUT_JSON, "Tied", "words=frozenset() of method"),
        (DEMANDING, "Tied", "--n-ctx"),
        (OUTSIDE, "Untied", "'Untied' in"),
        ("import nothing_of_that_name", "Tied", "ModuleNotFoundError"),
        ("x =", "Tied", "SyntaxError"),
    ],
    ids=["clash", "no_json", "demanding", "no_class", "import", "syntax"],
)
def test_methods_that_cannot_be_used(data, tmp_path, capfd, request, code, name, message):
    file = tmp_path / f"code_{request.node.callspec.id}.py"
    file.write_text(code)
    capfd.readouterr()
    assert main(command(data, tmp_path / "run", f"{file}:{name}")) == 2
    err = capfd.readouterr().err
    assert err.startswith("upt-fast: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "run").exists()
