"""Which backend computes an op, and what is said where none can."""

from __future__ import annotations

import types

import pytest
import torch

from upt_fast.engine import ops
from upt_fast.engine.autograd import composing
from upt_fast.engine.backends import compiled, dispatch, packages, pytorch, xformers
from upt_fast.engine.backends.asked import TORCH, UNASKED, Asked

X = torch.randn(2, 5)
ON_CPU = not torch.cuda.is_available()


def test_every_op_is_public_and_has_a_plain_implementation():
    for op, backends in dispatch.OPS.items():
        assert backends[-1] == "torch"
        if op != "prompt_transform":  # the learner's own modules are its plain implementation
            assert callable(getattr(ops, op))


@pytest.mark.parametrize("name", dispatch.BACKENDS)
def test_a_backend_has_a_function_for_each_of_its_ops(name):
    backend = dispatch.BACKENDS[name]
    elsewhere = {"prompt_transform", "block", *(["mlp"] if name == "compiled" else [])}  # as the backend's OPS says
    assert set(backend.OPS) <= set(dispatch.OPS)
    assert all(callable(getattr(backend, op)) for op in set(backend.OPS) - elsewhere)


@pytest.mark.parametrize("name", ["torch", "triton", "triton,torch", "torch, triton"])
def test_resolve_takes_names_that_run_here(name):
    assert str(dispatch.resolve(name)) == name.replace(" ", "")


def test_order_of_argument_environment_and_auto(monkeypatch):
    assert str(dispatch.resolve()) == "auto"
    monkeypatch.setenv("UPT_FAST_BACKEND", "triton")
    assert str(dispatch.resolve()) == "triton"
    assert dispatch.resolve("torch") == (TORCH, TORCH)
    monkeypatch.setenv("UPT_FAST_BACKEND", "")
    assert str(dispatch.resolve()) == "auto"
    monkeypatch.setenv("UPT_FAST_BACKEND", "auto")
    assert str(dispatch.resolve()) == "auto"


def test_the_environment_takes_the_same_words(monkeypatch):
    monkeypatch.setenv("UPT_FAST_BACKEND", "triton,linear_gelu=torch/torch")
    assert str(dispatch.resolve()) == "triton,linear_gelu=torch/torch"
    monkeypatch.setenv("UPT_FAST_BACKEND", "triton,linear=fpga")
    with pytest.raises(ValueError, match=r"^UPT_FAST_BACKEND='triton,linear=fpga': no backend 'fpga'; wanted"):
        dispatch.resolve()


def test_a_backend_that_runs_on_the_cpu_alone(monkeypatch):
    """A machine with a GPU has a CPU, too."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dispatch, "refusals", lambda name, device, *_: [] if device == "cpu" else [f"{device} (cpu)"])
    assert str(dispatch.resolve("compiled")) == "compiled"
    monkeypatch.setattr(dispatch, "refusals", lambda name, device, *_: [f"{device} (none)"])
    with pytest.raises(ValueError, match=r"backend='compiled' cannot run here: compiled: cuda \(none\)$"):
        dispatch.resolve("compiled")


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


def test_who_computes_one_op():
    assert dispatch.choose("layer_norm", "triton", X) == "triton"
    assert dispatch.choose("layer_norm", "triton,layer_norm=torch", X) == "torch"
    assert dispatch.choose("activation", "triton,layer_norm=torch", X) == "triton"
    assert dispatch.choose("layer_norm", "layer_norm=triton", X) == "triton"
    assert dispatch.choose("activation", "layer_norm=triton", X) == "torch"
    with pytest.raises(ValueError, match=r"no backend for layer_norm\n.*\n    triton: float64"):
        dispatch.choose("layer_norm", "torch,layer_norm=triton", X.double())


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


def test_what_the_compiled_operations_refuse(monkeypatch):
    monkeypatch.delenv("UPT_FAST_CPU_OPS", raising=False)
    assert dispatch.refusals("compiled", "cuda") == ["cuda (run on cpu)"]
    assert dispatch.refusals("compiled", "cpu", torch.float64) == ["float64 (take float32, bfloat16)"]
    assert compiled.refusals("cpu", torch.float32, width=128) == ["width 128 (run from 256)"]
    monkeypatch.setenv("UPT_FAST_CPU_OPS", "0")
    assert dispatch.refusals("compiled", "cpu") == ["UPT_FAST_CPU_OPS=0"]
    assert dispatch.explain("mlp", "cpu", UNASKED)[0] == "torch"
    assert dispatch.explain("mlp", "cpu", UNASKED)[1]["compiled"] == ["UPT_FAST_CPU_OPS=0"]


@pytest.mark.parametrize(
    ("asked", "chosen", "reasons"),
    [
        ("auto", "compiled", {"torch": "runs where the compiled operations do not: narrow towers, other dtypes"}),
        ("compiled", "compiled", {"torch": "the backend asked for is compiled"}),
        ("torch", "torch", {"compiled": "the backend asked for is torch"}),
        ("triton", "torch", {"compiled": "the backend asked for is triton"}),
    ],
)
def test_explained(monkeypatch, asked, chosen, reasons):
    monkeypatch.setattr(dispatch, "refusals", lambda *_: [])
    for op in ("norm_linear", "linear_residual", "mlp", "block"):
        found, refused = dispatch.explain(op, "cpu", Asked.of(asked))
        assert found == chosen
        assert refused["triton"] == ["has no implementation of this op"]
        assert {name: refused[name] for name in reasons} == {name: [reason] for name, reason in reasons.items()}
    assert dispatch.explain("linear", "cpu", Asked.of(asked))[0] == "torch"
    assert dispatch.explain("packed_attention", "cpu", Asked.of(asked))[0] == (asked if asked == "triton" else chosen)


@pytest.mark.skipif(bool(dispatch.refusals("compiled", "cpu", torch.float32)), reason="no compiled operations")
def test_who_attends_packed_rows():
    """ "auto" takes the compiled operation where it runs, "torch" never."""
    q = torch.randn(3, 4, 64)
    for asked, wide, narrow in (("auto", compiled, pytorch), ("torch", pytorch, pytorch)):
        assert dispatch.find("packed_attention", asked, q, q) is wide
        assert dispatch.find("packed_attention", asked, q.double(), q.double()) is pytorch
        assert dispatch.find("packed_attention", asked, q[:, :1], q[:, :1]) is narrow
    assert dispatch.find("packed_attention", "compiled", q, q) is compiled
    with composing.composable():
        assert dispatch.find("packed_attention", "compiled", q, q) is pytorch
    with pytest.raises(ValueError, match=r"no backend for packed_attention\n.*\n    compiled: float64 \(take"):
        dispatch.find("packed_attention", "compiled", q.double(), q.double())


def test_a_package_that_is_not_there(monkeypatch):
    packages.missing.cache_clear()
    monkeypatch.setattr(packages.util, "find_spec", lambda name: None)
    try:
        assert dispatch.refusals("triton", "cuda") == ["triton is not installed"]
        assert dispatch.refusals("xformers", "cuda") == ["xformers is not installed"]
    finally:
        packages.missing.cache_clear()


def test_a_package_that_does_not_import(monkeypatch):
    packages.missing.cache_clear()

    def broken(name: str) -> types.ModuleType:
        raise OSError("undefined symbol\nmore")

    monkeypatch.setattr(packages.importlib, "import_module", broken)
    try:
        assert dispatch.refusals("xformers", "cuda") == ["xformers does not import: undefined symbol"]
    finally:
        packages.missing.cache_clear()


def test_xformers_is_imported_only_where_it_could_run(monkeypatch):
    packages.missing.cache_clear()
    imported = []
    monkeypatch.setattr(packages.importlib, "import_module", imported.append)
    try:
        assert dispatch.refusals("xformers", "cpu") == ["cpu (runs on cuda)"]
        assert imported == []
        assert dispatch.refusals("xformers", "cuda") == []
        assert imported == ["xformers.ops"]
    finally:
        packages.missing.cache_clear()


def test_what_xformers_refuses_is_said_with_its_reasons():
    """The package at hand refuses a CPU tensor: its own reasons come through."""
    q = torch.randn(1, 3, 2, 8)
    with pytest.raises(ValueError, match="xformers refuses; name 'torch'") as caught:
        xformers.stream_attention(q.cpu(), q.cpu(), q.cpu())
    assert "device=cpu" in str(caught.value)
