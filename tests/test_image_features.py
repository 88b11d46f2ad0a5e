"""Image features that are given in the place of images, and the tower that computes them for every method."""

import copy

import pytest
import torch

from upt_fast import FastPromptedCLIP
from upt_fast.clip.loading import load_clip
from upt_fast.clip.tokens import clip_tokenizer
from upt_fast.common.closeness import max_error, relative_rms
from upt_fast.testing import random_clip

NAMES = ["cat", "golden_retriever", "traffic light"]
SMALL = dict(embed_dim=32, image_size=16, vision_layers=2, vision_width=64, text_layers=2, text_width=64, text_heads=1)
METHODS = ["coop", "cocoop", "kgcoop", "zeroshot"]


def build(method: str, dtype=torch.float64, **options) -> FastPromptedCLIP:
    torch.manual_seed(0)
    return FastPromptedCLIP(random_clip(**SMALL).to(dtype), NAMES, method=method, tokenizer=clip_tokenizer(), **options)


def batch(count=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 16, 16, dtype=dtype, generator=generator)
    return images, torch.arange(count) % len(NAMES)


@pytest.mark.parametrize("method", METHODS)
def test_given_features_are_as_good_as_the_images(method):
    model, (images, labels) = build(method), batch()
    features = model.vision_tower.alone(images)
    assert not features.requires_grad
    assert max_error(features, model.encode_image(images, normalize=False)) <= 1e-12
    assert max_error(model(image_features=features), model(images)) <= 1e-12
    parameters = list(model.parameters())
    for loss in (
        lambda *a, **k: model.loss(*a, **k),
        lambda *a, **k: model.loss_and_logits(*a, **k)[0],
    ):
        got, wanted = loss(None, labels, image_features=features), loss(images, labels)
        assert max_error(got, wanted) <= 1e-12
        if parameters:
            for a, b in zip(*(torch.autograd.grad(x, parameters) for x in (got, wanted)), strict=True):
                assert max_error(a, b) <= 1e-11


@pytest.mark.parametrize("method", ["coop", "cocoop", "kgcoop"])
def test_training_on_features_is_training_on_images(method):
    model, (images, labels) = build(method), batch()
    models = model.train(), copy.deepcopy(model).train()
    features = model.vision_tower.alone(images)
    for one, given in zip(models, (False, True), strict=True):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.05, momentum=0.9)
        step = one.make_graphed_step(optimizer, len(images), from_features=given)
        for _ in range(6):
            step(features if given else images, labels)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert max_error(a, b) <= 1e-12
    assert any(max_error(a, b) > 1e-3 for a, b in zip(models[0].parameters(), build(method).parameters(), strict=True))


def test_no_image_tower_runs_where_features_are_given(monkeypatch):
    model, (images, labels) = build("kgcoop"), batch()
    features = model.vision_tower.alone(images)

    def runs(*args, **kwargs):
        raise AssertionError("the image tower ran")

    monkeypatch.setattr(model.vision_tower, "_features", runs)
    model.loss(None, labels, image_features=features).backward()
    model.eval()(image_features=features)
    with pytest.raises(AssertionError, match="the image tower ran"):
        model(images)


def test_terms_of_the_loss_see_given_features():
    """``fixed_images`` of a method's own terms are the features that are given."""
    model, (images, labels), seen = build("kgcoop"), batch(), []
    model._loss_terms = lambda learner, features: (seen.append(features.fixed_images()), features.images.sum() * 0)[1]
    features = model.vision_tower.alone(images)
    model.loss(None, labels, image_features=features)
    model.loss(images, labels)
    assert max_error(*seen) <= 1e-12


def test_features_and_images_that_are_refused():
    model, (images, labels) = build("coop"), batch()
    features = model.vision_tower.alone(images)
    with pytest.raises(ValueError, match="both images and image_features"):
        model(images, image_features=features)
    with pytest.raises(ValueError, match="neither images nor image_features"):
        model.loss(None, labels)
    for bad in (features[:, :5], features[0], features.long()):
        with pytest.raises(ValueError, match=r"this CLIP's are floating-point \(B, 32\)"):
            model(image_features=bad)
    for method, options in (("upt", {}), ("vpt_deep", {}), ("maple", {"depth": 2})):
        prompted = build(method, **options)
        assert not prompted.images_are_fixed
        with pytest.raises(ValueError, match="the method prompts images"):
            prompted(image_features=features)
    assert all(build(method).images_are_fixed for method in METHODS)
    assert build("ivlp", depth_vision=0).images_are_fixed


def test_a_step_from_features_needs_less_memory():
    model = build("coop")
    assert 0 < model.predict_peak_memory(64, from_features=True) < model.predict_peak_memory(64)
    assert build("zeroshot").predict_peak_memory(64, from_features=True) == 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
def test_alone_is_the_tower(dtype):
    loaded = load_clip("tiny-digits")
    model = FastPromptedCLIP(loaded.model, NAMES, method="coop", tokenizer=loaded.tokenizer, dtype=dtype)
    images = torch.randn(8, 3, *model.vision_tower.image_size)
    limit = {"fp32": 1e-5, "bf16": 2e-2, "fp64": 1e-12}[dtype]
    assert relative_rms(model.vision_tower.alone(images), model.vision_tower(images, None)) <= limit


def test_the_digest_is_of_all_that_the_image_tower_has():
    model = build("coop")
    digest = model.vision_digest()
    assert build("kgcoop").vision_digest() == digest
    assert build("coop", dtype=torch.float32).vision_digest() != digest
    for name, buffer in model.vision_tower.named_buffers():
        last = buffer[tuple(size - 1 for size in buffer.shape)]
        before = last.clone()
        last += 1
        assert model.vision_digest() != digest, name
        last.copy_(before)
    assert model.vision_digest() == digest
    model.vision_tower.pooling = "avg"
    assert model.vision_digest() != digest
