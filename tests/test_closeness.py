"""What rounding explains: honest arithmetic in any order is within it, a wrong result is not."""

import math

import pytest
import torch
import torch.nn.functional as F

from upt_fast.common.closeness import assert_rounded, excesses

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
INPUTS = torch.randn(3, 5, 17, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def attention(q, k, v):
    return (torch.softmax(3 * q @ k.T, dim=-1) @ v,)


def normalized(x, y, z):
    return F.layer_norm(x + y, x.shape[-1:], z[0]), F.normalize(x * y, dim=-1)


def loss(x, y, z):
    x = x.requires_grad_()
    value = F.cross_entropy(14 * F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T, torch.arange(5))
    return value, *torch.autograd.grad(value, x)


def summed(x, y, z):
    total = torch.zeros((), dtype=x.dtype)
    for value in x.flatten():  # one by one, the worst order
        total = total + value
    return (total,)


FUNCTIONS = pytest.mark.parametrize("function", [attention, normalized, loss, summed], ids=lambda f: f.__name__)


def inputs(dtype):
    """The same numbers in a precision, and those in float64."""
    rounded = [t.to(dtype) for t in INPUTS]
    return rounded, lambda: [t.double() for t in rounded]


@FUNCTIONS
@DTYPES
def test_honest_arithmetic_is_within(function, dtype):
    rounded, exact = inputs(dtype)
    assert_rounded(function(*(t.clone() for t in rounded)), lambda: function(*exact()), dtype)


@FUNCTIONS
@DTYPES
@pytest.mark.parametrize("wrong", [lambda t: 1.1 * t, lambda t: t + 0.1 * t.abs().max(), lambda t: -t])
def test_wrong_results_are_not(function, dtype, wrong):
    rounded, exact = inputs(dtype)
    got = [wrong(t.detach()) for t in function(*(t.clone() for t in rounded))]
    if dtype == torch.bfloat16 and function is summed:
        pytest.skip("a sum of 85 numbers one by one may be off by more in bfloat16")
    with pytest.raises(AssertionError, match="what rounding to"):
        assert_rounded(got, lambda: function(*exact()), dtype)


def test_a_small_part_that_is_wrong_in_single_precision():
    """One row of many is off by 1e-4 of itself."""
    rounded, exact = inputs(torch.float32)
    (got,) = attention(*rounded)
    got[2] *= 1.0001
    with pytest.raises(AssertionError):
        assert_rounded([got], lambda: attention(*exact()), torch.float32)


@pytest.mark.parametrize("got", [1e-3, float("nan"), float("inf")])
def test_where_zero_is_exact(got):
    """Nothing is rounded in a sum of zeros: any other number is wrong."""
    zeros = torch.zeros(4, dtype=torch.float64)
    assert excesses([torch.zeros(4)], lambda: [zeros + zeros], torch.float32) == [0.0]
    with pytest.raises(AssertionError):
        assert_rounded([torch.full((4,), got)], lambda: [zeros + zeros], torch.float32)


def test_shapes_must_agree():
    assert excesses([torch.zeros(3)], lambda: [torch.zeros(4, dtype=torch.float64)], torch.float32) == [math.inf]
