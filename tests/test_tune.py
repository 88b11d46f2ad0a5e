"""upt-fast tune: what it measures, keeps, says and refuses; its measuring process killed and interrupted."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from measured_routes import ROUTES, unknown_machine

from upt_fast.cli import main
from upt_fast.engine.backends import xformers
from upt_fast.engine.tuning import choices, table
from upt_fast.engine.tuning.machine import machine
from upt_fast.engine.tuning.measuring import measure
from upt_fast.tools import kernel_choices, tune, tune_process

ASKED = ["tune", "--clip", "tiny-digits", "--classes", "5", "--batch-size", "4", "--device", "cpu"]


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """No kernels are measured within routes, but where a test asks for it."""
    monkeypatch.setattr(kernel_choices, "with_kernels", lambda kind: ())
    with unknown_machine(monkeypatch, tmp_path / "cache"):
        yield tmp_path / "cache"


@pytest.fixture
def here(monkeypatch):
    """Measure in this process, where xformers' stand-in is."""
    calls = []

    def measure_here(factory, arguments, patience, tell):
        calls.append(arguments)
        if factory == "upt_fast.tools.tune_process:kernels":
            return tune_process.kernels(**arguments, refused={}).measure(lambda event: None, {})
        found = tune_process.measurement(**arguments, refused={})
        return measure(*found[:4], refused=found.refused)

    monkeypatch.setattr(tune, "measure_isolated", measure_here)
    return calls


def tuned(capsys, *arguments):
    assert main([*ASKED, "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_candidate_is_measured(precision, capsys, here):
    found = tuned(capsys, "--precision", precision)
    assert found["machine"] == machine()
    assert set(found["modes"]) == {"step", "inference"}
    for mode, measured in found["modes"].items():
        entry = measured["entry"]
        assert not measured["known"]
        assert measured["key"].startswith(f"{mode} of upt; ")
        assert set(entry["ms"]) | set(entry["refused"]) == set(ROUTES)
        assert entry["refused"] == {}
        assert entry["usual"] == "torch"
        assert entry["choice"] in ROUTES
        best = min(entry["ms"].values())
        assert entry["ms"][entry["choice"]] <= best / 0.98
        for name in ROUTES:
            details = entry["details"][name]
            assert 0 < details["error"] < {"fp32": 1e-4, "bf16": 0.2, "fp16": 0.05}[precision]
            assert details["plain_error"] > 0
            assert details["prepare_s"] > 0
            assert details["peak_mib"] >= 0
            assert entry["spread"][name] >= 0
            assert entry["rounds"][name] >= 1
        assert choices.find(measured["key"]) == entry["choice"]


def test_what_is_known_is_not_measured_again(capsys, here):
    first = tuned(capsys, "--mode", "train")
    assert len(here) == 1
    again = tuned(capsys, "--mode", "train")
    assert len(here) == 1
    assert again["modes"]["step"] == {**first["modes"]["step"], "known": True, "entry": again["modes"]["step"]["entry"]}
    tuned(capsys, "--mode", "train", "--fresh", "true")
    tuned(capsys, "--mode", "train", "--batch-size", "5")
    tuned(capsys, "--mode", "inference")
    assert len(here) == 4
    # what a run has measured had no time for all
    key = first["modes"]["step"]["key"]
    choices.keep(key, first["modes"]["step"]["entry"] | {"budget_s": 1.0})
    tuned(capsys, "--mode", "train")
    assert len(here) == 5


def test_a_route_without_its_slow_kernels_is_a_candidate(capsys, here, monkeypatch):
    """In training attention of texts is slower by the kernel, in inference nothing is."""

    def seconds_of(call, name, run):
        slow = name == "xformers" and call.op == "buffer_attention" and "backward" in call.key
        return 2e-3 if slow else 1e-3

    monkeypatch.setattr(kernel_choices, "seconds_of", seconds_of)
    monkeypatch.setattr(kernel_choices, "with_kernels", lambda kind: ("xformers", "torch/xformers"))
    found = tuned(capsys)
    step, inference = (found["modes"][mode]["entry"] for mode in ("step", "inference"))
    more = {"xformers,buffer_attention=torch", "torch/xformers,buffer_attention=torch"}
    assert set(step["ms"]) | set(step["refused"]) == {*ROUTES, *more}
    assert step["refused"] == {}
    assert set(inference["ms"]) == set(ROUTES)
    assert {key.split()[1] for key in found["kernels"]} == {"buffer_attention", "stream_attention"}
    assert {key for key, entry in found["kernels"].items() if entry["choice"] == "torch"} == {
        key for key in found["kernels"] if "buffer_attention" in key and "backward" in key
    }
    assert all(arguments["seconds"] <= 0.2 * tune.SECONDS["cpu"] for arguments in here if "seconds" in arguments)
    measured = len(here)
    assert tuned(capsys)["kernels"] == found["kernels"]
    assert len(here) == measured


def test_a_method_without_parameters_has_no_training_step(capsys, here):
    assert set(tuned(capsys, "--method", "zeroshot")["modes"]) == {"inference"}


def test_a_wrong_candidate_is_refused(capsys, here, monkeypatch):
    """By 1e-2 in one tensor, the output of attention."""
    original = xformers.call
    monkeypatch.setattr(xformers, "call", lambda *args: 1.01 * original(*args))
    for measured in tuned(capsys)["modes"].values():
        entry = measured["entry"]
        assert entry["choice"] == "torch"
        assert set(entry["refused"]) == set(ROUTES[1:])
        assert all("not close: " in reason for reason in entry["refused"].values())


def test_text(capsys, here):
    assert main([*ASKED, "--only", "torch; xformers"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("tiny-digits, upt, 5 classes, 4 images, fp32, memory='fast', on ")
    assert "training step:\n    " in out
    assert "inference:\n    " in out
    assert out.count("chosen") == out.count("usual") == 2
    assert out.count(" ms  spread ") == 4
    assert main(ASKED) == 0
    assert "measured before" in capsys.readouterr().out


def test_export_and_import(capsys, here, tmp_path, folder):
    file = tmp_path / "table.json"
    entry = tuned(capsys, "--mode", "train", "--export", str(file))["modes"]["step"]
    assert json.loads(file.read_text())["machine"] == machine()
    for path in folder.glob("choices-*.json"):
        path.unlink()
    choices.forget()
    assert choices.find(entry["key"]) is None
    assert main(["tune", "--device", "cpu", "--import", str(file)]) == 0
    assert capsys.readouterr().out.endswith(f" choices taken over from {file}\n")
    choices.forget()
    assert choices.find(entry["key"]) == entry["entry"]["choice"]
    text = file.read_text()
    file.write_text(text.replace(torch.__version__, "1.0"))
    assert main(["tune", "--device", "cpu", "--import", str(file)]) == 2
    assert f"torch: '1.0' there, '{torch.__version__}' here" in capsys.readouterr().err
    file.write_text(text[:50])
    assert main(["tune", "--device", "cpu", "--import", str(file)]) == 2
    assert "is no table of choices" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--clip", "no-such-clip"], "no-such-clip"),
        (["--method", "no-such-method"], "no-such-method"),
        (["--classes", "0"], "classes"),
        (["--batch-size", "-1"], "batch_size"),
        (["--precision", "fp8"], "precision='fp8'; wanted one of"),
        (["--mode", "both of them"], "mode='both of them'"),
        (["--memory", "big"], "memory='big'"),
        (["--seconds", "0"], "seconds=0.0; wanted a number above 0"),
        (["--device", "tpu"], "tpu"),
        (["--only", "torch; no-such-backend"], "no backend 'no-such-backend'"),
        (["--import", "no-such-file.json"], "no-such-file.json is no table of choices"),
    ],
)
def test_bad_arguments(arguments, message, capfd):
    assert main([*ASKED, *arguments]) == 2
    err = capfd.readouterr().err
    assert message in err
    assert "Traceback" not in err


def environment(folder):
    return os.environ | {"UPT_FAST_CACHE": str(folder), "UPT_FAST_MEASURE": "1", "UPT_FAST_CPU_OPS": "0"}


def command(*arguments):
    return [sys.executable, "-m", "upt_fast", *ASKED, "--only", "torch", *arguments]


def test_in_a_process_of_its_own(folder):
    """Everything is real here: the reference, the steps, the process; two at once leave one valid table."""
    runs = [
        subprocess.Popen(
            [*command("--mode", mode, "--json")], env=environment(folder), stdout=subprocess.PIPE, text=True
        )
        for mode in ("train", "inference")
    ]
    outputs = [json.loads(run.communicate(timeout=300)[0]) for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    for output in outputs:
        (measured,) = output["modes"].values()
        assert measured["entry"]["choice"] == "torch"
        assert measured["entry"]["ms"]["torch"] > 0
        assert measured["entry"]["details"]["torch"]["error"] <= 1e-4
    (path,) = folder.glob("choices-*.json")
    assert len([key for key in json.loads(path.read_text())["choices"] if " of upt; " in key]) == 2


@pytest.mark.parametrize("which", [signal.SIGKILL, signal.SIGINT])
def test_killed_while_it_measures(which, folder):
    """The measuring process goes with it, and what was known stays."""
    here = machine()
    folder.mkdir(exist_ok=True)
    entry = {"choice": "a", "usual": "a", "ms": {"a": 1.0}, "refused": {}}
    found = subprocess.run(
        [sys.executable, "-c", KEEP], env=environment(folder), capture_output=True, text=True, check=True
    )
    assert found.stdout.strip()
    run = subprocess.Popen(
        command(), env=environment(folder), stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=hears
    )
    assert run.stderr.readline().startswith("torch: prepare")
    (child,) = children(run.pid)
    run.send_signal(which)
    assert run.wait(60) == (-signal.SIGKILL if which == signal.SIGKILL else 130)
    end = time.monotonic() + 60
    while alive(child) and time.monotonic() < end:
        time.sleep(0.1)
    assert not alive(child)
    (path,) = folder.glob("choices-*.json")
    assert json.loads(path.read_text())["choices"]["known"] == entry
    assert here["torch"] == torch.__version__
    assert json.loads(path.read_text())["format"] == table.FORMAT


KEEP = """
from upt_fast.engine.tuning import choices
choices.keep("known", {"choice": "a", "usual": "a", "ms": {"a": 1.0}, "refused": {}})
print("kept")
"""


def hears():
    """SIGINT, which children of a process that was started in the background would not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(word) for word in file.read().split()]


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split()[2] != "Z"
    except FileNotFoundError:
        return False
