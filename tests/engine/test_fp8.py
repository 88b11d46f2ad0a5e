"""dtype="fp8": rounding within what e4m3 allows, in products, gradients and whole models; what is refused, and why."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from upt_fast import FastPromptedCLIP, FastUPT
from upt_fast.cli import main
from upt_fast.common.closeness import relative_rms
from upt_fast.engine import fp8
from upt_fast.engine.fp8 import Fp8Weight, quantize_rows
from upt_fast.engine.towers.text import TextTower
from upt_fast.testing import build, random_clip
from upt_fast.tools import info

CPU = torch.device("cpu")  # any processor runs it
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICES = [CPU, pytest.param(torch.device("cuda"), marks=needs_gpu)]


def needs(device: torch.device) -> None:
    if device != CPU and (reason := fp8.refusal(device)):
        pytest.skip(f"{device}: {reason}")


NAMES = ["cat", "dog", "traffic light"]
CLIP = random_clip(vision_layers=2, text_layers=2)
METHODS = {"upt": {}, "coop": {"class_token_position": "middle"}, "cocoop": {}, "vpt_deep": {}, "maple": {"depth": 2}}


def model_of(dtype, method="upt", clip=CLIP, seed=0, **options):
    torch.manual_seed(seed)
    return build("fast", clip, NAMES, method, dtype=dtype, **options)


def run(model, seed=0):
    """Logits and all gradients of a batch."""
    device = model.logit_scale.device
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).to(device)
    logits = model(images)
    F.cross_entropy(logits.double(), torch.tensor([0, 1, 2, 0], device=device)).backward()
    gradients = torch.cat([p.grad.double().flatten() for p in model.parameters()])
    model.zero_grad(set_to_none=True)
    return logits.detach(), gradients


# quantisation


def rounding(x, scale):
    """The largest error of each number: 2^-4 of it, or half of e4m3's smallest number, 2^-9, times the scale."""
    return torch.maximum(2**-4 * x.abs(), 2**-10 * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [1.0, 3.0, 9.0])
def test_quantize_rows(dtype, spread):
    """spread: how far apart, in powers of e, the numbers of a row lie; rows differ by powers of 10."""
    x = torch.randn(50, 96) * torch.exp(spread * torch.randn(50, 96)) * 10.0 ** torch.arange(-25, 25)[:, None]
    x = x.to(dtype)
    q, scale = quantize_rows(x)
    assert q.dtype == torch.float8_e4m3fn
    assert scale.shape == (50, 1)
    assert scale.dtype == torch.float32
    assert torch.allclose(448 * scale, x.float().abs().amax(1, keepdim=True), rtol=1e-6, atol=0)
    back, exact = q.double() * scale.double(), x.double()
    assert ((back - exact).abs() <= (1 + 1e-6) * rounding(exact, scale.double())).all()
    largest = exact.abs().argmax(1, keepdim=True)
    assert torch.allclose(back.gather(1, largest), exact.gather(1, largest), rtol=1e-6, atol=0)


def test_rounding_is_two_and_a_half_percent():
    x = torch.randn(200, 512)
    q, scale = quantize_rows(x)
    assert 0.024 <= relative_rms(q.double() * scale.double(), x) <= 0.027


def test_rows_at_the_ends_of_the_range():
    top = torch.finfo(torch.bfloat16).max
    x = torch.tensor([[0.0, -0.0], [top, -top], [1e-37, 5e-38], [1e-44, 0.0]])
    q, scale = quantize_rows(x)
    back = q.double() * scale.double()
    assert torch.isfinite(back).all()
    assert torch.equal(back[0], torch.zeros(2, dtype=torch.float64))
    assert relative_rms(back[1:3], x[1:3]) <= 2**-4
    assert (back[3].abs() <= 1e-40).all()  # too small for a scale: rounded to zero


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_stays_so(bad):
    """In its own row alone, forward and backward; a cast to e4m3 alone would make 448 of inf."""
    weight = Fp8Weight.quantize(torch.randn(32, 16))
    x, dy = torch.randn(3, 16), torch.randn(3, 32)
    x[1, 5] = dy[2, 7] = bad
    x.requires_grad_()
    y = weight.linear(x)
    (dx,) = torch.autograd.grad(y, x, dy.bfloat16())
    assert torch.equal(y.isfinite().all(1), torch.tensor([True, False, True]))
    assert torch.equal(dx.isfinite().all(1), torch.tensor([True, True, False]))
    assert not y[1].isfinite().any()
    assert not dx[2].isfinite().any()


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (10, 10)])
def test_sizes(shape):
    with pytest.raises(ValueError, match=r"shape \(\d+, \d+\); wanted multiples of 16: use dtype='bf16'"):
        Fp8Weight.quantize(torch.randn(shape))


# products


def uneven(n, k):
    """A weight whose rows and columns differ in size, so that scales in wrong places show."""
    return torch.randn(n, k) * torch.exp(torch.randn(n, 1)) * torch.exp(torch.randn(k))


def product_bound(x, w):
    """The largest error of each entry of x W^T, from that of both factors; and rounding to bfloat16."""
    ex, ew = (rounding(t.double(), quantize_rows(t)[1].double()) for t in (x, w))
    x, w = x.double().abs(), w.double().abs()
    error = ex @ w.t() + x @ ew.t() + ex @ ew.t()
    return error + 2**-9 * (x @ w.t() + error)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 16, 16), (7, 64, 192), (201, 128, 48)])
def test_linear(m, k, n, dtype, device):
    needs(device)
    x, w, b = torch.randn(m, k).to(dtype).requires_grad_(), uneven(n, k), torch.randn(n).bfloat16()
    dy = (1e-3 * torch.randn(m, n)).bfloat16()
    y = Fp8Weight.quantize(w.to(device)).linear(x[None].to(device), b.to(device))[0]
    (dx,) = torch.autograd.grad(y, x, dy.to(device))
    assert (y.dtype, dx.dtype) == (torch.bfloat16, dtype)
    y = y.cpu()
    exact_y = x.detach().double() @ w.double().t()
    exact_dx = dy.double() @ w.double()
    y_bound = product_bound(x.detach(), w) + 2**-8 * b.double().abs()
    assert ((y.double() - b.double() - exact_y).abs() <= 1.001 * y_bound).all()
    assert ((dx.double() - exact_dx).abs() <= 1.001 * product_bound(dy, w.t())).all()


def test_error_of_a_product_is_as_derived():
    """3.7 % of |x| |w|, which is what the product has where signs are random."""
    x, w, dy = torch.randn(300, 256).requires_grad_(), torch.randn(320, 256), torch.randn(300, 320)
    y = Fp8Weight.quantize(w).linear(x)
    (dx,) = torch.autograd.grad(y, x, dy.bfloat16())
    assert 0.034 <= relative_rms(y, x.detach().double() @ w.double().t()) <= 0.04
    assert 0.034 <= relative_rms(dx, dy.double() @ w.double()) <= 0.04


def test_sums_are_in_float32():
    """The product of the rounded factors is exact but for one rounding to bfloat16."""
    x, w = torch.randn(50, 1024), torch.randn(64, 1024)
    weight = Fp8Weight.quantize(w)
    rows, scale = quantize_rows(x)
    exact = (scale.double() * rows.double()) @ (weight.forward_scale.double() * weight.forward.double().t())
    assert ((weight.linear(x).double() - exact).abs() <= 2**-8 * exact.abs() + 1e-4).all()


@pytest.mark.parametrize("bias", [False, True])
def test_a_cpu_computes_what_gpus_do(bias):
    """Scales within the product and behind it: but for the rounding to bfloat16 the same."""
    rows, scale = quantize_rows(torch.randn(50, 256))
    weight = Fp8Weight.quantize(torch.randn(64, 256))
    factors = rows, weight.forward, scale, weight.forward_scale, torch.randn(64).bfloat16() if bias else None
    try:
        wanted = fp8._multiply_by_rows(*factors)
    except RuntimeError as error:
        pytest.skip(f"torch {torch.__version__} on this processor: {fp8._in_words(error)}")
    got = fp8._multiply_by_one_scale(*factors)
    assert got.dtype == wanted.dtype == torch.bfloat16
    # a unit in the last place, and what float32 loses where terms of size 16 cancel
    assert ((got.double() - wanted.double()).abs() <= 2**-7 * wanted.double().abs() + 1e-4).all()


def test_strided_and_empty_rows():
    w = Fp8Weight.quantize(torch.randn(16, 32))
    x = torch.randn(3, 5, 32).transpose(0, 1).bfloat16()
    assert torch.equal(w.linear(x), w.linear(x.contiguous()))
    x = torch.zeros(0, 4, 32, requires_grad=True)
    y = w.linear(x)
    assert y.shape == (0, 4, 16)
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_nothing_of_the_rows_is_kept():
    x = torch.randn(100, 32, requires_grad=True)
    weight = Fp8Weight.quantize(torch.randn(16, 32))
    y = weight.linear(x)  # lives on: torch 2.10 lets go of what was kept with it
    kept = y.grad_fn.saved_tensors
    assert [t.data_ptr() for t in kept] == [weight.backward.data_ptr(), weight.backward_scale.data_ptr()]


# models


@pytest.mark.parametrize("method", METHODS)
def test_models_beside_bf16(method):
    """Over several draws at most 16 times bfloat16's error (tools/verify.py derives it), and larger than that."""
    squares = {"bf16": torch.zeros(2), "fp8": torch.zeros(2)}
    alike = []
    for seed in range(4):
        clip = random_clip(vision_layers=2, text_layers=2, seed=seed)
        wanted = run(model_of("fp64", method, clip, seed, **METHODS[method]), seed)
        got = {dtype: run(model_of(dtype, method, clip, seed, **METHODS[method]), seed) for dtype in squares}
        for dtype, found in got.items():
            squares[dtype] += torch.tensor([relative_rms(g, w) ** 2 for g, w in zip(found, wanted, strict=True)])
        alike.append(float(F.cosine_similarity(got["fp8"][1], got["bf16"][1], dim=0)))
    ratios = (squares["fp8"] / squares["bf16"]).sqrt()
    assert (ratios <= 16).all()
    assert (ratios >= 2).all()
    assert min(alike) >= 0.8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["auto", "triton", "triton,xformers"])
def test_models_on_a_gpu(backend):
    """A model that is moved there is as good as on the CPU."""
    needs(torch.device("cuda"))
    exact, on_cpu = run(model_of("fp64")), run(model_of("fp8"))
    got = run(model_of("fp8", backend=backend).cuda())
    for g, c, w in zip(got, on_cpu, exact, strict=True):
        assert relative_rms(g, w) <= 1.5 * relative_rms(c, w)


@pytest.mark.parametrize("method", ["upt", "coop", "vpt_shallow"])
def test_memory_levels_and_repetition(method):
    """What is computed again is computed alike, to the bit."""
    wanted = run(model_of("fp8", method))
    for memory in ("fast", "balanced", "lean"):
        for got, want in zip(run(model_of("fp8", method, memory=memory)), wanted, strict=True):
            assert torch.equal(got, want)


def test_memory_levels_save_memory():
    """Numbers kept for backward by the image tower's first layer alone, where nothing is packed: D = 128 each."""
    kept = {}
    x = torch.randn(2, 50, 128).bfloat16().requires_grad_()
    for memory in ("fast", "balanced", "lean"):
        blocks, found = model_of("fp8", memory=memory).vision_tower.blocks, {}
        weights = {t.untyped_storage().data_ptr() for t in blocks.buffers()}

        def keep(t, found=found, weights=weights):
            if t.untyped_storage().data_ptr() not in weights:
                found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() / (2 * x.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = blocks.layer(0).block(x, None, None, None, memory)
        kept[memory] = sum(found.values())
        y.sum().backward()
    assert 10 <= kept["fast"] <= 10.2  # and the moments of rows and of attention
    assert 5 <= kept["balanced"] <= 7.2  # what a checkpoint itself holds is not seen here
    assert kept["lean"] <= 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU: test_models_on_a_gpu")
@pytest.mark.parametrize("memory", ["fast", "balanced", "lean"])
def test_streams(memory):
    """The kernels' route computes the same as the other, but for where it rounds."""
    exact = run(model_of("fp64"))
    errors = {}
    for backend in ("torch", "triton"):
        got = run(model_of("fp8", backend=backend, memory=memory))
        errors[backend] = torch.tensor([relative_rms(g, w) for g, w in zip(got, exact, strict=True)])
    assert (errors["triton"] <= 1.5 * errors["torch"]).all()


def test_only_what_needs_it_stays_in_bfloat16():
    """Two copies of each weight in fp8; of the originals those that make the prompts' keys and values."""
    model = model_of("fp8")
    for tower in (model.text_tower, model.vision_tower):
        sizes = {}
        for name, buffer in tower.blocks.named_buffers():
            if not name.endswith(("_bias", "_scale")):
                sizes[buffer.dtype] = sizes.get(buffer.dtype, 0) + buffer.numel()
        square = 2 * 128**2  # of both layers
        assert sizes == {torch.float8_e4m3fn: 2 * 12 * square, torch.bfloat16: 2 * square}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_names_of_the_dtype():
    by_name, by_dtype = (FastUPT(CLIP, NAMES, dtype=dtype) for dtype in ("fp8", torch.float8_e4m3fn))
    assert by_name.quantized
    assert by_dtype.quantized
    assert not any(FastUPT(clip, NAMES).quantized for clip in (CLIP, copy.deepcopy(CLIP).bfloat16()))


def test_state_dict(tmp_path):
    """The learner alone, as at any dtype; saved and loaded it computes the same."""
    model = model_of("fp8").eval()
    plain = model_of("fp32").eval()
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(t, plain.state_dict()[name]) for name, t in model.state_dict().items())
    path = model.save_pretrained(tmp_path)
    loaded = FastPromptedCLIP.load(path, CLIP, dtype="fp8")
    for got, want in zip(run(loaded), run(model), strict=True):
        assert torch.equal(got, want)


def test_by_name(tmp_path):
    model = FastPromptedCLIP.from_pretrained("tiny-digits", classnames=NAMES, precision="fp8", n_text=2).eval()
    assert model.quantized
    loaded = FastPromptedCLIP.load(model.save_pretrained(tmp_path), precision="fp8")
    assert torch.equal(run(loaded)[0], run(model)[0])
    assert not FastPromptedCLIP.load(tmp_path, precision="bf16").quantized
    named = FastPromptedCLIP.from_pretrained("tiny-digits", classnames=NAMES, precision="fp8", dtype="bf16")
    assert not named.quantized  # dtype has the last word, as beside any precision


def test_class_names_change():
    model, other = model_of("fp8").eval(), FastUPT(CLIP, ["x", "a longer name"], dtype="fp8").eval()
    other.load_state_dict(model.state_dict())
    other.set_classnames(NAMES)
    assert torch.equal(run(model)[0], run(other)[0])


def test_copies_and_moves():
    model = model_of("fp8").eval()
    wanted = run(model)[0]
    assert torch.equal(run(copy.deepcopy(model))[0], wanted)
    assert torch.equal(run(model.to("cpu"))[0], wanted)
    assert torch.equal(run(model.share_memory())[0], wanted)
    assert model.to("meta").vision_tower.blocks.q_forward.device.type == "meta"


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.float(),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.bfloat16(),
        lambda m: m.to(torch.float32),
        lambda m: m.to("cpu", torch.float64),
        lambda m: nn.Sequential(m).float(),
        lambda m: m.vision_tower.float(),
    ],
    ids=["float", "half", "double", "bfloat16", "to", "to_both", "in_another", "tower"],
)
def test_casts_are_refused(cast):
    """Before anything has changed: numbers of 8 bits in a wider dtype, without their scales, would be wrong."""
    model = model_of("fp8").eval()
    wanted, dtypes = run(model)[0], [t.dtype for t in (*model.parameters(), *model.buffers())]
    with pytest.raises(ValueError, match=r"fp8 cannot be cast to \w+: .* build it anew with another dtype"):
        cast(model)
    assert [t.dtype for t in (*model.parameters(), *model.buffers())] == dtypes
    assert torch.equal(run(model)[0], wanted)


def test_a_tower_of_other_width():
    clip = random_clip(vision_width=40, vision_head_width=20)
    with pytest.raises(ValueError, match=r"weight of shape \(40, 40\); wanted multiples of 16"):
        FastUPT(clip, NAMES, dtype="fp8")
    FastUPT(clip, NAMES, dtype="bf16")


def test_compiles_as_one_graph():
    model = model_of("fp8", "coop", random_clip(vision_layers=1, text_layers=1))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for got, want in zip(run(compiled), run(model), strict=True):
        assert relative_rms(got, want) <= 0.02  # the compiler rounds elementwise chains to bfloat16 elsewhere


def test_autocast():
    """Its products are not autocast's to choose; what it makes of the rest is rounding."""
    model, exact = model_of("fp8"), run(model_of("fp64"))
    with torch.autocast("cpu", torch.bfloat16):
        got = run(model)
    for g, w, without in zip(got, exact, run(model), strict=True):
        assert relative_rms(g, w) <= 1.5 * relative_rms(without, w)


# where it cannot run


def test_old_gpus(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert fp8.refusal(torch.device("cuda:1")) == "compute capability 8.6 (wanted 8.9 or newer)"
    with pytest.raises(ValueError, match=r"fp8 cannot run on cuda:1: compute capability 8\.6 .*; use dtype='bf16'"):
        fp8.require(torch.device("cuda:1"))
    move = SimpleNamespace(dtype=fp8.DTYPE, device=torch.device("cuda:1"))
    with pytest.raises(ValueError, match="fp8 cannot run on cuda:1"):
        fp8.check_apply(lambda t: move, CPU)


@pytest.fixture
def fresh():
    """The trial product is made anew, and forgotten afterwards."""
    fp8._try.cache_clear()
    yield
    fp8._try.cache_clear()


def refuse(*args, **kwargs):
    raise RuntimeError("not built with it\nat line 5")


def fail(*args, **kwargs):
    where = '(scale.numel() == 1) INTERNAL ASSERT FAILED at "/src/Blas.cpp":249, please report a bug to PyTorch.'
    raise RuntimeError(f"{where} Takes one scale alone.\nat line 5")


@pytest.mark.parametrize(
    ("product", "reason"),
    [
        (refuse, "not built with it"),
        (fail, "Takes one scale alone."),
        (lambda a, b, **_: torch.zeros(len(a), b.shape[1]), "its products are wrong"),
    ],
    ids=["raises", "asserts", "wrong"],
)
def test_the_trial_product_decides(fresh, monkeypatch, capsys, product, reason):
    monkeypatch.setattr(torch, "_scaled_mm", product)
    assert fp8.refusal(CPU) == f"torch {torch.__version__}: {reason}"
    with pytest.raises(ValueError, match=rf"fp8 cannot run on cpu: .*{reason}; use dtype='bf16'"):
        FastUPT(CLIP, NAMES, dtype="fp8")
    FastUPT(CLIP, NAMES, dtype="bf16")  # which asks for none
    assert main(["info"]) == 0
    assert f"dtype fp8, cpu: torch {torch.__version__}: {reason}\n" in capsys.readouterr().out


def test_info(capsys):
    assert info.collect()["fp8"]["cpu"] == ""
    assert main(["info"]) == 0
    assert "dtype fp8, cpu: runs where it is asked for, slower than bfloat16\n" in capsys.readouterr().out


def test_towers_alone(tokenizer):
    """Without prompts a tower in fp8 is the CLIP's, but for rounding."""
    from upt_fast.clip.open_clip import frozen_clip
    from upt_fast.clip.tokens import tokenize_classnames

    text = frozen_clip(CLIP).text
    tokens = tokenize_classnames(NAMES, 0, text.context, tokenizer)
    exact, quantized = (TextTower(text, dtype, quantized=q) for dtype, q in ((torch.float64, False), (fp8.ROWS, True)))
    features = [tower(None, tower.pack(tokens, 0)) for tower in (exact, quantized)]
    assert 1e-3 <= relative_rms(features[1], features[0]) <= 0.15
