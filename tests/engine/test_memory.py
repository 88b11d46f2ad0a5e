"""The formula of a step's peak memory against the tensors that were alive."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from upt_fast.data.benchmark import bench_classnames
from upt_fast.testing import build, random_clip

CLIP = dict(embed_dim=64, image_size=112, patch_size=16, vision_width=256, text_width=256, text_heads=4)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Storages(TorchDispatchMode):
    """Bytes of the tensors that operations return, now and at most; not what a library's operation takes for itself."""

    def __init__(self):
        super().__init__()
        self.known, self.now, self.most = set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in given:  # else a view
                self.count(t.untyped_storage())
        return out

    def count(self, storage):
        key = storage._cdata
        if key in self.known:
            return
        size = storage.nbytes()
        self.known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.forget, key, size)

    def forget(self, key, size):
        self.known.discard(key)
        self.now -= size


def alive(run):
    """Peak bytes of the CPU tensors that a function makes, beside those that were there."""
    with Storages() as found:
        run()
    return found.most


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
        ("cocoop", 20, 8, {"dtype": "fp16"}),
        ("cocoop", 100, 3, {"dtype": "bf16"}),
        ("coop", 300, 4, {"dtype": "bf16"}),
        ("maple", 60, 3, {"depth": 3, "dtype": "fp16"}),
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
