"""backend="inductor": layers compiled by torch.compile, how often, and that they compute what they should."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from upt_fast import FastUPT, ReferenceUPT
from upt_fast.common.closeness import relative_rms
from upt_fast.engine.backends import dispatch, inductor
from upt_fast.testing import random_clip

NAMES = ["cat", "dog", "traffic light"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {"vision_width": 64, "vision_head_width": 32, "text_width": 64}
CLIP = random_clip(vision_layers=4, text_layers=4, **SMALL).double().to(DEVICE)
REFUSED = dispatch.refusals("inductor", DEVICE)
compiles = pytest.mark.skipif(bool(REFUSED), reason=f"inductor: {REFUSED}")


def pair(clip=CLIP, **options):
    """A reference, and a fast model with the same parameters."""
    memory = options.pop("memory", "fast")
    torch.manual_seed(0)
    reference = ReferenceUPT(clip, NAMES, **options)
    fast = FastUPT(clip, NAMES, backend="inductor", memory=memory, **options)
    fast.load_state_dict(reference.state_dict())
    return reference, fast


def images(count, dtype=torch.float64):
    return torch.randn(count, 3, 32, 32, dtype=dtype, device=DEVICE)


def run(model, batch):
    """Logits and all gradients."""
    model.zero_grad(set_to_none=True)
    logits = model(batch)
    F.cross_entropy(logits.double(), torch.arange(len(batch), device=DEVICE) % logits.shape[1]).backward()
    return logits.detach(), torch.cat([p.grad.double().flatten() for p in model.parameters()])


def close(reference, fast, batch, tolerance=1e-12):
    for got, wanted in zip(run(fast, batch), run(reference, batch), strict=True):
        assert relative_rms(got, wanted) <= tolerance


class Graphs:
    """Counts what is compiled from here on."""

    def __init__(self):
        self.before = counters["stats"]["unique_graphs"]

    def __call__(self):
        return counters["stats"]["unique_graphs"] - self.before


@compiles
@pytest.mark.slow
def test_layers_share_what_is_compiled():
    """Images: the first layer, whose rows are constants, and one for all others; texts: queries, keys and values, and
    what comes behind attention for the same two."""
    inductor.region.cache_clear()
    reference, fast = pair()
    graphs = Graphs()
    close(reference, fast, images(3))
    assert graphs() == 2 + 1 + 2
    close(reference, fast, images(4))
    assert graphs() == 5 + 2  # the number of images has become a variable
    close(reference, fast, images(6))
    for model in (reference, fast):
        model.set_classnames(["horse", "a longer name with words", "x", "tree"])
    close(reference, fast, images(2))
    assert graphs() == 7
    # and another model of the same geometry, or one that comes back, compiles nothing
    fast.use_backend("torch")
    fast.use_backend("inductor")
    other = pair()[1]
    graphs = Graphs()
    for model in (fast, other):
        run(model, images(5))
    assert graphs() == 0


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("memory", ["balanced", "lean"])
def test_recomputation(memory):
    close(*pair(memory=memory), images(3))


@compiles
@pytest.mark.slow
def test_balanced_keeps_less():
    kept = {}
    for memory in ("fast", "balanced", "lean"):
        _, fast = pair(memory=memory)
        sizes = {}

        def keep(t, sizes=sizes):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            logits = fast(images(3))
        kept[memory] = sum(sizes.values())
        assert logits.requires_grad
    assert kept["lean"] < kept["balanced"] < kept["fast"]


@compiles
@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"depth_text": 1, "depth_vision": 2, "n_text": 3, "n_visual": 2},
        {"class_token_position": "middle", "n_text": 3},
    ],
    ids=["shallow", "middle"],
)
def test_where_the_prompts_are(options):
    close(*pair(**options), images(3))


@compiles
@pytest.mark.slow
def test_float32():
    close(*pair(random_clip(vision_layers=3, text_layers=3, **SMALL).to(DEVICE)), images(3, torch.float32), 1e-5)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    """Errors against float64 as the plain reference's own in this precision: at most 1.5 times those."""
    errors = {"reference": 0.0, "fast": 0.0}
    clip = random_clip(vision_layers=3, text_layers=3, **SMALL).to(DEVICE)
    exact, _ = pair(clip.double())
    own, fast = pair(random_clip(vision_layers=3, text_layers=3, **SMALL).to(DEVICE, dtype))
    for seed in range(3):
        torch.manual_seed(seed)
        for model in (own, fast):
            model.load_state_dict(exact.state_dict())
        batch = images(3)
        wanted = run(exact, batch)
        for name, model in (("reference", own), ("fast", fast)):
            found = run(model, batch.to(dtype))
            errors[name] += sum(relative_rms(g, w) ** 2 for g, w in zip(found, wanted, strict=True))
    assert errors["fast"] <= 1.5**2 * errors["reference"]


@compiles
@pytest.mark.slow
def test_autocast_and_evaluation():
    clip = random_clip(vision_layers=3, text_layers=3, **SMALL).to(DEVICE)
    reference, fast = pair(clip)
    batch = images(3, torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        got, own = run(fast, batch), run(reference, batch)
    for g, o, w in zip(got, own, run(reference, batch), strict=True):
        assert relative_rms(g, w) <= 2 * relative_rms(o, w)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert relative_rms(fast.eval()(batch), reference(batch)) <= 1e-5


@compiles
@pytest.mark.slow
def test_images_of_several_sets():
    """Each image meets its own set's prompts."""
    from upt_fast.clip.open_clip import frozen_clip
    from upt_fast.engine.towers import VisionTower

    clip = frozen_clip(CLIP)
    prompts = torch.randn(3, 4, 2, clip.vision.width, dtype=torch.float64, device=DEVICE, requires_grad=True)
    set_index, batch, found = torch.tensor([2, 0, 2, 1], device=DEVICE), images(4), []
    for backend in ("torch", "inductor"):
        features = VisionTower(clip.vision, torch.float64, backend=backend)(batch, prompts, set_index)
        found.append((features, *torch.autograd.grad(features.square().sum(), prompts)))
    for got, wanted in zip(*found, strict=True):
        assert relative_rms(got, wanted) <= 1e-12


def test_who_differentiates_op_by_op_sees_no_region(monkeypatch):
    """Second derivatives, torch.func and shapes alone."""
    monkeypatch.setattr(inductor, "region", lambda *_: pytest.fail("a region"))
    clip = random_clip(vision_layers=2, text_layers=2, **SMALL).double()
    _, fast = pair(clip)
    batch = images(2).cpu()
    gradient = torch.func.grad(lambda x: fast(x).square().sum())(batch)
    fast.use_backend("torch")
    wanted = torch.func.grad(lambda x: fast(x).square().sum())(batch)
    assert relative_rms(gradient, wanted) <= 1e-12
    with torch.device("meta"):
        shapes = FastUPT(random_clip(vision_layers=2, text_layers=2, **SMALL), NAMES, backend="inductor")
        assert shapes(torch.empty(2, 3, 32, 32)).shape == (2, 3)


@compiles
@pytest.mark.slow
def test_second_derivatives():
    clip = random_clip(vision_layers=3, text_layers=2, **SMALL).double().to(DEVICE)
    batch, found = images(2), []
    torch.manual_seed(0)
    model = FastUPT(clip, NAMES, backend="inductor")
    for backend in ("inductor", "torch"):
        model.use_backend(backend)
        (first,) = torch.autograd.grad(model(batch).square().sum(), model.prompt_learner.uni_ctx, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), model.prompt_learner.uni_ctx)[0])
    assert relative_rms(*found) <= 1e-11


def test_inside_of_someone_elses_graph():
    """A compiled model is one graph, which layers are part of."""
    _, fast = pair(random_clip(vision_layers=2, text_layers=2, **SMALL).double().to(DEVICE))
    torch._dynamo.reset()
    graphs, batch = Graphs(), images(2)
    got = torch.compile(fast, fullgraph=True, backend="aot_eager")(batch)
    assert graphs() == 1
    fast.use_backend("torch")
    assert relative_rms(got, fast(batch)) <= 1e-12


def test_refusals():
    assert inductor.refusals("mps") == ["mps (runs on cpu, cuda)"]
    assert inductor.refusals("cpu", torch.int8)[0] == "int8 (takes float32, float16, bfloat16, float64)"
    with pytest.raises(ValueError, match="backend='inductor' cannot compute this text tower: inductor: fp8"):
        FastUPT(random_clip(vision_layers=2, text_layers=2), NAMES, backend="inductor", dtype="fp8")
    # by monkeypatch such settings would be gone afterwards
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        assert inductor.refusals("cpu") == ["no C++ compiler 'no-such-compiler' (CXX)"]
        with pytest.raises(ValueError, match=r"backend='inductor' cannot run here: inductor: no C\+\+ compiler"):
            FastUPT(CLIP, NAMES, backend="inductor")
    with torch._dynamo.config.patch(disable=True):
        assert inductor.refusals("cpu")[0].startswith("torch.compile is switched off")
