"""A step in parts against the step at once: loss, logits and every gradient, and what runs how often."""

import copy
import functools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import upt_fast.methods
from upt_fast import FastPromptedCLIP, MethodConfig, PromptLearner, Prompts, register_method
from upt_fast.clip.tokens import clip_tokenizer
from upt_fast.common.closeness import max_error, relative_rms
from upt_fast.steps import MicroBatches
from upt_fast.testing import build, random_clip

NAMES = ["cat", "golden_retriever", "hard-leaved pocket orchid", "dog", "spoon", "fork", "snow leopard"]
SMALL = dict(
    embed_dim=32, image_size=16, vision_layers=3, vision_width=64, vision_head_width=32, text_layers=3, text_width=64
)
CASES = {
    "upt": ("upt", {"n_text": 3, "n_visual": 2, "dropout": 0.2}),
    "upt_released": ("upt", {"preset": "released", "n_text": 3, "n_visual": 2}),
    "upt_shallow": ("upt", {"n_text": 2, "n_visual": 2, "depth_text": 1, "depth_vision": 2}),
    "coop": ("coop", {"n_ctx": 3}),
    "coop_middle": ("coop", {"n_ctx": 3, "class_token_position": "middle"}),
    "coop_front": ("coop", {"n_ctx": 3, "class_token_position": "front"}),
    "coop_per_class": ("coop", {"n_ctx": 3, "class_specific": True}),
    "kgcoop": ("kgcoop", {}),
    "cocoop": ("cocoop", {"n_ctx": 3}),
    "vpt_shallow": ("vpt_shallow", {}),
    "vpt_deep": ("vpt_deep", {"n_ctx": 2}),
    "maple": ("maple", {"depth": None}),
    "maple_half": ("maple", {"depth": None, "half_prompts": True}),
    "ivlp": ("ivlp", {"n_text": 3, "n_visual": 1}),
    "mvpt": ("mvpt", {"n_ctx": 2}),
}
PARTS = [(2, 3), (None, 2), (1, None), (3, 1), (50, 50)]
smoothed = functools.partial(F.cross_entropy, label_smoothing=0.1)


@functools.lru_cache(maxsize=1)
def tokenizer():
    return clip_tokenizer()


def make(method, dtype="fp64", **options):
    torch.manual_seed(0)
    clip = random_clip(**SMALL, logit_bias=-1.0, custom_text=True)
    model = build("fast", clip, NAMES, method, dtype=dtype, tokenizer=tokenizer(), **options).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def batch(count=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 16, 16, dtype=torch.float64, generator=generator).to(dtype)
    return images, torch.tensor([0, 6, 1, 1, 4, 2, 3, 5])[:count]


def at_once(model, images, labels, loss=F.cross_entropy):
    """Loss, logits and gradients by the step that is not in parts; the same random numbers each time."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    value, logits = model.loss_and_logits(images, labels, loss)
    value.backward()
    return [value.detach(), logits.detach(), *(p.grad.clone() for p in model.parameters())]


def in_parts(model, images, labels, parts, loss=F.cross_entropy):
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    value, logits = model.backward_in_parts(images, labels, MicroBatches(*parts), loss)
    return [value, logits, *(p.grad.clone() for p in model.parameters())]


def assert_same(found, wanted, bound=1e-12):
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert not ours.requires_grad
        assert ours.shape == theirs.shape
        assert max_error(ours, theirs) <= bound


@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_whole_step(case, parts):
    method, options = CASES[case]
    model, (images, labels) = make(method, **options), batch()
    # half_prompts: gradients of each class and image are rounded to float16, in one order or another
    bound = 1e-3 if options.get("half_prompts") else 1e-12
    for loss in (F.cross_entropy, smoothed):
        wanted = at_once(model, images, labels, loss)
        assert float(wanted[2].abs().max()) > 0
        assert_same(in_parts(model, images, labels, parts, loss), wanted, bound)


@pytest.mark.parametrize("memory", ["balanced", "lean"])
@pytest.mark.parametrize("case", ["upt", "cocoop", "coop_middle", "maple"])
def test_at_other_memory_levels(case, memory):
    method, options = CASES[case]
    model, (images, labels) = make(method, memory=memory, **options), batch()
    assert_same(in_parts(model, images, labels, (2, 3)), at_once(model, images, labels))


@pytest.mark.parametrize("case", ["upt", "coop", "cocoop", "vpt_deep", "kgcoop"])
def test_a_loss_that_is_no_mean_over_images(case):
    """The hardest image alone counts: no micro-batch can know its share by itself."""

    def hardest(logits, labels):
        return F.cross_entropy(logits, labels, reduction="none").square().max() + logits.std()

    method, options = CASES[case]
    model, (images, labels) = make(method, **options), batch()
    assert_same(in_parts(model, images, labels, (2, 3), hardest), at_once(model, images, labels, hardest))


@pytest.mark.parametrize("case", ["upt", "cocoop"])
def test_labels_that_cross_entropy_ignores(case):
    method, options = CASES[case]
    model, (images, labels) = make(method, **options), batch()
    labels[[0, 3]] = -100
    assert_same(in_parts(model, images, labels, (2, None), smoothed), at_once(model, images, labels, smoothed))


def test_gradients_are_added():
    """As those of backward are: a user may sum several batches."""
    model, (images, labels) = make("upt", n_text=3), batch()
    once = in_parts(model, images, labels, (2, 3))[2:]
    model.backward_in_parts(images, labels, MicroBatches(2, 3))
    assert_same([p.grad for p in model.parameters()], [2 * g for g in once])


@pytest.mark.parametrize("case", ["upt", "cocoop", "kgcoop"])
def test_scale_is_what_backward_sees(case):
    method, options = CASES[case]
    model, (images, labels) = make(method, **options), batch()
    value, _, *grads = in_parts(model, images, labels, (2, 3))
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    loss, _ = model.backward_in_parts(images, labels, MicroBatches(2, 3), scale=lambda x: x * 1024)
    assert_same([loss, *(p.grad for p in model.parameters())], [value, *(1024 * g for g in grads)])


@dataclass(frozen=True)
class AnchoredConfig(MethodConfig):
    """Options of the method below."""


class Anchored(PromptLearner):
    """Words and image tokens; terms that read all that there is, and a parameter that makes no prompt."""

    method, config_class = "anchored_in_parts", AnchoredConfig

    def __init__(self, config, setting):
        super().__init__(config, setting)
        self.n_text = 2
        self.ctx = nn.Parameter(setting.initial_context(2))
        self.visual = nn.Parameter(torch.randn(3, setting.vision_width))
        self.weight = nn.Parameter(torch.tensor(1.5))

    def forward(self):
        return Prompts(text=self.ctx[None, None], visual=self.visual[None, None])

    def loss_terms(self, features):
        texts = 1 - (features.texts * features.fixed_texts(("a photo of a {}.",))).sum(dim=-1).mean()
        images = (features.images - features.fixed_images()).square().sum()
        spread = features.images.std(dim=0).sum() + features.logits.softmax(1).mean(0).square().sum()
        return self.weight * (texts + images) + spread * features.labels.double().mean()


@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_terms_of_the_loss(parts):
    """Means over texts count once, and terms that tie images together are exact."""
    register_method(Anchored)
    try:
        model, (images, labels) = make("anchored_in_parts"), batch()
        wanted = at_once(model, images, labels)
        assert all(float(grad.abs().max()) > 0 for grad in wanted[2:])
        assert_same(in_parts(model, images, labels, parts), wanted)
    finally:
        upt_fast.methods.registry._METHODS.pop("anchored_in_parts", None)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("case", ["upt", "cocoop"])
def test_half_precision(case, dtype):
    """Sums over parts are in float32: no further from the float64 step than the step at once, but for rounding."""
    method, options = CASES[case]
    options = options | ({"dropout": 0.0} if case == "upt" else {})
    exact = at_once(make(method, **options), *batch())[2:]
    model = make(method, dtype=dtype, **options)
    images, labels = batch(dtype=torch.float32)
    whole = at_once(model, images, labels)[2:]
    parts = in_parts(model, images, labels, (2, 3))[2:]
    error = [
        relative_rms(torch.cat([g.flatten().double() for g in found]), torch.cat([g.flatten() for g in exact]))
        for found in (parts, whole)
    ]
    assert error[0] <= 2 * error[1] + 1e-3, error


class Passes:
    """Counts what passes the towers, with and without a graph."""

    def __init__(self, model, monkeypatch):
        self.text, self.images = [], []
        text, vision = model.text_tower.forward, model.vision_tower.forward

        def count_text(prompts, packed):
            self.text.append((packed.layout.num_classes, torch.is_grad_enabled()))
            return text(prompts, packed)

        def count_images(images, *args):
            self.images.append((len(images), torch.is_grad_enabled()))
            return vision(images, *args)

        monkeypatch.setattr(model.text_tower, "forward", count_text)
        monkeypatch.setattr(model.vision_tower, "forward", count_images)


def test_what_runs(monkeypatch):
    """Groups of classes twice, images once, the learner once; never more at a time than was asked for."""
    model, (images, labels) = make("upt", n_text=3, dropout=0.2), batch()
    learner, calls = model.prompt_learner.forward, []
    monkeypatch.setattr(model.prompt_learner, "forward", lambda: calls.append(1) or learner())
    passes = Passes(model, monkeypatch)
    in_parts(model, images, labels, (2, 3))
    assert passes.text == [(2, False), (2, False), (3, False), (2, True), (2, True), (3, True)]
    assert passes.images == [(1, True), (2, True), (2, True)]
    assert len(calls) == 1


def test_classes_in_one_group_run_once(monkeypatch):
    model, (images, labels) = make("upt", n_text=3), batch()
    passes = Passes(model, monkeypatch)
    in_parts(model, images, labels, (2, None))
    assert passes.text == [(7, True)]


def test_images_without_prompts_run_once_and_without_a_graph(monkeypatch):
    model, (images, labels) = make("kgcoop"), batch()
    passes = Passes(model, monkeypatch)
    in_parts(model, images, labels, (2, None))
    assert [size for size, _ in passes.images] == [1, 2, 2]


def test_texts_by_image_run_once_where_classes_are_one_group(monkeypatch):
    model, (images, labels) = make("cocoop", n_ctx=3), batch()
    passes = Passes(model, monkeypatch)
    in_parts(model, images, labels, (2, None))
    assert passes.text == [(7, True), (14, True), (14, True)]
    assert not any(grad for _, grad in passes.images)


@pytest.mark.parametrize("case", ["upt", "cocoop", "coop_per_class"])
def test_other_classes_and_other_precisions_later(case):
    method, options = CASES[case]
    model, (images, labels) = make(method, **options), batch()
    in_parts(model, images, labels, (2, 3))
    if case != "coop_per_class":
        model.set_classnames([*NAMES, "one more", "and another"])
        assert_same(in_parts(model, images, labels, (2, 3)), at_once(model, images, labels))
    model.float()
    found, wanted = (f(model, images.float(), labels, *a) for f, a in ((in_parts, [(2, 3)]), (at_once, [])))
    assert_same(found, wanted, 1e-4)
    assert copy.deepcopy(model)._parts.model is not model


@pytest.mark.parametrize("count", [1, 4, 8])
def test_a_graphed_step_in_parts(count):
    """The loss, the logits and the update of the step at once; batches of other sizes too."""
    images, labels = batch(count)
    results = []
    for parts in (None, MicroBatches(2, 3)):
        model = make("upt", n_text=3, dropout=0.2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        step = model.make_graphed_step(optimizer, 4, loss=smoothed, micro_batches=parts)
        for _ in range(3):
            loss, logits = step(images, labels)
        results.append([loss, logits, *(p.detach() for p in model.parameters())])
    assert_same(results[1], results[0], 1e-11)
    assert "CUDA" in step.reason


@pytest.mark.parametrize(("parts", "message"), [((0, 3), r"micro_batches\.images=0"), ((2, "all"), "classes='all'")])
def test_bad_parts(parts, message):
    model, (images, labels) = make("upt", n_text=3), batch()
    with pytest.raises(ValueError, match=message):
        model.backward_in_parts(images, labels, MicroBatches(*parts))


def test_wrong_images_are_refused():
    model, (_, labels) = make("upt", n_text=3), batch()
    with pytest.raises(ValueError, match="images of shape"):
        model.backward_in_parts(torch.zeros(5, 3, 8, 8), labels, MicroBatches(2, 3))


def test_without_parameters_nothing_is_asked():
    model = FastPromptedCLIP(random_clip(**SMALL), NAMES, method="zeroshot", tokenizer=tokenizer())
    images, labels = batch(dtype=torch.float32)
    with pytest.raises(RuntimeError, match="does not require grad"):
        model.backward_in_parts(images, labels, MicroBatches(2))
