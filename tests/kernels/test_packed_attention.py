"""Causal attention of packed classes against its plain twin in float64: tiles of short classes, and long classes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from upt_fast.kernels import packed_attention as kernel
from upt_fast.kernels.prefix_attention import attend

from upt_fast import testing_ops
from upt_fast.common.closeness import relative_rms
from upt_fast.engine import ops
from upt_fast.engine.layout import TILE_ROWS, PackedLayout, PackedTiles
from upt_fast.reference import ops as reference
from upt_fast.testing_ops import DEVICE, Numbers, compare_op, dtype_name, precisions

DTYPES = pytest.mark.parametrize("dtype", precisions("packed_attention"), ids=dtype_name)
LAST = pytest.mark.parametrize("last_only", [False, True], ids=["rows", "last_rows"])
NAN = float("nan")
NAMES = ("q", "k", "v", "prefix_k", "prefix_v")


def make(sets, P=3, H=2, K=16, last_only=False, dtype=torch.float32):
    """q, k, v and the prefixes as views of products, and the layout; constants."""
    *tensors, layout = testing_ops.packed_attention(Numbers(dtype), PackedLayout(sets), P, H, K, last_only)
    return [*(t.detach() for t in tensors), layout]


def evaluate(inputs, weight, needs=NAMES):
    """The output and the gradients of the tensors named in `needs`, by the kernels."""
    arguments = chosen(inputs, needs)
    return testing_ops.evaluate(lambda *t: ops.packed_attention(*t, backend="triton"), arguments, [weight])


def chosen(inputs, needs):
    """The inputs, of which those named need gradients."""
    leaves = [t.detach().requires_grad_(name in needs) for name, t in zip(NAMES, inputs, strict=False)]
    return [*leaves, inputs[5]]


def twin(inputs, weight):
    """The same in float64 by the plain twin."""
    return testing_ops.evaluate(
        reference.packed_attention, testing_ops.copied(chosen(inputs, NAMES), torch.float64), [weight]
    )


def compare(inputs, needs=NAMES, weight=None) -> None:
    compare_op("packed_attention", chosen(inputs, needs), None if weight is None else [weight])


# the first four fit in tiles with up to 20 shared rows, the others have classes that do not
LAYOUTS = {
    "one_row": (((1, 1),),),
    "one_row_classes": (((40, 1),),),
    "runs": (((2, 1), (5, 3), (3, 5), (1, 12)),),
    "sets": (((2, 2),), (), ((1, 1), (9, 4)), ((3, 3), (1, 10))),
    "just_long": (((1, 30), (2, 1)),),
    "one_long": (((1, 76),),),
    "long_and_short": (((3, 2), (1, 50)), ((1, 33), (2, 1)), ((1, 4),)),
}


@DTYPES
@LAST
@pytest.mark.parametrize("name", LAYOUTS)
def test_matches_reference(name, last_only, dtype):
    compare(make(LAYOUTS[name], P=5, last_only=last_only, dtype=dtype))


@LAST
@pytest.mark.parametrize("P", [0, 1, 20, 33])
@pytest.mark.parametrize("name", ["one_row", "sets", "one_long", "long_and_short"])
def test_prefix_lengths(name, P, last_only):
    compare(make(LAYOUTS[name], P, H=1, last_only=last_only))


@DTYPES
@pytest.mark.parametrize("K", [32, 48, 64, 80, 88, 96, 104, 112, 128])
def test_head_dimensions(K, dtype):
    compare(make(LAYOUTS["sets"], K=K, H=1, dtype=dtype))


@settings(max_examples=15)
@given(
    st.lists(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 20)), max_size=3), min_size=1, max_size=3),
    st.integers(0, 12),
    st.booleans(),
)
def test_any_layout(runs, P, last_only):
    if any(runs):
        compare(make(tuple(map(tuple, runs)), P, H=1, K=8, last_only=last_only))


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 40)), max_size=4), min_size=1, max_size=3),
    st.integers(0, 40),
)
def test_tiles(runs, P):
    """Each class is in one tile, with its set's others, in order; as many in each as there is room for."""
    layout = PackedLayout(tuple(map(tuple, runs)))
    got = PackedTiles.of(layout, P)
    lengths = [(s, length) for s, runs in enumerate(layout.sets) for count, length in runs for _ in range(count)]
    assert (got.longest, got.prefix, got.sets) == (max((n for _, n in lengths), default=0), P, len(runs))
    row = 0
    for c, (s, length) in enumerate(lengths):
        assert got.classes[c].tolist() == [row, row + length, c, c + 1, s]
        assert got.first_rows[row : row + length].tolist() == [row] * length
        row += length
    assert len(got.first_rows) == row == layout.num_rows
    end_row = end_class = 0
    for i, (first, end, first_class, last_class, s) in enumerate(got.tiles.tolist()):
        assert (first, first_class) == (end_row, end_class)
        assert {t for t, _ in lengths[first_class:last_class]} == {s}
        assert sum(n for _, n in lengths[first_class:last_class]) == end - first
        assert P + end - first <= TILE_ROWS or last_class - first_class == 1
        if i + 1 < len(got.tiles) and got.tiles[i + 1, 4] == s:
            assert P + end - first + lengths[last_class][1] > TILE_ROWS
        end_row, end_class = end, last_class
    assert (end_row, end_class) == (layout.num_rows, layout.num_classes)
    moved = got.to("meta")
    assert [t.device.type for t in moved[:3]] == ["meta"] * 3
    assert moved[3:] == got[3:]


NEEDS = {
    "prefixes": NAMES[3:],  # where the rows are constants, as in the first layer
    "one_prefix": ("prefix_k",),
    "rows": NAMES[:3],
    "queries": ("q",),
    "values": ("v",),
    "all_but_queries": NAMES[1:],
}


@pytest.mark.parametrize("needs", NEEDS.values(), ids=NEEDS)
@pytest.mark.parametrize("name", ["sets", "long_and_short"])
def test_constants(name, needs):
    compare(make(LAYOUTS[name]), needs)


VIEWS = {
    "every_second_row": lambda n: torch.randn(*n[:-3], 2 * n[-3], *n[-2:])[..., ::2, :, :],
    "heads_first": lambda n: torch.randn(n[-2], *n[:-2], n[-1]).movedim(0, -2),
    "every_second_column": lambda n: torch.randn(*n[:-1], 2 * n[-1])[..., ::2],
    "one_for_all": lambda n: torch.randn(*n[-2:]).expand(n),
    "one_number_for_all": lambda n: torch.randn(1).expand(n),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("place", [*NAMES, "dout"])
@pytest.mark.parametrize("name", ["runs", "just_long"])
def test_strided(name, place, view):
    inputs, weight = make(LAYOUTS[name], H=1), None
    if place == "dout":
        weight = view(inputs[0].shape).to(DEVICE)
    else:
        inputs[NAMES.index(place)] = view(inputs[NAMES.index(place)].shape).to(DEVICE)
    compare(inputs, weight=weight)


@LAST
@pytest.mark.parametrize("sets", [((),), ((), ())], ids=["one_set", "two_sets"])
def test_no_classes(sets, last_only):
    inputs = make(sets, last_only=last_only)
    out, *gradients = evaluate(inputs, torch.ones_like(inputs[0]))
    assert out.shape == (0, 2, 16)
    for t, g in zip(inputs, gradients, strict=False):
        assert torch.equal(g, torch.zeros_like(t))


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize("name", ["sets", "long_and_short"])
@pytest.mark.parametrize("factor", [0.0, 1000.0])
def test_extreme_scores(factor, name):
    inputs = make(LAYOUTS[name])
    inputs[0] = inputs[0] * factor
    weight = torch.randn_like(inputs[0])
    got = evaluate(inputs, weight)
    wanted = twin(inputs, weight)
    for a, b in zip(got, wanted, strict=True):
        assert a.isfinite().all()
        assert float((a - b).detach().abs().max()) <= 1e-4 * max(1.0, factor) * float(b.detach().abs().max() + 1)


@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered")
@pytest.mark.parametrize("value", [NAN, -float("inf")])
@pytest.mark.parametrize("place", range(4), ids=["q", "k", "v", "dout"])
@LAST
@pytest.mark.parametrize("name", ["sets", "long_and_short"])
def test_classes_do_not_see_each_other(name, last_only, place, value):
    """One row of a class among others; of the same tile too, where a product multiplies all of them."""
    inputs = make(LAYOUTS[name], H=1, last_only=last_only)
    weight, results = torch.randn_like(inputs[0]), []
    layout, (c, s) = inputs[5], (8, 2) if name == "sets" else (1, 0)  # the class, and its set
    rows = slice(*PackedTiles.of(layout, 3).classes[c, :2].tolist())
    row = rows.stop - 1
    own = [slice(c, c + 1) if last_only else rows, rows, rows]
    for bad in (False, True):
        changed = [*(t.clone() for t in inputs[:5]), layout]
        tensors = [*changed[:3], weight.clone()]
        if bad:
            tensors[place][(c if last_only else row) if place in (0, 3) else row, 0, 3] = value
        results.append(evaluate(changed, tensors[3]))
    if place != 3 and value != value:
        assert results[1][0][own[0]].isnan().any()
    for part, a, b in zip([own[0], *own], results[0][:4], results[1][:4], strict=True):
        keep = torch.ones(len(a), dtype=torch.bool)
        keep[part] = False
        assert torch.equal(a[keep], b[keep])
    others = [i for i in range(len(layout.sets)) if i != s]
    for a, b in zip(results[0][4:], results[1][4:], strict=True):
        assert torch.equal(a[others], b[others])
    if value != value:  # the sum over the set has the bad class in it
        assert results[1][4][s].isnan().any()


@pytest.mark.parametrize("name", ["sets", "long_and_short"])
def test_sets_do_not_see_each_other(name):
    inputs = make(LAYOUTS[name])
    weight, results = torch.randn_like(inputs[0]), []
    for bad in (1.0, NAN):
        changed = [*inputs[:3], *(t.clone() for t in inputs[3:5]), inputs[5]]
        changed[3][2] *= bad
        results.append(evaluate(changed, weight))
    last = len(weight) - sum(count * length for count, length in inputs[5].sets[2])  # first row of set 2
    if name == "sets":
        last -= sum(count * length for count, length in inputs[5].sets[3])
    for a, b in zip(results[0][:4], results[1][:4], strict=True):
        assert torch.equal(a[:last], b[:last])
        assert b[last : last + 2].isnan().all()
    for a, b in zip(results[0][4:], results[1][4:], strict=True):
        assert torch.equal(a[:2], b[:2])


@pytest.mark.parametrize("name", ["sets", "long_and_short"])
def test_the_last_rows_are_the_same_apart(name):
    q, *others = make(LAYOUTS[name])
    last = PackedTiles.of(others[4], 3).classes[:, 1].to(DEVICE, torch.int64) - 1
    whole = ops.packed_attention(q, *others, backend="triton")
    assert relative_rms(ops.packed_attention(q[last], *others, backend="triton"), whole[last]) <= 1e-6


@pytest.mark.parametrize(("name", "more"), [("sets", 0), ("long_and_short", 2)])
def test_what_backward_keeps(name, more):
    """The inputs; of long classes the output and a number per row besides."""
    inputs = make(LAYOUTS[name])
    leaves, saved = [t.requires_grad_() for t in inputs[:5]], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.packed_attention(*leaves, inputs[5], backend="triton")
    assert sum(t.is_floating_point() for t in saved) == 5 + more


def test_tiles_may_be_given():
    inputs = make(LAYOUTS["sets"])
    tiles = PackedTiles.of(inputs[5], 3).to(DEVICE)
    given_tiles = ops.packed_attention(*inputs, backend="triton", tiles=tiles)
    assert torch.equal(given_tiles, ops.packed_attention(*inputs, backend="triton"))
    assert torch.equal(given_tiles, kernel.packed_attention(*inputs[:5], tiles))


def test_gradients_after_inference_mode():
    """Tiles that were made in inference mode are kept, and serve training."""
    inputs = make((((1, 2), (1, 3)),))
    with torch.inference_mode():
        ops.packed_attention(*inputs, backend="triton")
    compare(inputs)


def test_autocast():
    """Everything in autocast's dtype, whatever each linear left."""
    inputs = make(LAYOUTS["runs"])
    inputs[3] = inputs[3].half()
    with torch.autocast(DEVICE, torch.float16):
        out = ops.packed_attention(*inputs, backend="triton")
    assert torch.equal(out, ops.packed_attention(*(t.half() for t in inputs[:5]), inputs[5], backend="triton"))


BAD = {
    "queries": lambda q, k, v, pk, pv: (q[:-1], k, v, pk, pv),
    "rows": lambda q, k, v, pk, pv: (q, k[:-1], v[:-1], pk, pv),
    "values": lambda q, k, v, pk, pv: (q, k, v[..., 1:], pk, pv),
    "dims": lambda q, k, v, pk, pv: (q[None], k[None], v[None], pk, pv),
    "prefix_length": lambda q, k, v, pk, pv: (q, k, v, pk[:, 1:], pv[:, 1:]),
    "sets": lambda q, k, v, pk, pv: (q, k, v, pk[:1], pv[:1]),
    "dtypes": lambda q, k, v, pk, pv: (q, k, v.half(), pk, pv),
    "wide": lambda q, k, v, pk, pv: tuple(t.repeat(*[1] * (t.ndim - 1), 9) for t in (q, k, v, pk, pv)),
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_what_does_not_fit_is_refused(change):
    *inputs, layout = make(LAYOUTS["sets"])
    tiles = PackedTiles.of(layout, 3).to(DEVICE)
    with pytest.raises(ValueError, match=r"q \(.*wanted k and v \(60, H, K\), q \(60, H, K\) or \(16, H, K\)"):
        kernel.packed_attention(*change(*inputs), tiles)


def op_inputs(name, last_only=False, grad=False):
    *inputs, layout = make(LAYOUTS[name], H=1, last_only=last_only)
    return [*(t.requires_grad_(grad) for t in inputs), *PackedTiles.of(layout, 3).to(DEVICE)[:3]]


def long_inputs(grad=False):
    """As packed_attention gives them to the kernels of prefix_attention."""
    *tensors, _, classes, _ = op_inputs("long_and_short", grad=grad)
    return *tensors, classes[:, 4], classes, 50


def long_saved():
    *tensors, longest = long_inputs()
    return torch.randn_like(tensors[0]), *tensors, *attend(*tensors, longest), longest


def bwd_inputs(name):
    tensors = op_inputs(name)
    return torch.randn_like(tensors[0]), *tensors


OPCHECKS = {
    "tiles": lambda: ("packed_attention_fwd", op_inputs("sets", grad=True)),
    "last_rows": lambda: ("packed_attention_fwd", op_inputs("runs", last_only=True)),
    "long": lambda: ("prefix_attention_fwd", long_inputs(grad=True)),
    "tiles_backward": lambda: ("packed_attention_bwd", (*bwd_inputs("sets"), True, True, True)),
    "tiles_backward_of_prefixes": lambda: ("packed_attention_bwd", (*bwd_inputs("sets"), False, False, True)),
    "long_backward": lambda: ("prefix_attention_bwd", (*long_saved(), True, True, True)),
    "long_backward_of_rows": lambda: ("prefix_attention_bwd", (*long_saved(), True, True, False)),
}


@pytest.mark.parametrize("case", OPCHECKS.values(), ids=OPCHECKS)
def test_opcheck(case):
    name, inputs = case()
    torch.library.opcheck(getattr(torch.ops.upt_fast, name), tuple(inputs))
