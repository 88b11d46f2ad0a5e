"""The activations' kernel against its plain twin in float64: output and gradient."""

from functools import partial

import pytest
import torch
from upt_fast.kernels import activation as kernel

from upt_fast import testing_ops
from upt_fast.clip.frozen import ACTIVATIONS
from upt_fast.common.closeness import relative_rms
from upt_fast.engine import ops
from upt_fast.reference import ops as reference
from upt_fast.testing_ops import DEVICE, compare_op, dtype_name, precisions

PRECISIONS = precisions("activation")
DTYPES = pytest.mark.parametrize("dtype", PRECISIONS, ids=dtype_name)
KINDS = pytest.mark.parametrize("kind", ACTIVATIONS)
BIAS = pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
randn = partial(testing_ops.randn, scale=2.0)  # so that all of the activation's bends are met


def compare(u, kind, bias=None, weight=None) -> None:
    compare_op("activation", [u, kind, bias], None if weight is None else [weight])


@DTYPES
@KINDS
@BIAS
@pytest.mark.parametrize("shape", [(1, 33), (33, 127), (2, 3, 5, 16), (3, 1025), (7, 1), (5,)], ids=str)
@pytest.mark.usefixtures("gpu_tiles")
def test_matches_reference(shape, bias, kind, dtype):
    compare(randn(*shape, dtype=dtype, grad=True), kind, randn(shape[-1], dtype=dtype) if bias else None)


@BIAS
def test_zero_rows(bias):
    compare(randn(2, 0, 33, grad=True), "gelu", randn(33) if bias else None)


VIEWS = {
    "every_second_row": lambda: randn(10, 33)[::2],
    "some_columns": lambda: randn(5, 40)[:, 3:36],
    "every_second_column": lambda: randn(5, 66)[:, ::2],
    "transposed": lambda: randn(33, 5).t(),
    "one_row_for_all": lambda: randn(33).expand(5, 33),
    "one_number_for_all": lambda: randn(1).expand(5, 33),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("place", ["u", "gradient"])
def test_strided(place, view):
    u = (view() if place == "u" else randn(5, 33)).requires_grad_()
    compare(u, "quick_gelu", randn(33), view() if place == "gradient" else None)


def test_rows_of_sequences_are_strided():
    compare(randn(4, 5, 33)[:, 1:3].requires_grad_(), "gelu", randn(33), randn(2, 4, 33).transpose(0, 1))


@pytest.mark.parametrize(
    "bias", [lambda: randn(33, 2)[:, 0], lambda: randn(1).expand(33)], ids=["every_second", "one_for_all"]
)
def test_strided_bias(bias):
    compare(randn(5, 33, grad=True), "gelu", bias())


@pytest.mark.parametrize("half", PRECISIONS[1:], ids=str)
def test_mixed_dtypes(half):
    compare(randn(9, 65, dtype=half, grad=True), "gelu", randn(65))
    compare(randn(9, 65, grad=True), "gelu", randn(65, dtype=half))


def test_the_sum_is_not_rounded():
    """In float16 -8 + b loses some 0.002 of a b between -1 and 0, and the activation as much of its value."""
    u = torch.full((50, 33), -8.0, dtype=torch.float16, device=DEVICE)
    bias = -torch.rand(33).to(DEVICE, torch.float16)
    wanted = reference.activation(u.double(), "quick_gelu", bias.double())
    assert relative_rms(ops.activation(u, "quick_gelu", bias, "triton"), wanted) <= 2**-11  # one rounding, at the end
    assert relative_rms(ops.activation(u + bias, "quick_gelu", backend="triton"), wanted) > 2**-10


@KINDS
@DTYPES
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_far_from_zero(kind, dtype):
    """There the activation is 0 or u, its slope 0 or 1; nothing overflows on the way."""
    u = torch.tensor([[-6e4, -300.0, -50.0, 50.0, 300.0, 6e4]], dtype=dtype, device=DEVICE).requires_grad_()
    y = ops.activation(u, kind, backend="triton")
    (slope,) = torch.autograd.grad(y.sum(), u)
    assert torch.allclose(y, u.clamp(min=0), rtol=0, atol=1e-15)
    assert torch.allclose(slope, (u > 0).to(dtype), rtol=0, atol=1e-15)


def test_kinds_differ():
    u = randn(5, 33)
    results = [ops.activation(u, kind, backend="triton") for kind in ACTIVATIONS]
    assert min(float((a - b).abs().max()) for a, b in zip(results, results[1:] + results[:1], strict=True)) > 1e-4


def test_backward_keeps_the_input_and_the_bias_only():
    saved = []
    u, bias = randn(5, 33, grad=True), randn(33)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        ops.activation(u, "quick_gelu", bias, backend="triton")
    assert sorted(saved) == sorted([u.data_ptr(), bias.data_ptr()])


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind 'relu'; wanted one of quick_gelu, gelu, gelu_tanh"):
        kernel.activation(randn(2, 33), "relu")


OPCHECKS = {
    "fwd": lambda: (torch.ops.upt_fast.activation_fwd, (randn(5, 33, grad=True), None, "quick_gelu")),
    "fwd_bias": lambda: (torch.ops.upt_fast.activation_fwd, (randn(5, 33, grad=True), randn(33), "gelu")),
    "fwd_strided": lambda: (
        torch.ops.upt_fast.activation_fwd,
        (randn(33, 5).t().requires_grad_(), randn(33), "gelu_tanh"),
    ),
    "bwd": lambda: (torch.ops.upt_fast.activation_bwd, (randn(5, 33), randn(5, 33), None, "quick_gelu")),
    "bwd_bias": lambda: (
        torch.ops.upt_fast.activation_bwd,
        (randn(33).expand(5, 33), randn(33, 5).t(), randn(33), "gelu"),
    ),
}


@pytest.mark.parametrize("case", OPCHECKS.values(), ids=OPCHECKS)
def test_opcheck(case):
    op, inputs = case()
    torch.library.opcheck(op, inputs)
