"""``upt-fast info``: what it says is what the engine does."""

import json

import pytest
import torch

from upt_fast.cli import main
from upt_fast.engine.backends import dispatch, xformers_operators
from upt_fast.engine.backends.xformers_operators import USES
from upt_fast.engine.tuning import choices
from upt_fast.tools import info
from upt_fast.version import __version__


def test_collect():
    found = info.collect()
    assert found["upt_fast"] == __version__
    assert found["packages"]["torch"] == torch.__version__.split("+")[0]
    assert found["devices"][0].startswith("cpu: ")
    assert f"{torch.get_num_threads()} threads" in found["devices"][0]
    assert found["ops"].keys() == set(dispatch.OPS)
    for name, op in found["ops"].items():
        assert op["backend"] in dispatch.OPS[name]
        assert {op["backend"], *op["refused"]} == set(dispatch.BACKENDS)
        assert all(op["refused"].values())
    assert found["auto"].keys() == found["cpu_ops"].keys()
    assert bool(found["xformers"]["problem"]) != bool(found["xformers"]["cards"])
    for operators in found["xformers"]["cards"].values():
        assert operators.keys() == {f"{t} {use}" for t in ("float32", "float16", "bfloat16") for use in USES}
    compiled = "torch" if found["cpu_ops"]["float32"] or torch.cuda.is_available() else "compiled"
    assert {name: found["ops"][name]["backend"] for name in ("linear", "mlp", "block")} == {
        "linear": "torch",
        "mlp": compiled,
        "block": compiled,
    }
    assert found["auto"]["float32"] == compiled


def test_a_package_that_is_missing(monkeypatch):
    monkeypatch.setattr(info, "PACKAGES", ("torch", "no-such-package"))
    assert info.collect()["packages"]["no-such-package"] == "not installed"


def test_json_and_text_agree(capsys):
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == info.collect()
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"upt_fast {__version__}, Python {found['python']}" in text
    for package, version in found["packages"].items():
        assert f"{package} {version}" in text
    for op, choice in found["ops"].items():
        assert f"op {op}: {choice['backend']}\n" in text
    for dtype, backend in found["auto"].items():
        assert f"auto, ViT-B/16, {dtype}: {backend}" in text
    for backend, reasons in choice["refused"].items():
        assert f"not {backend}: {'; '.join(reasons)}" in text
    for card, uses in found["xformers"]["cards"].items():
        for use, operators in uses.items():
            (line,) = (x for x in text.splitlines() if x.startswith(f"    {card}, ") and use in x)
            assert f": {operators['forward'] or 'no forward'} and {operators['backward'] or 'no backward'}" in line


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(("name", "why"), [("cuda", "wanted 'auto'"), ("triton", "cannot run here")])
def test_bad_environment(monkeypatch, capsys, name, why, as_json):
    monkeypatch.setattr(dispatch, "refusals", lambda *_: ["for a test"])
    monkeypatch.setenv("UPT_FAST_BACKEND", name)
    assert main(["info", *["--json"] * as_json]) == 1
    out = capsys.readouterr().out
    assert f"UPT_FAST_BACKEND='{name}'" in out
    assert why in out


def test_each_tower_is_shown(monkeypatch, capsys):
    monkeypatch.setattr(dispatch, "refusals", lambda *_: [])
    monkeypatch.setenv("UPT_FAST_BACKEND", "triton/torch")
    found = info.collect()
    assert found["ops"]["layer_norm"]["backend"] == "triton"
    assert found["text_ops"]["layer_norm"]["backend"] == "torch"
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "op layer_norm: triton\n" in out
    assert "op layer_norm of the text tower: torch\n" in out


def test_the_named_backend_is_shown(monkeypatch):
    monkeypatch.setattr(dispatch, "refusals", lambda *_: [])
    monkeypatch.setenv("UPT_FAST_BACKEND", "triton,xformers")
    ops = info.collect()["ops"]
    assert ops["layer_norm"]["backend"] == "triton"
    assert ops["stream_attention"]["backend"] == "xformers"
    assert ops["linear"]["backend"] == "torch"
    assert ops["mlp"]["backend"] == "torch"
    assert ops["mlp"]["refused"]["compiled"] == ["the backend asked for is triton,xformers"]
    assert info.collect()["text_ops"] == {}
    assert ops["layer_norm"]["refused"]["torch"] == ["the backend asked for is triton,xformers"]
    assert ops["layer_norm"]["refused"]["xformers"] == ["has no implementation of this op"]


def test_without_xformers(monkeypatch, capsys):
    monkeypatch.setattr(xformers_operators, "problem", lambda: "xformers is not installed")
    assert info.collect()["xformers"] == {"problem": "xformers is not installed", "cards": {}}
    assert main(["info"]) == 0
    assert "xformers' operators: xformers is not installed\n" in capsys.readouterr().out


def test_routes_that_were_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("UPT_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(choices, "_measured", {})
    monkeypatch.setattr(choices, "_chosen", {})
    assert main(["info"]) == 0
    assert capsys.readouterr().out.count("(not measured here: run upt-fast tune)") == 2
    entry = {"choice": "inductor/torch", "usual": "torch", "ms": {"inductor/torch": 12.0, "torch": 24.0}, "refused": {}}
    choices.keep("step of upt; images", entry)
    choices.keep("norm_linear 3 x 4", entry)
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "auto, measured, step of upt; images: inductor/torch, 12 ms (torch: 24 ms)\n" in text
    assert "not measured here" not in text
    assert text.count("step of upt") == 1
    assert set(info.collect()["routes"]) == {"step of upt; images"}
