"""UPT's prompt learner against the plain one, and against dropout masks recorded from the released code."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from upt_fast import FastUPT, ReferenceUPT, UPTConfig
from upt_fast.common.closeness import max_error, relative_rms
from upt_fast.common.files import load_safetensors
from upt_fast.prompts import LearnerSetting
from upt_fast.prompts.upt import UnifiedPromptLearner
from upt_fast.reference.upt import ReferencePromptLearner
from upt_fast.testing import golden_clip

GOLDEN = Path(__file__).parent / "golden"
DEPTHS = {"paper": [(1, 1), (3, 3), (1, 3), (4, 2)], "released": [(1, 1)]}


def learners(config: UPTConfig, depth_text: int, depth_vision: int):
    """The reference and the engine's learner with the same values, float64, width 12 -> 10."""
    pair = []
    setting = LearnerSetting(max(depth_text, 2), 12, max(depth_vision, 2), 10)
    if config.preset == "paper":
        config = dataclasses.replace(config, depth_text=depth_text, depth_vision=depth_vision)
    for build in (
        lambda: ReferencePromptLearner(config, depth_text, depth_vision, 12, 10),
        lambda: UnifiedPromptLearner(config, setting),
    ):
        torch.manual_seed(0)
        pair.append(build().double())
    with torch.no_grad():
        for a, b in zip(*(learner.parameters() for learner in pair), strict=True):
            a += 0.1 * torch.randn_like(a)
            b.copy_(a)
    return pair


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize(("n_text", "n_visual"), [(1, 1), (4, 4), (2, 5)])
@pytest.mark.parametrize(("preset", "depths"), [(p, d) for p, ds in DEPTHS.items() for d in ds])
def test_equals_reference(preset, depths, n_text, n_visual, heads):
    config = UPTConfig(preset=preset, n_text=n_text, n_visual=n_visual, attention_heads=heads)
    results = []
    for learner in learners(config, *depths):
        text, visual = (t.reshape(t.shape[-3:]) for t in learner.eval()())
        assert text.shape == (depths[0], n_text, 12)
        assert visual.shape == (depths[1], n_visual, 10)
        loss = (text * torch.arange(12).cos()).sum() + (visual * torch.arange(10).sin()).sum()
        parameters = tuple(learner.parameters())
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        grads = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, parameters, strict=True)]
        results.append([text, visual, *grads])
    for got, wanted in zip(results[1], results[0], strict=True):
        assert max_error(got, wanted) <= 1e-12


def transform(config: UPTConfig, learner) -> torch.Tensor:
    """The prompts written out, one layer and one head of attention at a time, from the equations."""
    u, d = learner.uni_ctx, 12
    w, b = learner.self_attn.in_proj_weight, learner.self_attn.in_proj_bias
    layers = []
    for rows in u:  # (N, d)
        q, k, v = (rows @ w[i * d : (i + 1) * d].T + b[i * d : (i + 1) * d] for i in range(3))
        if config.preset == "paper":
            v = (q @ k.T / d**0.5).softmax(-1) @ v
        attended = v @ learner.self_attn.out_proj.weight.T + learner.self_attn.out_proj.bias
        x = attended + learner.norm1(rows) if config.preset == "paper" else learner.norm1(rows + attended)
        h = learner.norm2(x)
        ffn = F.relu(h @ learner.linear1.weight.T + learner.linear1.bias) @ learner.linear2.weight.T
        layers.append(ffn + learner.linear2.bias + (h if config.preset == "paper" else x))
    return torch.stack(layers)


@pytest.mark.parametrize("preset", ["paper", "released"])
@pytest.mark.parametrize("which", [0, 1], ids=["reference", "fast"])
def test_equals_the_equations(preset, which):
    config = UPTConfig(preset=preset, n_text=2, n_visual=3)
    depths = (2, 3) if preset == "paper" else (1, 1)
    learner = learners(config, *depths)[which].eval()
    text, visual = (t.reshape(t.shape[-3:]) for t in learner())
    prompts = transform(config, learner)
    assert max_error(text, prompts[: depths[0], :2]) <= 1e-12
    wanted = prompts[: depths[1], 2:] @ learner.mlp.weight.T + learner.mlp.bias
    assert max_error(visual, wanted) <= 1e-12


@pytest.mark.parametrize(("preset", "interact"), [("paper", True), ("released", False)])
def test_prompts_of_a_layer_interact_in_the_paper_only(preset, interact):
    config = UPTConfig(preset=preset, n_text=2, n_visual=2)
    learner = learners(config, *((2, 2) if preset == "paper" else (1, 1)))[1]
    (grad,) = torch.autograd.grad(learner().text[0, 0, 0, 0], learner.uni_ctx)
    reached = grad.abs().amax(-1) > 1e-9  # (D, N)
    assert reached[0].tolist() == [True, interact, interact, interact]
    assert not reached[1:].any()  # layers do not


def test_paper_dropout_has_the_reference_distribution():
    """Its masks lie elsewhere than the reference's under the same seed; mean and spread of the prompts agree."""
    config = UPTConfig(n_text=2, n_visual=2, attention_heads=2, dropout=0.4)
    moments = []
    for learner in learners(config, 2, 2):
        torch.manual_seed(0)
        draws = torch.stack([learner()[0].reshape(-1) for _ in range(1500)]).detach()
        moments.append((draws.mean(0), draws.std(0)))
    quiet = learner.eval()()[0].reshape(-1).detach()
    assert relative_rms(moments[1][1], moments[0][1]) <= 0.06
    error = relative_rms(moments[1][0], moments[0][0])
    assert error <= 0.06
    assert relative_rms(quiet, moments[0][0]) > 2 * error  # dropout is not linear in the prompts: this can tell


def masks(tensors, monkeypatch) -> list[torch.Tensor]:
    """Make every dropout apply the recorded masks, in their order; what is left of them."""
    left = [tensors[f"train.mask.{i}"].double() for i in range(8)]
    plain = F.scaled_dot_product_attention

    def dropout(x, p=0.5, training=True, inplace=False):
        if not training or p == 0.0:
            return x
        mask = left.pop(0)
        assert p == 0.1
        assert mask.numel() == x.numel()
        return x * mask.view(x.shape) / 0.9

    def attention(q, k, v, attn_mask=None, dropout_p=0.0, *more, **options):
        if dropout_p == 0.0:
            return plain(q, k, v, attn_mask, dropout_p, *more, **options)
        assert q.shape[-2] == k.shape[-2] == 1  # sequences of length one: every probability is 1
        return dropout(torch.ones_like(v[..., :1]), dropout_p) * v

    monkeypatch.setattr(F, "dropout", dropout)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    return left


@pytest.mark.parametrize("build", [ReferenceUPT, FastUPT])
def test_training_mode_equals_the_recorded_run(build, monkeypatch, tokenizer):
    tensors, _ = load_safetensors(GOLDEN / "upt.safetensors")
    sidecar = json.loads((GOLDEN / "upt.json").read_text(encoding="utf-8"))
    clip = golden_clip(GOLDEN / sidecar["clip_file"])
    model = build(clip, sidecar["classnames"], tokenizer=tokenizer, preset="released").train()
    model.load_state_dict({f"prompt_learner.{n[6:]}": t for n, t in tensors.items() if n.startswith("param.")})
    left = masks(tensors, monkeypatch)
    logits = model(tensors["images"].double())
    assert left == []
    assert max_error(logits, tensors["train.out.logits"]) <= 1e-9
    loss = F.cross_entropy(logits, tensors["labels"])
    assert max_error(loss, tensors["train.out.loss"]) <= 1e-9
    loss.backward()
    largest = max(float(t.abs().max()) for n, t in tensors.items() if n.startswith("train.grad."))
    for name, parameter in model.prompt_learner.named_parameters():
        assert float((parameter.grad - tensors[f"train.grad.{name}"]).abs().max()) <= 1e-9 * largest, name


def test_heads_must_divide_the_width():
    config = UPTConfig(attention_heads=5)
    for build, sizes in (
        (ReferencePromptLearner, (1, 1, 12, 10)),
        (UnifiedPromptLearner, (LearnerSetting(1, 12, 1, 10),)),
    ):
        with pytest.raises(ValueError, match=r"attention_heads=5.*12"):
            build(config, *sizes)
