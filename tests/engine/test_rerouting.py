"""A model on another route, in place: the bits of one that was built with it, also of models on the same towers."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F

from upt_fast import FastPromptedCLIP, FastUPT
from upt_fast.engine.backends import dispatch
from upt_fast.engine.towers.stacks import PackedStack, PlainStack
from upt_fast.engine.towers.tower import Tower
from upt_fast.testing import random_clip, xformers_on_cpu

NAMES = ["cat", "dog", "traffic light"]
# wide enough for the compiled operations
CLIP = random_clip(vision_width=256, text_width=256, text_heads=4, vision_layers=2, text_layers=2)
COMPILED = [] if dispatch.refusals("compiled", "cpu", torch.float32) else ["compiled", "torch/compiled"]
BACKENDS = [
    *COMPILED,
    "auto",
    "torch",
    "triton",
    "torch,triton",
    "triton,xformers",
    "triton/torch",
    "torch,packed_attention=triton",
    pytest.param("inductor", marks=pytest.mark.slow),
    pytest.param("inductor/torch", marks=pytest.mark.slow),
]
compiled = pytest.mark.skipif(not COMPILED, reason="no compiled operations")
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="xformers and the kernels run elsewhere")


def build(backend: str, **options) -> FastUPT:
    torch.manual_seed(0)
    return FastUPT(CLIP, NAMES, backend=backend, depth_text=1, n_text=2, **options).train()


def run(model: FastPromptedCLIP) -> list[torch.Tensor]:
    """Logits, all gradients, and the class features that evaluation keeps."""
    model.zero_grad(set_to_none=True)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    logits = model(images)
    F.cross_entropy(logits, torch.arange(2)).backward()
    with torch.no_grad():
        texts = model.eval().encode_text()
    model.train()
    return [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None), texts]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


@WITHOUT_GPU
@pytest.mark.parametrize("backend", BACKENDS)
def test_as_if_built_with_it(backend):
    """From each to the next, with all that was kept on the way."""
    with xformers_on_cpu():
        built, model = build(backend), build("torch,triton" if backend == "torch" else "torch")
        run(model)  # something is kept
        model.use_backend(backend)
        assert model.backend == built.backend == backend
        assert model.prompt_learner.backend == backend.split("/")[0]
        assert [type(t.route) for t in towers(model)] == [type(t.route) for t in towers(built)]
        assert [type(t.blocks.stack) for t in towers(model)] == [type(t.blocks.stack) for t in towers(built)]
        assert equal(run(model), run(built))
        model.use_backend("torch")
        assert equal(run(model), run(build("torch")))


def towers(model: FastPromptedCLIP) -> tuple[Tower, Tower]:
    return model.vision_tower, model.text_tower


def test_routes_differ_in_bits():
    """What the tests above compare could tell them apart."""
    found = [run(build(backend)) for backend in ("torch", "torch,triton", *COMPILED[:1])]
    assert not any(equal(a, b) for i, a in enumerate(found) for b in found[:i])


@compiled
def test_packed_weights_come_and_go():
    model = build("compiled")
    assert all(isinstance(tower.blocks.stack, PackedStack) for tower in towers(model))
    stack = weakref.ref(model.vision_tower.blocks.stack)
    model.use_backend("auto")
    assert model.vision_tower.blocks.stack is stack()  # it is what that wants
    model.use_backend("torch")
    assert all(type(tower.blocks.stack) is PlainStack for tower in towers(model))
    gc.collect()
    assert stack() is None
    model.use_backend("torch/compiled")
    assert [type(tower.blocks.stack) for tower in towers(model)] == [PlainStack, PackedStack]


def test_the_learner_and_the_loss_follow_the_image_tower():
    model = build("torch")
    model.use_backend("triton/torch")
    assert model.prompt_learner.backend == "triton"
    assert model.backend == "triton/torch"
    model.use_backend("torch/triton")
    assert model.prompt_learner.backend == "torch"


def test_siblings_follow():
    first = build("torch")
    second = first.sibling(["car", "ship"], n_text=2, depth_text=1)
    third = second.sibling(NAMES, method="zeroshot")
    features = third.fixed_text_features(["a photo of a {}."])
    run(second)
    second.use_backend("torch,triton")
    assert first.backend == second.backend == third.backend == "torch,triton"
    assert first.prompt_learner.backend == second.prompt_learner.backend == "torch,triton"
    assert equal(run(first), run(build("torch,triton")))
    alone = build("torch,triton").sibling(["car", "ship"], n_text=2, depth_text=1)
    alone.load_state_dict(second.state_dict())
    assert equal(run(second)[:1], run(alone)[:1])
    assert third._kept_features == {}
    assert not torch.equal(third.fixed_text_features(["a photo of a {}."]), features)


def test_per_class_prompts_and_templates_are_packed_as_they_were():
    for method, options in (("coop", {"class_specific": True}), ("zeroshot", {}), ("cocoop", {})):
        torch.manual_seed(0)
        model = FastPromptedCLIP(CLIP, NAMES, method=method, backend="torch", **options)
        torch.manual_seed(0)
        built = FastPromptedCLIP(CLIP, NAMES, method=method, backend="torch,triton", **options)
        model.use_backend("torch,triton")
        images = torch.randn(2, 3, 32, 32)
        assert torch.equal(model(images), built(images)), method
        assert [p.per_class for p in model.packed] == [p.per_class for p in built.packed]


@pytest.mark.parametrize(
    ("backend", "why"),
    [
        ("fpga", "no backend 'fpga'"),
        ("inductor,triton", "computes whole layers"),
        ("torch,linear_gelu=triton", "changes nothing"),
        pytest.param("torch/compiled", "float64", marks=compiled),
        pytest.param("compiled", "float64", marks=compiled),
    ],
)
def test_an_error_changes_nothing(backend, why):
    torch.manual_seed(0)
    model = FastUPT(copy.deepcopy(CLIP).double(), NAMES, backend="torch,triton", n_text=2, depth_text=1)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    before, packed = model(images), model.packed
    with pytest.raises(ValueError, match=why):
        model.use_backend(backend)
    assert model.backend == model.prompt_learner.backend == "torch,triton"
    assert model.packed is packed
    assert torch.equal(model(images), before)


def test_an_error_on_the_way_changes_nothing(monkeypatch):
    model = build("torch,triton")
    sibling = model.sibling(["car"])
    before, packed = run(model), model.packed
    monkeypatch.setattr(sibling.text_tower, "pack", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.use_backend("torch")
    monkeypatch.undo()
    assert model.backend == sibling.backend == "torch,triton"
    assert model.packed is packed
    assert equal(run(model), before)


@compiled
def test_compiled_says_why_not():
    narrow = random_clip(vision_layers=2, text_layers=2)
    with pytest.raises(
        ValueError, match=r"backend='compiled' cannot compute this text tower: compiled: width 128 \(run"
    ):
        FastUPT(narrow, NAMES, backend="compiled")
    with pytest.raises(ValueError, match=r"cannot compute this image tower: compiled: width 128 .*; wanted 'auto', or"):
        FastUPT(narrow, NAMES, backend="compiled/torch")
    with pytest.raises(ValueError, match=r"compiled: float64 \(take float32, bfloat16\)"):
        FastUPT(CLIP, NAMES, backend="compiled", dtype="fp64")
    with pytest.raises(ValueError, match=r"compiled: fp8 \(take float32, bfloat16\)"):
        FastUPT(CLIP, NAMES, backend="compiled", dtype="fp8")


def test_compiled_is_switched_off(monkeypatch):
    monkeypatch.setenv("UPT_FAST_CPU_OPS", "0")
    with pytest.raises(ValueError, match="backend='compiled' cannot run here: compiled: UPT_FAST_CPU_OPS=0"):
        FastUPT(CLIP, NAMES, backend="compiled")


@compiled
def test_compiled_is_not_moved_where_it_does_not_run():
    model = build("compiled")
    before = run(model)
    with pytest.raises(ValueError, match=r"compiled: float64 \(take"):
        model.double()
    assert equal(run(model), before)
    model.use_backend("auto")
    assert type(model.double().text_tower.blocks.stack) is PlainStack


def test_fp8_takes_other_routes():
    torch.manual_seed(0)
    model = FastUPT(CLIP, NAMES, backend="torch", dtype="fp8", n_text=2, depth_text=1)
    model.use_backend("torch,triton")
    torch.manual_seed(0)
    built = FastUPT(CLIP, NAMES, backend="torch,triton", dtype="fp8", n_text=2, depth_text=1)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images), built(images))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_on_towers_of_their_own(copied):
    model = build("torch")
    pair = copied([model, model.sibling(NAMES, n_text=2, depth_text=1)])
    pair[0].use_backend("torch,triton")
    assert pair[1].backend == "torch,triton"
    assert len(list(pair[0]._siblings)) == 2
    assert model.backend == "torch"
    assert equal(run(pair[0]), run(build("torch,triton")))
