"""Each operation against its plain twin: outputs and every gradient."""

from inspect import isfunction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from upt_fast.common.closeness import relative_rms
from upt_fast.engine import ops
from upt_fast.engine.autograd import functions
from upt_fast.engine.backends import dispatch
from upt_fast.engine.layout import BufferPlaces, PackedLayout
from upt_fast.engine.workspace import Workspace
from upt_fast.reference import ops as reference

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=["float64", "float32"])
KINDS = ("quick_gelu", "gelu", "gelu_tanh")


def randn(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = True) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


def is_float(t: torch.Tensor | None) -> bool:
    return t is not None and t.is_floating_point()


def backward(f, inputs, args, weights):
    """f's outputs and the gradients of its inputs, and the weights of the outputs."""
    leaves = [t for t in inputs if is_float(t) and t.requires_grad]
    y = f(*inputs, *args)
    y = y if isinstance(y, tuple) else (y,)
    weights = [torch.randn_like(t) for t in y] if weights is None else weights
    return [*y, *torch.autograd.grad(y, leaves, weights, materialize_grads=True)], weights


def compare(name: str, inputs, *args) -> None:
    """engine.ops.<name> equals upt_fast.reference.ops.<name> in float64 on the same inputs, forward and backward."""
    got, weights = backward(getattr(ops, name), inputs, args, None)
    exact = [t.detach().double().requires_grad_(t.requires_grad) if is_float(t) else t for t in inputs]
    wanted, _ = backward(getattr(reference, name), exact, args, [w.double() for w in weights])
    dtype = inputs[0].dtype
    for i, (g, w) in enumerate(zip(got, wanted, strict=True)):
        assert g.dtype == dtype
        assert relative_rms(g, w) <= TOLERANCES[dtype], (name, i)


def test_every_op_has_a_twin():
    public = {n for n, f in vars(ops).items() if isfunction(f) and f.__module__ == ops.__name__ and n[0] != "_"}
    assert set(dispatch.OPS) - {"prompt_transform"} <= public  # the learner's own modules are that one's plain form
    assert public <= vars(reference).keys()


@DTYPES
@pytest.mark.parametrize("shape", [(1, 5), (7, 33), (2, 3, 7, 16), (0, 4)], ids=str)
@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_layer_norm(shape, eps, dtype):
    compare("layer_norm", [randn(*shape, dtype=dtype)], eps)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 5), (7, 33), (2, 3, 7, 16), (0, 4)], ids=str)
@pytest.mark.parametrize("constant", [None, "x", "y"])
def test_add_layer_norm(shape, constant, dtype):
    compare("add_layer_norm", [randn(*shape, dtype=dtype, grad=name != constant) for name in "xy"], 1e-5)


def test_add_layer_norm_gradcheck():
    assert torch.autograd.gradcheck(lambda x, y: ops.add_layer_norm(x, y, 1e-5), [randn(2, 3, 4), randn(2, 3, 4)])


def test_add_layer_norm_leaves_its_inputs():
    inputs = [randn(3, 4, grad=False) for _ in "xy"]
    copies = [t.clone() for t in inputs]
    s, _ = ops.add_layer_norm(*inputs, 1e-5)
    assert all(map(torch.equal, inputs, copies))
    assert s.data_ptr() not in [t.data_ptr() for t in inputs]


def with_reserved_rows(P, *shape, dtype=torch.float64):
    """A stream whose first P rows hold what nobody may read."""
    x = randn(*shape, dtype=dtype, grad=False)
    x[:, :P] = float("nan")
    return x.requires_grad_()


STREAMS = {
    "shared": (5, 6, 3, None),
    "one_image": (1, 2, 1, None),
    "no_prompts": (2, 3, 0, None),
    "unused_set": (5, 6, 2, [2, 0, 2, 2, 0]),
    "per_image": (4, 5, 2, [0, 1, 2, 3]),
    "no_images": (0, 5, 2, None),
}


@DTYPES
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize(("B", "T", "P", "index"), STREAMS.values(), ids=STREAMS)
def test_prompt_insert(B, T, P, index, residual, dtype):
    x, y = (with_reserved_rows(P, B, T, 7, dtype=dtype) for _ in "xy")
    prompts = randn(1 if index is None else 1 + max(index), P, 7, dtype=dtype)
    index = None if index is None else torch.tensor(index)
    compare("prompt_insert", [x, y if residual else None, prompts, index], 1e-5)


def test_prompt_insert_of_a_constant_stream():
    """As in layer 0, where only the prompts have a gradient."""
    x, y = (with_reserved_rows(2, 3, 5, 7).detach() for _ in "xy")
    compare("prompt_insert", [x, y, randn(2, 2, 7), torch.tensor([1, 0, 1])], 1e-5)


def test_prompt_insert_gradcheck():
    index = torch.tensor([1, 0, 1])
    inputs = [randn(3, 4, 3), randn(3, 4, 3), randn(2, 2, 3)]
    assert torch.autograd.gradcheck(lambda x, y, p: ops.prompt_insert(x, y, p, index, 1e-3), inputs)


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [None, True, False], ids=["plain", "bias", "constant_bias"])
def test_activation(bias, kind, dtype):
    u = (3 * randn(5, 17, dtype=dtype)).detach().requires_grad_()
    compare("activation", [u], kind) if bias is None else compare_with_bias(u, randn(17, dtype=dtype, grad=bias), kind)


def compare_with_bias(u, bias, kind):
    results = []
    for f, inputs in ((ops.activation, [u, bias]), (reference.activation, [t.detach().double() for t in (u, bias)])):
        leaves = [t.requires_grad_(own.requires_grad) for t, own in zip(inputs, (u, bias), strict=True)]
        y = f(inputs[0], kind, inputs[1])
        grads = torch.autograd.grad(y.sin().sum(), [t for t in leaves if t.requires_grad])
        results.append([y, *grads])
    for got, wanted in zip(*results, strict=True):
        assert got.dtype == u.dtype
        assert relative_rms(got, wanted) <= TOLERANCES[u.dtype]


def test_activations_differ():
    u = randn(100, grad=False)
    results = [ops.activation(u, kind) for kind in KINDS]
    assert min(float((a - b).abs().max()) for a, b in zip(results, results[1:] + results[:1], strict=True)) > 1e-4


@DTYPES
@pytest.mark.parametrize("lead", [(1,), (7,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_linear(lead, bias, dtype):
    x, weight = randn(*lead, 10, dtype=dtype), randn(6, 10, dtype=dtype, grad=False)
    compare("linear", [x, weight, *([randn(6, dtype=dtype, grad=False)] if bias else [])])


@DTYPES
@pytest.mark.parametrize("lead", [(1,), (7,), (2, 3), (2, 1, 5)], ids=str)
def test_linear_residual(lead, dtype):
    inputs = [randn(*lead, 6, dtype=dtype), randn(*lead, 10, dtype=dtype)]
    compare("linear_residual", [*inputs, randn(6, 10, dtype=dtype, grad=False), randn(6, dtype=dtype, grad=False)])


def test_linear_residual_leaves_its_inputs():
    x, y, weight, bias = inputs = [randn(*shape, grad=False) for shape in ((3, 6), (3, 10), (6, 10), (6,))]
    copies = [t.clone() for t in inputs]
    ops.linear_residual(x, y, weight, bias)
    assert all(map(torch.equal, inputs, copies))


def test_linear_residual_takes_strided_rows():
    x, y = randn(4, 5, 6)[:, 1:3], randn(4, 2, 20)[..., ::2]
    got = ops.linear_residual(x, y, weight := randn(6, 10, grad=False), bias := randn(6, grad=False))
    assert relative_rms(got, reference.linear_residual(x, y, weight, bias)) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_residual_of_a_gpu_rounds_the_sum_once(dtype, monkeypatch):
    """In two launches: the product with its bias, and the sum."""
    monkeypatch.setattr(functions, "composes", lambda *t: False)  # fake tensors have a device that is not there
    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.extend([func.overloadpacket.__name__] * (func.namespace == "aten" and not func.is_view))
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), Record():
        tensors = [torch.empty(*shape, device="cuda", dtype=dtype) for shape in ((3, 6), (3, 10), (6, 10), (6,))]
        calls.clear()
        functions.linear_residual(*tensors)
    assert calls == ["addmm", "add"]


def frozen_mlp(width: int, hidden: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    shapes = ((hidden, width), (hidden,), (width, hidden), (width,))
    return [randn(*shape, dtype=dtype, grad=False) for shape in shapes]


@DTYPES
@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 5), (5, 8), (2, 3, 7)], ids=str)
def test_mlp(shape, kind, recompute, dtype):
    inputs = [randn(*shape, dtype=dtype), *frozen_mlp(shape[-1], 11, dtype)]
    compare("mlp", inputs, 1e-3, kind, recompute)


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("kind", KINDS)
def test_mlp_gradcheck(kind, recompute):
    weights = frozen_mlp(4, 6)
    assert torch.autograd.gradcheck(lambda x: ops.mlp(x, *weights, 1e-5, kind, recompute), [randn(2, 3, 4)])


def test_mlp_takes_strided_rows_and_gradients():
    x = randn(3, 5, 8)
    weights = frozen_mlp(8, 11)
    dy = randn(3, 8, 2, grad=False).transpose(1, 2)  # the gradient of a transposed output
    results = [torch.autograd.grad(f(x[:, 1:3], *weights, 1e-5, "gelu"), x, dy)[0] for f in (ops.mlp, reference.mlp)]
    assert relative_rms(*results) <= 1e-12


def test_mlp_recompute_saves_no_hidden_features():
    def saved(recompute: bool) -> int:
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape) or t, lambda t: t):
            ops.mlp(x, *weights, 1e-5, "gelu", recompute)
        return sum(shape == (5, 32) for shape in shapes)

    x, weights = randn(5, 8), frozen_mlp(8, 32)
    assert (saved(False), saved(True)) == (1, 0)


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("rows", [(5, 5, 5, 5), (5, 5, 7, 7), (5, 7, 5, 7), (7, 5, 2, 1)], ids=str)
def test_mlps_that_share_a_workspace(rows, recompute):
    """Layer after layer, whose numbers of rows change as prompts become rows, then backward through all."""
    x, weights, results = randn(7, 8), [frozen_mlp(8, 11) for _ in rows], []
    for f, options in ((ops.mlp, {"workspace": Workspace(len(rows))}), (reference.mlp, {})):
        y = []
        for layer, (count, weight) in enumerate(zip(rows, weights, strict=True)):
            where = {"layer": layer} if options else {}
            y.append(f(x[:count] * (layer + 1), *weight, 1e-5, "gelu", recompute, **options, **where))
        results.append([*y, *torch.autograd.grad(sum(t.square().sum() for t in y), x)])
    for got, wanted in zip(*results, strict=True):
        assert relative_rms(got, wanted) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_mlp_in_half_precision(dtype):
    weights = [t / t.shape[-1] ** 0.5 for t in frozen_mlp(32, 128)]
    x = randn(64, 32)
    exact = [t.detach().to(dtype).double().requires_grad_(t.requires_grad) for t in (x, *weights)]
    half = [t.detach().to(dtype).requires_grad_(t.requires_grad) for t in exact]
    wanted, (w,) = backward(reference.mlp, exact, (1e-5, "quick_gelu"), None)
    got, _ = backward(ops.mlp, half, (1e-5, "quick_gelu"), [w.to(dtype)])
    plain, _ = backward(reference.mlp, half, (1e-5, "quick_gelu"), [w.to(dtype)])
    for g, p, t in zip(got, plain, wanted, strict=True):
        assert relative_rms(g, t) <= 1.1 * relative_rms(p, t)
        assert relative_rms(g, t) <= 5e-3 if dtype == torch.float16 else 4e-2


@DTYPES
@pytest.mark.parametrize("index", [None, [0, 0, 0], [2, 0, 2, 1, 2]], ids=["one_set", "unused_sets", "mixed"])
@pytest.mark.parametrize(("P", "L"), [(1, 1), (3, 5), (0, 4), (2, 0)])
def test_prepend_rows(P, L, index, dtype):
    sets, B = (1, 4) if index is None else (3, len(index))
    index = None if index is None else torch.tensor(index)
    compare("prepend_rows", [randn(sets, P, 2, 3, dtype=dtype), randn(B, L, 2, 3, dtype=dtype), index])


@pytest.mark.parametrize("constant", ["prefix", "x"])
def test_prepend_rows_of_a_constant(constant):
    compare("prepend_rows", [randn(1, 2, 3, grad=constant != "prefix"), randn(4, 5, 3, grad=constant != "x")])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_sets_are_added_in_float32(dtype, monkeypatch):
    """On a GPU in half precision; each sum would be rounded as often as a set has images."""
    added = []
    index_add_ = torch.Tensor.index_add_
    monkeypatch.setattr(
        torch.Tensor, "index_add_", lambda s, *a: added.append((s.dtype, a[2].dtype)) or index_add_(s, *a)
    )
    with FakeTensorMode():
        x, index = torch.empty(6, 4, 2, 8, device="cuda", dtype=dtype), torch.zeros(6, device="cuda", dtype=torch.int64)
        sums = functions.sum_by_set(x[:, 1:], index, 3)
        assert (sums.shape, sums.dtype) == ((3, 3, 2, 8), dtype)
    assert added == [(torch.float32, torch.float32)]


def test_prepend_rows_gradcheck():
    index = torch.tensor([1, 0, 1])
    assert torch.autograd.gradcheck(ops.prepend_rows, [randn(1, 2, 3), randn(3, 2, 3)])
    assert torch.autograd.gradcheck(lambda p, x: ops.prepend_rows(p, x, index), [randn(2, 2, 3), randn(3, 2, 3)])


@DTYPES
@pytest.mark.parametrize(("Q", "L"), [(1, 1), (1, 6), (5, 5), (2, 7)], ids=str)
@pytest.mark.parametrize("P", [None, 0, 1, 4])
@pytest.mark.parametrize("index", [None, [1, 0, 1]], ids=["one_set", "two_sets"])
def test_prefix_attention(Q, L, P, index, dtype):
    q, k, v = (randn(3, n, 2, 5, dtype=dtype) for n in (Q, L, L))
    sets = 1 if index is None else 2
    prefix = [None, None] if P is None else [randn(sets, P, 2, 5, dtype=dtype) for _ in "kv"]
    compare("prefix_attention", [q, k, v, *prefix, None if index is None else torch.tensor(index)])


def test_prefix_attention_gradcheck():
    rows = [randn(2, n, 2, 3) for n in (1, 2, 2)]
    prefix = [randn(2, 2, 2, 3) for _ in "kv"]
    index = torch.tensor([1, 0])
    assert torch.autograd.gradcheck(lambda *t: ops.prefix_attention(*t, index), [*rows, *prefix])


LAYOUTS = {
    "one_class": (((1, 1),),),
    "one_run": (((3, 4),),),
    "runs": (((2, 1), (1, 3), (4, 5)),),
    "sets": (((2, 2),), ((1, 1), (1, 4)), ((3, 3),)),
}


def packed_inputs(layout, last_only, P, H=2, K=3, dtype=torch.float64, grad=True):
    N = layout.num_rows
    rows = [randn(n, H, K, dtype=dtype, grad=grad) for n in (layout.num_classes if last_only else N, N, N)]
    return [*rows, *(randn(len(layout.sets), P, H, K, dtype=dtype) for _ in "kv")]


@DTYPES
@pytest.mark.parametrize("last_only", [False, True], ids=["all_rows", "last_rows"])
@pytest.mark.parametrize("P", [0, 1, 5])
@pytest.mark.parametrize("runs", LAYOUTS.values(), ids=LAYOUTS)
def test_packed_attention(runs, P, last_only, dtype):
    layout = PackedLayout(runs)
    compare("packed_attention", packed_inputs(layout, last_only, P, dtype=dtype), layout)


@pytest.mark.parametrize("last_only", [False, True], ids=["all_rows", "last_rows"])
def test_packed_attention_gradcheck(last_only):
    layout = PackedLayout((((1, 1), (2, 2)), ((1, 3),)))
    inputs = packed_inputs(layout, last_only, 2, H=1, K=2)
    assert torch.autograd.gradcheck(lambda *t: ops.packed_attention(*t, layout), inputs)


def test_packed_attention_of_constant_rows():
    """As in layer 0, where only the prompts have a gradient."""
    layout = PackedLayout(LAYOUTS["sets"])
    compare("packed_attention", packed_inputs(layout, False, 3, grad=False), layout)


def test_packed_attention_of_constant_queries():
    layout = PackedLayout(LAYOUTS["runs"])
    q, *others = packed_inputs(layout, False, 2)
    compare("packed_attention", [q.detach(), *others], layout)


runs_of_sets = st.lists(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 6)), min_size=1, max_size=3).map(tuple), min_size=1, max_size=3
)


@settings(max_examples=60)
@given(runs_of_sets.map(tuple), st.booleans(), st.integers(0, 4), st.integers(1, 3), st.integers(1, 5), st.booleans())
def test_packed_attention_of_any_layout(runs, last_only, P, H, K, strided):
    layout = PackedLayout(runs)
    inputs = packed_inputs(layout, last_only, P, H, K)
    if strided:  # heads first in memory, as a projection of (3, H, K) columns would leave them
        inputs = [t.detach().transpose(-3, -2).contiguous().transpose(-3, -2).requires_grad_() for t in inputs]
    compare("packed_attention", inputs, layout)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_packed_attention_in_half_precision_sums_in_float32(dtype):
    layout = PackedLayout((((4, 6),),))
    half = [t.detach().to(dtype).requires_grad_() for t in packed_inputs(layout, False, 64, K=16)]
    exact = [t.detach().double().requires_grad_() for t in half]
    got, (w,) = backward(ops.packed_attention, half, (layout,), None)
    wanted, _ = backward(reference.packed_attention, exact, (layout,), [w.double()])
    rounded = [t.to(dtype) for t in wanted]  # what cannot be avoided
    for g, r, t in zip(got, rounded, wanted, strict=True):
        assert g.dtype == dtype
        assert relative_rms(g, t) <= 1.2 * relative_rms(r, t)


def test_packed_attention_does_not_see_later_rows_or_other_classes():
    layout = PackedLayout((((2, 3),), ((1, 3),)))
    inputs = packed_inputs(layout, False, 2, grad=False)
    before = ops.packed_attention(*inputs, layout)
    with torch.no_grad():
        inputs[1][2], inputs[2][2] = 9.0, 9.0  # the last row of the first class
        inputs[4][1] += 1.0  # the second set's prefix
    changed = (ops.packed_attention(*inputs, layout) - before).abs().amax((1, 2)) > 1e-9
    assert changed.tolist() == [False, False, True, False, False, False, True, True, True]


@DTYPES
@pytest.mark.parametrize("P", [0, 1, 3])
@pytest.mark.parametrize("runs", [*LAYOUTS.values(), (((2, 2),), (), ((3, 1),))], ids=[*LAYOUTS, "unused_set"])
def test_insert_shared(runs, P, dtype):
    layout = PackedLayout(runs)
    inputs = [randn(layout.num_rows, 2, 3, dtype=dtype), randn(len(runs), P, 2, 3, dtype=dtype)]
    compare("insert_shared", inputs, BufferPlaces.of(layout, P))


@pytest.mark.parametrize("constant", ["own", "shared"])
def test_insert_shared_of_a_constant(constant):
    places = BufferPlaces.of(PackedLayout(LAYOUTS["sets"]), 2)
    compare("insert_shared", [randn(18, 3, grad=constant != "own"), randn(3, 2, 3, grad=constant != "shared")], places)


def test_insert_shared_gradcheck():
    places = BufferPlaces.of(PackedLayout((((1, 1), (2, 2)), ((1, 3),))), 2)
    assert torch.autograd.gradcheck(lambda *t: ops.insert_shared(*t, places), [randn(8, 2), randn(2, 2, 2)])


@DTYPES
@pytest.mark.parametrize(("Q", "L"), [(1, 1), (1, 6), (5, 5), (2, 7)], ids=str)
def test_stream_attention(Q, L, dtype):
    compare("stream_attention", [randn(3, n, 2, 5, dtype=dtype) for n in (Q, L, L)])


def test_stream_attention_gradcheck():
    assert torch.autograd.gradcheck(ops.stream_attention, [randn(2, n, 2, 3) for n in (1, 2, 2)])


def buffer_inputs(layout, last_only, P, H=2, K=3, dtype=torch.float64):
    keys = layout.num_rows + P * layout.num_classes
    queries = layout.num_classes if last_only else layout.num_rows
    return [randn(n, H, K, dtype=dtype) for n in (queries, keys, keys)]


@DTYPES
@pytest.mark.parametrize("last_only", [False, True], ids=["all_rows", "last_rows"])
@pytest.mark.parametrize("P", [0, 1, 5])
@pytest.mark.parametrize("runs", LAYOUTS.values(), ids=LAYOUTS)
def test_buffer_attention(runs, P, last_only, dtype):
    layout = PackedLayout(runs)
    compare("buffer_attention", buffer_inputs(layout, last_only, P, dtype=dtype), layout, P)


@pytest.mark.parametrize("last_only", [False, True], ids=["all_rows", "last_rows"])
def test_buffer_attention_gradcheck(last_only):
    layout = PackedLayout((((1, 1), (2, 2)), ((1, 3),)))
    inputs = buffer_inputs(layout, last_only, 2, H=1, K=2)
    assert torch.autograd.gradcheck(lambda *t: ops.buffer_attention(*t, layout, 2), inputs)


@pytest.mark.parametrize("last_only", [False, True], ids=["all_rows", "last_rows"])
@pytest.mark.parametrize("runs", LAYOUTS.values(), ids=LAYOUTS)
def test_buffer_attention_is_packed_attention(runs, last_only):
    """Of shared rows that insert_shared put in front of each class's own."""
    layout = PackedLayout(runs)
    q, k, v, prefix_k, prefix_v = packed_inputs(layout, last_only, 2)
    places = BufferPlaces.of(layout, 2)
    buffers = [ops.insert_shared(own, shared, places) for own, shared in ((k, prefix_k), (v, prefix_v))]
    wanted = ops.packed_attention(q, k, v, prefix_k, prefix_v, layout)
    assert relative_rms(ops.buffer_attention(q, *buffers, layout, 2), wanted) <= 1e-12


@DTYPES
@pytest.mark.parametrize("ranges", [None, [[0, 5], [5, 7], [6, 7], [0, 5]]], ids=["all_classes", "own_classes"])
def test_contrastive_loss(ranges, dtype):
    labels = torch.tensor([4, 1, 0, 2])
    ranges = None if ranges is None else torch.tensor(ranges)
    compare("contrastive_loss", [3 * randn(4, 9, dtype=dtype), randn(7, 9, dtype=dtype)], 14.3, labels, ranges)


@pytest.mark.parametrize("name", ["mlp", "prepend_rows", "packed_attention"])
def test_gradients_of_gradients_are_refused(name):
    x = randn(2, 4)
    if name == "mlp":
        y = ops.mlp(x, *frozen_mlp(4, 6), 1e-5, "gelu")
    elif name == "prepend_rows":
        y = ops.prepend_rows(x[None], x[None])
    else:
        rows = x.view(4, 2, 1)
        y = ops.packed_attention(rows, rows, rows, rows[None], rows[None], PackedLayout((((2, 2),),)))
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
