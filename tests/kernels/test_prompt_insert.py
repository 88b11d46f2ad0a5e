"""The kernels that put prompts into streams, against their plain twins in float64: outputs, gradients, and the memory
that they must leave alone."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from upt_fast.kernels import prompt_insert as kernel  # noqa: F401 registers the operators

from upt_fast import testing_ops
from upt_fast.common.closeness import relative_rms
from upt_fast.engine import ops
from upt_fast.reference import ops as reference
from upt_fast.testing_ops import DEVICE, EPS, Numbers, dtype_name, integers, precisions, randn

PRECISIONS = precisions("prompt_insert")
HALF = PRECISIONS[1:]
DTYPES = pytest.mark.parametrize("dtype", PRECISIONS, ids=dtype_name)
NAN = float("nan")


def stream_inputs(B, T, P, D, sets=None, dtype=torch.float32, residual=True):
    """x, y, prompts and set_index; the reserved rows of x and y hold NaN. `sets` is each sequence's set of 1 + max."""
    x, *others, _ = testing_ops.prompt_insert(Numbers(dtype), B, T, P, D, sets, residual)
    return SimpleNamespace(**dict(zip(("x", "y", "prompts", "set_index"), (x.requires_grad_(), *others), strict=True)))


def insert(x, *others, **options):
    """On a copy of x: a leaf must not be changed in place."""
    return ops.prompt_insert(x.clone(memory_format=torch.contiguous_format), *others, **options)


def evaluate(inputs, weights):
    """Stream and h, and the gradients of those of x, y and prompts that have one."""
    outputs, arguments = insert(*inputs, EPS, backend="triton"), [*inputs]
    return outputs, testing_ops.gradients(outputs, arguments, weights)


def compare(x, y, prompts, set_index, weights=None) -> None:
    """Stream, h and every gradient; weights: of both outputs' elements, None where an output is not used."""
    kernels = partial(insert, backend="triton")
    testing_ops.compare(kernels, reference.prompt_insert, [x, y, prompts, set_index, EPS], weights)


STREAMS = {
    "one_image": dict(B=1, T=5, P=2, D=33),
    "no_prompts": dict(B=3, T=4, P=0, D=33),
    "one_own_row": dict(B=2, T=4, P=3, D=16),
    "shared": dict(B=5, T=9, P=4, D=127),
    "many_images": dict(B=37, T=3, P=1, D=127),  # more than a program adds at once
    "unused_set": dict(B=5, T=6, P=2, D=33, sets=(0, 2, 2, 0, 2)),
    "one_of_sets": dict(B=3, T=3, P=2, D=33, sets=(1, 1, 1)),
    "per_image": dict(B=4, T=6, P=3, D=33, sets=(0, 1, 2, 3)),
    "many_in_sets": dict(B=70, T=2, P=1, D=65, sets=(0, 1, 1, 0, 2) * 14),
    "wide": dict(B=2, T=3, P=1, D=1025, sets=(1, 0)),
}


STREAM = pytest.mark.parametrize("shape", STREAMS.values(), ids=STREAMS)


@DTYPES
@STREAM
@pytest.mark.usefixtures("gpu_tiles")
def test_matches_reference(shape, dtype):
    compare(**vars(stream_inputs(**shape, dtype=dtype)))


@STREAM
def test_large_tiles_and_no_residual(shape):
    compare(**vars(stream_inputs(**shape, residual=False)))


def test_no_images():
    t = stream_inputs(B=0, T=4, P=2, D=33)
    stream, h = ops.prompt_insert(t.x.clone(), t.y, t.prompts, None, EPS, backend="triton")
    grads = torch.autograd.grad([stream, h], [t.x, t.y, t.prompts], [torch.ones_like(stream)] * 2)
    assert stream.shape == h.shape == grads[0].shape == grads[1].shape == (0, 4, 33)
    assert torch.equal(grads[2], torch.zeros(1, 2, 33, device=DEVICE))


@DTYPES
@pytest.mark.parametrize("used", ["stream", "h"])
@pytest.mark.parametrize("sets", [None, (1, 0, 1)], ids=["shared", "sets"])
def test_one_output_used(sets, used, dtype):
    inputs = stream_inputs(3, 5, 2, 33, sets, dtype)
    weight = randn(3, 5, 33, dtype=dtype)
    compare(**vars(inputs), weights=[weight, None] if used == "stream" else [None, weight])


@pytest.mark.parametrize("constant", ["x", "y", "prompts", "x y"])
def test_constants(constant):
    inputs = stream_inputs(3, 5, 2, 33, (1, 0, 1))
    for name in constant.split():
        getattr(inputs, name).requires_grad_(False)
    compare(**vars(inputs))


VIEWS = {
    "every_second": lambda: randn(4, 10, 66)[:, ::2, ::2],
    "some_columns": lambda: randn(4, 5, 40)[..., 3:36],
    "transposed": lambda: randn(5, 4, 33).transpose(0, 1),
    "columns_first": lambda: randn(4, 33, 5).transpose(1, 2),
    "one_row_for_all": lambda: randn(33).expand(4, 5, 33),
    "one_sequence_for_all": lambda: randn(5, 33).expand(4, 5, 33),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("place", ["y", "prompts", "dx", "dh"])
def test_strided(place, view):
    inputs = (
        stream_inputs(4, 9, 5, 33, (3, 0, 1, 3)) if place == "prompts" else stream_inputs(4, 5, 2, 33, (1, 0, 1, 1))
    )
    weights = [randn(*inputs.x.shape) for _ in "sh"]
    if place in ("y", "prompts"):
        setattr(inputs, place, view().requires_grad_())
    else:
        weights[place == "dh"] = view()
    compare(**vars(inputs), weights=weights)


def test_strided_set_index():
    inputs = stream_inputs(3, 5, 2, 33, (1, 0, 1))
    inputs.set_index = integers([1, 9, 0, 9, 1, 9])[::2]
    compare(**vars(inputs))


def test_gradients_of_a_plain_sum():
    one = torch.ones((), device=DEVICE).expand(3, 5, 33)
    compare(**vars(stream_inputs(3, 5, 2, 33)), weights=[one, one])


@pytest.mark.parametrize("half", HALF, ids=str)
@pytest.mark.parametrize("place", ["x", "y", "prompts", "y prompts"])
def test_mixed_dtypes(place, half):
    """Above all a stream in float32 and what a linear under autocast adds to it."""
    inputs = stream_inputs(3, 5, 2, 65, (1, 0, 1))
    for name in place.split():
        setattr(inputs, name, getattr(inputs, name).detach().to(half).requires_grad_())
    compare(**vars(inputs))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
def test_changes_the_stream_in_place(residual, mode):
    """Only the stream, and of it only its own numbers: what lies before and behind in memory stays."""
    inputs = stream_inputs(3, 5, 2, 33, residual=residual)
    with mode():
        x = inputs.x.detach()
        memory = torch.full((5 * 5 * 33,), 7.0, device=DEVICE)
        memory[165:-165] = x.flatten()
        stream = memory[165:-165].view(3, 5, 33)
        y = None if inputs.y is None else inputs.y.detach()
        result, h = ops.prompt_insert(stream, y, inputs.prompts.detach(), None, EPS, backend="triton")
        assert result.data_ptr() == stream.data_ptr() == memory[165:].data_ptr()
        own = x if y is None else x + y
        assert torch.equal(stream[:, :2], inputs.prompts.expand(3, 2, 33))
        assert torch.equal(stream[:, 2:], own[:, 2:])
        assert (memory[:165] == 7).all()
        assert (memory[-165:] == 7).all()
        assert h.data_ptr() != stream.data_ptr()


def test_what_was_saved_of_the_stream_before_is_refused():
    x, prompts = randn(2, 4, 33, grad=True), randn(1, 2, 33)
    stream = x.clone()
    square = stream.square()  # keeps the stream for backward
    _, h = ops.prompt_insert(stream, None, prompts, None, EPS, backend="triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (square.sum() + h.sum()).backward()


def test_the_callers_stream_carries_the_gradient():
    """Whoever goes on with the tensor that went in computes the same as with the one that came back."""
    inputs, gradients = stream_inputs(2, 5, 2, 33), []
    for name in ("went_in", "came_back"):
        stream = inputs.x.clone()
        result, h = ops.prompt_insert(stream, inputs.y, inputs.prompts, None, EPS, backend="triton")
        loss = (stream if name == "went_in" else result).pow(3).sum() + h.pow(3).sum()
        gradients.append(torch.autograd.grad(loss, [inputs.x, inputs.y, inputs.prompts]))
    assert all(map(torch.equal, *gradients))


def test_layer_after_layer():
    """The same stream through several insertions: each layer's prompts replace those of the layer before."""

    def layers(f, x, prompts, weight, **options):
        x, y, total = x.clone(), None, 0.0
        for i, p in enumerate(prompts):
            x, h = f(x, y, p, index, EPS, **options)
            y = torch.tanh(h @ weight[i])
            total = total + (h * h * h).mean()
        return total + (x + y).square().mean()

    index, leaves = integers([1, 0, 1]), [randn(3, 6, 33, grad=True), *(randn(2, 2, 33, grad=True) for _ in range(3))]
    weight, results = randn(3, 33, 33), []
    for f, dtype, options in (
        (ops.prompt_insert, torch.float32, {"backend": "triton"}),
        (reference.prompt_insert, torch.float64, {}),
    ):
        x, *prompts = (t.detach().to(dtype).requires_grad_() for t in leaves)
        loss = layers(f, x, prompts, weight.to(dtype), **options)
        results.append([loss, *torch.autograd.grad(loss, [x, *prompts])])
    for got, want in zip(*results, strict=True):
        assert relative_rms(got, want) <= 1e-5


def test_the_stream_before_has_no_gradient_in_the_reserved_rows():
    inputs = stream_inputs(3, 5, 2, 33)
    weights = [randn(3, 5, 33), randn(3, 5, 33)]
    _, (dx, dy, _) = evaluate(vars(inputs).values(), weights)
    assert (dx[:, :2] == 0).all()
    assert (dy[:, :2] == 0).all()
    assert (dx[:, 2:] != 0).all()


@pytest.mark.usefixtures("gpu_tiles")
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_images_and_sets_do_not_see_each_other():
    inputs, weights = stream_inputs(35, 4, 2, 33, (0, 1, 2, 1, 0) * 7), [randn(35, 4, 33), randn(35, 4, 33)]
    results = []
    for bad in (False, True):
        with torch.no_grad():
            inputs.x[4, 2:] = NAN if bad else 1.0  # an image of set 0
            inputs.prompts[2] = NAN if bad else 2.0
            weights[0][9], weights[1][9] = (NAN, NAN) if bad else (1.0, 1.0)  # of set 0
        outputs, gradients = evaluate(vars(inputs).values(), weights)
        results.append(([*outputs, *gradients[:2]], gradients[2]))
    good = [b for b in range(35) if b not in (4, 9)]
    for a, b in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(a[good, 2:], b[good, 2:])
    for dx in results[1][0][2:]:
        assert (dx[:, :2] == 0).all()
    assert torch.equal(results[0][1][1], results[1][1][1])
    assert results[1][1][0].isnan().all()


def test_backward_keeps_h_and_the_deviations_only():
    inputs, shapes = stream_inputs(2, 5, 3, 33, (1, 0)), []
    x = inputs.x.clone()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        ops.prompt_insert(x, inputs.y, inputs.prompts, inputs.set_index, EPS, backend="triton")
    assert sorted(shapes) == [(2,), (2, 5), (2, 5, 33)]


def saved_of_stream():
    """dh, h and 1 / std of a stream (3, 5, 33)."""
    return randn(3, 5, 33).transpose(0, 1).reshape(5, 3, 33).transpose(0, 1), randn(3, 5, 33), randn(3, 5).abs()


SETS = (1, 0, 1)
OPCHECKS = {
    "insert": lambda: ("prompt_insert_", (randn(3, 5, 33), None, randn(1, 2, 33), None, EPS)),
    "insert_sets": lambda: ("prompt_insert_", (*(randn(3, 5, 33) for _ in "xy"), randn(2, 2, 33), integers(SETS), EPS)),
    "insert_bwd": lambda: ("prompt_insert_bwd", (None, *saved_of_stream(), None, 1, 2)),
    "insert_bwd_sets": lambda: ("prompt_insert_bwd", (randn(3, 5, 33), *saved_of_stream(), integers(SETS), 2, 2)),
}


@pytest.mark.parametrize("case", OPCHECKS.values(), ids=OPCHECKS)
def test_opcheck(case):
    name, inputs = case()
    torch.library.opcheck(getattr(torch.ops.upt_fast, name), tuple(inputs))


def test_compiles_on_the_callers_stream():
    """The change in place is not lost where the stream comes from outside."""

    def f(x):
        return ops.prompt_insert(x, inputs.y, inputs.prompts, None, EPS, backend="triton")[1]

    inputs, streams, results = stream_inputs(3, 5, 2, 33), [], []
    with torch.no_grad():
        for g in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
            streams.append(inputs.x.detach().clone())
            results.append(g(streams[-1]))
    assert torch.equal(*results)
    assert torch.equal(*streams)
    assert streams[0].isfinite().all()
