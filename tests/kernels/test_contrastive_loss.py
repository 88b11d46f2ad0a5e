"""The contrastive loss's kernels against their plain twin in float64: loss and both gradients."""

import pytest
import torch
from upt_fast.kernels import _contrastive_loss_bwd as bwd
from upt_fast.kernels import _contrastive_loss_common as common
from upt_fast.kernels import _contrastive_loss_fwd as fwd
from upt_fast.kernels import contrastive_loss as kernel
from upt_fast.kernels._launch import record

from upt_fast import testing_ops
from upt_fast.common.closeness import assert_rounded, relative_rms
from upt_fast.reference import ops as reference
from upt_fast.testing_ops import DEVICE, dtype_name, integers, precisions

DTYPES = pytest.mark.parametrize("dtype", precisions("contrastive_loss"), ids=dtype_name)
# one program sums everything and projects; several, whose sums are added up afterwards
SPLITS = pytest.mark.parametrize("programs", [1, common.PROGRAMS], ids=["whole", "split"])
RANGES = {
    "sets_mixed_in_a_block": [[0, 40], [40, 70], [70, 101], [40, 70], [0, 40], [70, 101], [70, 101]],
    "overlapping": [[0, 70], [30, 101], [60, 61], [0, 101], [69, 101]],
    "single_classes": [[100, 101], [0, 1], [63, 64], [64, 65]],
    "far_apart": [[0, 3], [98, 101]],
    "blocks_of_images_apart": [[50 * (i // 33), 50 * (i // 33) + 50] for i in range(40)],
}


def features(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return testing_ops.randn(*shape, dtype=dtype, grad=True)


def labels_in(ranges: torch.Tensor) -> torch.Tensor:
    sizes = ranges[:, 1] - ranges[:, 0]
    return (torch.rand(len(ranges)).to(DEVICE) * sizes).long()


def evaluate(f, images, texts, args, weights):
    """Loss, and gradients of images and texts."""
    return testing_ops.evaluate(f, [images, texts, *args], [weights])


def compare(images, texts, *args) -> None:
    inputs = [images, texts, *args]
    testing_ops.compare(kernel.contrastive_loss, reference.contrastive_loss, inputs, dtype=torch.float32)


@DTYPES
@pytest.mark.parametrize(("B", "C", "e"), [(1, 1, 33), (1, 70, 16), (33, 2, 5), (37, 141, 33)], ids=str)
def test_matches_reference(B, C, e, dtype):
    compare(features(B, e, dtype=dtype), features(C, e, dtype=dtype), 14.3, torch.randint(C, (B,)).to(DEVICE))


@SPLITS
def test_matches_reference_in_several_blocks_of_columns(programs, monkeypatch):
    monkeypatch.setattr(common, "PROGRAMS", programs)
    compare(features(3, 300), features(20, 300), 14.3, integers([19, 0, 7]))


@SPLITS
@pytest.mark.parametrize("rising", [True, False], ids=["rising", "falling"])
def test_largest_logit_block_by_block(rising, programs, monkeypatch):
    """Each block of classes has larger logits than those before, or smaller: the sum so far is scaled each time."""
    monkeypatch.setattr(common, "PROGRAMS", programs)
    images, texts = features(5, 12), features(300, 12)
    with torch.no_grad():
        images.copy_(images[:1] + 0.1 * images)
        order = torch.nn.functional.cosine_similarity(texts, images[:1]).argsort(descending=not rising)
        texts.copy_(texts[order])
    compare(images, texts, 14.3, integers([0, 299, 70, 64, 150]))


def test_a_single_class_is_certain():
    images, texts = features(33, 5), features(1, 5)
    loss, *gradients = evaluate(
        kernel.contrastive_loss, images, texts, (14.3, integers([0] * 33)), torch.ones(33, device=DEVICE)
    )
    assert float(loss.detach().abs().max()) <= 1e-5
    assert max(float(g.abs().max()) for g in gradients) <= 1e-3  # rounding of the logits, times the scale


@pytest.mark.parametrize("ranges", RANGES.values(), ids=RANGES)
def test_ranges(ranges):
    ranges = integers(ranges)
    compare(features(len(ranges), 19), features(101, 19), 14.3, labels_in(ranges), ranges)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_ranges_in_one_split(dtype, monkeypatch):
    monkeypatch.setattr(common, "PROGRAMS", 1)
    ranges = integers(RANGES["sets_mixed_in_a_block"])
    images, texts = features(len(ranges), 19, dtype=dtype), features(101, 19, dtype=dtype)
    compare(images, texts, 14.3, labels_in(ranges), ranges)


@SPLITS
def test_near_duplicates_at_a_large_scale(programs, monkeypatch):
    """Logits within 1e-2 of 100, of which float32 keeps little."""
    monkeypatch.setattr(common, "PROGRAMS", programs)
    centre = 30 * torch.randn(24).to(DEVICE)
    images, texts = ((centre + 0.3 * torch.randn(n, 24).to(DEVICE)).requires_grad_() for n in (20, 50))
    args, weights = (100.0, torch.randint(50, (20,)).to(DEVICE)), torch.ones(20).to(DEVICE)
    exact = [t.detach().double().requires_grad_() for t in (images, texts)]
    got = evaluate(kernel.contrastive_loss, images, texts, args, weights)
    assert_rounded(got, lambda: evaluate(reference.contrastive_loss, *exact, args, weights), torch.float32)


@SPLITS
def test_zero_and_tiny_vectors(programs, monkeypatch):
    """Below eps the normalisation is x / eps; each row is compared on its own scale."""
    monkeypatch.setattr(common, "PROGRAMS", programs)
    images, texts = features(6, 20), features(40, 20)
    with torch.no_grad():
        for t in (images, texts):
            t[:4] *= torch.tensor([[0.0], [1e-15], [1e-13], [1e-10]], device=DEVICE)
    inputs, weights = [images, texts, 14.3, integers([0, 1, 2, 39, 3, 17])], [torch.randn(6).to(DEVICE)]
    got, exact = (
        testing_ops.evaluate(kernel.contrastive_loss, inputs, weights),
        testing_ops.copied(inputs, torch.float64),
    )

    def run():
        return [row for t in testing_ops.evaluate(reference.contrastive_loss, exact, weights) for row in t]

    assert_rounded([row for t in got for row in t], run, torch.float32)


def test_strided_features_and_gradient():
    images, texts = features(9, 5, 21)[:, 1], features(21, 40).t()
    args = 14.3, torch.randint(40, (9,)).to(DEVICE)
    compare(images, texts, *args)
    gradients = [
        torch.autograd.grad(f(images, texts, *args).mean(), (images, texts))
        for f in (kernel.contrastive_loss, reference.contrastive_loss)
    ]
    assert all(relative_rms(*pair) <= 1e-5 for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize("constant", ["images", "texts"])
def test_constant_features(constant):
    images, texts, labels = features(3, 8), features(5, 8), integers([4, 0, 2])
    leaf = texts if constant == "images" else images
    inputs = [t if t is leaf else t.detach() for t in (images, texts)]
    got, wanted = (
        torch.autograd.grad(f(*inputs, 14.3, labels).sum(), leaf)[0]
        for f in (kernel.contrastive_loss, reference.contrastive_loss)
    )
    assert relative_rms(got, wanted) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_scale_as_a_tensor(dtype):
    images, texts, labels = features(3, 8), features(5, 8), integers([4, 0, 2])
    scale = torch.tensor(12.5, dtype=dtype, device=DEVICE, requires_grad=True)
    loss = kernel.contrastive_loss(images, texts, scale, labels)
    assert torch.equal(loss, kernel.contrastive_loss(images, texts, 12.5, labels))
    loss.sum().backward()
    assert scale.grad is None


@pytest.mark.parametrize("ranges", [False, True], ids=["all", "ranges"])
def test_no_images(ranges):
    images, texts = features(0, 7), features(20, 7)
    loss = kernel.contrastive_loss(images, texts, 14.3, integers([]), integers([]).view(0, 2) if ranges else None)
    assert loss.shape == (0,)
    d_images, d_texts = torch.autograd.grad(loss.sum(), (images, texts))
    assert d_images.shape == (0, 7)
    assert torch.equal(d_texts, torch.zeros_like(texts))


@pytest.mark.parametrize(
    ("labels", "ranges", "image"),
    [
        ([0, 5], None, 1),
        ([-1, 0], None, 0),
        ([0, -100], None, 1),
        ([1, 2], [[0, 2], [3, 5]], 1),
        ([0, 0], [[0, 2], [3, 3]], 1),
        ([1, 0], [[0, 6], [0, 5]], 0),
        ([1, 0], [[-1, 5], [0, 5]], 0),
        ([2**32, 0], None, 0),
    ],
)
def test_wrong_labels(labels, ranges, image, monkeypatch):
    """On the CPU an error, on a GPU NaN for that image alone."""
    args = 14.3, integers(labels), None if ranges is None else integers(ranges)
    images, texts = features(2, 8), features(5, 8)
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match=rf"image {image}: label {labels[image]} .* wanted 0 <= label"):
            kernel.contrastive_loss(images, texts, *args)
    monkeypatch.setattr(fwd, "_check_labels", lambda *_: None)
    loss = kernel.contrastive_loss(images, texts, *args)
    good = slice(1 - image, 2 - image)
    wanted = reference.contrastive_loss(images[good], texts, 14.3, *(None if t is None else t[good] for t in args[1:]))
    assert bool(loss[image].isnan())
    torch.testing.assert_close(loss[good], wanted, atol=1e-5, rtol=1e-5)


def test_a_wrong_label_shows_in_the_gradients(monkeypatch):
    monkeypatch.setattr(fwd, "_check_labels", lambda *_: None)
    images, texts, ranges = features(3, 8), features(30, 8), integers([[0, 10], [10, 20], [20, 30]])
    loss = kernel.contrastive_loss(images, texts, 14.3, integers([0, 10, 9]), ranges)
    d_images, d_texts = torch.autograd.grad(loss.sum(), (images, texts))
    assert d_images.isnan().all(1).tolist() == d_images.isnan().any(1).tolist() == [False, True, False]
    assert d_texts.isnan().all(1).tolist() == d_texts.isnan().any(1).tolist() == [10 <= c < 20 for c in range(30)]


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, in the interpreter
@SPLITS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_set_leaves_the_others_alone(value, programs, monkeypatch):
    monkeypatch.setattr(common, "PROGRAMS", programs)
    ranges = integers([[0, 7], [7, 20], [0, 7], [7, 20], [7, 20]])
    images, texts, labels = features(5, 8), features(20, 8), labels_in(ranges)
    wanted = evaluate(kernel.contrastive_loss, images, texts, (14.3, labels, ranges), torch.ones(5).to(DEVICE))
    with torch.no_grad():
        images[0, 3], texts[2, 4] = value, value
    got = evaluate(kernel.contrastive_loss, images, texts, (14.3, labels, ranges), torch.ones(5).to(DEVICE))
    for g, w, spoilt in zip(got, wanted, ([0, 2], [0, 2], list(range(7))), strict=True):
        others = [i for i in range(len(g)) if i not in spoilt]
        assert g[spoilt].isnan().flatten(1).any(1).all() if g.ndim > 1 else g[spoilt].isnan().all()
        assert torch.equal(g[others], w[others])


def test_opcheck():
    images, texts, scale = features(3, 8), features(5, 8), torch.tensor(14.3, device=DEVICE)
    args = scale, integers([3, 2, 0]), integers([[0, 4], [2, 5], [4, 5]])
    torch.library.opcheck(kernel._fwd, (images, texts, *args))
    images, texts = images.detach(), texts.detach()
    loss, *saved = kernel._fwd(images, texts, *args)
    for of_text in (False, True):
        torch.library.opcheck(kernel._bwd, (torch.randn_like(loss), images, texts, *args, *saved, of_text))


@pytest.mark.parametrize(
    "change",
    [
        {"image_features": torch.zeros(2, 9)},
        {"image_features": torch.zeros(2, 3, 8)},
        {"image_features": torch.zeros(2, 8).double(), "text_features": torch.zeros(5, 8).double()},
        {"text_features": torch.zeros(5, 8).half()},
        {"labels": torch.zeros(3, dtype=torch.int64)},
        {"labels": torch.zeros(2, dtype=torch.int32)},
        {"labels": torch.tensor(0)},
        {"class_ranges": torch.tensor([0, 5])},
        {"class_ranges": torch.tensor([[0.0, 5.0], [0.0, 5.0]])},
        {"labels": torch.zeros(2, dtype=torch.int64, device="meta")},
        {"logit_scale": torch.ones(2)},
    ],
    ids=lambda change: ",".join(change),
)
def test_wrong_arguments(change):
    inputs = {"image_features": torch.zeros(2, 8), "text_features": torch.zeros(5, 8), "labels": torch.zeros(2).long()}
    with pytest.raises(ValueError, match="wanted"):
        kernel.contrastive_loss(**{"logit_scale": 14.3, **inputs, **change})


@pytest.mark.parametrize("programs", [0, 1, 5, 100, 10_000])
@pytest.mark.parametrize("columns", [0, 1, 16, 17, 1000, 100_000])
def test_splits_cover_the_columns(columns, programs):
    splits, chunk = common.split_sum(programs, columns, 16)
    assert chunk % 16 == 0
    assert splits * chunk >= columns > (splits - 1) * chunk or (columns, splits) == (0, 1)
    assert splits <= max(1, min(common.MAX_SPLITS, common.PROGRAMS // max(programs, 1)))


def test_workloads_launch_every_kernel():
    with record() as launches:
        for _, call in kernel.workloads():
            call()
    assert len(launches) == 12
    assert {fwd._contrastive_loss_fwd_kernel, bwd._contrastive_loss_bwd_kernel} == {
        launch.kernel for launch in launches
    }
