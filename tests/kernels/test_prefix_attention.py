"""Attention over shared prompts and own rows against its plain twin in float64: output, log-sum-exp, every gradient."""

import itertools

import pytest
import torch
from upt_fast.kernels import prefix_attention as kernel
from upt_fast.kernels._attention import dot_settings

from upt_fast import testing_ops
from upt_fast.common.closeness import relative_rms
from upt_fast.engine import ops
from upt_fast.reference import ops as reference
from upt_fast.testing_ops import DEVICE, Numbers, compare_op, dtype_name, precisions

DTYPES = pytest.mark.parametrize("dtype", precisions("prefix_attention"), ids=dtype_name)
NAN = float("nan")
NAMES = ("q", "k", "v", "prefix_k", "prefix_v")


def make(dtype=torch.float32, **sizes):
    """q, k, v, prefix_k, prefix_v as views of products, and set_index; constants."""
    arguments = testing_ops.prefix_attention(Numbers(dtype), **sizes)
    return [t if t is None else t.detach() for t in arguments]


def evaluate(inputs, weight, needs=NAMES):
    """The output and the gradients of the tensors named in `needs`, by the kernels."""
    arguments = chosen(inputs, needs)
    return testing_ops.evaluate(lambda *t: ops.prefix_attention(*t, backend="triton"), arguments, [weight])


def chosen(inputs, needs):
    """The inputs, of which those named need gradients."""
    leaves = [t.detach().requires_grad_(name in needs) for name, t in zip(NAMES, inputs, strict=False)]
    return [*leaves, inputs[5]]


def twin(inputs, weight):
    """The same in float64 by the plain twin."""
    return testing_ops.evaluate(
        reference.prefix_attention, testing_ops.copied(chosen(inputs, NAMES), torch.float64), [weight]
    )


def compare(inputs, needs=NAMES, weight=None) -> None:
    compare_op("prefix_attention", chosen(inputs, needs), None if weight is None else [weight])


SHAPES = {
    "one_key": dict(L=1, P=0, H=1),
    "one_row_one_prompt": dict(L=1, P=1),
    "few": dict(L=5, P=4),
    "odd": dict(B=3, L=17, P=10, sets=(1, 0, 1)),
    "patches": dict(L=50, P=4, H=1, K=64),
    "patches_and_many_prompts": dict(L=50, P=33, sets=(0, 1)),
    "b16": dict(B=1, L=197, P=4, H=1, K=64),
    "no_prompts": dict(L=33, P=0),
    "full_blocks": dict(L=60, P=4, K=32),
    "prompts_alone": dict(L=0, Q=3, P=5),
    "pooled": dict(B=3, Q=1, L=50, P=4, sets=(1, 1, 0)),
    "more_queries_than_keys": dict(Q=70, L=9, P=2),
    "per_image": dict(B=4, L=6, P=3, sets=(0, 1, 2, 3)),
    "unused_set": dict(B=3, L=6, P=2, sets=(0, 2, 0)),
    "many_prompts": dict(B=1, L=5, P=70, H=1),
    "many_images": dict(B=37, Q=1, L=2, P=1, H=1, sets=(0, 1) * 18 + (0,)),  # more than a sum adds at once
}


@DTYPES
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_matches_reference(shape, dtype):
    compare(make(**shape, dtype=dtype))


@DTYPES
@pytest.mark.parametrize("K", [32, 48, 64, 80, 88, 96, 104, 112, 128])
def test_head_dimensions(K, dtype):
    compare(make(L=9, P=2, H=1, K=K, dtype=dtype))


@pytest.mark.parametrize("Q", [1, 9])
def test_without_prefixes(Q):
    rows = [t.requires_grad_() for t in make(Q=Q, L=9)[:3]]
    compare_op("prefix_attention", [*rows, None, None, None])


NEEDS = {
    "prefixes": NAMES[3:],  # where the rows are constants, as in the first layer
    "one_prefix": ("prefix_v",),
    "rows": NAMES[:3],
    "queries": ("q",),
    "values": ("v",),
    "keys": ("k", "prefix_k"),
    "all_but_queries": NAMES[1:],
}


@pytest.mark.parametrize("shape", [dict(L=9, P=3, sets=(1, 0)), dict(L=3, P=35, H=1), dict(L=40, P=35, H=1)], ids=str)
@pytest.mark.parametrize("needs", NEEDS.values(), ids=NEEDS)
def test_constants(needs, shape):
    compare(make(**shape), needs)


def test_only_gradients_that_are_needed_are_computed():
    q, k, v, prefix_k, prefix_v, index = make(L=40, P=3, sets=(1, 0))
    out, softmax = kernel.prefix_attention_fwd(q, k, v, prefix_k, prefix_v, index, None, 0)
    shapes = q.shape, k.shape, v.shape, (2, *prefix_k.shape)
    saved = q, q, k, v, prefix_k, prefix_v, index, None, out, softmax, 0
    for needs in itertools.product((False, True), repeat=3):
        gradients = kernel.prefix_attention_bwd(*saved, *needs)
        computed = (needs[0], needs[1], needs[1], needs[2])
        assert [g.shape for g in gradients] == [s if c else (0,) for s, c in zip(shapes, computed, strict=True)]


VIEWS = {
    "every_second_row": lambda n: torch.randn(n[0], 2 * n[1], *n[2:])[:, ::2],
    "heads_first": lambda n: torch.randn(n[0], n[2], n[1], n[3]).transpose(1, 2),
    "rows_first": lambda n: torch.randn(n[1], n[0], *n[2:]).transpose(0, 1),
    "every_second_column": lambda n: torch.randn(*n[:3], 2 * n[3])[..., ::2],
    "columns_first": lambda n: torch.randn(n[3], *n[:3]).movedim(0, 3),
    "one_row_for_all": lambda n: torch.randn(n[0], 1, *n[2:]).expand(n),
    "one_number_for_all": lambda n: torch.randn(1).expand(n),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("place", [*NAMES, "dout"])
def test_strided(place, view):
    inputs, weight = make(L=6, P=3, sets=(1, 0)), None
    if place == "dout":
        weight = view(inputs[0].shape).to(DEVICE)
    else:
        inputs[NAMES.index(place)] = view(inputs[NAMES.index(place)].shape).to(DEVICE)
    compare(inputs, weight=weight)


def test_strided_set_index():
    inputs = make(B=3, sets=(1, 0, 1))
    inputs[5] = torch.tensor([1, 9, 0, 9, 1, 9], device=DEVICE)[::2]
    compare(inputs)


@pytest.mark.parametrize("shape", [dict(B=0), dict(L=0, Q=0), dict(B=0, sets=(0, 1)), dict(B=0, P=0)], ids=str)
def test_nothing_to_do(shape):
    inputs = make(**{**shape, "sets": None})
    if "sets" in shape:
        inputs[3:5] = (t.expand(2, -1, -1, -1) for t in inputs[3:5])
        inputs[5] = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    out, *gradients = evaluate(inputs, torch.ones_like(inputs[0]))
    assert out.shape == inputs[0].shape
    for t, g in zip(inputs, gradients, strict=False):
        assert torch.equal(g, torch.zeros_like(t))


@pytest.mark.parametrize("Q", [None, 1])
def test_log_sum_exp(Q):
    q, k, v, prefix_k, prefix_v, index = make(B=3, Q=Q, L=37, P=3, sets=(1, 0, 1))
    _, softmax = kernel.prefix_attention_fwd(q, k, v, prefix_k, prefix_v, index, None, 0)
    largest, total = softmax.double().view(2, 2, 3, -1).transpose(1, 2)  # (B, H, Q)
    lse = largest + total.log()
    keys = torch.cat([prefix_k[index], k], dim=1).double()
    assert relative_rms(lse, torch.einsum("bqhk,blhk->bhql", q.double(), keys).logsumexp(-1)) <= 1e-6


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize("factor", [0.0, 30.0, 1000.0])
def test_extreme_scores(factor):
    """All keys alike, and a softmax that sees one key only; scores of both signs far beyond exp's range."""
    inputs = make(L=37, P=3)
    inputs[0] = inputs[0] * factor
    weight = torch.randn_like(inputs[0])
    got = evaluate(inputs, weight)
    wanted = twin(inputs, weight)
    for a, b in zip(got, wanted, strict=True):
        assert a.isfinite().all()
        assert float((a - b).detach().abs().max()) <= 1e-4 * max(1.0, factor) * float(b.detach().abs().max() + 1)


@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered")
@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_images_and_sets_do_not_see_each_other(value):
    inputs = make(B=5, L=9, P=3, sets=(0, 1, 2, 1, 0))
    weight, results = torch.randn_like(inputs[0]), []
    for bad in (False, True):
        changed = [t.clone() for t in inputs]
        if bad:
            changed[1][4, 3], changed[2][4, 5], changed[0][4, 0] = value, value, value  # an image of set 0
            changed[3][2], changed[4][2] = value, value  # prompts of image 2 alone
        results.append(evaluate(changed, weight))
    good = [0, 1, 3]
    for a, b in zip(results[0][:4], results[1][:4], strict=True):
        assert torch.equal(a[good], b[good])
    assert results[1][0][4].isnan().any()
    assert results[1][0][2].isnan().all()
    for a, b in zip(results[0][4:], results[1][4:], strict=True):
        assert torch.equal(a[1], b[1])
        assert b[0].isnan().any()  # the sum over set 0 has the bad image in it


def test_an_image_does_not_depend_on_its_batch():
    inputs = make(B=3, L=20, P=5, sets=(0, 1, 1))
    whole = ops.prefix_attention(*inputs, backend="triton")
    alone = ops.prefix_attention(*(t[1:2] for t in inputs[:3]), *inputs[3:5], inputs[5][1:2], backend="triton")
    assert torch.equal(whole[1:2], alone)


def test_backward_keeps_the_inputs_the_output_and_two_numbers_a_query():
    inputs, saved = [t.requires_grad_() for t in make(L=9)[:5]], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        ops.prefix_attention(*inputs, backend="triton")
    assert sorted(saved) == sorted([*(t.numel() for t in inputs), inputs[0].numel(), 2 * 2 * 2 * 9])


def test_autocast():
    """As PyTorch's attention: everything in autocast's dtype."""
    inputs = make()
    inputs[3] = inputs[3].half()
    with torch.autocast(DEVICE, torch.float16):
        out = ops.prefix_attention(*inputs, backend="triton")
    assert out.dtype == torch.float16
    assert torch.equal(out, kernel.prefix_attention(*(t.half() for t in inputs[:5])))


BAD = {
    "batch": lambda q, k, v, pk, pv, i: (q[:1], k, v, pk, pv, i),
    "values": lambda q, k, v, pk, pv, i: (q, k, v[:, 1:], pk, pv, i),
    "heads": lambda q, k, v, pk, pv, i: (q[:, :, :1], k, v, pk, pv, i),
    "dims": lambda q, k, v, pk, pv, i: (q[0], k[0], v[0], pk, pv, i),
    "prefix_width": lambda q, k, v, pk, pv, i: (q, k, v, pk[..., 1:], pv[..., 1:], i),
    "prefix_lengths": lambda q, k, v, pk, pv, i: (q, k, v, pk, pv[:, 1:], i),
    "one_prefix": lambda q, k, v, pk, pv, i: (q, k, v, pk, None, i),
    "no_sets": lambda q, k, v, pk, pv, i: (q, k, v, pk, pv, None),
    "too_few_sets": lambda q, k, v, pk, pv, i: (q, k, v, pk, pv, i[:1]),
    "int32_sets": lambda q, k, v, pk, pv, i: (q, k, v, pk, pv, i.int()),
    "dtypes": lambda q, k, v, pk, pv, i: (q, k.half(), v, pk, pv, i),
    "prefix_dtype": lambda q, k, v, pk, pv, i: (q, k, v, pk.half(), pv.half(), i),
    "wide": lambda q, k, v, pk, pv, i: (*(torch.zeros(2, 3, 1, 136, device=DEVICE),) * 3, None, None, None),
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_what_does_not_fit_is_refused(change):
    with pytest.raises(ValueError, match=r"q \(.*wanted q \(B, Q, H, K\), k and v \(B, L, H, K\)"):
        kernel.prefix_attention(*change(*make(sets=(1, 0))))


def test_no_keys():
    q, k, v, *_ = make(L=3)
    with pytest.raises(ValueError, match="wanted at least one key for each query"):
        ops.prefix_attention(q, k[:, :0], v[:, :0], None, None, backend="triton")


def saved_inputs(sets=None, **shape):
    inputs = make(sets=sets, **shape)
    return torch.randn_like(inputs[0]), *inputs, None, *kernel.prefix_attention_fwd(*inputs, None, 0), 0


OPCHECKS = {
    "forward": lambda: ("fwd", [*(t.requires_grad_() for t in make()[:5]), None, None, 0]),
    "forward_sets": lambda: ("fwd", [*make(sets=(1, 0)), None, 0]),
    "forward_rows_alone": lambda: ("fwd", [*make()[:3], None, None, None, None, 0]),
    "backward": lambda: ("bwd", (*saved_inputs(), True, True, True)),
    "backward_of_prefixes": lambda: ("bwd", (*saved_inputs((1, 0)), False, False, True)),
    "backward_of_rows": lambda: ("bwd", (*saved_inputs((1, 0)), True, True, False)),
}


@pytest.mark.parametrize("case", OPCHECKS.values(), ids=OPCHECKS)
def test_opcheck(case):
    name, inputs = case()
    torch.library.opcheck(getattr(torch.ops.upt_fast, f"prefix_attention_{name}"), tuple(inputs))


def test_tf32_where_it_is_allowed():
    x, before = torch.empty(1, 64), torch.get_float32_matmul_precision()
    assert dot_settings(x)["PRECISION"] == "ieee"
    torch.set_float32_matmul_precision("high")
    try:
        assert dot_settings(x)["PRECISION"] == "tf32"
        assert dot_settings(x.half())["PRECISION"] == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)
