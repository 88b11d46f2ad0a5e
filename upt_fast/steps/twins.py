"""A model beside itself: on few classes and images, in float64, to hold a route's results to.

The CLIP's own weights are not at hand once they are folded, so a run's routes are held to the folded ones in float64,
and to what PyTorch's operations, or the usual route, make of them in the run's precision.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from upt_fast.engine.autograd import composing
from upt_fast.engine.tuning.judge import Judge

if TYPE_CHECKING:
    from upt_fast.model import FastPromptedCLIP

CLASSES, IMAGES = 4, 2
PLAIN = "torch"


def make_judge(model: FastPromptedCLIP) -> Judge:
    """Of the routes that a model may take; it stays on the usual one, which tests hold to the reference."""
    way, usual = model.way(), small_results(model)
    try:
        model.reroute(PLAIN)
        plain = small_results(model)
        small = small_twin(model)
        exact = copy.deepcopy(small).double()
    finally:
        model.take_way(way)
    images = small_images(model).double()

    def again() -> list[Tensor]:
        with composing.composable():  # operations one by one, so that each can be off
            return results(exact, images)

    judge = Judge(again(), plain, result_names(small), towers_dtype(model), again)
    judge.trust(usual)
    return judge


def result_names(model: nn.Module) -> list[str]:
    """Of what :func:`results` gives."""
    return ["logits", *(f"the gradient of {name}" for name, _ in model.named_parameters())]


def small_results(model: FastPromptedCLIP) -> list[Tensor]:
    """Logits and all gradients of a model's twin with few classes, on few images, on the route that it is on."""
    return results(small_twin(model), small_images(model))


class Learns(Protocol):
    """A model, fast or plain."""

    classnames: tuple[str, ...]

    def loss_and_logits(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


def results(model: Learns, images: Tensor) -> list[Tensor]:
    """Logits and all gradients, of the first classes."""
    labels = torch.arange(len(images), device=images.device) % len(model.classnames)
    with torch.enable_grad():
        loss, logits = model.loss_and_logits(images, labels)
        parameters = list(model.parameters())
        gradients = torch.autograd.grad(loss, parameters, materialize_grads=True) if parameters else ()
    return [logits.detach(), *gradients]


def small_twin(model: FastPromptedCLIP) -> FastPromptedCLIP:
    """A sibling in evaluation, which draws no random numbers, with prompts of its own where classes have theirs."""
    with torch.random.fork_rng(devices=[model.logit_scale.device] if model.logit_scale.is_cuda else []):
        torch.manual_seed(0)
        twin = model.sibling(model.classnames[:CLASSES], method=model.method, config=model.config)
    twin.settled = True
    own, others = dict(twin.prompt_learner.named_parameters()), dict(model.prompt_learner.named_parameters())
    with torch.no_grad():
        for name, parameter in own.items():
            if others[name].shape == parameter.shape:
                parameter.copy_(others[name])
    return twin.eval()


def small_images(model: FastPromptedCLIP) -> Tensor:
    """(IMAGES, 3, H, W), the same each time."""
    generator = torch.Generator().manual_seed(0)
    shape = IMAGES, 3, *model.vision_tower.image_size
    return torch.randn(shape, generator=generator).to(model.logit_scale.device, towers_dtype(model))


def towers_dtype(model: FastPromptedCLIP) -> torch.dtype:
    """In which a model's towers compute."""
    return model.vision_tower.blocks.qkv_bias.dtype
