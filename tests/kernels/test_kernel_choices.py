"""Kernels beside PyTorch's own operations: which a route leaves to PyTorch, by declared times and real results."""

from __future__ import annotations

import math

import pytest
import torch

from upt_fast import FastUPT
from upt_fast.engine.backends import dispatch, triton
from upt_fast.engine.backends.asked import AskedOfTowers
from upt_fast.engine.towers import routes
from upt_fast.engine.tuning import candidates, choices, table
from upt_fast.engine.tuning.candidates import Declared, declared
from upt_fast.engine.tuning.machine import machine
from upt_fast.testing import random_clip, xformers_on_cpu
from upt_fast.tools import kernel_choices, tune, tune_process
from upt_fast.tools.kernel_choices import Kernels, overridden
from upt_fast.tools.op_calls import calls_of

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="xformers and the kernels run elsewhere")
pytestmark = WITHOUT_GPU
SMALL = {"vision_layers": 2, "text_layers": 2, "vision_width": 32, "vision_head_width": 16}
CLIP = random_clip(**SMALL, text_width=32, embed_dim=16, image_size=16)
B, NAMES = 2, ["cat", "traffic light"]
IMAGES, LABELS = torch.randn(B, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(B)


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """A cache of its own, and nothing chosen."""
    monkeypatch.setenv("UPT_FAST_MEASURE", "1")
    monkeypatch.setenv("UPT_FAST_CACHE", str(tmp_path))
    chosen = dict(choices._chosen)
    choices.forget()
    yield tmp_path
    choices.forget()
    choices._chosen.update(chosen)


@pytest.fixture
def times(monkeypatch):
    """Declared milliseconds of kernels by op, or by (op, rows of its first argument); 1 where none, as PyTorch's.

    What is timed is not run, and all is close.
    """
    monkeypatch.setattr(kernel_choices, "_not_close", lambda call, weights: "")
    return declared_times(monkeypatch)


@pytest.fixture
def held_times(monkeypatch):
    """The same of kernels that are held to PyTorch's operations."""
    return declared_times(monkeypatch)


def declared_times(monkeypatch) -> dict:
    found: dict = {}

    def seconds_of(call, name, run):
        rows = math.prod(call.tensors[0].shape[:-1])
        ms = found.get((call.op, rows), found.get(call.op, 1.0)) if name != "torch" else 1.0
        if isinstance(ms, Exception):
            raise ms
        return ms / 1e3

    monkeypatch.setattr(kernel_choices, "seconds_of", seconds_of)
    return found


def build(backend: str = "torch", **options) -> FastUPT:
    torch.manual_seed(0)
    options = {"n_text": 2, "n_visual": 2, "dropout": 0.0} | options
    return FastUPT(CLIP, NAMES, backend=backend, **options).train()


def measured(*backends: str, refused=None, seconds=1e9, fresh=False, **options):
    """What is found for routes, and the keys that were measured for it."""
    model, told = build(**options), []
    work = Kernels(model, lambda: model.loss(IMAGES, LABELS), backends, seconds, fresh)
    return work.measure(told.append, refused or {}), [event["candidate"] for event in told if "stage" in event]


def results(model: FastUPT) -> list[torch.Tensor]:
    loss = model.loss(IMAGES, LABELS)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)]


def entry_of(start: str) -> dict:
    (found,) = {key: e for key, e in kernel_choices.known("cpu").items() if key.startswith(start)}.values()
    return found


def test_what_a_step_calls_by_tower():
    model = build()
    calls = calls_of(model, AskedOfTowers.of("triton"), lambda: model.loss(IMAGES, LABELS))
    counts = {place: sum(call.count for call in found.values()) for place, found in calls.items()}
    # two layers: a sum behind attention in each, and one in front of the second; the last ones pool
    layers = {"add_layer_norm": 3, "linear_gelu": 2}
    assert counts == {
        **{("images", op): count for op, count in layers.items()},
        **{("texts", op): count for op, count in layers.items()},
        ("images", "layer_norm"): 1,
        ("images", "prefix_attention"): 2,
        ("texts", "packed_attention"): 2,
        ("images", "prompt_transform"): 1,
        ("images", "contrastive_loss"): 1,
    }
    rows = [call.arguments[0].shape for call in calls["images", "prefix_attention"].values()]
    assert rows == [(B, 5, 2, 16), (B, 1, 2, 16)]
    first = next(iter(calls["images", "prefix_attention"].values()))
    assert first.arguments[0].stride()[:2] == (5 * 3 * 32, 3 * 32)  # slices of one product
    assert [t.requires_grad for t in first.arguments[:5]] == [False, False, False, True, True]  # images are constants
    assert not any(call.refused for found in calls.values() for call in found.values())
    assert dispatch.find("layer_norm", "triton", IMAGES) is triton  # and nobody listens any more


@pytest.mark.parametrize("memory", ["balanced", "lean"])
def test_what_is_computed_again_is_heard_once_with_its_gradients(memory):
    model, plain = build(memory=memory), build()
    counts = [
        {
            (place, tuple(call.arguments[0].shape), sum(t.requires_grad for t in call.tensors)): call.count
            for place, found in calls_of(m, AskedOfTowers.of("triton"), lambda m=m: m.loss(IMAGES, LABELS)).items()
            for call in found.values()
        }
        for m in (model, plain)
    ]
    assert counts[0] == counts[1]


def test_what_is_slower_is_left_to_pytorch(folder, times):
    times |= {"linear_gelu": 1.5, "prefix_attention": 0.5, "add_layer_norm": 1 / 0.985, "packed_attention": 1 / 0.97}
    found, _ = measured("triton", "torch/triton")
    assert found == {
        "triton": "triton,linear_gelu=torch,packed_attention=torch",
        "torch/triton": "torch/triton,linear_gelu=torch,packed_attention=torch",
    }
    assert entry_of("op contrastive_loss")["choice"] == "triton"
    text = entry_of("op packed_attention by triton, forward and backward; <=2x2")
    assert (text["choice"], text["usual"], text["refused"]) == ("torch", "triton", {})
    assert text["ms"] == {"triton": 1.0309, "torch": 1.0}


def test_calls_of_one_op_count_as_often_as_a_step_has_them(folder, times):
    # rows of the images' sums: two calls at 2 x 5, one at the pooled 2; a class has 3 or 4 rows
    times |= {("add_layer_norm", 10): 0.9, ("add_layer_norm", 2): 1.15}
    assert measured("triton/torch")[0] == {}
    times[("add_layer_norm", 2)] = 1.5
    assert measured("triton/torch", fresh=True)[0] == {"triton/torch": "triton,add_layer_norm=torch/torch"}


def test_towers_differ(folder, times):
    times |= {("linear_gelu", 10): 3.0, "prefix_attention": 3.0}
    found, _ = measured("triton")
    assert found == {"triton": "triton,linear_gelu=torch,prefix_attention=torch/triton"}
    routes.check(dispatch.resolve(found["triton"]))


def test_no_override_where_kernels_win(folder, held_times):
    held_times |= dict.fromkeys(dispatch.OPS, 0.9)
    found, keys = measured("triton", "inductor/triton")
    assert found == {}
    assert len(keys) == len(set(keys)) == len(kernel_choices.known("cpu"))


def test_what_is_known_is_not_measured_again(folder, times):
    times["linear_gelu"] = 2.0
    found, keys = measured("triton")
    assert keys
    choices.forget()  # another process
    times.clear()
    assert measured("triton") == (found, [])
    assert measured("triton", fresh=True) == ({}, keys)


@pytest.mark.parametrize("op", ["layer_norm", "prefix_attention", "packed_attention"])
def test_a_wrong_kernel_is_refused(folder, held_times, monkeypatch, op):
    held_times |= dict.fromkeys(dispatch.OPS, 0.1)
    right = getattr(triton, op)
    monkeypatch.setattr(triton, op, lambda *arguments: right(*arguments) * 1.01)
    found, _ = measured("triton")
    assert found == {"triton": f"triton,{op}=torch"}
    for key, entry in kernel_choices.known("cpu").items():
        if key.startswith(f"op {op} "):
            assert entry["choice"] == "torch"
            assert "triton" not in entry["ms"]
            assert entry["refused"]["triton"].startswith(f"not close: {op}'s result ")
        else:
            assert (entry["choice"], entry["refused"]) == ("triton", {})


def test_a_wrong_gradient_is_refused(folder, held_times, monkeypatch):
    right = triton.linear_gelu

    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * 1.01

    monkeypatch.setattr(triton, "linear_gelu", lambda h, *others: right(Off.apply(h), *others))
    assert measured("triton/torch")[0] == {"triton/torch": "triton,linear_gelu=torch/torch"}
    assert (
        "result 1 is off by 1.0e-02"
        in entry_of("op linear_gelu by triton, forward and backward; <=2x5")["refused"]["triton"]
    )


def test_a_kernel_that_fails_is_refused(folder, held_times, monkeypatch):
    def fails(*arguments):
        raise NotImplementedError("no kernel for this card")

    monkeypatch.setattr(triton, "contrastive_loss", fails)
    held_times["prefix_attention"] = RuntimeError("launch failure")
    found, _ = measured("triton")
    assert found == {"triton": "triton,contrastive_loss=torch,prefix_attention=torch"}
    refused = {"triton": "NotImplementedError: no kernel for this card"}
    assert entry_of("op contrastive_loss")["refused"] == refused
    assert entry_of("op prefix_attention by triton, forward and backward; <=2x5")["refused"] == {
        "triton": "RuntimeError: launch failure"
    }


def test_a_kernel_that_does_not_take_the_input_is_refused(folder, times):
    found, _ = measured("triton", dropout=0.1)
    assert found == {"triton": "triton,prompt_transform=torch"}
    assert entry_of("op prompt_transform")["refused"] == {"triton": "dropout 0.1 (takes 0)"}
    with pytest.raises(ValueError, match=r"dropout 0\.1"):
        build("triton", dropout=0.1).loss(IMAGES, LABELS)
    assert build(found["triton"], dropout=0.1).loss(IMAGES, LABELS).isfinite()


def test_what_broke_another_process_is_not_tried(folder, times, monkeypatch):
    _, keys = measured("triton")
    broken = next(key for key in keys if key.startswith("op layer_norm"))
    monkeypatch.setattr(triton, "layer_norm", lambda x, eps: pytest.fail("it was tried"))
    found, _ = measured("triton", fresh=True, refused={broken: "its process ended, by SIGSEGV"})
    assert found == {"triton": "triton,layer_norm=torch"}
    assert entry_of("op layer_norm")["refused"] == {"triton": "its process ended, by SIGSEGV"}


def test_large_operations_come_first(folder, times):
    _, keys = measured("triton/torch")
    places = {op: [i for i, key in enumerate(keys) if key.startswith(f"op {op} ")] for op in dispatch.OPS}
    assert max(places["linear_gelu"] + places["prompt_transform"]) < min(places["prefix_attention"])
    assert places["contrastive_loss"] == [len(keys) - 1]


def test_no_time_no_override(folder, times):
    times |= dict.fromkeys(dispatch.OPS, 5.0)
    assert measured("triton", seconds=0) == ({}, [])


@pytest.mark.parametrize("backend", ["triton", "triton,xformers", "xformers/triton", "torch/xformers"])
def test_routes_with_overrides_run_and_compute_the_same(folder, times, backend):
    """Every second op that the route has is slower."""
    with xformers_on_cpu():
        model = build()
        ops = sorted({op for _, op in calls_of(model, dispatch.resolve(backend), lambda: model.loss(IMAGES, LABELS))})
        times |= dict.fromkeys(ops[::2], 2.0)
        (found,) = measured(backend)[0].values()
        model = build(backend)
        wanted = results(model)
        model.use_backend(found)
        assert model.backend == str(AskedOfTowers.of(found))
        overridden_ops = {op for part in AskedOfTowers.of(found) for op, name in part.ops if name == "torch"}
        assert overridden_ops == set(ops[::2])
        for got, want in zip(results(model), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-5)
        calls = calls_of(model, dispatch.resolve(found), lambda: model.loss(IMAGES, LABELS))
        assert {op for _, op in calls} == set(ops) - set(ops[::2])


def test_an_op_of_one_tower_stands_in_the_text_of_both_only_where_both_are_alike():
    has = {
        ("images", "layer_norm"),
        ("images", "prefix_attention"),
        ("texts", "layer_norm"),
        ("texts", "packed_attention"),
    }
    asked = AskedOfTowers.of("triton")
    texts = {
        "triton,packed_attention=torch,prefix_attention=torch": {
            ("images", "prefix_attention"),
            ("texts", "packed_attention"),
        },
        "triton,layer_norm=torch": {("images", "layer_norm"), ("texts", "layer_norm")},
        "triton/triton,layer_norm=torch,packed_attention=torch": {
            ("texts", "layer_norm"),
            ("texts", "packed_attention"),
        },
        "triton,layer_norm=torch,prefix_attention=torch/triton,packed_attention=torch": has - {("texts", "layer_norm")},
    }
    for text, slower in texts.items():
        assert overridden(asked, has, slower) == text
        routes.check(dispatch.resolve(text))


def test_candidates_beside_the_declared_ones():
    found, left_out = declared("cuda", "torch", True, beside={"triton": "triton,linear_gelu=torch"})
    names = list(found)
    assert names[names.index("triton") :][:4] == [
        "triton",
        "triton, graph",
        "triton,linear_gelu=torch",
        "triton,linear_gelu=torch, graph",
    ]
    assert len(names) == len(declared("cuda", "torch", True)[0]) + 2
    assert not left_out
    assert set(kernel_choices.with_kernels("cuda")) >= {"triton", "triton,xformers", "torch/triton", "inductor/triton"}
    assert not {"torch", "inductor", "flash/torch"} & set(kernel_choices.with_kernels("cuda"))
    assert kernel_choices.with_kernels("cpu") == ()


def test_the_work_runs_in_another_process(folder, monkeypatch):
    """As upt-fast tune runs it on a GPU."""
    monkeypatch.setattr(kernel_choices, "with_kernels", lambda kind: ("torch/triton",))
    asked = {
        "clip": "tiny-digits",
        "method": "upt",
        "classes": 2,
        "batch_size": 1,
        "precision": "fp32",
        "memory": "fast",
    }
    told = []
    found = tune._routes_beside({**asked, "device": "cpu", "mode": "step"}, "cpu", 60.0, False, told.append)
    ops = "add_layer_norm", "linear_gelu", "packed_attention"
    left = dict(AskedOfTowers.of(found.get("torch/triton", "torch/triton")).texts.ops)
    assert set(left) <= set(ops)
    for op in ops:  # times are real: which of both is faster is not told here
        entries = [entry for key, entry in kernel_choices.known("cpu").items() if key.startswith(f"op {op} ")]
        assert all(set(entry["ms"]) == {"torch", "triton"} and entry["refused"] == {} for entry in entries)
        chosen = {entry["choice"] for entry in entries}
        assert chosen == {"torch", "triton"} or chosen == {left.get(op, "triton")}
    assert {line.split(" by ")[0] for line in told} == {"op add_layer_norm", "op linear_gelu", "op packed_attention"}
    file = folder / "export.json"
    tune.export("cpu", file)
    assert kernel_choices.known("cpu").items() <= table.load(file, machine("cpu")).items()


def test_a_route_with_overrides_is_a_candidate(monkeypatch):
    """Of upt-fast tune's race: it takes the step, and its results are right."""
    text = "torch/triton,linear_gelu=torch"
    monkeypatch.setitem(candidates.BY_DEVICE, "cpu", (Declared("torch"), Declared("torch/triton")))
    sizes = "tiny-digits", "upt", 2, 1, "fp32", "fast", "cpu", "step"
    found = tune_process.measurement(
        *sizes, budget=60.0, refused={}, beside={"torch/triton": text, "triton": "not declared"}, only=None
    )
    assert set(found.candidates) == {found.usual, "torch", "torch/triton", text}
    candidate = found.candidates[text]
    candidate.prepare()
    assert found.judge(candidate.results()).reason == ""
    assert candidate.run() > 0


def test_a_process_that_dies_leaves_the_routes_to_be_measured(monkeypatch):
    monkeypatch.setattr(kernel_choices, "with_kernels", lambda kind: ("triton",))

    def dies(*arguments):
        raise RuntimeError("nothing could be measured: its process ended at the start, by SIGKILL")

    monkeypatch.setattr(tune, "measure_isolated", dies)
    told = []
    assert tune._routes_beside({}, "cpu", 1.0, False, told.append) == {}
    assert told == [
        "no single operation was measured: nothing could be measured: its process ended at the start, by SIGKILL"
    ]
