"""Plans: their bytes against tensors that were alive and against a process, their work against what runs."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from upt_fast.data.benchmark import bench_classnames
from upt_fast.engine import workspace
from upt_fast.steps import MicroBatches
from upt_fast.steps.planning import Step, sizes
from upt_fast.testing import build, random_clip
from upt_fast.tools.step_cost import CPU_ATTENTION

CLIP = dict(embed_dim=64, image_size=112, patch_size=16, vision_width=256, text_width=256, text_heads=4)


def make(method="upt", classes=60, layers=3, memory="fast", dtype="fp32", **options):
    torch.manual_seed(0)
    clip = random_clip(**CLIP, vision_layers=layers, text_layers=layers)
    return build("fast", clip, bench_classnames(classes), method, memory=memory, dtype=dtype, **options).train()


def batch(size):
    return torch.randn(size, 3, 112, 112), torch.arange(size) % 10


@pytest.fixture(autouse=True)
def small_heap(monkeypatch):
    """Plans as in a process whose heap is kept small, whatever tests ran before."""
    monkeypatch.setattr(workspace, "_heap_is_small", True)


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize(
    ("method", "classes", "size", "parts", "options"),
    [
        ("upt", 300, 16, (2, None), {}),
        ("upt", 300, 8, (4, 100), {}),
        ("upt", 300, 16, (16, 50), {}),
        ("coop", 300, 4, (2, 60), {}),
        ("coop", 200, 4, (2, 60), {"dtype": "bf16"}),
        ("vpt_deep", 20, 24, (4, None), {"n_ctx": 5}),
        ("cocoop", 60, 8, (2, None), {}),
        ("cocoop", 60, 8, (2, 20), {}),
        ("kgcoop", 300, 8, (2, 60), {}),
    ],
    ids=str,
)
def test_bytes_of_parts_are_those_alive(method, classes, size, parts, options, memory, alive):
    model = make(method, classes, layers=5, memory=memory, **options)
    images, labels = batch(size)
    model.classes_at_once = parts[1]

    def run():
        for _ in range(2):  # from the second step on the pools are full
            model.zero_grad(set_to_none=True)
            model.backward_in_parts(images, labels, MicroBatches(*parts))

    found = alive(run)
    step = Step(model, size)
    predicted = step.in_parts(memory, parts[0] or size, parts[1] or classes)
    assert 0.85 * found <= predicted + step.rest()["features"], (predicted / 2**20, found / 2**20)
    assert predicted <= 1.2 * found, (predicted / 2**20, found / 2**20)


@pytest.fixture
def alive():
    """Of test_memory.py beside the engine's tests: peak bytes of the tensors that a function makes."""
    import importlib.util

    path = Path(__file__).parents[1] / "engine" / "test_memory.py"
    spec = importlib.util.spec_from_file_location("memory_of_the_engine", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.alive


def counted(run):
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("method", "parts"), [("upt", (2, 20)), ("upt", (2, 60)), ("coop", (4, 30)), ("vpt_deep", (2, 60))]
)
def test_work_is_what_runs(method, parts, monkeypatch):
    """Against PyTorch's counter, which sees the products of PyTorch's own operations; float64 has no others."""
    options = {"n_ctx": 3} if method == "vpt_deep" else {}
    model, (images, labels) = make(method, dtype="fp64", **options), batch(4)
    step, images = Step(model, 4), images.double()
    monkeypatch.setattr("upt_fast.steps.planning.PASS_ROWS", 0)
    with torch.no_grad():
        model(images)  # what is computed once
    at_once = counted(lambda: model.loss_and_logits(images, labels)[0].backward())
    in_parts = counted(lambda: model.backward_in_parts(images, labels, MicroBatches(*parts)))
    found, wanted = step.flops("fast", *parts) - step.flops("fast", 4, 60), in_parts - at_once
    assert abs(found - wanted) <= 0.02 * at_once, (found / 1e6, wanted / 1e6, at_once / 1e6)


def plans(model, size):
    """Whatever plan_memory may choose: bytes and work."""
    step = Step(model, size)
    found = []
    for level, i, c in itertools.product(("fast", "balanced", "lean"), sizes(size), sizes(step.num_classes)):
        need = max(step.with_room(step.in_parts(level, i, c)), step.evaluation(1, c))
        found.append((need, step.flops(level, i, c)))
    return found


@pytest.mark.parametrize("method", ["upt", "coop", "cocoop", "kgcoop", "vpt_deep"])
def test_the_plan_is_the_fastest_that_fits(method):
    options = {"n_ctx": 3} if method == "vpt_deep" else {}
    model = make(method, classes=100 if method != "cocoop" else 40, **options)
    step, every = Step(model, 8), plans(model, 8)
    low, high = min(need for need, *_ in every), max(need for need, *_ in every)
    seen = set()
    for limit in range(low, high + 1, (high - low) // 6):
        plan = model.plan_memory(8, limit)
        assert plan.bytes <= limit
        assert plan.flops == min(flops for need, flops, *_ in every if need <= limit)
        assert step.evaluation(plan.test_images, plan.classes) <= limit
        assert plan.test_images == 4096 or step.evaluation(plan.test_images + 1, plan.classes) > limit
        seen.add(plan[:3])
    assert len(seen) > 1
    with pytest.raises(
        ValueError, match=f"max_memory={-(-(low - 1) // 10**6)} MB is too little for a step of 8 images"
    ):
        model.plan_memory(8, low - 1)


def test_without_a_limit_nothing_is_divided():
    plan = make().plan_memory(8)
    assert (plan.memory, plan.images, plan.classes, plan.micro_batches) == ("fast", 8, 60, None)
    assert plan.flops == plan.fastest_flops
    assert make("cocoop", classes=10).plan_memory(4).micro_batches == MicroBatches(4, 10)


@pytest.mark.parametrize("method", ["upt", "cocoop"])
def test_a_plan_is_followed(method):
    """The same gradients, at the plan's level and in its parts."""
    options = {"dropout": 0.0} if method == "upt" else {}
    model, (images, labels) = make(method, classes=40, dtype="fp64", **options), batch(6)
    images = images.double()
    model.loss_and_logits(images, labels)[0].backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    plan = model.plan_memory(6, int(1.05 * min(need for need, _ in plans(model, 6))))
    assert plan.micro_batches is not None
    model.follow_plan(plan)
    assert model.text_tower.blocks.memory == model.vision_tower.blocks.memory == plan.memory
    model.zero_grad(set_to_none=True)
    model.backward_in_parts(images, labels, plan.micro_batches)
    for parameter, grad in zip(model.parameters(), wanted, strict=True):
        assert float((parameter.grad - grad).abs().max()) <= 1e-12 * float(grad.abs().max())
    assert f"{plan.images} of 6 images and {plan.classes} of 40 classes at once" in plan.describe()


@pytest.mark.parametrize(
    ("size", "limit", "message"), [(0, 10**9, "batch_size=0"), (4, 0, "max_bytes=0"), (4, 0.5, "max")]
)
def test_bad_numbers(size, limit, message):
    with pytest.raises(ValueError, match=message):
        make(classes=3, layers=1).plan_memory(size, limit)


def test_other_numbers_than_dropouts_are_not_drawn():
    """Asking for a plan leaves the random numbers of a run as they are."""
    model = make(dropout=0.3)
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    model.plan_memory(4)
    assert torch.equal(torch.rand(3), wanted)


CHILD = """
import ctypes, gc, json, sys
from pathlib import Path
import torch
import torch.nn.functional as F
from upt_fast.data.benchmark import bench_classnames
from upt_fast.engine.workspace import keep_heap_small
from upt_fast.testing import build, random_clip
limit = int(sys.argv[1])
kept = keep_heap_small() if limit else False
torch.manual_seed(0)
clip = random_clip(**json.loads(sys.argv[2]), vision_layers=6, text_layers=6)
model = build("fast", clip, bench_classnames(500), "upt").train()
images, labels = torch.randn(16, 3, 112, 112), torch.arange(16)
import torch._dynamo
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
plan = model.plan_memory(16, limit) if limit else None
if plan:
    model.follow_plan(plan)
for _ in range(3):
    model.zero_grad(set_to_none=True)
    if plan:
        model.backward_in_parts(images, labels, plan.micro_batches)
    else:
        F.cross_entropy(model(images), labels).backward()
print(json.dumps([status("VmHWM") - before, kept, plan and plan.bytes]))
"""


def measured(limit):
    command = [sys.executable, "-c", CHILD, str(limit), json.dumps(CLIP)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux' high-water mark")
def test_a_process_stays_below_the_limit():
    """Resident memory above what there is once the model is built; the step at once has more than twice the limit."""
    limit = 80 * 10**6
    peak, kept, planned = measured(limit)
    if not kept:
        pytest.skip("this C library's heap cannot be kept small")
    assert planned <= limit
    assert peak <= limit, (peak / 1e6, planned / 1e6)
    assert measured(0)[0] > 1.5 * limit
