"""What reaches fused attention can be read by its kernels on a GPU: last stride 1, rows and heads at multiples of 16
bytes.

The rules, some of which nothing checks until a kernel meets a misaligned address:

* FlashAttention 2 (PyTorch's aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp) checks that the last
  stride of q, k, v, out and dout is 1 and that K is a multiple of 8; its copies are of 16 bytes (kernel_traits.h), from
  wherever the strides and the storage's offset lead.
* The cutlass kernels (mem_eff_attention/kernel_forward.h and kernel_backward.h, check_supported) check pointers and the
  strides of rows, heads and sequences: multiples of 128 bits, 4 numbers of float32 or 8 of 16 bits. sdp_utils.cpp
  refuses other K; xformers (ops/fmha/common.py, check_lastdim_alignment_stride1) the same of K and stride(-2).

Masks are exempt: PyTorch pads them (attention.cu, pad_bias).
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from upt_fast.engine.autograd import composing
from upt_fast.engine.backends import xformers
from upt_fast.testing import build, random_clip, xformers_on_cpu

NAMES = ["cat", "dog", "traffic light", "x"]
ALIGNED = 16  # bytes
QKV = ("query", "key", "value", "grad_out", "out")


def breaches(name: str, x: Tensor) -> list[str]:
    """Which of the rules a tensor (..., K) breaks."""
    found = []
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        found.append(f"{name}: last stride {x.stride(-1)}")
    if x.shape[-1] * x.element_size() % ALIGNED:
        found.append(f"{name}: {x.shape[-1]} numbers of a head")
    if x.data_ptr() % ALIGNED:
        found.append(f"{name}: begins {x.data_ptr() % ALIGNED} bytes behind a multiple of {ALIGNED}")
    for size, stride in list(zip(x.shape, x.stride(), strict=True))[:-1]:
        if size > 1 and stride * x.element_size() % ALIGNED:
            found.append(f"{name}: stride {stride} of {tuple(x.stride())}")
    return found


class Attentions(TorchDispatchMode):
    """Sees each fused attention that PyTorch runs, forward and backward, with the tensors that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.breaches: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if "scaled_dot_product" in name:
            self.calls.append(name)
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.name in QKV:
                    self.breaches += [f"{name}: {breach}" for breach in breaches(argument.name, value)]
        return func(*args, **(kwargs or {}))


def test_breaches_are_seen():
    x = torch.zeros(2, 3, 4, 64)
    assert breaches("x", x) == []
    assert breaches("x", x.half()[..., :24]) == []
    assert breaches("x", x[:, :, :, ::2]) == ["x: last stride 2"]
    assert breaches("x", x.half()[..., :20]) == ["x: 20 numbers of a head"]
    assert breaches("x", x.flatten()[1:61].view(3, 20)[:, :16]) == ["x: begins 4 bytes behind a multiple of 16"]
    assert breaches("x", torch.zeros(3, 18)[:, :16]) == ["x: stride 18 of (18, 1)"]
    with Attentions() as seen:
        q = torch.zeros(1, 1, 3, 18, requires_grad=True)
        F.scaled_dot_product_attention(q[..., :16], q[..., :16], q[..., :16]).sum().backward()
    assert len(seen.calls) == 2, seen.calls  # forward and backward
    assert "_backward: query: stride 18" in " ".join(seen.breaches)


BACKENDS = ("torch", "torch,triton", "torch,xformers", "xformers")
HEADS = (64, 80, 88, 104)  # of ViT-B and L, H, g, bigG
CASES = [
    *(pytest.param(b, k, d, {}, id=f"{b}-{k}-{d}") for b in BACKENDS for k in HEADS for d in ("fp32", "bf16")),
    *(
        pytest.param(backend, 88, "fp16", options, id=f"{backend}-{next(iter(options.values()))}")
        for backend in BACKENDS
        for options in (
            {"memory": "lean"},
            {"class_token_position": "middle"},
            {"preset": "released"},
            {"method": "cocoop"},
            {"method": "vpt_deep"},
        )
    ),
]


@pytest.mark.parametrize(("backend", "head", "dtype", "options"), CASES)
def test_what_reaches_attention(backend, head, dtype, options, monkeypatch):
    """Each route, with an odd number of prompts, and rows that come after the last prompted layer."""
    monkeypatch.setattr(composing, "op_by_op", lambda x: True)  # no operation computes a whole block: as on a GPU
    options = {"method": "upt", **options}
    if options["method"] == "upt":
        options |= {"n_text": 3, "n_visual": 3}
    if options["method"] == "upt" and "preset" not in options:
        options |= {"depth_text": 2, "depth_vision": 2}
    widths = {"vision_width": 2 * head, "vision_head_width": head, "text_width": 2 * head, "text_heads": 2}
    given: list[str] = []
    with xformers_on_cpu() as calls, monkeypatch.context() as patch:
        attend = xformers.call

        def call(q: Tensor, k: Tensor, v: Tensor, bias: object) -> Tensor:
            given.extend(breach for name, x in zip("qkv", (q, k, v), strict=True) for breach in breaches(name, x))
            return attend(q, k, v, bias)

        patch.setattr(xformers, "call", call)
        model = build("fast", random_clip(**widths), NAMES, backend=backend, dtype=dtype, **options)
        with Attentions() as seen:
            model.loss(torch.randn(3, 3, 32, 32), torch.tensor([2, 0, 3])).backward()
    assert seen.breaches == given == []
    backward = [name for name in seen.calls if name.endswith("_backward")]
    # PyTorch has attention of packed texts of its own
    texts, images = "xformers" in backend, True
    assert len(seen.calls) - len(backward) >= 3 * (texts + images)
    texts, images = texts and options["method"] != "vpt_deep", options["method"] != "cocoop"  # that have a gradient
    assert len(backward) >= 2 * (texts + images)
    assert bool(calls) == (backend == "xformers")
