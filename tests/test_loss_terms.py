"""Terms that a method adds to the loss, and the features that it may read for them."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import upt_fast.methods
from upt_fast import FastPromptedCLIP, MethodConfig, PromptLearner, Prompts, ReferencePromptedCLIP, register_method
from upt_fast.clip.tokens import clip_tokenizer
from upt_fast.common.closeness import max_error
from upt_fast.testing import random_clip

NAMES = ["cat", "golden_retriever", "dog"]
TEMPLATES = ("a photo of a {}.", "one {} of many")
seen = []


@dataclass(frozen=True)
class AnchoredConfig(MethodConfig):
    """Options of the method below.

    Args:
        weight: of the term.
    """

    weight: float = 2.0


class Anchored(PromptLearner):
    """Words and image tokens whose features stay near the CLIP's own."""

    method, config_class = "anchored", AnchoredConfig

    def __init__(self, config, setting):
        super().__init__(config, setting)
        self.n_text = 2
        self.ctx = nn.Parameter(setting.initial_context(2))
        self.visual = nn.Parameter(torch.randn(3, setting.vision_width))

    def forward(self):
        return Prompts(text=self.ctx[None, None], visual=self.visual[None, None])

    def loss_terms(self, features):
        seen.append(features)
        texts = (features.texts - features.fixed_texts(TEMPLATES)).square().sum()
        images = (features.images - features.fixed_images()).square().sum()
        return self.config.weight * (texts + images)


@pytest.fixture
def model():
    register_method(Anchored)
    seen.clear()
    torch.manual_seed(0)
    yield build(torch.float64)
    upt_fast.methods.registry._METHODS.pop("anchored", None)


def make_clip(dtype):
    return random_clip(
        embed_dim=32, image_size=16, vision_layers=2, vision_width=64, text_layers=2, text_width=64, text_heads=1
    ).to(dtype)


def build(dtype, **options):
    return FastPromptedCLIP(make_clip(dtype), NAMES, method=Anchored, tokenizer=clip_tokenizer(), **options)


def plain(**options):
    return ReferencePromptedCLIP(make_clip(torch.float64), NAMES, tokenizer=clip_tokenizer(), **options)


def batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 16, 16, dtype=dtype, generator=generator), torch.tensor([0, 2, 1, 0])


def by_hand(model, images, labels):
    """The loss from the model's public parts and the plain CLIP's features."""
    fixed = plain(method="zeroshot", templates=TEMPLATES)
    texts, anchors = model.encode_text(), fixed.encode_text()
    features, originals = model.encode_image(images), fixed.encode_image(images)
    terms = (texts - anchors).square().sum() + (features - originals).square().sum()
    return F.cross_entropy(model(images), labels) + model.config.weight * terms


def test_loss_has_the_terms(model):
    images, labels = batch()
    wanted = by_hand(model, images, labels)
    loss, logits = model.loss_and_logits(images, labels)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(wanted, parameters)
    for got in (loss, model.loss(images, labels)):
        assert max_error(got, wanted) <= 1e-12
        for a, b in zip(torch.autograd.grad(got, parameters), gradients, strict=True):
            assert max_error(a, b) <= 1e-11
    assert max_error(logits, model(images)) <= 1e-13
    other, _ = model.loss_and_logits(images, labels, loss=lambda logits, labels: logits.square().mean())
    assert max_error(other - logits.square().mean(), wanted - F.cross_entropy(logits, labels)) <= 1e-12
    assert max_error(seen[-1].logits, logits) == 0
    assert torch.equal(seen[-1].labels, labels)


def test_fixed_features_are_constants_computed_once(model, monkeypatch):
    images, labels = batch()
    runs = []
    forward = model.text_tower.forward
    monkeypatch.setattr(model.text_tower, "forward", lambda text, *args: runs.append(text) or forward(text, *args))
    for _ in range(3):
        model.loss(images, labels)
    assert [text is None for text in runs].count(True) == len(TEMPLATES)
    features = seen[-1]
    assert not features.fixed_texts(TEMPLATES).requires_grad
    assert not features.fixed_images().requires_grad
    assert torch.allclose(features.fixed_texts(TEMPLATES).norm(dim=-1), torch.ones(3, dtype=torch.float64))
    before = model.fixed_text_features(TEMPLATES)
    model.set_classnames(["dog", "cat"])
    assert max_error(model.fixed_text_features(TEMPLATES), before[[2, 0]]) <= 1e-13
    model.float()
    assert model.fixed_text_features(TEMPLATES).dtype == torch.float32


def test_steps_train_on_the_terms(model):
    images, labels = batch()
    twin = build(torch.float64)
    twin.load_state_dict(model.state_dict())
    optimizer, other = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin))
    step = model.make_graphed_step(optimizer, len(images))
    for _ in range(2):
        loss, _ = step(images, labels)
        wanted = by_hand(twin, images, labels)
        other.zero_grad()
        wanted.backward()
        other.step()
        assert max_error(loss, wanted) <= 1e-12
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert max_error(ours, theirs) <= 1e-11


def test_terms_are_in_single_precision_beside_half(model):
    low = build(torch.bfloat16)
    low.load_state_dict(model.state_dict())
    images, labels = batch(torch.bfloat16)
    loss = low.loss(images, labels).detach()
    assert loss.dtype == torch.float32
    features = seen[-1]
    for values in (features.images, features.texts, features.logits, features.fixed_images()):
        assert values.dtype == torch.float32
    wanted = model.loss(*batch()).detach()
    assert abs(float(loss) - float(wanted)) <= 0.05 * abs(float(wanted))


def test_a_model_with_terms_can_be_saved(model, tmp_path):
    images, labels = batch()
    path = model.save_pretrained(tmp_path)
    again = FastPromptedCLIP.load(path, make_clip(torch.float64), tokenizer=clip_tokenizer(), method=Anchored)
    assert max_error(again.loss(images, labels), model.loss(images, labels)) <= 1e-13


def test_other_methods_add_nothing():
    for method in ("coop", "cocoop"):
        model = FastPromptedCLIP(make_clip(torch.float64), NAMES, method=method, tokenizer=clip_tokenizer())
        images, labels = batch()
        loss, logits = model.loss_and_logits(images, labels)
        assert max_error(loss, F.cross_entropy(logits, labels)) == 0
        assert max_error(model.loss(images, labels), loss) <= 1e-13
