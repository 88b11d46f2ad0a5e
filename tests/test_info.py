"""``upt-fast info``: what it says is what the engine does."""

import json

import pytest
import torch

from upt_fast import dispatch, info
from upt_fast.version import __version__


def test_collect():
    found = info.collect()
    assert found["upt_fast"] == __version__
    assert found["packages"]["torch"] == torch.__version__.split("+")[0]
    assert found["devices"][0].startswith("cpu: ")
    assert f"{torch.get_num_threads()} threads" in found["devices"][0]
    assert found["ops"].keys() == set(dispatch.OPS)
    for op in found["ops"].values():
        assert op["backend"] == dispatch.resolve()
        assert op["refused"] == {name: reasons() for name, reasons in dispatch.BACKENDS.items() if reasons()}
        assert op["backend"] not in op["refused"]


def test_a_package_that_is_missing(monkeypatch):
    monkeypatch.setattr(info, "PACKAGES", ("torch", "no-such-package"))
    assert info.collect()["packages"]["no-such-package"] == "not installed"


def test_json_and_text_agree(capsys):
    assert info.main_info(as_json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == info.collect()
    assert info.main_info() == 0
    text = capsys.readouterr().out
    assert f"upt_fast {__version__}, Python {found['python']}" in text
    for package, version in found["packages"].items():
        assert f"{package} {version}" in text
    for op, choice in found["ops"].items():
        assert f"op {op}: {choice['backend']}\n" in text
    for backend, reasons in choice["refused"].items():
        assert f"not {backend}: {'; '.join(reasons)}" in text


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(("name", "why"), [("cuda", "wanted 'auto'"), ("triton", "cannot run here")])
def test_bad_environment(monkeypatch, capsys, name, why, as_json):
    monkeypatch.setitem(dispatch.BACKENDS, "triton", lambda: ["for a test"])
    monkeypatch.setenv("UPT_FAST_BACKEND", name)
    assert info.main_info(as_json) == 1
    out = capsys.readouterr().out
    assert f"UPT_FAST_BACKEND='{name}'" in out
    assert why in out


def test_resolve_takes_the_first_without_a_reason(monkeypatch):
    reasons = {"triton": ["a", "b"], "xformers": [], "torch": []}
    for name in reasons:
        monkeypatch.setitem(dispatch.BACKENDS, name, lambda name=name: reasons[name])
    assert dispatch.resolve() == "xformers"
    assert dispatch.resolve("torch") == "torch"
    with pytest.raises(ValueError, match="backend='triton' cannot run here: a; b"):
        dispatch.resolve("triton")
    reasons["triton"] = []
    assert dispatch.resolve() == "triton"


def test_order_of_argument_environment_and_auto(monkeypatch):
    for name in dispatch.BACKENDS:
        monkeypatch.setitem(dispatch.BACKENDS, name, list)
    monkeypatch.setenv("UPT_FAST_BACKEND", "torch")
    assert dispatch.resolve() == "torch"
    assert dispatch.resolve("xformers") == "xformers"
    monkeypatch.setenv("UPT_FAST_BACKEND", "")
    assert dispatch.resolve() == next(iter(dispatch.BACKENDS))
    monkeypatch.setenv("UPT_FAST_BACKEND", "auto")
    assert dispatch.resolve() == next(iter(dispatch.BACKENDS))
