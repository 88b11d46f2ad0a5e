"""The memory that a tower's passes share: reused when free, never while someone still needs it."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from upt_fast import FastUPT, ReferenceUPT
from upt_fast.common.closeness import relative_rms
from upt_fast.common.memory_pool import MemoryPool
from upt_fast.engine import ops, workspace
from upt_fast.engine.autograd import functions
from upt_fast.engine.workspace import Workspace, pieces
from upt_fast.testing import random_clip

LIKE = torch.empty(0)


def test_a_block_is_reused_once_nothing_refers_to_it():
    pool = MemoryPool()
    first = pool.take("a", LIKE, 4, 3)
    place = first.data_ptr()
    view = first[1:].view(-1)
    del first
    assert pool.take("a", LIKE, 4, 3).data_ptr() != place  # the view still reads it
    del view
    assert pool.take("a", LIKE, 12).data_ptr() == place
    assert pool.take("a", LIKE, 2).data_ptr() == place  # a smaller request fits


def test_names_and_dtypes_share_nothing():
    pool = MemoryPool()
    taken = [pool.take("a", LIKE, 8), pool.take("b", LIKE, 8), pool.take("a", LIKE.double(), 8)]
    for i, block in enumerate(taken):
        block.fill_(i)
    assert [block[0].item() for block in taken] == [0, 1, 2]


def test_a_larger_request_replaces_what_lies_idle():
    pool = MemoryPool()
    for size in (10, 20, 30):
        pool.take("a", LIKE, size)
    assert [block.numel() for block in pool._blocks["a"]] == [30]


def test_copies_share_no_memory():
    pool = MemoryPool()
    block = pool.take("a", LIKE, 4)
    for other in (copy.deepcopy(pool), pickle.loads(pickle.dumps(pool))):
        assert other.take("a", LIKE, 4).data_ptr() != block.data_ptr()


def test_threads_never_hold_the_same_block():
    pool = MemoryPool()

    def work(i):
        for _ in range(200):
            block = pool.take("a", LIKE, 64).fill_(i)
            if not bool((block == i).all()):
                return False
        return True

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(work, range(4)))


def test_memory_taken_in_inference_mode_serves_training():
    pool = MemoryPool()
    with torch.inference_mode():
        pool.take("a", LIKE, 4).zero_()
    assert pool.take("a", LIKE, 4).fill_(1).sum() == 4


def test_a_loss_that_outlives_its_backward_holds_no_activations():
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    w1, b1 = torch.randn(8, 6, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    w2, b2 = torch.randn(6, 8, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    pool = MemoryPool()
    space = Workspace(2, pool)
    y = 2 * x  # not the leaf, whose .grad would be one of the blocks
    for layer in range(2):
        y = ops.mlp(y, w1, b1, w2, b2, 1e-5, "gelu", workspace=space, layer=layer)
    space.end_forward()
    loss = y.sum()
    del y

    def idle() -> list[bool]:
        return [MemoryPool._is_idle(block) for blocks in pool._blocks.values() for block in blocks]

    assert not all(idle())  # backward still needs them
    loss.backward()
    assert idle()
    assert all(idle())
    assert loss.grad_fn is not None


def test_memory_of_a_gpu_is_its_allocators():
    """A layer's for itself: one block for all layers would live until backward has passed the first."""
    with FakeTensorMode():
        space, like = Workspace(3), torch.empty(0, device="cuda")
        kept = [space.kept("x", i, like, 5, 4) for i in range(3)]
        assert all(t.untyped_storage().nbytes() == 80 for t in kept)
        assert len({t.untyped_storage()._cdata for t in kept}) == 3


@pytest.mark.parametrize("size", [0, 1, 5, 64])
@pytest.mark.parametrize("limit", [1, 24, 100, 10**9])
def test_pieces_cover_all_rows_once(size, limit):
    x = torch.arange(size * 3, dtype=torch.float32).view(size, 3)
    parts = [x[i] for i in pieces(x, limit)]
    assert torch.equal(torch.cat(parts) if parts else x, x)
    assert all(part.numel() * 4 <= max(limit, 12) for part in parts)


def models(dtype):
    clip = random_clip().to(dtype)
    names = ["cat", "dog", "aeroplane", "traffic light"]
    torch.manual_seed(0)
    fast = FastUPT(clip, names)
    reference = ReferenceUPT(clip, names)
    reference.load_state_dict(fast.state_dict())
    return fast.train(), reference.train(), clip


def gradients(model, images):
    model.zero_grad(set_to_none=True)
    logits = model(images)
    F.cross_entropy(logits, torch.arange(len(images)) % 4).backward()
    return logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=str)
def test_small_pieces_change_nothing(monkeypatch, dtype, tolerance):
    monkeypatch.setattr(workspace, "PIECE_BYTES", 300)
    monkeypatch.setattr(functions, "PRODUCT_PIECE_BYTES", 700)
    fast, reference, clip = models(dtype)
    images = torch.randn(5, 3, *clip.visual.image_size, dtype=dtype)
    for got, wanted in zip(gradients(fast, images), gradients(reference, images), strict=True):
        assert relative_rms(got, wanted) <= tolerance


def test_steps_of_different_batches_and_overlapping_graphs():
    fast, reference, clip = models(torch.float64)
    batches = [torch.randn(n, 3, *clip.visual.image_size, dtype=torch.float64) for n in (2, 5, 2, 1, 5)]
    for images in batches:
        for got, wanted in zip(gradients(fast, images), gradients(reference, images), strict=True):
            assert relative_rms(got, wanted) <= 1e-12
    # all forward passes before any backward
    fast.zero_grad()
    reference.zero_grad()
    for model in (fast, reference):
        losses = [model(images).square().mean() for images in batches]
        for loss in reversed(losses):
            loss.backward()
    for got, wanted in zip(fast.parameters(), reference.parameters(), strict=True):
        assert relative_rms(got.grad, wanted.grad) <= 1e-12


def test_a_model_keeps_no_activations_in_eval_mode():
    fast, _, clip = models(torch.float32)
    gradients(fast, torch.randn(2, 3, *clip.visual.image_size))
    assert fast.vision_tower.blocks._pool._blocks
    fast.eval()
    assert not fast.vision_tower.blocks._pool._blocks
