"""The process that measures routes for ``upt-fast tune``: its model, its candidates, and what they are held to."""

from __future__ import annotations

import contextlib
import copy
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from upt_fast.clip.loading import clip_with_random_weights
from upt_fast.data.benchmark import bench_classnames
from upt_fast.engine import graphs
from upt_fast.engine.graphs import GraphedStep
from upt_fast.engine.tuning.candidates import INFERENCE, STEP, Route, declared
from upt_fast.engine.tuning.judge import Judge
from upt_fast.methods import find_method
from upt_fast.model import DTYPES, FastPromptedCLIP
from upt_fast.reference import TWINS, ReferencePromptedCLIP
from upt_fast.steps.twins import CLASSES, PLAIN, result_names, results, small_images, towers_dtype
from upt_fast.tools.isolated import Measurement
from upt_fast.tools.kernel_choices import Kernels
from upt_fast.tools.peak_memory import PeakMemory

WARMUP = 3  # steps before a capture
LAYERS = 3  # of the model that is held to the reference


def make_model(
    clip: nn.Module, tokenizer: Any, method: str, classnames: Sequence[str], precision: str, memory: str
) -> FastPromptedCLIP:
    """The model that is measured, with the method's default options."""
    config, dtype = find_method(method).config.from_options({}), DTYPES[precision]
    options: dict[str, Any] = {"tokenizer": tokenizer, "config": config, "dtype": dtype, "memory": memory}
    return FastPromptedCLIP(clip, classnames, method=method, **options).train()


def measurement(
    clip: str,
    method: str,
    classes: int,
    batch_size: int,
    precision: str,
    memory: str,
    device: str,
    mode: str,
    budget: float,
    only: Sequence[str] | None,
    refused: Mapping[str, str],
    beside: Mapping[str, str] | None = None,
) -> Measurement:
    """For :func:`upt_fast.tools.isolated.measure_isolated`; the arguments are those of tune.py."""
    torch.manual_seed(0)
    weights, tokenizer = clip_with_random_weights(clip)
    names = bench_classnames(classes)
    of = weights.to(device), tokenizer, names, method
    return measurement_of(*of, batch_size, precision, memory, mode, budget, only, beside)


def measurement_of(
    clip: nn.Module,
    tokenizer: Any,
    classnames: Sequence[str],
    method: str,
    batch_size: int,
    precision: str,
    memory: str,
    mode: str,
    budget: float,
    only: Sequence[str] | None = None,
    beside: Mapping[str, str] | None = None,
) -> Measurement:
    """The same of a CLIP that is at hand.

    Args:
        clip: where it is measured.
        tokenizer: its own; None: CLIP's.
        classnames: C names.
        method: its name.
        batch_size: B.
        precision: one of PRECISIONS.
        memory: level of a training step.
        mode: STEP or INFERENCE.
        budget: seconds in all.
        only: backends to measure beside the usual one, in the place of those that are declared.
        beside: further ones by those that they stand beside.
    """
    model = make_model(clip, tokenizer, method, classnames, precision, memory)
    model.settled = True
    if mode == INFERENCE:
        model.eval()
    small = _small(clip, tokenizer, method, precision)
    where = model.logit_scale.device
    usual = model.usual_route(mode)
    found, left_out = declared(where.type, usual.backend, usual.graph, only=only, beside=beside)
    subject = _Subject(model, small, batch_size, mode, found.values())
    judge = _judge(*small, tokenizer, mode)
    candidates = {name: _Candidate(subject, route) for name, route in found.items()}

    def healthy() -> bool:
        with contextlib.suppress(RuntimeError):
            graphs.synchronize(where)
            return True
        return False

    return Measurement(candidates, usual.name, judge, budget, left_out, healthy)


def kernels(
    clip: str,
    method: str,
    classes: int,
    batch_size: int,
    precision: str,
    memory: str,
    device: str,
    mode: str,
    backends: Sequence[str],
    seconds: float,
    fresh: bool,
    refused: Mapping[str, str],
) -> Kernels:
    """The same for single operations of some routes; see :class:`upt_fast.tools.kernel_choices.Kernels`."""
    torch.manual_seed(0)
    weights, tokenizer = clip_with_random_weights(clip)
    model = make_model(weights.to(device), tokenizer, method, bench_classnames(classes), precision, memory)
    model.settled = True
    subject = _Subject(model, (model, weights), batch_size, mode, ())

    def step() -> object:
        if mode == STEP:
            return model.loss(subject.images, subject.labels)
        with torch.no_grad():
            return model.eval()(subject.images)

    return Kernels(model, step, backends, seconds, fresh)


class _Subject:
    """The model that candidates share, and a batch; and the small one that is held to the reference."""

    def __init__(
        self,
        model: FastPromptedCLIP,
        small: tuple[FastPromptedCLIP, nn.Module],
        batch_size: int,
        mode: str,
        routes: Iterable[Route],
    ) -> None:
        self.model, self.small, self.mode, self.batch_size = model, small[0], mode, batch_size
        device = model.logit_scale.device
        shape = batch_size, 3, *model.vision_tower.image_size
        self.images = torch.randn(shape, device=device).to(towers_dtype(model))
        self.labels = torch.arange(batch_size, device=device) % len(model.classnames)
        self.ways: dict[str, Any] = {}  # by backend
        self.users = Counter(route.backend for route in routes)  # of each way

    def small_results(self, backend: str) -> list[Tensor]:
        self.small.reroute(backend)
        found = results(self.small, small_images(self.small))
        return found[:1] if self.mode == INFERENCE else found

    def let_go(self, backend: str) -> None:
        """One candidate less needs a way."""
        self.users[backend] -= 1
        if not self.users[backend]:
            self.ways.pop(backend, None)


class _Candidate:
    """See upt_fast.engine.tuning.measuring.Candidate."""

    def __init__(self, subject: _Subject, route: Route) -> None:
        self.subject, self.route = subject, route
        self._step: GraphedStep | None = None
        self._way: Any = None

    def prepare(self) -> None:
        subject, model = self.subject, self.subject.model
        known = subject.ways.get(self.route.backend)
        if known is None:
            model.reroute(self.route.backend)
            subject.ways[self.route.backend] = model.way()
        else:
            model.take_way(known)
        self._way = subject.ways[self.route.backend]
        if subject.mode == STEP:
            # nothing is learned: each candidate has the same prompts
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, fused=model.logit_scale.is_cuda)
            self._step = GraphedStep(model, optimizer, subject.batch_size, warmup=WARMUP, capture=self.route.graph)
        for tower in (model.vision_tower, model.text_tower):
            tower.blocks.release()  # another route's memory
        with PeakMemory(model.logit_scale.device) as self._memory:
            for _ in range(WARMUP + 1 if self.route.graph else 1):
                self._once()
        if self.route.graph and self._step is not None and self._step.reason:
            raise RuntimeError(self._step.reason)

    def results(self) -> Sequence[Tensor]:
        return self.subject.small_results(self.route.backend)

    def results_at_full_size(self) -> Sequence[Tensor]:
        logits = self._once()
        if self._step is None:
            return [logits]
        return [logits, *(p.grad for p in self.subject.model.parameters() if p.grad is not None)]

    def run(self) -> float:
        device = self.subject.model.logit_scale.device
        self.subject.model.take_way(self._way)
        graphs.synchronize(device)
        began = time.perf_counter()
        self._once()
        graphs.synchronize(device)
        return time.perf_counter() - began

    def peak_mib(self) -> float | None:
        return self._memory.mib

    def close(self) -> None:
        # a graph's memory is PyTorch's again, which gives it to others when it has no more
        self._step = self._way = None
        self.subject.let_go(self.route.backend)

    def _once(self) -> Tensor:
        subject = self.subject
        subject.model.take_way(self._way)
        if self._step is not None:
            return self._step(subject.images, subject.labels)[1]
        with torch.no_grad():
            return subject.model(subject.images)


def _small(clip: nn.Module, tokenizer: Any, method: str, precision: str) -> tuple[FastPromptedCLIP, nn.Module]:
    """A model with few classes on the first layers of the CLIP, which have all that its others have; and that CLIP.

    A method that wants more layers has all.
    """
    cut: Any = copy.deepcopy(clip)
    for tower in (cut.visual, getattr(cut, "text", cut)):
        tower.transformer.resblocks = tower.transformer.resblocks[:LAYERS]
    for found in (cut, clip):
        try:
            model = make_model(found, tokenizer, method, bench_classnames(CLASSES), precision, "fast")
        except ValueError:
            if found is clip:
                raise
            continue
        model.settled = True
        return model.eval(), found
    raise AssertionError


def _judge(small: FastPromptedCLIP, clip: nn.Module, tokenizer: Any, mode: str) -> Judge:
    """Holds candidates to the plain reference; a method from a file of its own, which has none, to its own towers."""
    images, dtype = small_images(small), towers_dtype(small)
    count = 1 if mode == INFERENCE else None

    def reference(dtype: torch.dtype) -> ReferencePromptedCLIP:
        own, options = copy.deepcopy(clip).to(dtype), {"tokenizer": tokenizer, "config": small.config}
        found = ReferencePromptedCLIP(own, small.classnames, method=small.method, **options)
        found.load_state_dict(small.state_dict())
        found.to(images.device)
        return (found.double() if dtype == torch.float64 else found).eval()

    if small.method not in TWINS:
        small.reroute(PLAIN)
        plain, exact = results(small, images)[:count], copy.deepcopy(small).double()
        return Judge(results(exact, images.double())[:count], plain, result_names(small)[:count], dtype)
    twin = reference(torch.float64)

    def again() -> list[Tensor]:
        return results(twin, images.double())[:count]

    plain = results(reference(dtype), images)[:count]
    return Judge(again(), plain, result_names(small)[:count], dtype, again)
