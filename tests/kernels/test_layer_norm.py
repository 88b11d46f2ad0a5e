"""LayerNorm's kernel, alone and after a residual sum, against its plain twin in float64: outputs and gradients."""

from functools import partial

import pytest
import torch
from upt_fast.kernels import layer_norm as kernel  # noqa: F401 registers the operators

from upt_fast import testing_ops
from upt_fast.common.closeness import relative_rms
from upt_fast.engine import ops
from upt_fast.reference import ops as reference
from upt_fast.testing_ops import DEVICE, EPS, compare_op, dtype_name, precisions

PRECISIONS = precisions("layer_norm")
DTYPES = pytest.mark.parametrize("dtype", PRECISIONS, ids=dtype_name)
randn = partial(testing_ops.randn, grad=True)


def compare(inputs, weights=None) -> None:
    """x -> h for one input, (x, y) -> (s, h) for two; every gradient, from the outputs whose weight is not None."""
    compare_op("layer_norm" if len(inputs) == 1 else "add_layer_norm", [*inputs, EPS], weights)


@DTYPES
@pytest.mark.parametrize("count", [1, 2], ids=["layer_norm", "add_layer_norm"])
@pytest.mark.parametrize(
    "shape",
    [(1, 33), (33, 127), (2, 3, 5, 16), (70, 128), (3, 1025), (7, 1), (5,)],
    ids=lambda s: "x".join(map(str, s)),
)
@pytest.mark.usefixtures("gpu_tiles")
def test_matches_reference(shape, count, dtype):
    compare([randn(*shape, dtype=dtype) for _ in range(count)])


@pytest.mark.parametrize("count", [1, 2], ids=["layer_norm", "add_layer_norm"])
def test_zero_rows(count):
    compare([randn(2, 0, 33) for _ in range(count)])


VIEWS = {
    "every_second_row": lambda dtype: randn(10, 33, dtype=dtype)[::2],
    "some_columns": lambda dtype: randn(5, 40, dtype=dtype)[:, 3:36],
    "every_second_column": lambda dtype: randn(5, 66, dtype=dtype)[:, ::2],
    "transposed": lambda dtype: randn(33, 5, dtype=dtype).t(),
    "one_row_for_all": lambda dtype: randn(33, dtype=dtype).expand(5, 33),
    "part_of_a_sequence": lambda dtype: randn(1, 7, 33, dtype=dtype)[0, 2:],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("place", ["x", "y", "ds", "dh"])
def test_strided(place, view):
    tensors = {name: view(torch.float32) if name == place else randn(5, 33) for name in ("x", "y", "ds", "dh")}
    compare([tensors["x"], tensors["y"]], [tensors["ds"].detach(), tensors["dh"].detach()])


def test_rows_of_sequences_are_strided():
    compare([randn(4, 5, 33)[:, 1:3], randn(2, 4, 33).transpose(0, 1)])


def test_expanded_gradients():
    """As of a plain sum, whose gradient is one number for all."""
    one = torch.ones((), device=DEVICE).expand(5, 33)
    compare([randn(5, 33), randn(5, 33)], [one, one])
    compare([randn(5, 33), randn(5, 33)], [None, randn(5, 33, grad=False) + one])


@DTYPES
@pytest.mark.parametrize("used", ["s", "h"])
def test_one_output_used(used, dtype):
    weight = randn(7, 33, dtype=dtype, grad=False)
    compare([randn(7, 33, dtype=dtype), randn(7, 33, dtype=dtype)], [weight, None] if used == "s" else [None, weight])


@pytest.mark.parametrize("constant", ["x", "y"])
def test_a_constant_input(constant):
    """Its twin's gradient is the other's, so only that one is asked for."""
    x, y = randn(5, 33, grad=constant != "x"), randn(5, 33, grad=constant != "y")
    variable, weight = y if constant == "x" else x, randn(5, 33)
    grads = [
        torch.autograd.grad(f(x, y, EPS, **options)[1], variable, weight)[0]
        for f, options in ((ops.add_layer_norm, {"backend": "triton"}), (reference.add_layer_norm, {}))
    ]
    assert relative_rms(*grads) <= 1e-5


@pytest.mark.parametrize("half", PRECISIONS[1:], ids=str)
def test_mixed_dtypes(half):
    """A stream in float32 and what a linear under autocast adds to it; and the other way round."""
    compare([randn(9, 65), randn(9, 65, dtype=half)])
    compare([randn(9, 65, dtype=half), randn(9, 65)])


def test_normalises_the_sum_before_it_is_rounded():
    """What float16 loses of 2048 + 0.5 is not lost to h."""
    x = torch.full((3, 64), 2048.0, dtype=torch.float16, device=DEVICE)
    y = (0.4 * torch.rand(3, 64)).to(DEVICE, torch.float16)
    s, h = ops.add_layer_norm(x, y, EPS, backend="triton")
    assert (s == 2048).all()
    assert relative_rms(h, reference.add_layer_norm(x.double(), y.double(), EPS)[1]) <= 2e-3


def test_variance_of_a_large_mean():
    """E[x^2] - E[x]^2 would be off by a few per cent here."""
    x = randn(5, 127, grad=False) + 1000
    assert relative_rms(ops.layer_norm(x, EPS, "triton"), reference.layer_norm(x.double(), EPS)) <= 2e-4


def test_constant_rows_are_zeros():
    h = ops.layer_norm(torch.full((3, 33), 7.0, device=DEVICE), EPS, "triton")
    assert float(h.abs().max()) <= 1e-3


@pytest.mark.parametrize("eps", [1e-6, 1e-5, 0.1])
def test_eps(eps):
    x = 1e-3 * randn(5, 33, grad=False)
    assert relative_rms(ops.layer_norm(x, eps, "triton"), reference.layer_norm(x.double(), eps)) <= 1e-5


@pytest.mark.usefixtures("gpu_tiles")
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_rows_do_not_see_each_other():
    x, y, weight = randn(40, 33), randn(40, 33, grad=False), randn(40, 33, grad=False)
    results = []
    for bad in (False, True):
        with torch.no_grad():
            x[7], weight[9] = (float("nan"), float("inf")) if bad else (1.0, 1.0)
        s, h = ops.add_layer_norm(x, y, EPS, backend="triton")
        results.append(torch.cat([s, h, torch.autograd.grad(h, x, weight)[0]], 1).detach())
    good = [row for row in range(40) if row not in (7, 9)]
    assert torch.equal(results[0][good], results[1][good])
    assert results[1][7].isnan().all()


def test_backward_keeps_h_and_the_deviations_only():
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        ops.add_layer_norm(randn(2, 5, 33), randn(2, 5, 33), EPS, backend="triton")
    assert sorted(shapes) == [(2, 5), (2, 5, 33)]


OPCHECKS = {
    "fwd": lambda: (torch.ops.upt_fast.layer_norm_fwd, (randn(5, 33), None, EPS)),
    "fwd_sum": lambda: (torch.ops.upt_fast.layer_norm_fwd, (randn(5, 33), randn(5, 33, dtype=torch.float16), EPS)),
    "fwd_strided": lambda: (torch.ops.upt_fast.layer_norm_fwd, (randn(33, 5).t(), randn(5, 66)[:, ::2], EPS)),
    "bwd": lambda: (torch.ops.upt_fast.layer_norm_bwd, (None, *gradient_and_saved())),
    "bwd_sum": lambda: (torch.ops.upt_fast.layer_norm_bwd, (randn(5, 33, grad=False), *gradient_and_saved())),
}


def gradient_and_saved():
    """dh (one row for all), h and 1 / std of rows (5, 33)."""
    dh, h = randn(33, grad=False).expand(5, 33), randn(5, 33, grad=False)
    return dh, h, randn(5, grad=False).abs()


@pytest.mark.parametrize("case", OPCHECKS.values(), ids=OPCHECKS)
def test_opcheck(case):
    op, inputs = case()
    torch.library.opcheck(op, inputs)
