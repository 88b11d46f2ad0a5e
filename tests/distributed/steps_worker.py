"""Run by torchrun: steps of every method, divided over the processes, against the same in each process alone.

    torchrun --nproc-per-node N steps_worker.py FILE [CASE ...]

FILE gets, of each case (none: all), the largest error of loss, logits, gradients and weights on any process, or what
went wrong.
"""

import functools
import json
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from upt_fast import DistributedStep, FastPromptedCLIP, MethodConfig, PromptLearner, Prompts, register_method
from upt_fast.common.closeness import max_error
from upt_fast.distributed import join
from upt_fast.steps import MicroBatches
from upt_fast.testing import random_clip

NAMES = ["cat", "golden_retriever", "hard-leaved pocket orchid", "dog", "sunflower", "fire lily", "tree"]
SIZE = 16
SMOOTHED = functools.partial(F.cross_entropy, label_smoothing=0.1)


@dataclass(frozen=True)
class TiedConfig(MethodConfig):
    """Options of the method below.

    Args:
        by_image: whether its texts depend on the image.
    """

    by_image: bool = False


class Tied(PromptLearner):
    """Its terms read all that there is: features, logits, fixed features, the learner itself; and it drops out."""

    method, config_class = "tied", TiedConfig

    def __init__(self, config, setting):
        super().__init__(config, setting)
        self.n_text, self.by_image = 2, config.by_image
        self.ctx = nn.Parameter(setting.initial_context(2))
        self.visual = nn.Parameter(torch.randn(3, setting.vision_width), requires_grad=not config.by_image)
        self.shift = nn.Linear(setting.embed_dim, setting.text_width)

    def forward(self, image_features=None):
        ctx = F.dropout(self.ctx, 0.3, self.training)[None, None]
        if self.by_image:  # an image's prompts depend on the others too
            shift = F.dropout(self.shift(image_features - image_features.mean(0)), 0.3, self.training)
            return Prompts(text=ctx + shift[:, None, None])
        return Prompts(text=ctx + self.shift.bias, visual=self.visual[None, None])

    def loss_terms(self, features):
        value = self.ctx.square().sum() + features.logits.var(dim=0).sum() / 100
        value = value + (features.images - features.fixed_images()).square().mean() + features.labels.double().mean()
        if features.texts is not None:
            texts = features.texts - features.fixed_texts(("a photo of a {}.", "one {} of many"))
            value = value + texts.square().sum()
        return value


def hinge(logits, labels):
    """A loss that is no mean over the images."""
    return F.multi_margin_loss(logits, labels, reduction="none").square().sum().sqrt()


# method, options, then of the step: batch, classes, parts, loss, whether features are given, memory, text_batch
CASES = {
    "upt": ("upt", {"n_text": 3, "n_visual": 2}, {}),
    "upt_dropout": ("upt", {"n_text": 3, "n_visual": 2, "dropout": 0.2}, {}),
    "upt_joint": ("upt", {"joint": True, "n_text": 2, "n_visual": 3}, {"loss": SMOOTHED}),
    "coop": ("coop", {"n_ctx": 3}, {}),
    "coop_features": ("coop", {"n_ctx": 3}, {"features": True}),
    "coop_middle": ("coop", {"n_ctx": 3, "class_token_position": "middle"}, {}),
    "coop_csc": ("coop", {"n_ctx": 3, "class_specific": True}, {}),
    "coop_csc_front": ("coop", {"n_ctx": 1, "class_specific": True, "class_token_position": "front"}, {}),
    "kgcoop": ("kgcoop", {}, {}),
    "kgcoop_parts": ("kgcoop", {}, {"parts": MicroBatches(1, 2)}),
    "cocoop": ("cocoop", {"n_ctx": 3}, {}),
    "cocoop_text_batch": ("cocoop", {"n_ctx": 3}, {"text_batch": 1}),
    "cocoop_parts": ("cocoop", {"n_ctx": 3}, {"parts": MicroBatches(2, 3), "loss": SMOOTHED}),
    "cocoop_features": ("cocoop", {"n_ctx": 3}, {"features": True}),
    "vpt_shallow": ("vpt_shallow", {}, {}),
    "vpt_deep": ("vpt_deep", {"n_ctx": 2}, {"memory": "balanced"}),
    "mvpt": ("mvpt", {}, {}),
    "maple": ("maple", {"depth": None}, {}),
    "maple_half": ("maple", {"depth": None, "half_prompts": True}, {}),
    "ivlp": ("ivlp", {}, {"memory": "lean"}),
    "zeroshot": ("zeroshot", {}, {}),
    "parts": ("upt", {"n_text": 3, "n_visual": 2, "dropout": 0.2}, {"parts": MicroBatches(1, 1)}),
    "other_loss": ("upt", {"n_text": 3, "n_visual": 2}, {"loss": hinge}),
    "terms": ("tied", {}, {}),
    "terms_parts": ("tied", {}, {"parts": MicroBatches(1, 2), "loss": SMOOTHED}),
    "terms_by_image": ("tied", {"by_image": True}, {}),
    "one_image": ("upt", {"n_text": 3, "n_visual": 2}, {"batch": 1}),
    "two_classes": ("upt", {"n_text": 3, "n_visual": 2}, {"classes": 2}),
    "one_image_by_image": ("cocoop", {"n_ctx": 3}, {"batch": 1}),
    "one_image_two_classes": ("maple", {"depth": 1}, {"batch": 1, "classes": 2}),
    "ignored": ("coop", {"n_ctx": 3}, {"ignored": True}),
}


def clip():
    sizes = dict(vision_layers=3, vision_width=64, vision_head_width=32, text_layers=2, text_width=64)
    return random_clip(embed_dim=32, image_size=SIZE, **sizes).double()


def build(method, options, step):
    torch.manual_seed(5)
    how = {name: step[name] for name in ("memory", "text_batch") if name in step}
    return FastPromptedCLIP(CLIP, NAMES[: step.get("classes", 7)], method=method, **options, **how).train()


def optimizer_of(model):
    parameters = list(model.parameters())
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01) if parameters else None


def check(method, options, step):
    """Three steps of both; the second adds to the gradients of the first, the first is asked without sizes."""
    count = step.get("batch", 5)
    alone, shared = build(method, options, step), build(method, options, step)
    with torch.no_grad():  # as where processes began apart
        for parameter in shared.parameters():
            parameter.add_(GROUP.rank)
    divided = DistributedStep(shared, step.get("parts"))
    optimizers = [optimizer_of(alone), optimizer_of(shared)]
    loss, worst = step.get("loss", F.cross_entropy), 0.0
    for i in range(3):
        generator = torch.Generator().manual_seed(i)
        images = torch.randn(count, 3, SIZE, SIZE, dtype=torch.float64, generator=generator)
        labels = torch.randint(len(alone.classnames), (count,), generator=generator)
        if step.get("ignored"):
            labels[0] = -100
        own, sizes = GROUP.share(count), GROUP.sizes(count)
        if step.get("features"):
            features = alone.encode_image(images, normalize=False).detach()
            wanted_given, given = {"image_features": features}, {"image_features": features[own]}
            wanted_images = own_images = None
        else:
            wanted_given, given, wanted_images, own_images = {}, {}, images, images[own]
        torch.manual_seed(i)
        wanted = alone.loss_and_logits(wanted_images, labels, loss, **wanted_given)
        if wanted[0].requires_grad:
            wanted[0].backward()
        torch.manual_seed(i)
        known = {"sizes": sizes} if i else {}
        found = divided.backward(own_images, labels if i else labels[own], loss, **given, **known)
        compared = list(zip(found, wanted, strict=True))
        for ours, theirs in zip(shared.parameters(), alone.parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None)
            compared += [] if ours.grad is None else [(ours.grad, theirs.grad)]
        for optimizer in optimizers:
            if optimizer is not None and i != 0:
                optimizer.step()
                optimizer.zero_grad()
        compared += zip(shared.parameters(), alone.parameters(), strict=True)
        worst = max(worst, *(float(max_error(ours, theirs)) for ours, theirs in compared))
        rows = [value.detach().flatten() for value in (*found, *shared.parameters())]
        everywhere = GROUP.objects(torch.cat(rows))
        assert all(torch.equal(everywhere[0], theirs) for theirs in everywhere), "processes differ in bits"
    return worst


def main():
    found = {}
    for name in sys.argv[2:] or CASES:
        try:
            said = check(*CASES[name])
        except Exception:
            said = traceback.format_exc()
        every = GROUP.objects(said)
        texts = [text for text in every if isinstance(text, str)]
        found[name] = texts[0] if texts else max(every)
    if GROUP.first:
        Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    register_method(Tied)
    GROUP, CLIP = join(), clip()
    main()
