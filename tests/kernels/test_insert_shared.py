"""The kernels that put shared rows in front of packed sequences, against their plain twins in float64: the buffer and
every gradient."""

import pytest
import torch
from upt_fast.kernels import insert_shared as kernel  # noqa: F401 registers the operators

from upt_fast import testing_ops
from upt_fast.common.closeness import relative_rms
from upt_fast.engine import ops
from upt_fast.engine.layout import PackedLayout
from upt_fast.reference import ops as reference
from upt_fast.testing_ops import DEVICE, Numbers, compare_op, dtype_name, integers, precisions, randn

PRECISIONS = precisions("insert_shared")
HALF = PRECISIONS[1:]
DTYPES = pytest.mark.parametrize("dtype", PRECISIONS, ids=dtype_name)
NAN = float("nan")

# set 1 of "unused_set" has no sequence; "many" are more than a program adds at once
LAYOUTS = {
    "one_row": (((1, 1),),),
    "one_run": (((3, 4),),),
    "runs": (((2, 1), (1, 3), (4, 5)),),
    "sets": (((2, 2),), ((1, 1), (1, 4)), ((3, 3),)),
    "unused_set": (((2, 2),), (), ((3, 1),)),
    "many": (((40, 1), (30, 2)), ((33, 1),)),
}


def inputs_of(runs, P, *features, dtype=torch.float32):
    """own, shared, and the places."""
    return testing_ops.insert_shared(Numbers(dtype), PackedLayout(runs), P, *features)


def compare(own, shared, places, weight=None) -> None:
    """The buffer, which is a copy, and both gradients."""
    compare_op("insert_shared", [own, shared, places], None if weight is None else [weight])
    buffer = ops.insert_shared(own, shared, places, backend="triton")
    assert torch.equal(buffer, reference.insert_shared(own.double(), shared.double(), places).to(own.dtype))


@DTYPES
@pytest.mark.parametrize(("P", "features"), [(0, (5,)), (1, (2, 5)), (3, (3, 65))], ids=str)
@pytest.mark.parametrize("runs", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.usefixtures("gpu_tiles")
def test_matches_reference(runs, P, features, dtype):
    compare(*inputs_of(runs, P, *features, dtype=dtype))


@pytest.mark.parametrize("runs", LAYOUTS.values(), ids=LAYOUTS)
def test_large_tiles(runs):
    compare(*inputs_of(runs, 2, 2, 33))


def test_without_rows():
    own, shared, places = inputs_of(((),), 2, 2, 5)
    buffer = ops.insert_shared(own, shared, places, backend="triton")
    down, dshared = torch.autograd.grad(buffer, [own, shared], torch.ones_like(buffer))
    assert buffer.shape == down.shape == (0, 2, 5)
    assert torch.equal(dshared, torch.zeros(1, 2, 2, 5, device=DEVICE))


VIEWS = {
    "one_of_three": lambda n: randn(*n[:-2], 3, *n[-2:]).unbind(-3)[1],  # keys among queries, keys and values
    "heads_first": lambda n: randn(n[-2], *n[:-2], n[-1]).movedim(0, -2),
    "every_second": lambda n: randn(2 * n[0], *n[1:])[::2],
    "every_second_column": lambda n: randn(*n[:-1], 2 * n[-1])[..., ::2],
    "one_for_all": lambda n: randn(*n[1:]).expand(n),
    "one_number_for_all": lambda n: randn(1).expand(n),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("place", ["own", "shared", "gradient"])
def test_strided(place, view):
    own, shared, places = inputs_of(LAYOUTS["sets"], 2, 3, 7)
    weight = None
    if place == "own":
        own = view(own.shape).requires_grad_()
    elif place == "shared":
        shared = view(shared.shape).requires_grad_()
    else:
        weight = view((len(places.source), 3, 7))
    compare(own, shared, places, weight)


@pytest.mark.parametrize("half", HALF, ids=str)
def test_mixed_dtypes(half):
    own, shared, places = inputs_of(LAYOUTS["sets"], 2, 3, 7)
    compare(own.detach().to(half).requires_grad_(), shared, places)
    compare(own, shared.detach().to(half).requires_grad_(), places)


@pytest.mark.parametrize("constant", ["own", "shared"])
def test_constants(constant):
    own, shared, places = inputs_of(LAYOUTS["sets"], 2, 3, 7)
    variable = shared if constant == "own" else own
    (own if constant == "own" else shared).requires_grad_(False)
    buffers = [f(own, shared, places) for f in (reference.insert_shared, lambda *t: ops.insert_shared(*t, "triton"))]
    weight = torch.randn_like(buffers[0])
    wanted, got = (torch.autograd.grad(buffer, variable, weight)[0] for buffer in buffers)
    assert relative_rms(got, wanted) <= 1e-5


@pytest.mark.usefixtures("gpu_tiles")
def test_sets_do_not_see_each_other():
    own, shared, places = inputs_of(LAYOUTS["many"], 2, 33)
    with torch.no_grad():
        shared[0], own[0] = NAN, NAN
    buffer = ops.insert_shared(own, shared, places, backend="triton")
    first = int(places.first_rows[70])  # of set 1
    assert buffer[:first].isnan().any(1).sum() == 70 * 2 + 1
    assert not buffer[first:].isnan().any()
    weight = torch.ones_like(buffer)
    weight[:first] = NAN
    (dshared,) = torch.autograd.grad(buffer, shared, weight)
    assert dshared[0].isnan().all()
    assert (dshared[1] == 33).all()


def test_backward_keeps_places_only():
    own, shared, places = inputs_of(LAYOUTS["sets"], 2, 33)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.insert_shared(own, shared, places, backend="triton")
    assert saved
    assert all(t.dtype == torch.int64 for t in saved)


def bwd_inputs():
    _, _, places = inputs_of(LAYOUTS["sets"], 2, 2, 5)
    return randn(len(places.source), 2, 5), *places[1:], 2


OPCHECKS = {
    "fwd": lambda: ("insert_shared_fwd", (randn(9, 2, 5), randn(3, 2, 2, 5), integers([-1, 3, -6, 8]))),
    "bwd": lambda: ("insert_shared_bwd", bwd_inputs()),
}


@pytest.mark.parametrize("case", OPCHECKS.values(), ids=OPCHECKS)
def test_opcheck(case):
    name, inputs = case()
    torch.library.opcheck(getattr(torch.ops.upt_fast, name), tuple(inputs))
