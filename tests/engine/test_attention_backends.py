"""Attention by PyTorch's single kernels, varlen_attn and FlashAttention's packages: on a CPU by exact stand-ins."""

from __future__ import annotations

import contextlib
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from upt_fast import FastUPT, ReferenceUPT, testing_ops
from upt_fast.common.closeness import relative_rms
from upt_fast.engine import ops
from upt_fast.engine.backends import dispatch, flash_attn, packages, sdpa, varlen
from upt_fast.engine.layout import PackedLayout, buffer_ends
from upt_fast.engine.towers.rows import Rows
from upt_fast.engine.towers.streams import ReservedStreams, Streams
from upt_fast.reference import ops as reference_ops
from upt_fast.testing import random_clip

NAMES = ["cat", "dog", "traffic light"]
CLIP = random_clip(vision_layers=3, text_layers=3).double()
ALL = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LAYOUT = PackedLayout((((3, 2), (1, 4)), ((2, 3),)))
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="stand-ins are for a CPU")


@pytest.fixture
def flash_on_cpu(monkeypatch):
    """PyTorch has a FlashAttention for CPUs, too, of any dtype."""
    monkeypatch.setitem(sdpa.flash.devices, "cpu", ALL)


def exact(q, k, v, ends_q, ends_k, *, scale, aligned_at_end):
    """Each sequence's queries (N, H, K) over its own keys, causal."""
    found = []
    for i in range(len(ends_q) - 1):
        a, b = (slice(int(ends[i]), int(ends[i + 1])) for ends in (ends_q, ends_k))
        own = [t.transpose(0, 1) for t in (q[a], k[b], v[b])]
        rows, keys = own[0].shape[1], own[1].shape[1]
        mask = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows if aligned_at_end else 0)
        found.append(F.scaled_dot_product_attention(*own, attn_mask=mask, scale=scale).transpose(0, 1))
    return torch.cat(found)


def check_lengths(ends_q, ends_k, max_q, max_k):
    assert ends_q.dtype == ends_k.dtype == torch.int32
    assert max_q == int(ends_q.diff().max())
    assert max_k == int(ends_k.diff().max())


@contextlib.contextmanager
def varlen_on_cpu(monkeypatch):
    """The function of torch 2.11, whose keywords later ones have, too."""
    calls = []

    def varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
    ):
        assert window_size == (-1, 0)
        check_lengths(cu_seq_q, cu_seq_k, max_q, max_k)
        calls.append(len(query))
        return exact(query, key, value, cu_seq_q, cu_seq_k, scale=scale, aligned_at_end=True)

    with monkeypatch.context() as patch:
        patch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
        patch.setattr(varlen, "devices", ("cuda", "cpu"))
        patch.setattr(varlen, "DTYPES", ALL)
        varlen._missing.cache_clear()
        yield calls
    varlen._missing.cache_clear()


@contextlib.contextmanager
def packages_on_cpu(monkeypatch, name):
    """A module with the signatures of FlashAttention 2 or 4."""
    calls = []

    def dense(q, k, v, softmax_scale, causal):
        assert not causal
        calls.append("dense")
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=softmax_scale).transpose(1, 2)

    def packed(q, k, v, *ends, softmax_scale, causal):
        assert causal
        check_lengths(*ends)
        calls.append("packed")
        return exact(q, k, v, *ends[:2], scale=softmax_scale, aligned_at_end=True)

    version_2, version_4 = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.cute")

    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        assert dropout_p == 0
        return dense(q, k, v, softmax_scale, causal)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        assert dropout_p == 0
        ends = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        return packed(q, k, v, *ends, softmax_scale=softmax_scale, causal=causal)

    version_2.flash_attn_func, version_2.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func

    def flash_attn_func(
        q, k, v, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0,
        num_splits=1, pack_gqa=None, deterministic=False, mask_mod=None, full_block_cnt=None, full_block_idx=None,
        mask_block_cnt=None, mask_block_idx=None, block_size=None, return_lse=False,
    ):  # fmt: skip
        return dense(q, k, v, softmax_scale, causal), None

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, seqused_q=None,
        seqused_k=None, page_table=None, softmax_scale=None, causal=False, window_size=(None, None),
        learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None,
        mask_mod=None, block_sparse_tensors=None, cu_total_m_blocks=None, cu_total_n_blocks=None, aux_tensors=None,
        return_lse=False,
    ):  # fmt: skip
        ends = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        return packed(q, k, v, *ends, softmax_scale=softmax_scale, causal=causal), None

    version_4.flash_attn_func, version_4.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    with monkeypatch.context() as patch:
        if name == "flash_attn":
            patch.setitem(sys.modules, "flash_attn", version_2)
            patch.setitem(sys.modules, "flash_attn.cute", None)
        else:  # version 4 alone is a folder of the other's name
            patch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
            patch.setitem(sys.modules, "flash_attn.cute", version_4)
        patch.setattr(flash_attn, "devices", ("cuda", "cpu"))
        patch.setattr(flash_attn, "DTYPES", ALL)
        flash_attn.found.cache_clear()
        yield calls
    flash_attn.found.cache_clear()


def run(model, batch):
    model.zero_grad(set_to_none=True)
    logits = model(batch)
    F.cross_entropy(logits, torch.arange(len(batch))).backward()
    return logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


def close(backend, route, **options):
    """Logits and gradients in float64, against the plain reference's."""
    torch.manual_seed(0)
    memory = options.pop("memory", "fast")
    reference = ReferenceUPT(CLIP, NAMES, **options)
    fast = FastUPT(CLIP, NAMES, backend=backend, memory=memory, **options)
    fast.load_state_dict(reference.state_dict())
    assert [type(tower.route) for tower in (fast.vision_tower, fast.text_tower)] == list(route)
    batch = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    for got, wanted in zip(run(fast, batch), run(reference, batch), strict=True):
        assert relative_rms(got, wanted) <= 1e-12
    return fast, batch


SHALLOW = {"depth_text": 1, "depth_vision": 2, "n_text": 3, "n_visual": 2}


@pytest.mark.parametrize("memory", ["fast", "balanced", "lean"])
@pytest.mark.parametrize("options", [{}, SHALLOW], ids=["deep", "shallow"])
def test_flash(flash_on_cpu, options, memory, monkeypatch):
    calls, attend = [], sdpa.flash._attend
    monkeypatch.setattr(sdpa.flash, "_attend", lambda *t: (calls.append(len(t)), attend(*t))[1])
    close("flash", (Rows, Rows), memory=memory, **options)
    assert len(calls) == (6 if memory == "lean" else 3)


def test_flash_for_one_op(flash_on_cpu):
    close("torch,prefix_attention=flash", (Rows, Rows))
    close("auto,prefix_attention=flash", (Rows, Rows))


def test_flash_beside_others(flash_on_cpu, monkeypatch):
    with varlen_on_cpu(monkeypatch) as calls:
        close("flash,varlen", (ReservedStreams, ReservedStreams))
        assert len(calls) == 3
        close("flash/varlen", (Rows, ReservedStreams))


def test_flash_composes(flash_on_cpu):
    """Second derivatives and torch.func go op by op, which FlashAttention has none of."""
    fast, batch = close("flash", (Rows, Rows))
    found = []
    for backend in ("flash", "torch"):
        fast.use_backend(backend)
        (first,) = torch.autograd.grad(fast(batch).square().sum(), fast.prompt_learner.uni_ctx, create_graph=True)
        second = torch.autograd.grad(first.square().sum(), fast.prompt_learner.uni_ctx)[0]
        found.append((second, torch.func.grad(lambda x: fast(x).square().sum())(batch)))
    for a, b in zip(*found, strict=True):
        assert relative_rms(a, b) <= 1e-11


def test_flash_in_a_compiled_model(flash_on_cpu):
    fast, batch = close("flash", (Rows, Rows))
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(run(compiled, batch), run(fast, batch), strict=True):
        assert relative_rms(got, wanted) <= 1e-12


def test_triton_beside_flash(flash_on_cpu):
    asked = dispatch.resolve("flash,triton")
    x = torch.randn(2, 3, 2, 8)
    assert dispatch.choose("prefix_attention", asked.images, x) == "flash"
    assert dispatch.choose("packed_attention", asked.images, x) == "triton"
    torch.manual_seed(0)
    clip = random_clip(vision_layers=2, text_layers=2)
    models = [FastUPT(clip, NAMES, backend=backend) for backend in ("torch", "flash,triton")]
    models[1].load_state_dict(models[0].state_dict())
    assert type(models[1].vision_tower.route) is Streams
    batch = torch.randn(3, 3, 32, 32)
    for got, wanted in zip(*(run(model, batch) for model in models), strict=True):
        assert relative_rms(got, wanted) <= 3e-5


def test_another_kernel_is_never_taken(monkeypatch):
    """PyTorch has neither of these on a CPU."""
    q = torch.randn(1, 3, 2, 8)
    for name, kernel in (("efficient", sdpa.efficient), ("cudnn", sdpa.cudnn)):
        monkeypatch.setitem(kernel.devices, "cpu", ALL)
        with pytest.raises(ValueError) as caught:
            ops.stream_attention(q, q, q, name)
        assert str(caught.value).startswith(f"no backend for attention: PyTorch's {kernel.kernel.name} refuses\n")
        assert "q (1, 3, 2, 8), k (1, 3, 2, 8) float32 cpu" in str(caught.value)
        assert "No viable backend" in str(caught.value)


@pytest.mark.parametrize("name", ["flash", "efficient", "cudnn", "varlen", "flash_attn"])
def test_refusals(name, monkeypatch):
    takes = "float32, float16, bfloat16" if name == "efficient" else "float16, bfloat16"
    assert dispatch.refusals(name, "cpu")[0] == "cpu (runs on cuda)"
    assert dispatch.refusals(name, "cpu", torch.float64)[0] == f"float64 (takes {takes})"
    with pytest.raises(ValueError, match=rf"backend='{name}' cannot run here: {name}: cpu \(runs on cuda\)"):
        dispatch.resolve(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (4, 9))
    least = "5.0" if name == "efficient" else "8.0"
    assert dispatch.refusals(name, "cuda", torch.float16)[0] == f"compute capability 4.9 (takes {least} or newer)"


def test_varlen(monkeypatch):
    with varlen_on_cpu(monkeypatch) as calls:
        close("varlen", (ReservedStreams, ReservedStreams))
        assert len(calls) == 3
        assert calls[-1] == len(NAMES)  # the last layer has a query for each class
        close("varlen", (ReservedStreams, ReservedStreams), memory="lean", **SHALLOW)
        close("torch,buffer_attention=varlen", (ReservedStreams, ReservedStreams))


def test_varlen_of_an_older_pytorch(monkeypatch):
    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        """As torch 2.10 has it."""

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    varlen._missing.cache_clear()
    try:
        assert dispatch.refusals("varlen", "cuda") == [f"torch {torch.__version__} has no scale and no window_size"]
    finally:
        varlen._missing.cache_clear()


def test_varlen_of_this_pytorch():
    assert varlen._missing() == "" or torch.__version__ < "2.11"


@pytest.mark.parametrize("name", ["flash_attn", "flash_attn.cute"])
def test_flash_attn(name, monkeypatch):
    with packages_on_cpu(monkeypatch, name) as calls:
        assert flash_attn.found(None)[0].__name__ == name
        close("flash_attn", (ReservedStreams, ReservedStreams))
        assert calls == ["packed"] * 3 + ["dense"] * 3
        close("flash_attn", (ReservedStreams, ReservedStreams), **SHALLOW)
        close("torch/flash_attn", (Rows, ReservedStreams))


def test_flash_attn_of_a_card(monkeypatch):
    """Version 4 is for Hopper and Blackwell."""
    with packages_on_cpu(monkeypatch, "flash_attn.cute"):
        assert flash_attn.found((9, 0))[0].__name__ == "flash_attn.cute"
        assert flash_attn.found((8, 0)) == (None, ("flash_attn has no flash_attn_func",))
    with packages_on_cpu(monkeypatch, "flash_attn"):
        assert flash_attn.found((9, 0))[0].__name__ == flash_attn.found((8, 0))[0].__name__ == "flash_attn"


def test_flash_attn_is_not_installed(monkeypatch):
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, None)
    flash_attn.found.cache_clear()
    try:
        reasons = dispatch.refusals("flash_attn", "cuda")
        assert len(reasons) == 2
        assert all("flash_attn" in reason for reason in reasons)
    finally:
        flash_attn.found.cache_clear()


@pytest.mark.parametrize("last", [False, True])
def test_buffers_against_the_twin(last, monkeypatch):
    """The op alone, over two sets of classes, and every gradient."""
    arguments = testing_ops.buffer_attention(testing_ops.Numbers(torch.float64), LAYOUT, 5, 2, 8, last)
    with varlen_on_cpu(monkeypatch), packages_on_cpu(monkeypatch, "flash_attn"):
        for backend in ("varlen", "flash_attn"):
            testing_ops.compare(
                lambda *t, backend=backend: ops.buffer_attention(*t, backend=backend),
                reference_ops.buffer_attention,
                arguments,
            )


def test_ends():
    ends_q, ends_k, max_q, max_k = buffer_ends(LAYOUT, 5, False, "cpu")
    assert ends_q.tolist() == [0, 2, 4, 6, 10, 13, 16]
    assert ends_k.tolist() == [0, 7, 14, 21, 30, 38, 46]
    assert (max_q, max_k) == (4, 9)
    assert buffer_ends(LAYOUT, 5, True, "cpu")[0].tolist() == list(range(7))


def test_older_cards(monkeypatch):
    assert packages.older_card("cuda", (8, 0)) == []  # there is none
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert packages.older_card("cuda", (8, 0)) == ["compute capability 7.5 (takes 8.0 or newer)"]
    assert packages.older_card("cuda", (7, 5)) == packages.older_card("cpu", (8, 0)) == []
