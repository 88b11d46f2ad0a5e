"""Which backend computes an op, and what is said where none can."""

from __future__ import annotations

import types

import pytest
import torch

from upt_fast.engine import ops
from upt_fast.engine.backends import dispatch

X = torch.randn(2, 5)
ON_CPU = not torch.cuda.is_available()


def test_every_op_is_public_and_has_a_plain_implementation():
    for op, backends in dispatch.OPS.items():
        assert backends[-1] == "torch"
        if op != "prompt_transform":  # the learner's own modules are its plain implementation
            assert callable(getattr(ops, op))


@pytest.mark.parametrize("name", ["torch", "triton", "triton,torch", "torch, triton"])
def test_resolve_takes_names_that_run_here(name):
    assert dispatch.resolve(name) == name.replace(" ", "")


def test_order_of_argument_environment_and_auto(monkeypatch):
    assert dispatch.resolve() == "auto"
    monkeypatch.setenv("UPT_FAST_BACKEND", "triton")
    assert dispatch.resolve() == "triton"
    assert dispatch.resolve("torch") == "torch"
    monkeypatch.setenv("UPT_FAST_BACKEND", "")
    assert dispatch.resolve() == "auto"
    monkeypatch.setenv("UPT_FAST_BACKEND", "auto")
    assert dispatch.resolve() == "auto"


@pytest.mark.parametrize("name", ["fpga", "triton,fpga", "triton;xformers", ","])
def test_unknown_names(name):
    with pytest.raises(ValueError, match="wanted 'auto', one of 'triton', 'xformers', 'torch'"):
        dispatch.resolve(name)


@pytest.mark.skipif(not ON_CPU, reason="xformers runs here")
def test_a_named_backend_that_cannot_run():
    with pytest.raises(ValueError, match=r"backend='xformers' cannot run here: xformers: .*cpu \(runs on cuda\)"):
        dispatch.resolve("xformers")


@pytest.mark.skipif(not ON_CPU, reason="the kernels run natively here")
def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        dispatch.resolve("triton")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        ops.layer_norm(X, 1e-5, "triton")


def test_auto_takes_what_was_measured(monkeypatch):
    assert dispatch.choose("layer_norm", "auto", X) == "torch"
    monkeypatch.setitem(dispatch.MEASURED, ("layer_norm", "cpu"), "triton")
    assert dispatch.choose("layer_norm", "auto", X) == "triton"
    assert dispatch.choose("layer_norm", "torch", X) == "torch"


def test_a_named_backend_never_falls_back():
    with pytest.raises(ValueError) as caught:
        ops.layer_norm(X.double(), 1e-5, "triton")
    assert str(caught.value).splitlines() == [
        "no backend for layer_norm",
        "    x: (2, 5) float64 cpu",
        "    triton: float64 (takes float32, float16, bfloat16)",
    ]
    assert dispatch.choose("layer_norm", "triton,torch", X.double()) == "torch"  # unless told so
    assert dispatch.choose("linear", "triton", X.double()) == "torch"  # has no such kernel
    assert dispatch.refusals("triton", "cpu", torch.float32, dropout=0.1) == ["dropout 0.1 (takes 0)"]
    assert dispatch.refusals("triton", "mps")[-1] == "mps (runs on cuda)"


def test_a_package_that_is_not_there(monkeypatch):
    dispatch._missing.cache_clear()
    monkeypatch.setattr(dispatch.util, "find_spec", lambda name: None)
    try:
        assert dispatch.refusals("triton", "cuda") == ["triton is not installed"]
        assert dispatch.refusals("xformers", "cuda") == ["xformers is not installed"]
    finally:
        dispatch._missing.cache_clear()


def test_a_package_that_does_not_import(monkeypatch):
    dispatch._missing.cache_clear()

    def broken(name: str) -> types.ModuleType:
        raise OSError("undefined symbol\nmore")

    monkeypatch.setattr(dispatch.importlib, "import_module", broken)
    try:
        assert dispatch.refusals("xformers", "cuda") == ["xformers does not import: undefined symbol"]
    finally:
        dispatch._missing.cache_clear()


def test_xformers_is_imported_only_where_it_could_run(monkeypatch):
    dispatch._missing.cache_clear()
    imported = []
    monkeypatch.setattr(dispatch.importlib, "import_module", imported.append)
    try:
        assert dispatch.refusals("xformers", "cpu") == ["cpu (runs on cuda)"]
        assert imported == []
        assert dispatch.refusals("xformers", "cuda") == []
        assert imported == ["xformers.ops"]
    finally:
        dispatch._missing.cache_clear()


def test_what_xformers_refuses_is_said_with_its_reasons():
    """The package at hand refuses a CPU tensor: its own reasons come through."""
    from upt_fast.engine.backends import xformers

    q = torch.randn(1, 3, 2, 8)
    with pytest.raises(ValueError, match="xformers refuses; name 'torch'") as caught:
        xformers.attention(q.cpu(), q.cpu(), q.cpu())
    assert "device=cpu" in str(caught.value)
