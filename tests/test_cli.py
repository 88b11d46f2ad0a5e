"""The command line as a user types it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from upt_fast.cli import main


def write_images(folder: Path, level: int, count: int = 3) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = np.random.default_rng(level + i).integers(0, 60, (34, 34, 3), dtype=np.uint8) + np.uint8(level)
        Image.fromarray(pixels).save(folder / f"{i}.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_images(root / "dark_side", 0)
    write_images(root / "light", 190)
    return root


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main([*train_command(data, out), "--epochs", "2"]) == 0
    return out


def train_command(data: Path, out: Path) -> list[str]:
    command = ["train", "--data", str(data), "--out", str(out), "--clip", "tiny-digits", "--shots", "2"]
    return [*command, "--batch-size", "2", "--depth-text", "1", "--depth-vision", "1", "--device", "cpu"]


def error_of(capfd, argv: list[str], code: int = 2) -> str:
    """The one message that a command must end with."""
    capfd.readouterr()
    assert main(argv) == code
    out, err = capfd.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("upt-fast: error: ")]
    assert len(errors) == 1, err
    assert err.splitlines()[-1] == errors[0]
    assert "Traceback" not in out + err
    return errors[0]


def test_help_is_fast_and_imports_no_torch():
    code = (
        "import sys\nfrom upt_fast.cli import main\n"
        "for argv in (['--help'], ['train', '--help'], ['--version'], ['train', '--shots', '0'],\n"
        "             ['train', '--method', 'maple', '--help'], ['train', '--config', 'coop', '--n-ctx', '0']):\n"
        "    assert main(argv) in (0, 2)\n"
        "assert 'torch' not in sys.modules and 'open_clip' not in sys.modules"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "predict" in done.stdout
    assert "--weight-decay" in done.stdout
    assert time.perf_counter() - started < 3


def test_module_entry_point():
    done = subprocess.run([sys.executable, "-m", "upt_fast", "nonsense"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("upt-fast: error: ")
    assert done.stderr.count("\n") == 1


def test_version_and_help(capsys):
    import upt_fast

    assert main(["--version"]) == 0
    assert upt_fast.__version__ in capsys.readouterr().out
    assert main(["eval", "--help"]) == 0


def test_help_shows_the_method_s_options(capsys):
    assert main(["train", "--method", "coop", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "shown for CoOp" in shown
    assert "options of method coop (CoOp): --n-ctx N_CTX prompt tokens (type: int, default: 16)" in shown
    assert "--n-text" not in shown
    assert main(["train", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "options of method upt (UPT)" in shown
    assert "--n-visual" in shown
    assert "or a recipe by name (cocoop, coop" in shown


def test_train_eval_predict(run, data, capsys):
    capsys.readouterr()
    assert main(["eval", "--checkpoint", str(run), "--data", str(data), "--device", "cpu", "--json"]) == 0
    evaluation = json.loads(capsys.readouterr().out)
    assert evaluation["num_images"] == 2
    assert evaluation["accuracy"] == json.loads((run / "results.json").read_text())["test"]["accuracy"]
    assert main(["eval", "--checkpoint", str(run / "best"), "--data", str(data), "--device", "cpu"]) == 0
    assert "accuracy" in capsys.readouterr().out
    images = [str(data / "light" / "0.png"), str(data / "dark_side" / "1.png")]
    assert main(["predict", *images, "--checkpoint", str(run), "--top-k", "1", "--json", "--device", "cpu"]) == 0
    predictions = json.loads(capsys.readouterr().out)
    assert [prediction["path"] for prediction in predictions] == images
    assert all(len(prediction["probabilities"]) == 1 for prediction in predictions)
    assert main(["predict", images[0], "--checkpoint", str(run), "--device", "cpu"]) == 0
    assert "dark side" in capsys.readouterr().out


def test_config_file_and_overrides(data, run, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(
        "shots: 1\nlr: 1e-3\nclip: tiny-digits\nepochs: 1\naugment: crop\ndepth_text: 1\nprogress: false\n"
    )
    command = ["train", "--config", str(config), "--data", str(data), "--out", str(tmp_path / "run"), "--lr", "0.5"]
    assert main([*command, "--device", "cpu"]) == 0
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (written["shots"], written["lr"], written["augment"], written["seed"]) == (1, 0.5, "crop", 1)
    capsys.readouterr()
    assert main([*command, "--print_config"]) == 0
    assert "lr: 0.5" in capsys.readouterr().out
    # the settings that a run writes are a config file
    assert main(["train", "--config", str(run / "config.json"), "--resume"]) == 0
    assert "is finished" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shots", "0"], "shots=0; wanted a whole number of at least 1"),
        (["--shots", "few"], "--shots few: wanted int or 'all'"),
        (["--lr", "fast"], "--lr"),
        (["--lr", "-1"], "lr=-1.0"),
        (["--augment", "mixup"], "--augment"),
        (["--shoots", "4"], "--shoots"),
        (["--data", "/nowhere"], "'/nowhere' does not exist"),
        (["--clip", "ViT-Q-7"], "unknown CLIP model 'ViT-Q-7'"),
        (["--clip", "ViT-B-32", "--pretrained", "nobody"], "nobody"),
        (["--pretrained", "openai"], "leave it out"),
        (["--shots", "3"], "leaves none to test on"),
        (["--depth-text", "99"], "depth_text=99"),
        (["--device", "cuda:77"], "cuda:77"),
        (["--backend", "fpga"], "fpga"),
        (["--config", "/no.yaml"], "/no.yaml"),
        (["--resume"], "nothing to resume"),
        (["--method", "nobody"], "method='nobody'; wanted one of 'upt', 'coop'"),
        (["--method", "coop"], "train with method 'coop' has no option --depth-text, --depth-vision;"),
        (["--shoots=4"], "train with method 'upt' has no option --shoots; did you mean --shots? see upt-fast train"),
        (
            ["--method", "ivlp", "--n-ctx", "3"],
            "train with method 'ivlp' has no option --n-ctx; did you mean --n-text?",
        ),
        (["--config", "mapel"], "--config mapel: no such file; wanted a YAML or JSON file, or a recipe: cocoop, coop"),
        (["--config", "maple"], "train with method 'maple' has no option --depth-text"),
        (["--method"], "--method: expected one argument"),
        (["--method", "/nowhere.py:Mine"], "cannot import /nowhere.py"),
        (["--n-text", "many"], "--n-text many: wanted int"),
        (["--shared", "perhaps"], "--shared perhaps: wanted bool"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_bad_options(data, tmp_path, capfd, options, message):
    assert message in error_of(capfd, [*train_command(data, tmp_path / "run"), *options])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no command; wanted one of train, eval"),
        (["eval", "--checkpoint", "a", "--data", "b", "--shots", "3"], "unrecognized arguments: --shots 3"),
        (["trian"], "trian"),
        (["train"], "required: --data"),
        (["predict", "a.png", "--checkpoint", "/nowhere"], "a.png"),
        (["predict", "--checkpoint", "/nowhere"], "image"),
        (["eval", "--checkpoint", "/nowhere", "--data", "."], "'/nowhere' does not exist"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_bad_commands(capfd, argv, message):
    assert message in error_of(capfd, argv)


@pytest.mark.parametrize("text", ["data: [a\n", "nonsense: 3\n", "shots: [1, 2]\n", "- 1\n", "\x00"])
def test_bad_yaml(data, tmp_path, capfd, text):
    config = tmp_path / "bad.yaml"
    config.write_text(text)
    error_of(capfd, [*train_command(data, tmp_path / "run"), "--config", str(config)])


def test_unsupported_model(data, tmp_path, capfd):
    import open_clip
    import torch

    weights = tmp_path / "weights.pt"
    torch.save(open_clip.create_model("RN50").state_dict(), weights)
    options = ["--clip", "RN50", "--pretrained", str(weights)]
    assert "unsupported" in error_of(capfd, [*train_command(data, tmp_path / "run"), *options])


def test_corrupt_weights_file(data, tmp_path, capfd):
    weights = tmp_path / "weights.pt"
    weights.write_text("no weights")
    error_of(capfd, [*train_command(data, tmp_path / "run"), "--clip", "ViT-B-32", "--pretrained", str(weights)])


def test_bad_images_and_classes(tmp_path, capfd):
    root = tmp_path / "data"
    write_images(root / "dark", 0)
    write_images(root / "light", 190)
    command = train_command(root, tmp_path / "run")
    (root / "light" / "3.jpg").write_bytes(b"\xff\xd8\xff no JPEG")
    message = error_of(capfd, command)
    assert "1 image(s) cannot be read" in message
    assert "light/3.jpg" in message
    (root / "light" / "3.jpg").unlink()
    (root / "empty").mkdir()
    assert "data/empty" in error_of(capfd, command)
    (root / "empty").rmdir()
    write_images(root / " ".join(["w"] * 110), 3)
    assert "tokens" in error_of(capfd, command)
    assert not (tmp_path / "run").exists()


def test_method_of_eval_must_be_the_checkpoint_s(run, data, capfd):
    argv = ["eval", "--checkpoint", str(run), "--data", str(data), "--device", "cpu", "--method"]
    assert main([*argv, "upt"]) == 0
    assert "method 'upt'; method='coop' was given" in error_of(capfd, [*argv, "coop"])


def test_unknown_option_in_a_config_file(data, tmp_path, capfd):
    config = tmp_path / "some.yaml"
    config.write_text("method: cocoop\nnctx: 3\n")
    message = error_of(
        capfd, ["train", "--data", str(data), "--out", "o", "--clip", "tiny-digits", "--config", str(config)]
    )
    assert "train with method 'cocoop' has no option --nctx; did you mean --n-ctx?" in message


def test_corrupt_image_in_predict(run, tmp_path, capfd):
    (tmp_path / "bad.jpg").write_text("no image")
    argv = ["predict", str(tmp_path / "bad.jpg"), "--checkpoint", str(run), "--device", "cpu"]
    assert "bad.jpg" in error_of(capfd, argv)


def test_divergence(data, tmp_path, capfd):
    argv = [*train_command(data, tmp_path / "run"), "--lr", "1e30", "--epochs", "4"]
    assert "the last good checkpoint is kept" in error_of(capfd, argv, code=1)


def test_debug_shows_the_traceback(data, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="does not exist"):
        main(["--debug", *train_command(tmp_path / "none", tmp_path / "run")])
    monkeypatch.setenv("UPT_FAST_DEBUG", "1")
    with pytest.raises(ValueError, match="does not exist"):
        main(train_command(tmp_path / "none", tmp_path / "run"))


def test_bugs_are_not_hidden(data, tmp_path, monkeypatch):
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("upt_fast.train.loop.scan_folder", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(train_command(data, tmp_path / "run"))


def test_interrupt_says_how_to_resume(data, tmp_path, capfd):
    out = tmp_path / "run"
    command = [*train_command(data, out), "--epochs", "4000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "upt_fast", *command],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # a shell's background job ignores SIGINT, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not (out / "last").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert (
        err.splitlines()[-1]
        == f"upt-fast: interrupted; continue with: upt-fast train --config {out}/config.json --resume"
    )
    assert os.path.islink(out / "last")


def test_other_commands_are_called(monkeypatch):
    import types

    calls = []
    modules = {
        "upt_fast.tools.verify": {"run_verify": lambda *a: calls.append(a) or 3},
        "upt_fast.tools.info": {"collect": lambda: calls.append("info") or {"problem": ""}},
        "upt_fast.demo.run": {"run_demo": lambda **k: calls.append(k)},
    }
    for name, members in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    assert main(["verify", "golden", "--dtype", "float32"]) == 3
    assert main(["verify"]) == 3
    assert main(["info", "--json"]) == 0
    assert main(["demo", "--out", "d", "--shots", "1", "4", "--seeds", "7"]) == 0
    assert main(["demo"]) == 0
    assert calls == [
        (Path("golden"), "cpu", "float32", "auto"),
        (None, "cpu", "float64", "auto"),
        "info",
        {"out_dir": Path("d"), "shots": (1, 4), "seeds": (7,)},
        {"out_dir": None},
    ]
