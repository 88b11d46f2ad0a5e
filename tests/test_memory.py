"""The formula of a step's peak memory against the tensors that were alive."""

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from upt_fast.testing import bench_classnames, build, random_clip

CLIP = dict(embed_dim=64, image_size=112, patch_size=16, vision_width=256, text_width=256, text_heads=4)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def alive(run):
    """Peak bytes of the CPU tensors that a function makes, of the profiler's record of every allocation."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events = [(e.start_ns(), e.nbytes()) for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for _, change in sorted(events):
        now += change
        most = max(most, now)
    return most


def make(method, memory, classes, dtype="fp32", layers=5, device="cpu", **options):
    torch.manual_seed(0)
    clip = random_clip(**CLIP, vision_layers=layers, text_layers=layers).to(device)
    return build("fast", clip, bench_classnames(classes), method, memory=memory, dtype=dtype, **options).train()


def steps(model, batch, device="cpu"):
    images, labels = (
        torch.randn(batch, 3, 112, 112, device=device),
        torch.arange(batch, device=device) % len(model.classnames),
    )

    def run():
        for _ in range(2):  # from the second step on the pools are full
            model.zero_grad(set_to_none=True)
            F.cross_entropy(model(images).float(), labels).backward()

    return run


@pytest.mark.parametrize("memory", ["fast", "balanced", "lean"])
@pytest.mark.parametrize(
    ("method", "classes", "batch", "options"),
    [
        ("upt", 20, 24, {}),
        ("upt", 500, 4, {}),
        ("upt", 100, 16, {"dtype": "bf16"}),
        ("coop", 300, 4, {}),
        ("coop", 60, 4, {"class_specific": True, "n_ctx": 4}),
        ("vpt_deep", 20, 24, {"n_ctx": 5}),
        ("vpt_shallow", 20, 24, {"n_ctx": 30}),
        ("maple", 100, 16, {"depth": 3}),
        ("cocoop", 20, 8, {}),
    ],
    ids=str,
)
def test_within_15_percent(method, classes, batch, options, memory):
    model = make(method, memory, classes, **options)
    found, predicted = alive(steps(model, batch)), model.predict_peak_memory(batch)
    assert 0.85 <= predicted / found <= 1.15, (predicted / 2**20, found / 2**20)


def test_groups_of_images_bound_the_texts():
    """CoCoOp's texts of a large batch are computed group by group."""
    model = make("cocoop", "fast", 20, text_batch=2)
    found, predicted = alive(steps(model, 16)), model.predict_peak_memory(16)
    assert 0.85 <= predicted / found <= 1.15
    assert predicted < make("cocoop", "fast", 20, text_batch=16).predict_peak_memory(16) / 2


def test_batch_size_is_checked():
    with pytest.raises(ValueError, match="batch_size=0"):
        make("upt", "fast", 3, layers=1).predict_peak_memory(0)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("memory", ["fast", "balanced", "lean"])
@pytest.mark.parametrize(("classes", "batch"), [(20, 64), (1000, 8)])
def test_within_15_percent_on_a_gpu(classes, batch, memory):
    model = make("upt", memory, classes, device="cuda")
    run = steps(model, batch, "cuda")
    run()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    found = torch.cuda.max_memory_allocated() - before
    assert 0.85 <= model.predict_peak_memory(batch) / found <= 1.15
