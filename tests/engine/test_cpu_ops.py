"""The compiled CPU operations and the block built on them, against the twins; what happens without a compiler."""

import copy
import itertools
import logging
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from upt_fast.common.closeness import assert_rounded, relative_rms
from upt_fast.engine import ops
from upt_fast.engine.autograd.attention import CompiledAttention, FlashAttention
from upt_fast.engine.cpu import library
from upt_fast.engine.cpu.library import PANELS, pack
from upt_fast.engine.layout import PackedLayout
from upt_fast.engine.weights import BlockWeights, MLPWeights, Packed, Plain
from upt_fast.engine.workspace import Workspace
from upt_fast.reference import ops as reference
from upt_fast.testing import build, random_clip

KINDS = ("quick_gelu", "gelu", "gelu_tanh")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
REASON = library.refusal(torch.float32)
compiled = pytest.mark.skipif(bool(REASON), reason=f"CPU operations: {REASON}")


def needs(dtype: torch.dtype) -> None:
    if reason := library.refusal(dtype):
        pytest.skip(reason)


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


# the ways that a product may be computed in, and attention
WAYS = ((192, False), (96, True), (0, True))
BY_WAY = pytest.mark.parametrize(("panel", "fill"), WAYS, ids=str)


def block_weights(
    width: int,
    hidden: int,
    heads: int,
    kind: str,
    dtype: torch.dtype,
    packed: bool = True,
    panel: int = PANELS[0],
    fill: bool = False,
):
    def weight(n: int, k: int) -> Packed | Plain:
        values = (torch.randn(n, k) * k**-0.5).to(dtype)
        return Packed.pack(values, panel, panel) if packed else Plain(values)

    def bias(n: int) -> torch.Tensor:
        return (0.1 * torch.randn(n)).to(dtype)

    mlp = MLPWeights(weight(hidden, width), bias(hidden), weight(width, hidden), bias(width), 1e-5, kind)
    qkv_bias = F.pad(bias(width), (0, 2 * width))
    attention = CompiledAttention(fill) if packed else FlashAttention()
    projections = weight(3 * width, width), qkv_bias, weight(width, width), bias(width)
    return BlockWeights(*projections, 1e-5, heads, mlp, attention)


def converted(weights, dtype: torch.dtype):
    """The same weights in another dtype, not packed."""

    def convert(value):
        if isinstance(value, (Packed, Plain)):
            return Plain(value.plain.to(dtype))
        if isinstance(value, MLPWeights):
            return MLPWeights(*map(convert, value))
        if isinstance(value, CompiledAttention):
            return FlashAttention()
        return value.to(dtype) if isinstance(value, torch.Tensor) else value

    return type(weights)(*map(convert, weights))


def grads_of(f, leaves, dy):
    y = f(*leaves)
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy.to(y.dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("k", "n"), [(2, 1), (6, 64), (10, 65), (4, 130)])
def test_pack(k, n, dtype):
    b = rows(k, n, dtype=dtype)
    packed = pack(b).values
    flat = packed if dtype == torch.float32 else packed.permute(0, 1, 3, 2).flatten(1, 2)
    assert packed.is_contiguous()
    back = flat.transpose(0, 1).flatten(1)
    assert torch.equal(back[:, :n], b)
    assert not back[:, n:].any()


@compiled
@DTYPES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "width", "hidden"), [(1, 64, 128), (7, 96, 200), (400, 128, 66), (33, 1100, 70)])
def test_mlp(n, width, hidden, kind, dtype):
    """Rows, widths and hidden features that fill no tile; widths beyond the part of K that is taken at once."""
    needs(dtype)
    x, dy = rows(n, width, dtype=dtype).requires_grad_(), rows(n, width, dtype=dtype)
    got = []
    for panel, recompute in itertools.product((192, 0), (False, True)):
        torch.manual_seed(1)
        w = block_weights(width, hidden, 1, kind, dtype, panel=panel).mlp
        got += grads_of(lambda x, w=w, recompute=recompute: w.added(x, recompute), [x], dy)
    e = converted(w, torch.float64)
    exact = x.detach().double().requires_grad_()
    assert {t.dtype for t in got} == {dtype}

    def twin(x):
        return reference.mlp(x, e.fc.plain, e.fc_bias, e.proj.plain, e.proj_bias, e.eps, kind)

    assert_rounded(got, lambda: 4 * grads_of(twin, [exact], dy), dtype)


@compiled
@DTYPES
@pytest.mark.parametrize(
    ("batch", "length", "prefix", "sets", "heads", "width"),
    [
        (2, 5, 3, 1, 2, 64),
        (3, 17, 4, 3, 1, 96),
        (1, 1, 0, 0, 2, 128),
        (5, 50, 1, 2, 3, 96),
        (2, 197, 4, 1, 1, 64),
        (1, 519, 4, 1, 2, 44),
    ],
)
@pytest.mark.parametrize("constant", ["", "x", "prefix"])
def test_block(batch, length, prefix, sets, heads, width, dtype, constant):
    """Every way, at every memory level."""
    needs(dtype)
    if constant == "prefix" and not prefix:
        pytest.skip("no prefix")
    if constant == "x" and not prefix:
        pytest.skip("nothing needs a gradient")
    x = rows(batch, length, width, dtype=dtype).requires_grad_(constant != "x")
    head = width // heads
    prefixes = [rows(sets, prefix, heads, head, dtype=dtype).requires_grad_(constant != "prefix") for _ in range(2)]
    prefixes = prefixes if prefix else [None, None]
    index = torch.arange(batch) % sets if sets > 1 else None
    dy, got = rows(batch, length, width, dtype=dtype), []
    for panel, fill in WAYS:
        torch.manual_seed(1)
        w = block_weights(width, 4 * width, heads, "quick_gelu", dtype, panel=panel, fill=fill)
        for memory in ("fast", "balanced", "lean"):
            got += grads_of(lambda *t, w=w, memory=memory: ops.block(*t, w, index, memory), [x, *prefixes], dy)
    exact = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in (x, *prefixes)]
    e = converted(w, torch.float64)
    assert_rounded(got, lambda: 3 * len(WAYS) * grads_of(lambda *t: reference.block(*t, e, index), exact, dy), dtype)


@pytest.mark.parametrize("memory", ["fast", "balanced", "lean"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("prefix", "sets"), [(0, 0), (3, 1), (2, 3)])
def test_block_in_float64(memory, kind, prefix, sets):
    """PyTorch's operations, equal at every memory level."""
    x = torch.randn(3, 6, 8, dtype=torch.float64, requires_grad=True)
    prefixes = [torch.randn(sets, prefix, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    prefixes = prefixes if prefix else [None, None]
    index = torch.tensor([2, 0, 2]) if sets > 1 else None
    w = block_weights(8, 20, 2, kind, torch.float64, packed=False)
    dy = torch.randn(3, 6, 8, dtype=torch.float64)
    got, wanted = (
        grads_of(f, [x, *prefixes], dy)
        for f in (lambda *t: ops.block(*t, w, index, memory), lambda *t: reference.block(*t, w, index))
    )
    for g, t in zip(got, wanted, strict=True):
        assert relative_rms(g, t) <= 1e-13


def saved_numbers(memory: str) -> int:
    x = torch.randn(4, 50, 64, dtype=torch.float64, requires_grad=True)
    w = block_weights(64, 256, 2, "gelu", torch.float64, packed=False)
    found = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t.numel()) or t, lambda t: t):
        ops.block(x, None, None, w, None, memory)
    return sum(found) / (4 * 50 * 64)


def test_what_is_saved():
    """10 D, 6 D and D numbers a row, and a little for the LayerNorms and the softmax."""
    for memory, numbers in (("fast", 10), ("balanced", 6), ("lean", 1)):
        assert numbers <= saved_numbers(memory) <= numbers + 0.15


@compiled
@pytest.mark.parametrize("lead", [(3,), (2, 3), (350,)], ids=str)
@DTYPES
def test_linear_residual(lead, dtype):
    needs(dtype)
    x, y = rows(*lead, 70, dtype=dtype).requires_grad_(), rows(*lead, 96, dtype=dtype).requires_grad_()
    w, bias, dy = Packed.pack(rows(70, 96, dtype=dtype)), rows(70, dtype=dtype), rows(*lead, 70, dtype=dtype)
    got = grads_of(lambda x, y: w.residual(x, y, bias), [x, y], dy)
    exact, w64, bias64 = [t.detach().double().requires_grad_() for t in (x, y)], w.plain.double(), bias.double()
    assert_rounded(got, lambda: grads_of(lambda x, y: x + (y @ w64.t() + bias64), exact, dy), dtype)


LAYOUTS = {
    "one_row": (((1, 1),),),
    "runs": (((2, 1), (1, 3), (4, 5)),),
    "sets": (((2, 2),), ((1, 1), (1, 4)), ((3, 3),)),
    "groups": (((30, 2), (12, 7)), ((2, 20),)),  # more rows than one task takes
}


def packed_inputs(layout, last_only, prefix, heads, head, dtype):
    queries = layout.num_classes if last_only else layout.num_rows
    shapes = [(queries,), (layout.num_rows,), (layout.num_rows,), *[(len(layout.sets), prefix)] * 2]
    return [rows(*shape, heads, head, dtype=dtype).requires_grad_() for shape in shapes]


@compiled
@DTYPES
@pytest.mark.parametrize("last_only", [False, True], ids=["all_rows", "last_rows"])
@pytest.mark.parametrize(("prefix", "heads", "head"), [(0, 1, 16), (1, 3, 5), (17, 2, 64)])
@pytest.mark.parametrize("runs", LAYOUTS.values(), ids=LAYOUTS)
def test_packed_attention(runs, prefix, heads, head, last_only, dtype, monkeypatch):
    needs(dtype)
    monkeypatch.setattr(library, "MIN_WIDTH", 0)
    if dtype == torch.bfloat16 and head % 2:
        head += 1  # odd ones are left to PyTorch
    layout = PackedLayout(runs)
    inputs = packed_inputs(layout, last_only, prefix, heads, head, dtype)
    dy = rows(*inputs[0].shape, dtype=dtype)

    def run(f, *tensors):
        y = f(*tensors, layout)
        assert f is not ops.packed_attention or type(y.grad_fn).__name__ == "PackedAttentionBackward"
        return [y.detach(), *torch.autograd.grad(y, tensors, dy.to(y.dtype))]

    got = run(ops.packed_attention, *inputs)
    assert {t.dtype for t in got} == {dtype}
    exact = [t.detach().double().requires_grad_() for t in inputs]
    assert_rounded(got, lambda: run(reference.packed_attention, *exact), dtype)
    # strided rows, rows without a gradient, any number of threads
    q, k, v, prefix_k, prefix_v = inputs
    strided = torch.stack([k, v], dim=1).detach()
    again = ops.packed_attention(q.detach(), strided[:, 0], strided[:, 1], prefix_k, prefix_v, layout)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        grads = torch.autograd.grad(again, [prefix_k, prefix_v], dy)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip([again, *grads], [got[0], *got[4:]], strict=True))


@compiled
def test_packed_attention_checks_its_rows():
    lib, (first, sets) = torch.ops.upt_fast_cpu.packed_attention, PackedLayout((((2, 3),), ((1, 1),))).bounds
    assert (first.tolist(), sets.tolist()) == ([0, 3, 6, 7], [0, 2, 3])
    q, k, v, prefix_k, prefix_v = (torch.zeros(*n, 2, 8) for n in ((7,), (7,), (7,), (2, 3), (2, 3)))
    out = torch.zeros_like(q)
    lib(q, k, v, prefix_k, prefix_v, first, sets, False, out)
    for wrong in (
        lambda: lib(q[:6], k, v, prefix_k, prefix_v, first, sets, False, out),
        lambda: lib(q, k, v, prefix_k, prefix_v, first, sets, True, out),
        lambda: lib(q, k, v, prefix_k[:1], prefix_v[:1], first, sets, False, out),
        lambda: lib(q, k, v, prefix_k, prefix_v, first + 1, sets, False, out),
        lambda: lib(q, k, v, prefix_k, prefix_v, torch.tensor([0, 6, 3, 7]), sets, False, out),
        lambda: lib(q, k, v, prefix_k, prefix_v, first, torch.tensor([0, 5, 3]), False, out),
        lambda: lib(q, k.double(), v, prefix_k, prefix_v, first, sets, False, out),
    ):
        with pytest.raises(RuntimeError):
            wrong()


@compiled
@DTYPES
@pytest.mark.parametrize(("lead", "parts"), [((3,), 3), ((2, 3), 2), ((301,), 1)], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_norm_linear(lead, parts, with_bias, dtype):
    """Parts that fill no block of columns, and a part that the loss does not read."""
    needs(dtype)
    x, dy = rows(*lead, 96, dtype=dtype).requires_grad_(), rows(*lead, 70, dtype=dtype)
    w, bias = Packed.pack(rows(70 * parts, 96, dtype=dtype)), rows(70 * parts, dtype=dtype) if with_bias else None

    def run(f, x, w, bias, dy):
        outs = f(x, w, bias, 1e-5, parts)
        return [*outs, *torch.autograd.grad(outs[0], x, dy)]

    got = run(ops.norm_linear, x, w, bias, dy)
    exact = x.detach().double().requires_grad_()
    w64, bias64 = Plain(w.plain.double()), None if bias is None else bias.double()
    wanted = run(reference.norm_linear, exact, w64, bias64, dy.double())
    assert {t.dtype for t in got} == {dtype}
    assert_rounded(got, lambda: run(reference.norm_linear, exact, w64, bias64, dy.double()), dtype)
    plain = run(ops.norm_linear, exact, w64, bias64, dy.double())  # without packed weights
    assert all(relative_rms(g, t) <= 1e-13 for g, t in zip(plain, wanted, strict=True))


@compiled
def test_strided_rows_and_gradients():
    w = block_weights(64, 96, 2, "gelu", torch.float32)
    e = converted(w, torch.float64)
    base = torch.randn(3, 9, 64, requires_grad=True)
    dy = torch.randn(3, 64, 5).transpose(1, 2)
    got = torch.autograd.grad(ops.block(base[:, 2:7], None, None, w), base, dy)[0]
    exact = base.detach().double().requires_grad_()

    def run():
        return torch.autograd.grad(reference.block(exact[:, 2:7], None, None, e), exact, dy.double())

    assert_rounded([got], run, torch.float32)


@compiled
@DTYPES
@pytest.mark.parametrize("fill", [False, True])
def test_softmax_of_two(dtype, fill):
    """Each probability e^u / (1 + e^u) on its own, to the roundings of e^u and of itself, down to the smallest."""
    needs(dtype)
    u = torch.linspace(-80, 0, 300).to(dtype)
    q, k, v = torch.zeros(300, 1, 2, dtype=dtype), *torch.zeros(2, 300, 2, 2, dtype=dtype)
    q[:, 0, 0], k[:, 1, 0], v[:, 1] = 1, u, 1
    out, lse = torch.empty_like(q), torch.empty(300)
    torch.ops.upt_fast_cpu.attention(q, k, v, 1, fill, out, lse)
    exact = torch.sigmoid(u.double())[:, None].expand(-1, 2)
    unit = torch.finfo(dtype).eps / 2
    assert ((out[:, 0] - exact).abs() <= (2 * unit + (2**-14 if dtype == torch.bfloat16 else 4 * unit)) * exact).all()
    assert torch.allclose(lse.double(), torch.log1p(u.double().exp()), rtol=0, atol=2**-16)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@BY_WAY
def test_bad_numbers_are_not_hidden(bad, dtype, panel, fill):
    """One bad row spoils its image, forward and backward, and no other."""
    needs(dtype)
    w = block_weights(64, 256, 2, "quick_gelu", dtype, panel=panel, fill=fill)
    x = rows(2, 21, 64, dtype=dtype)
    x[0, 3, 5] = bad
    x.requires_grad_()
    y, dx = grads_of(lambda x: ops.block(x, None, None, w), [x], rows(2, 21, 64, dtype=dtype))
    for t in (y, dx):
        assert t[0].isnan().any(-1).all()
        assert t[1].isfinite().all()


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@BY_WAY
def test_equal_runs_give_equal_bits(dtype, panel, fill):
    needs(dtype)
    w = block_weights(128, 512, 2, "quick_gelu", dtype, panel=panel, fill=fill)
    x, prefix = (rows(*shape, dtype=dtype).requires_grad_() for shape in ((3, 50, 128), (1, 4, 2, 64)))
    dy = rows(3, 50, 128, dtype=dtype)
    runs = [grads_of(lambda x, p: ops.block(x, p, p, w), [x, prefix], dy) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@compiled
def test_threads():
    """More threads than rows, and others than the tests' one."""
    w = block_weights(64, 128, 2, "gelu", torch.float32)
    before, found = torch.get_num_threads(), []
    x = torch.randn(2, 3, 64)
    try:
        for threads in (1, 2, 16):
            torch.set_num_threads(threads)
            found.append(ops.block(x, None, None, w))
    finally:
        torch.set_num_threads(before)
    assert all(relative_rms(y, found[0]) <= 1e-6 for y in found)


@compiled
def test_shapes_are_checked():
    lib = torch.ops.upt_fast_cpu
    x, w = torch.randn(5, 64), Packed.pack(torch.randn(96, 64))
    out, moments = torch.empty(5, 96), torch.empty(5)
    lib.linear_residual(x, *w.forward, None, None, out)
    lib.linear_residual(x, w.plain.t(), 0, None, None, out)
    odd = [torch.zeros(1, 5, 6, dtype=torch.bfloat16)] * 3
    for wrong in (
        lambda: lib.linear_residual(x[:, :60].contiguous(), *w.forward, None, None, out),
        lambda: lib.linear_residual(x, w.forward.values, 0, None, None, out),
        lambda: lib.linear_residual(x, w.plain.t(), 192, None, None, out),
        lambda: lib.linear_residual(x, w.forward.values, -1, None, None, out),
        lambda: lib.linear_residual(x.double(), *w.forward, None, None, out),
        lambda: lib.linear_residual(x, *w.forward, None, None, out[:4]),
        lambda: lib.linear_residual(x, *w.forward, torch.randn(3), None, out),
        lambda: lib.linear_residual(x, *w.forward, None, torch.randn(4, 96), out),
        lambda: lib.linear_residual(x.t(), *w.forward, None, None, out),
        lambda: lib.norm_linear(x, 1e-5, *w.forward, None, 0, None, [out], [0], [0], [0], moments[:4], moments),
        lambda: lib.norm_linear(x, 1e-5, *w.forward, None, 0, None, [out], [2], [9], [0], moments, moments),
        lambda: lib.linear_times(x, *w.forward, torch.randn(4, 96), out),
        lambda: lib.linear_norm_backward(x, *w.forward, out, moments[:3], moments, out, out),
        lambda: lib.attention(*odd, 2, False, odd[0], torch.empty(2, 5)),
    ):
        with pytest.raises(RuntimeError):
            wrong()


def is_packed(model) -> bool:
    return isinstance(model.vision_tower.blocks.layer(0).qkv, Packed)


@compiled
@pytest.mark.parametrize("method", ["upt", "coop", "vpt_shallow"])
@pytest.mark.parametrize("memory", ["fast", "balanced", "lean"])
def test_models(method, memory, monkeypatch):
    """A whole model with and without the compiled operations, and after moves between dtypes."""
    clip = random_clip(vision_width=128, text_width=128)
    monkeypatch.setattr(library, "MIN_WIDTH", 64)
    names = ["cat", "dog", "traffic light"]
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    found = []
    for width in (64, 10**6):
        monkeypatch.setattr(library, "MIN_WIDTH", width)
        torch.manual_seed(0)
        model = build("fast", clip, names, method, memory=memory)
        assert is_packed(model) == (width == 64)
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters())])
    assert all(relative_rms(a, b) <= 2e-5 for a, b in zip(*found, strict=True))
    monkeypatch.setattr(library, "MIN_WIDTH", 64)
    twin = copy.deepcopy(model).double()
    assert not is_packed(twin)
    assert twin(images).dtype == torch.float64
    twin.float()
    assert is_packed(twin)
    assert relative_rms(twin(images), model(images)) <= 2e-5


def test_workspaces_are_needed_by_layer():
    """Several layers share one workspace and its pool, forward then backward, at each level."""
    for memory in ("fast", "balanced", "lean"):
        layers = [block_weights(16, 24, 2, "gelu", torch.float64, packed=False) for _ in range(3)]
        x = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
        results = []
        for space in (Workspace(3), None):
            y = x
            for i, w in enumerate(layers):
                y = (
                    reference.block(y, None, None, w)
                    if space is None
                    else ops.block(y, None, None, w, None, memory, space, i)
                )
            if space is not None:
                space.end_forward()
            results.append([y, *torch.autograd.grad(y.sin().sum(), x)])
        for got, wanted in zip(*results, strict=True):
            assert relative_rms(got, wanted) <= 1e-12


# without the library


def test_refusals(monkeypatch):
    monkeypatch.delenv("UPT_FAST_CPU_OPS", raising=False)
    assert library.refusal(torch.float64) == "float64 (take float32, bfloat16)"
    assert library.refusal(torch.float32, 128) == "width 128 (run from 256)"
    assert "even" in library.refusal(torch.bfloat16, 260, 20) or not torch.cpu._is_avx512_bf16_supported()
    monkeypatch.setenv("UPT_FAST_CPU_OPS", "0")
    assert library.refusal(torch.float32, 512) == "UPT_FAST_CPU_OPS=0"
    monkeypatch.setenv("UPT_FAST_CPU_OPS", "1")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert "no AVX-512" in library.refusal(torch.float32, 512)


SCRIPT = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
import torch
torch.backends.cpu.get_cpu_capability = lambda: "AVX512"
from upt_fast.engine.cpu import library
print("reason:", library.refusal(torch.float32, 512))
"""


@pytest.mark.parametrize("how", ["no_compiler", "broken_compiler", "folder_is_a_file"])
def test_no_compiler(how, tmp_path):
    """One line of reason and PyTorch's operations, never a failure; nothing is left in the cache."""
    environment = os.environ | {"UPT_FAST_CACHE": str(tmp_path / "cache"), "CXX": "no-such-compiler"}
    environment.pop("UPT_FAST_CPU_OPS", None)
    if how == "broken_compiler":
        fake = tmp_path / "broken"
        fake.write_text("#!/bin/sh\necho broken >&2\nexit 1\n")
        fake.chmod(0o755)
        environment["CXX"] = str(fake)
    if how == "folder_is_a_file":
        (tmp_path / "cache").write_text("")
        environment["CXX"] = "c++"
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "reason: cannot be compiled: " in done.stdout
    if how == "no_compiler":
        assert "no C++ compiler 'no-such-compiler'" in done.stdout
    if (tmp_path / "cache").is_dir():
        assert [path.name for path in (tmp_path / "cache").iterdir() if path.name != ".lock"] == []


@pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    or os.environ.get("UPT_FAST_CPU_OPS") == "0"
    or shutil.which(os.environ.get("CXX", "c++")) is None,
    reason="no AVX-512, no compiler, or UPT_FAST_CPU_OPS=0",
)
def test_they_run_where_they_can():
    """Else a mistake in the sources would show as tests that are skipped."""
    assert REASON == ""


BFLOAT16_SCRIPT = """
import torch
from upt_fast.engine.cpu import library
from upt_fast.common.closeness import relative_rms
from upt_fast.testing import build, random_clip
print("reason:", library.refusal(torch.bfloat16, 256))
clip = random_clip(vision_width=256, text_width=256, text_heads=4, vision_layers=2, text_layers=2)
fast, exact = (build("fast", clip, ["cat", "dog"], dtype=t) for t in (torch.bfloat16, torch.float64))
exact.load_state_dict(fast.state_dict())
images = torch.randn(4, 3, 32, 32)
print(relative_rms(fast.encode_image(images), exact.encode_image(images.double())))
print(relative_rms(fast.encode_text(), exact.encode_text()))
"""


@compiled
@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_micro_kernel_that_refuses(isa):
    """Whether PyTorch multiplies in bfloat16 hangs on what oneDNN takes the processor for; else its own run."""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": isa}
    done = subprocess.run(
        [sys.executable, "-c", BFLOAT16_SCRIPT], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    # bfloat16 rounds by up to 2^-8, a few hundred times on the way
    assert all(float(error) < 0.1 for error in done.stdout.split()[-2:])
    if isa == "AVX2":
        assert "reason: PyTorch does not multiply so" in done.stdout or "no bfloat16" in done.stdout


@compiled
def test_compiled_once(tmp_path, caplog):
    """What the cache holds is loaded, without a compiler."""
    assert list(library.cache_folder().glob("cpu-*.so"))
    environment = os.environ | {"CXX": "no-such-compiler"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "reason:"
    assert caplog.records == [] or caplog.records[0].levelno == logging.INFO
