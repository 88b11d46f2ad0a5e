"""The fused prompt transform against its formula in float64, and against the learner it replaces."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from upt_fast.kernels._prompt_transform_common import NAMES, WEIGHTS
from upt_fast.kernels.prompt_transform import _bwd, _fwd, prompt_transform

from upt_fast.common.closeness import relative_rms
from upt_fast.methods.upt import UPTConfig
from upt_fast.prompts import LearnerSetting
from upt_fast.prompts.upt import UnifiedPromptLearner
from upt_fast.testing_ops import DEVICE, compare, dtype_name, precisions, randn

FORMS = pytest.mark.parametrize("released", [False, True], ids=["paper", "released"])
EPS = {"eps1": 1e-5, "eps2": 1e-3}


def inputs(layers: int, n: int, d: int, w: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """u and the parameters, in prompt_transform's order."""

    def normal(*shape: int, std: float, mean: float = 0.0) -> Tensor:
        return (mean + randn(*shape, scale=std)).to(dtype).requires_grad_()

    norm = [dict(std=0.2, mean=1.0), dict(std=0.1)]
    return [
        normal(layers, n, d, std=1.0),
        *(normal(3 * d, d, std=d**-0.5), normal(3 * d, std=0.1), normal(d, d, std=d**-0.5), normal(d, std=0.1)),
        *(normal(d, **kind) for kind in norm + norm),
        *(normal(d, d, std=d**-0.5), normal(d, std=0.1), normal(d, d, std=d**-0.5), normal(d, std=0.1)),
        *(normal(w, d, std=d**-0.5), normal(w, std=0.1)),
    ]


def formula(u, *params, n_text, num_heads, eps1, eps2, released):
    """UPT's transform, step by step as in the paper or in the published code."""
    w_in, b_in, w_out, b_out, g1, c1, g2, c2, w1, b1, w2, b2, w_mlp, b_mlp = params
    d = u.shape[-1]

    def ffn(x):
        return F.relu(x @ w1.T + b1) @ w2.T + b2

    q, k, v = (u @ w_in.T + b_in).split(d, dim=-1)
    if released:
        x = F.layer_norm(u + v @ w_out.T + b_out, (d,), g1, c1, eps1)
        y = x + ffn(F.layer_norm(x, (d,), g2, c2, eps2))
    else:
        heads = []
        for q_h, k_h, v_h in zip(*(t.chunk(num_heads, dim=-1) for t in (q, k, v)), strict=True):
            heads.append((q_h @ k_h.mT / q_h.shape[-1] ** 0.5).softmax(-1) @ v_h)
        s = torch.cat(heads, dim=-1) @ w_out.T + b_out + F.layer_norm(u, (d,), g1, c1, eps1)
        x = F.layer_norm(s, (d,), g2, c2, eps2)
        y = ffn(x) + x
    return y[:, :n_text], y[:, n_text:] @ w_mlp.T + b_mlp


def gradients(outputs: tuple[Tensor, ...], leaves: list[Tensor], douts: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs, leaves, douts, materialize_grads=True)


def check(leaves: list[Tensor], **options) -> None:
    """Outputs and every gradient against the formula in float64."""
    compare(partial(prompt_transform, **options), partial(formula, **options), leaves)
    if options["released"]:
        got = prompt_transform(*leaves, **options)
        weights = gradients(got, leaves[1:3], [torch.randn_like(t) for t in got])
        queries_and_keys = 2 * leaves[0].shape[-1]
        assert not any(g[:queries_and_keys].any() for g in weights)


@FORMS
@pytest.mark.parametrize("dtype", precisions("prompt_transform"), ids=dtype_name)
@pytest.mark.parametrize(
    ("layers", "n", "d", "w", "n_text", "num_heads"),
    [(3, 8, 33, 47, 4, 1), (1, 5, 16, 24, 2, 2), (1, 3, 72, 32, 1, 2)],
    ids=["odd", "heads", "wide"],
)
def test_formula(layers, n, d, w, n_text, num_heads, dtype, released):
    check(inputs(layers, n, d, w, dtype), n_text=n_text, num_heads=num_heads, released=released, **EPS)


@FORMS
@pytest.mark.parametrize(("n", "n_text"), [(3, 0), (3, 3), (1, 1), (40, 11)], ids=["visual", "text", "one", "many"])
def test_token_counts(n, n_text, released):
    check(inputs(1, n, 33, 20), n_text=n_text, num_heads=1, released=released, **EPS)


@pytest.mark.parametrize(
    ("layers", "n", "n_text", "d", "w", "released"),
    [(5, 8, 3, 20, 36, False), (1, 2, 1, 132, 20, True)],
    ids=["rows", "sums"],
)
@pytest.mark.usefixtures("gpu_tiles")
def test_gpu_tiles(layers, n, n_text, d, w, released):
    """Several tiles of rows, one of them with visual and text rows; few rows, whose sums take several rounds."""
    check(inputs(layers, n, d, w), n_text=n_text, num_heads=2, released=released, **EPS)


@FORMS
def test_not_contiguous(released):
    u, *params = inputs(2, 3, 32, 20)
    u = u.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    params = [p.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_() for p in params]
    assert not u.is_contiguous()
    assert not params[0].is_contiguous()
    check([u, *params], n_text=1, num_heads=2, released=released, **EPS)


@FORMS
def test_mixed_dtypes(released):
    """Each gradient comes in its input's dtype."""
    u, *params = inputs(2, 3, 16, 20)
    params[2] = params[2].detach().half().requires_grad_()
    options = dict(n_text=1, num_heads=1, released=released, **EPS)
    got = prompt_transform(u, *params, **options)
    grads = gradients(got, [u, *params], [torch.randn_like(t) for t in got])
    assert [t.dtype for t in grads] == [t.dtype for t in (u, *params)]


@FORMS
def test_no_layers(released):
    leaves = inputs(0, 3, 16, 20)
    text, visual = prompt_transform(*leaves, n_text=1, num_heads=1, released=released, **EPS)
    assert text.shape == (0, 1, 16)
    assert visual.shape == (0, 2, 20)
    grads = gradients((text, visual), leaves, [text, visual])
    assert all(g.shape == t.shape and not g.any() for g, t in zip(grads, leaves, strict=True))


@FORMS
def test_opcheck(released):
    u, *params = inputs(1, 3, 16, 20)
    arguments = (u, params, 1, 1, 1e-5, 1e-5, released)
    torch.library.opcheck(_fwd, arguments)
    with torch.no_grad():
        text, visual, *kept = _fwd(*arguments)
    weights = [t.detach() for name, t in zip(NAMES, params, strict=True) if name in WEIGHTS]
    torch.library.opcheck(_bwd, (text, visual, u.detach(), weights, *kept, released))


@pytest.mark.parametrize(
    "config",
    [
        UPTConfig(n_text=2, n_visual=3, attention_heads=2),
        UPTConfig(preset="released"),
    ],
    ids=["paper", "released"],
)
def test_learner(config):
    released = config.preset == "released"
    layers = 1 if released else 3
    learner = UnifiedPromptLearner(config, LearnerSetting(layers, 32, layers, 48)).to(DEVICE).eval()
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    attention, norms = learner.self_attn, (learner.norm1, learner.norm2)
    linears = (learner.linear1, learner.linear2, learner.mlp)
    leaves = [
        learner.uni_ctx,
        *(attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.weight, attention.out_proj.bias),
        *(t for module in (*norms, *linears) for t in (module.weight, module.bias)),
    ]
    got = prompt_transform(
        *leaves,
        n_text=config.n_text,
        num_heads=config.attention_heads,
        eps1=learner.norm1.eps,
        eps2=learner.norm2.eps,
        released=released,
    )
    wanted = tuple(prompts[0] for prompts in learner())
    douts = [torch.randn_like(t) for t in wanted]
    pairs = [*zip(got, wanted, strict=True)]
    pairs += zip(gradients(got, leaves, douts), gradients(wanted, leaves, douts), strict=True)
    assert max(relative_rms(a, b) for a, b in pairs) <= 1e-5
