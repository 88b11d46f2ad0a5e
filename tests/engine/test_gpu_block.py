"""The block as a GPU runs it, without one: numbers on a CPU, where exact attention stands in for CUDA's kernels under
their own names and signatures; shapes, layouts and launches by PyTorch's own descriptions of the kernels.
"""

import math
import re
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from upt_fast.common.closeness import assert_rounded, relative_rms
from upt_fast.engine import ops, weights
from upt_fast.engine.autograd import gpu_attention
from upt_fast.engine.autograd.frozen_block import MLP, Block
from upt_fast.engine.autograd.gpu_attention import Cudnn, Efficient, Flash, FusedAttention, Math
from upt_fast.engine.towers.stacks import GpuStack, PlainStack
from upt_fast.engine.weights import BlockWeights, MLPWeights, Plain, PlainOnGpu
from upt_fast.reference import ops as reference
from upt_fast.testing import build, random_clip

KERNELS = (Flash(), Efficient(), Cudnn())
BY_KERNEL = pytest.mark.parametrize("kernel", [*KERNELS, Math()], ids=lambda k: type(k).__name__)
BY_MEMORY = pytest.mark.parametrize("memory", ["fast", "balanced", "lean"])
KINDS = ("quick_gelu", "gelu", "gelu_tanh")
SEED, OFFSET = 11, 22


class StandIn:
    """Exact attention under the names of CUDA's kernels, on CPU tensors.

    It asks for what they ask for: rows of heads side by side in memory in what comes from forward, the same seeds, and
    of the log-sum-exp the layout in which it was given.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.library = torch.library.Library("aten", "IMPL")
        for name in ("flash", "efficient", "cudnn"):
            for suffix in ("", "_backward"):
                op = f"_scaled_dot_product_{name}_attention{suffix}"
                self.library.impl(op, getattr(self, name + suffix), "CPU")

    def scores(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        assert all(t.stride(3) == 1 for t in (q, k, v))
        exact = torch.promote_types(q.dtype, torch.float32)
        scores = scale * q.to(exact) @ k.to(exact).transpose(2, 3)
        return scores, torch.logsumexp(scores, 3)

    def output(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        scores, lse = self.scores(q, k, v, scale)
        out = (scores - lse[..., None]).exp() @ v.to(scores.dtype)
        return row_by_row(out.to(q.dtype)), lse

    def grads(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float):
        assert dout.transpose(1, 2).is_contiguous()
        assert out.transpose(1, 2).is_contiguous()
        scores, _ = self.scores(q, k, v, scale)
        probs, dout, out = (scores - lse[..., None]).exp(), dout.to(scores.dtype), out.to(scores.dtype)
        dscores = probs * (dout @ v.to(scores.dtype).transpose(2, 3) - (dout * out).sum(3, keepdim=True)) * scale
        dq, dk = dscores @ k.to(scores.dtype), dscores.transpose(2, 3) @ q.to(scores.dtype)
        return [row_by_row(d.to(q.dtype)) for d in (dq, dk, probs.transpose(2, 3) @ dout)]

    def seeds(self) -> tuple[Tensor, Tensor]:
        return torch.tensor([SEED, 0], dtype=torch.uint64), torch.tensor(OFFSET, dtype=torch.uint64)

    def check_seeds(self, seed: Tensor, offset: Tensor) -> None:
        assert (int(seed[0]), int(offset)) == (SEED, OFFSET)

    def flash(self, q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
        assert (dropout_p, is_causal, return_debug_mask) == (0.0, False, False)
        self.calls.append("flash")
        return *self.output(q, k, v, scale), None, None, q.shape[2], k.shape[2], *self.seeds(), q.new_empty(0)

    def flash_backward(
        self, dout, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, seed, offset, *, scale=None
    ):
        assert (cum_q, cum_k, max_q, max_k) == (None, None, q.shape[2], k.shape[2])
        assert (dropout_p, is_causal) == (0.0, False)
        self.check_seeds(seed, offset)
        self.calls.append("flash_backward")
        return tuple(self.grads(dout, q, k, v, out, lse, scale))

    def efficient(self, q, k, v, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None):
        assert (attn_bias, dropout_p, is_causal) == (None, 0.0, False)
        self.calls.append("efficient" if compute_log_sumexp else "efficient, no sums")
        out, lse = self.output(q, k, v, scale)
        rows = q.shape[2]
        padded = F.pad(lse, (0, math.ceil(rows / 32) * 32 - rows), value=math.inf)
        return out, padded if compute_log_sumexp else lse[..., :0], *self.seeds()

    def efficient_backward(
        self, dout, q, k, v, bias, out, lse, seed, offset, dropout_p, grad_input_mask, is_causal=False, *, scale=None
    ):
        assert (bias, dropout_p, is_causal, grad_input_mask) == (None, 0.0, False, [True, True, True, False])
        assert lse.shape[2] % 32 == 0
        self.check_seeds(seed, offset)
        self.calls.append("efficient_backward")
        grads = self.grads(dout, q, k, v, out, lse[..., : q.shape[2]], scale)
        if q.untyped_storage()._cdata == k.untyped_storage()._cdata and q.shape == k.shape:
            # where queries, keys and values come from one product the kernel lays their gradients out so
            together = torch.stack([d.transpose(1, 2) for d in grads], dim=2)
            grads = [d.transpose(1, 2) for d in together.unbind(2)]
        return *grads, None

    def cudnn(self, q, k, v, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, debug=False, *, scale=None):
        assert (attn_bias, dropout_p, is_causal, debug) == (None, 0.0, False, False)
        self.calls.append("cudnn")
        out, lse = self.output(q, k, v, scale)
        return out, lse[..., None], None, None, q.shape[2], k.shape[2], *self.seeds(), None

    def cudnn_backward(
        self, dout, q, k, v, out, lse, seed, offset, bias, cum_q, cum_k, max_q, max_k, dropout_p, causal, *, scale=None
    ):
        assert (bias, cum_q, cum_k, max_q, max_k) == (None, None, None, q.shape[2], k.shape[2])
        assert (dropout_p, causal) == (0.0, False)
        assert lse.shape == (*q.shape[:3], 1)
        self.check_seeds(seed, offset)
        self.calls.append("cudnn_backward")
        return tuple(self.grads(dout, q, k, v, out, lse[..., 0], scale))


def row_by_row(x: Tensor) -> Tensor:
    """(B, H, L, K) with the heads of a row side by side in memory, as the kernels write it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.fixture(scope="module")
def stand_in():
    found = StandIn()
    yield found
    found.library._destroy()


def block_weights(width, hidden, heads, kind, dtype, attention, device="cpu") -> BlockWeights:
    def weight(n: int, k: int) -> PlainOnGpu:
        return PlainOnGpu((torch.randn(n, k, device=device) * k**-0.5).to(dtype))

    def bias(n: int) -> Tensor:
        return (0.1 * torch.randn(n, device=device)).to(dtype)

    mlp = MLPWeights(weight(hidden, width), bias(hidden), weight(width, hidden), bias(width), 1e-5, kind)
    projections = weight(3 * width, width), F.pad(bias(width), (0, 2 * width)), weight(width, width), bias(width)
    return BlockWeights(*projections, 1e-5, heads, mlp, attention)


def in_float64(w: BlockWeights) -> BlockWeights:
    def convert(value):
        if isinstance(value, PlainOnGpu):
            return Plain(value.plain.double())
        if isinstance(value, MLPWeights):
            return MLPWeights(*map(convert, value))
        return value.double() if isinstance(value, Tensor) else value

    return BlockWeights(*map(convert, w))


def grads_of(f, leaves, dy):
    y = f(*leaves)
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy.to(y.dtype))]


class Case(NamedTuple):
    batch: int
    length: int
    prefix: int
    sets: int
    heads: int
    head: int
    constant: str = ""

    def leaves(self, dtype: torch.dtype) -> list[Tensor | None]:
        def leaf(name: str, *shape: int) -> Tensor:
            return torch.randn(*shape).to(dtype).requires_grad_(self.constant != name)

        x = leaf("x", self.batch, self.length, self.heads * self.head)
        if not self.prefix:
            return [x, None, None]
        # as the towers have them: keys and values side by side
        prefixes = torch.randn(self.sets, self.prefix, 2, self.heads, self.head).to(dtype).unbind(2)
        return [x, *(p.requires_grad_(self.constant != "prefix") for p in prefixes)]

    @property
    def index(self) -> Tensor | None:
        return torch.arange(self.batch).flip(0) % self.sets if self.sets > 1 else None


CASES = (
    Case(3, 6, 0, 1, 2, 4),
    Case(3, 6, 2, 1, 2, 4),
    Case(4, 5, 3, 2, 1, 8),
    Case(3, 33, 2, 3, 2, 4),  # one set an image; rows that are no multiple of a kernel's
    Case(2, 5, 2, 1, 2, 4, "x"),
    Case(2, 5, 2, 1, 2, 4, "prefix"),
    Case(1, 1, 1, 1, 1, 8),
)


@BY_KERNEL
@BY_MEMORY
@pytest.mark.parametrize("case", CASES, ids=str)
def test_block_in_float64(case, memory, kernel, stand_in):
    kind = KINDS[case.length % 3]
    w = block_weights(case.heads * case.head, 20, case.heads, kind, torch.float64, kernel)
    leaves, dy = case.leaves(torch.float64), torch.randn(case.batch, case.length, case.heads * case.head).double()
    stand_in.calls.clear()
    got = grads_of(lambda *t: ops.block(*t, w, case.index, memory), leaves, dy)
    if kernel.name:
        forward = [kernel.name] * (2 if memory == "lean" else 1)
        assert stand_in.calls == [*forward, f"{kernel.name}_backward"]
    wanted = grads_of(lambda *t: reference.block(*t, in_float64(w), case.index), leaves, dy)
    for g, t in zip(got, wanted, strict=True):
        assert relative_rms(g, t) <= 1e-13


@BY_KERNEL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case", [Case(2, 17, 0, 1, 2, 16), Case(3, 17, 4, 1, 2, 16), Case(5, 19, 2, 2, 1, 40)], ids=str
)
def test_block_rounds_as_explained(case, dtype, kernel, stand_in):
    width = case.heads * case.head
    w = block_weights(width, 4 * width, case.heads, "quick_gelu", dtype, kernel)
    leaves, dy, got = case.leaves(dtype), torch.randn(case.batch, case.length, width).to(dtype), []
    for memory in ("fast", "balanced", "lean"):
        got += grads_of(lambda *t, memory=memory: ops.block(*t, w, case.index, memory), leaves, dy)
    assert {t.dtype for t in got} == {dtype}
    exact = [None if t is None else t.detach().double().requires_grad_() for t in leaves]
    assert_rounded(
        got, lambda: 3 * grads_of(lambda *t: reference.block(*t, in_float64(w), case.index), exact, dy), dtype
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prefix", [0, 4])
def test_half_precision_is_as_good_as_plain(dtype, prefix, stand_in):
    """Errors against float64 at most 1.5 times those of the block op by op, in the same precision."""
    case = Case(4, 50, prefix, 1, 2, 32)
    w = block_weights(64, 256, 2, "quick_gelu", dtype, Flash())
    leaves, dy = case.leaves(dtype), torch.randn(4, 50, 64).to(dtype)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in leaves]
    wanted = grads_of(lambda *t: reference.block(*t, in_float64(w), None), exact, dy)
    plain = w._replace(qkv=Plain(w.qkv.plain), out=Plain(w.out.plain), mlp=w.mlp._replace(fc=Plain(w.mlp.fc.plain)))
    found, other = (
        grads_of(lambda *t, b=b: ops.block(*t, b, None, "fast"), leaves, dy) for b in (w, plain._replace(mlp=w.mlp))
    )
    for name, f, o, t in zip(("y", "dx", "dk", "dv"), found, other, wanted, strict=False):
        assert relative_rms(f, t) <= 1.5 * relative_rms(o, t), name


def test_gradients_side_by_side_are_not_copied(stand_in, monkeypatch):
    """Where efficient attention has laid them out for the product before it, and only there."""
    stacked = []
    monkeypatch.setattr(torch, "stack", lambda *a, stack=torch.stack, **k: stacked.append(1) or stack(*a, **k))
    for prefix, kernel, copies in ((0, Efficient(), 1), (2, Efficient(), 1), (0, Flash(), 1)):
        case = Case(2, 5, prefix, 1, 2, 4)
        w = block_weights(8, 12, 2, "gelu", torch.float64, kernel)
        stacked.clear()
        grads_of(lambda *t, w=w: ops.block(*t, w), case.leaves(torch.float64), torch.ones(2, 5, 8).double())
        assert len(stacked) == copies, (prefix, kernel)  # in the first case the stand-in's own


def test_recomputed_by_the_kernel_of_the_first_time(stand_in, monkeypatch):
    """PyTorch's choice may be another in backward, where other kernels are allowed."""
    choices = iter([gpu_attention.SDPBackend.FLASH_ATTENTION.value])
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *a, **k: next(choices))
    w = block_weights(64, 20, 2, "gelu", torch.float32, FusedAttention())
    x = torch.randn(2, 5, 64, requires_grad=True)
    stand_in.calls.clear()
    ops.block(x, None, None, w, None, "lean").sum().backward()
    assert stand_in.calls == ["flash", "flash", "flash_backward"]


def test_pytorchs_choice(stand_in, monkeypatch):
    """Asked as F.scaled_dot_product_attention would ask; heads that it would pad are multiplied by us."""
    asked, answers = [], []

    def choice(q, k, v, *, scale):
        asked.append((torch.is_grad_enabled(), q.requires_grad, tuple(q.shape), tuple(k.shape), scale))
        return answers[-1]

    monkeypatch.setattr(torch, "_fused_sdp_choice", choice)
    for number, head, dtype, wanted in (
        (1, 8, torch.bfloat16, Flash),
        (2, 4, torch.float32, Efficient),
        (3, 8, torch.float16, Cudnn),
        (0, 8, torch.float64, Math),
        (1, 12, torch.bfloat16, Math),
        (2, 6, torch.float32, Math),
    ):
        answers.append(number)
        q, k = torch.randn(6, 2 * head).to(dtype), torch.randn(2, 5, 2 * head).to(dtype)
        for needed in (True, False):
            assert type(FusedAttention().chosen(q, k, k, 2, needed)) is wanted
            assert asked[-1] == (needed, needed, (2, 2, 3, head), (2, 2, 5, head), 1.0)
    answers.append(-1)
    with pytest.raises(ValueError, match=r"no attention kernel for queries \(2, 2, 3, 6\), keys \(2, 2, 5, 6\)"):
        FusedAttention().chosen(q, k, k, 2, False)


def test_the_numbers_are_pytorchs():
    """A CPU has one fused attention, which goes by the number of flash."""
    q, k = torch.randn(6, 16), torch.randn(2, 5, 16)
    assert torch._fused_sdp_choice(*(t.view(2, -1, 2, 8).transpose(1, 2) for t in (q, k, k)), scale=1.0) == 1
    assert [kernel.backend.value for kernel in (Math(), *KERNELS)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("name", "dtype", "head", "reason"),
    [
        ("flash", torch.float32, 8, r"float32 \(takes float16, bfloat16\)"),
        ("cudnn", torch.float64, 8, r"float64 \(takes float16, bfloat16\)"),
        ("efficient", torch.float64, 8, r"float64 \(takes float32, float16, bfloat16\)"),
        ("flash", torch.bfloat16, 12, r"heads of width 12 \(takes multiples of 8\)"),
        ("efficient", torch.float32, 6, r"heads of width 6 \(takes multiples of 4\)"),
    ],
)
def test_a_named_kernel_says_why_not(name, dtype, head, reason):
    q, k = torch.randn(6, 2 * head).to(dtype), torch.randn(2, 5, 2 * head).to(dtype)
    with pytest.raises(ValueError) as caught:
        FusedAttention(name).chosen(q, k, k, 2, True)
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"attention='{name}' does not take queries (2, 2, 3, {head}), keys (2, 2, 5, {head}) ")
    assert re.fullmatch("    " + reason, second)
    allowed = FusedAttention(name).chosen(*(torch.zeros(*t.shape[:-1], 16).half() for t in (q, k, k)), 2, True)
    assert allowed.name == name


def test_there_is_no_other_kernel():
    with pytest.raises(ValueError, match="attention='math'; wanted one of 'flash', 'efficient', 'cudnn'"):
        FusedAttention("math")


class Launches(TorchDispatchMode):
    """The operations that do something on a device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and not func.is_view and not name.startswith(("new_empty", "empty")):
            self.names.append(name.removeprefix("_scaled_dot_product_"))
        return func(*args, **(kwargs or {}))


MLP_FORWARD = ["native_layer_norm", "addmm", "silu", "addmm", "add_"]
MLP_BACKWARD = ["mm", "silu_backward", "mm", "native_layer_norm_backward", "add"]
LAST = ["mm", "native_layer_norm_backward", "add"]


def launches(kernel, prefix: bool, memory: str, constant: bool) -> tuple[list[str], list[str]]:
    """What a block launches forward and backward."""
    projection = ["addmm", "bmm", "copy_", "copy_"] if prefix else ["addmm"]
    half = ["native_layer_norm", *projection, f"{kernel.name}_attention", "addmm", "add_"]
    again = {"fast": [], "balanced": MLP_FORWARD[:2], "lean": half + MLP_FORWARD[:2]}[memory]
    attention = ["mm", f"{kernel.name}_attention_backward", *([] if constant else ["stack", *LAST])]
    return half + MLP_FORWARD, [*again, *MLP_BACKWARD, *attention, *(["sum", "sum"] if prefix else [])]


def run_without_data(kernel, dtype, batch, length, prefix, heads, head, memory, constant=False):
    """A block's forward and backward on a GPU that is not there, and what they launch.

    The engine that runs backward asks the driver for a device; the function's own backward does not.
    """
    width = heads * head
    w = block_weights(width, 4 * width, heads, "quick_gelu", dtype, kernel, "cuda")

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, device="cuda", dtype=dtype)

    x = empty(batch, length, width).requires_grad_(not constant)
    prefixes = empty(1, prefix, 2, heads, head).requires_grad_().unbind(2) if prefix else (None, None)
    with Launches() as forward:
        y = Block.apply(x, *prefixes, None, w, memory, None, 0)
    with Launches() as backward:
        grads = Block.backward(y.grad_fn, empty(batch, length, width))
    return y, grads, forward.names, backward.names


WITHOUT_DATA = [
    (32, 197, 4, 12, 64),  # ViT-B/16
    (512, 197, 4, 12, 64),
    (512, 197, 0, 12, 64),
    (32, 577, 4, 16, 64),  # ViT-L/14 at 336 pixels
    (2, 577, 0, 16, 64),
    (32, 257, 4, 16, 80),  # ViT-H/14
    (32, 257, 0, 16, 88),  # ViT-g/14
    (8, 257, 8, 16, 104),  # ViT-G/14
    (1, 50, 4, 12, 64),
]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
@pytest.mark.parametrize(("batch", "length", "prefix", "heads", "head"), WITHOUT_DATA)
@BY_MEMORY
def test_block_by_cudas_own_kernels(batch, length, prefix, heads, head, memory, kernel):
    """Shapes, layouts and dtypes; nothing is launched that is not asked for, and nothing waits: fake tensors have no
    number to wait for."""
    for dtype in kernel.dtypes:
        with FakeTensorMode():
            args = kernel, dtype, batch, length, prefix, heads, head, memory
            y, (dx, dk, dv, *others), forward, backward = run_without_data(*args)
            wanted = launches(kernel, bool(prefix), memory, constant=False)
            assert (forward, backward) == wanted
            assert others == [None] * 5
            for t in (y, dx):
                assert (t.shape, t.dtype, t.device.type) == ((batch, length, heads * head), dtype, "cuda")
                assert t.is_contiguous()
            for t in (dk, dv):
                assert t is None if not prefix else t.shape == (1, prefix, heads, head)
                assert t is None or (t.dtype == dtype and t.device.type == "cuda")


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
@BY_MEMORY
def test_rows_that_are_constants_have_no_gradient(kernel, memory):
    with FakeTensorMode():
        args = kernel, torch.bfloat16, 32, 197, 4, 12, 64, memory
        _, grads, *found = run_without_data(*args, constant=True)
        assert tuple(found) == launches(kernel, True, memory, constant=True)
        assert grads[0] is None
        assert grads[1].shape == grads[2].shape == (1, 4, 12, 64)


def kept_bytes(node) -> int:
    """Of the storages that an autograd function keeps for backward, as saved tensors or as attributes."""
    kept = [t for t in (*node.saved_tensors, *vars(node).values()) if isinstance(t, Tensor)]
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in kept}
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("where", ["cpu", "cuda"])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
@pytest.mark.parametrize(("memory", "numbers"), [("fast", 10), ("balanced", 6), ("lean", 1)])
@pytest.mark.parametrize("prefix", [0, 4])
def test_what_is_saved(prefix, memory, numbers, kernel, where, stand_in):
    """10 D, 6 D or D numbers a row, and 2 D for each of a prefix; beside them the moments and the log-sum-exp."""
    batch, length, heads, head, dtype = 4, 50, 2, 32, torch.bfloat16
    width = heads * head
    mode = FakeTensorMode() if where == "cuda" else torch.enable_grad()
    with mode:
        w = block_weights(width, 4 * width, heads, "gelu", dtype, kernel, where)
        x = torch.empty(batch, length, width, device=where, dtype=dtype).requires_grad_()
        shared = torch.empty(1, prefix, 2, heads, head, device=where, dtype=dtype).requires_grad_()
        prefixes = shared.unbind(2) if prefix else (None, None)
        saved = kept_bytes(Block.apply(x, *prefixes, None, w, memory, None, 0).grad_fn)
    rows = batch * length * width * numbers
    rows += 2 * prefix * width * (batch if memory != "lean" else 1)
    small = 0
    if memory != "lean":
        moments = 4 * batch * length * (2 if where == "cpu" else 4)  # a CPU keeps them in the rows' dtype
        padded = math.ceil(length / 32) * 32 if kernel.name == "efficient" else length
        small = moments + 4 * batch * heads * padded + 24
    assert 2 * rows <= saved <= 2 * rows + small
    assert small < 2 * batch * length * width / 2  # half of one more D


@pytest.mark.parametrize(("recompute", "numbers"), [(False, 5), (True, 1)])
def test_what_an_mlp_saves(recompute, numbers):
    with FakeTensorMode():
        w = block_weights(64, 256, 1, "gelu", torch.bfloat16, Flash(), "cuda").mlp
        x = torch.empty(200, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        assert kept_bytes(MLP.apply(x, w, recompute, None, 0).grad_fn) == 2 * 200 * 64 * numbers + 2 * 4 * 200


def test_without_gradient_nothing_is_kept(stand_in):
    w = block_weights(16, 24, 2, "gelu", torch.float64, Efficient())
    x, shared = torch.randn(2, 5, 16).double(), torch.randn(1, 2, 2, 2, 8).double()
    stand_in.calls.clear()
    with torch.no_grad():
        y = ops.block(x, *shared.unbind(2), w)
    assert relative_rms(y, reference.block(x, *shared.unbind(2), in_float64(w))) <= 1e-13
    z = ops.block(x, *shared.unbind(2), w)  # nothing needs one
    assert torch.equal(z, y)
    assert z.grad_fn is None
    assert stand_in.calls == 2 * ["efficient, no sums"]


def test_rows_and_gradients_with_any_strides(stand_in):
    w = block_weights(16, 24, 2, "gelu", torch.float64, Flash())
    base = torch.randn(3, 9, 16, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(3, 16, 5, dtype=torch.float64).transpose(1, 2)
    got, wanted = (
        torch.autograd.grad(f(base[:, 2:7], None, None, b), base, dy)[0]
        for f, b in ((ops.block, w), (reference.block, in_float64(w)))
    )
    assert relative_rms(got, wanted) <= 1e-13


# --- towers


def model_on_gpu_blocks(kernel, memory="fast", method="upt", **options):
    """A model on a CPU whose blocks are those of a GPU."""
    clip = random_clip(vision_width=32, vision_head_width=16, text_width=32, text_heads=2, embed_dim=16).double()
    torch.manual_seed(3)
    model = build("fast", clip, ["cat", "a large dog", "tree"], method, memory=memory, **options)
    for tower in (model.vision_tower, model.text_tower):
        tower.blocks.stack = GpuStack()
        tower.blocks.stack.attention = kernel
    return model


def a_step(model, images):
    model.zero_grad(set_to_none=True)
    logits = model(images)
    F.cross_entropy(logits, torch.arange(len(images)) % 3).backward()
    return [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def refuse(*args, **kwargs):
    raise AssertionError("checkpoint")


@BY_MEMORY
@pytest.mark.parametrize("method", ["upt", "vpt_shallow"])
def test_towers_of_gpu_blocks(method, memory, stand_in):
    """The image tower's layers, all but the last, are functions of their own, which need no checkpoint."""
    images, kernel = torch.randn(4, 3, 32, 32, dtype=torch.float64), Efficient()
    model = model_on_gpu_blocks(kernel, memory, method)
    stand_in.calls.clear()
    got = a_step(model, images)
    assert stand_in.calls.count("efficient_backward") == model.vision_tower.blocks.num_layers - 1
    assert stand_in.calls.count("efficient") == stand_in.calls.count("efficient_backward") * (1 + (memory == "lean"))
    for tower in (model.vision_tower, model.text_tower):
        tower.blocks.stack = PlainStack()
    wanted = a_step(model, images)
    assert len(got) > 1
    for g, t in zip(got, wanted, strict=True):
        assert relative_rms(g, t) <= 1e-12


@BY_MEMORY
def test_blocks_need_no_checkpoint(memory, stand_in, monkeypatch):
    monkeypatch.setattr(weights, "checkpoint", refuse)
    w = block_weights(16, 24, 2, "gelu", torch.float64, Cudnn())
    x = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    ops.block(x, None, None, w, None, memory).sum().backward()
    assert x.grad is not None


def test_towers_of_gpu_blocks_compose(stand_in):
    """Second derivatives, autocast and torch.compile go op by op, as everywhere."""
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    model = model_on_gpu_blocks(Flash())
    parameters = [p for p in model.parameters() if p.requires_grad]

    def second_derivatives():
        stand_in.calls.clear()
        grads = torch.autograd.grad(model(images).square().sum(), parameters, create_graph=True)
        assert "flash_backward" not in stand_in.calls
        return torch.autograd.grad(sum(g.square().sum() for g in grads), parameters)

    found, stack = second_derivatives(), model.vision_tower.blocks.stack
    model.vision_tower.blocks.stack = PlainStack()
    for g, t in zip(found, second_derivatives(), strict=True):
        assert relative_rms(g, t) <= 1e-11
    assert not stand_in.calls
    model.vision_tower.blocks.stack = stack
    compiled = torch.compile(model, backend="eager", fullgraph=True)(images)
    assert not stand_in.calls
    assert relative_rms(compiled, model(images)) <= 1e-12
    assert stand_in.calls
    stand_in.calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(images).isfinite().all()
    assert not stand_in.calls


def test_a_gpus_blocks_follow_the_device():
    """Without data, for there is no GPU; attention that was asked for stays."""
    with FakeTensorMode():
        clip = random_clip(vision_width=32, vision_head_width=16, text_width=32, text_heads=2)
        model = build("fast", clip, ["cat"], "upt")
        assert type(model.vision_tower.blocks.stack) is PlainStack
        blocks = model.vision_tower.blocks.to("cuda")
        assert type(blocks.stack) is GpuStack
        assert blocks.stack.attention == FusedAttention()
        layer = blocks.layer(0)
        assert {type(w) for w in (layer.qkv, layer.out, layer.mlp.fc, layer.mlp.proj)} == {PlainOnGpu}
        blocks.stack.attention = FusedAttention("flash")
        assert blocks.to(torch.bfloat16).layer(1).attention == FusedAttention("flash")
        assert type(blocks.to("cpu").stack) is PlainStack


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["", *gpu_attention.NAMES])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head", [64, 80, 88, 104])
def test_block_on_a_gpu(head, dtype, name):
    case = Case(4, 50, 4, 2, 2, head)
    w = block_weights(2 * head, 8 * head, 2, "quick_gelu", dtype, FusedAttention(name))
    named = [kernel for kernel in KERNELS if kernel.name == name]
    if named and dtype not in named[0].dtypes:
        pytest.skip(f"{name} does not take {dtype}")
    leaves, dy = case.leaves(dtype), torch.randn(4, 50, 2 * head).to(dtype)

    def cuda(value):
        if isinstance(value, PlainOnGpu):
            return PlainOnGpu(value.plain.cuda())
        if isinstance(value, MLPWeights):
            return MLPWeights(*map(cuda, value))
        return value.cuda() if isinstance(value, Tensor) else value

    there, got = BlockWeights(*map(cuda, w)), []
    there_leaves = [t.detach().cuda().requires_grad_() for t in leaves]
    for memory in ("fast", "balanced", "lean"):
        run = lambda *t, memory=memory: ops.block(*t, there, case.index.cuda(), memory)  # noqa: E731
        got += [t.cpu() for t in grads_of(run, there_leaves, dy.cuda())]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    assert_rounded(
        got, lambda: 3 * grads_of(lambda *t: reference.block(*t, in_float64(w), case.index), exact, dy), dtype
    )
