"""``upt-fast tune``: measure the routes through the towers on this machine, and keep which is the fastest.

The CLIP has random weights, which are as fast as any; nothing is downloaded. Each candidate is held to the plain
reference (upt_fast/reference) in float64 first, on few classes and images, and to the usual route at the size that is
timed.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from upt_fast.clip.loading import clip_with_random_weights, model_without_weights
from upt_fast.common.checks import require_choice, require_int
from upt_fast.data.benchmark import bench_classnames
from upt_fast.engine import graphs
from upt_fast.engine.backends import dispatch
from upt_fast.engine.graphs import GraphedStep
from upt_fast.engine.tuning import choices, table
from upt_fast.engine.tuning.candidates import INFERENCE, STEP, Route, declared
from upt_fast.engine.tuning.judge import Judge
from upt_fast.engine.tuning.machine import machine
from upt_fast.engine.tuning.measuring import Entry
from upt_fast.methods import find_method
from upt_fast.model import DTYPES, FastPromptedCLIP
from upt_fast.reference import TWINS, ReferencePromptedCLIP
from upt_fast.steps.twins import CLASSES, PLAIN, result_names, results, small_images, towers_dtype
from upt_fast.tools import kernel_choices
from upt_fast.tools.isolated import Measurement, measure_isolated
from upt_fast.tools.kernel_choices import Kernels
from upt_fast.tools.peak_memory import PeakMemory

PRECISIONS = ("fp32", "bf16", "fp16")
MODES = {"train": (STEP,), "inference": (INFERENCE,), "both": (STEP, INFERENCE)}
SECONDS = {"cuda": 110.0, "cpu": 900.0}  # of all that is measured for a size
PATIENCE = {"cuda": 90.0, "cpu": 300.0}  # without a word: compilation is the longest
KERNELS_SHARE = 0.2  # of these seconds, at most, for single operations
WARMUP = 3  # steps before a capture
LAYERS = 3  # of the model that is held to the reference


def tune(
    clip: str,
    method: str,
    classes: int,
    batch_size: int,
    precision: str = "fp32",
    memory: str = "fast",
    mode: str = "both",
    device: str = "cpu",
    seconds: float | None = None,
    fresh: bool = False,
    only: Sequence[str] | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure, keep what was found, and say it; what is known is not measured again.

    Args:
        clip: a name for :func:`upt_fast.clip.loading.clip_with_random_weights`.
        method: its name; its default options.
        classes: C, names of Caltech101's classes up to 100, of ImageNet's beyond.
        batch_size: B.
        precision: one of PRECISIONS.
        memory: level of a training step.
        mode: a name of MODES.
        device: "cpu" or "cuda".
        seconds: for all that is measured; None: those of SECONDS.
        fresh: measure what is known, too.
        only: backends that are measured, beside the usual one; None: all.
        tell: hears in a line what is done.
    Returns:
        "machine", what was asked for, by mode "key", "entry", and whether it was "known" before; and "kernels", what
        is known of single operations.
    Raises:
        ValueError: a name or a number that is not taken; says what was wanted.
        RuntimeError: nothing could be measured; says why.
    """
    for name, number in (("classes", classes), ("batch_size", batch_size)):
        require_int(name, number, 1)
    require_choice("precision", precision, PRECISIONS)
    require_choice("mode", mode, tuple(MODES))
    if seconds is not None and not 0 < seconds < float("inf"):
        raise ValueError(f"seconds={seconds}; wanted a number above 0")
    for backend in only or ():
        dispatch.resolve(backend)
    kind = device.partition(":")[0]
    asked = {"clip": clip, "method": method, "classes": classes, "batch_size": batch_size}
    asked |= {"precision": precision, "memory": memory, "device": device}
    seconds = SECONDS[kind] if seconds is None else seconds
    with torch.random.fork_rng(devices=[]):
        shapes = _model(*model_without_weights(clip), method, bench_classnames(classes), precision, memory)
    found: dict[str, Any] = {"machine": machine(kind), **asked, "modes": {}}
    modes = [m for m in MODES[mode] if m == INFERENCE or any(True for _ in shapes.parameters())]
    end = time.monotonic() + seconds
    for place, name in enumerate(modes):
        key = shapes.route_key(name, batch_size, device=kind)
        entry = None if fresh else choices.kept(kind).get(key)
        known = entry is not None and "budget_s" not in entry  # what a run has measured had no time for all
        if not known:
            share = 1.0 if place == len(modes) - 1 else 0.7
            for_kernels = KERNELS_SHARE * share * (end - time.monotonic())
            beside = _routes_beside({**asked, "mode": name}, kind, for_kernels, fresh, tell) if only is None else {}
            budget = (end - time.monotonic()) * share
            arguments = {**asked, "mode": name, "budget": max(budget, 1.0), "only": only, "beside": beside}
            entry = measure_isolated("upt_fast.tools.tune:measurement", arguments, PATIENCE[kind], tell)
            choices.keep(key, entry | {"at": [classes, batch_size]}, kind)
        found["modes"][name] = {"key": key, "entry": entry, "known": known}
    return found | {"kernels": kernel_choices.known(kind)}


def _routes_beside(
    asked: Mapping[str, Any], kind: str, seconds: float, fresh: bool, tell: Callable[[str], None]
) -> Entry:
    """Routes whose slow kernels are left to PyTorch, by the declared ones that have the kernels."""
    backends = kernel_choices.with_kernels(kind)
    if not backends:
        return {}
    arguments = {**asked, "backends": backends, "seconds": seconds, "fresh": fresh}
    try:
        return measure_isolated("upt_fast.tools.tune:kernels", arguments, PATIENCE[kind], tell)
    except RuntimeError as error:  # the routes themselves are measured all the same
        tell(f"no single operation was measured: {error}")
        return {}


def export(kind: str, file: Path) -> int:
    """Write this machine's table into a file; how many entries.

    Raises:
        ValueError: there are none.
    """
    entries = table.read(machine(kind))
    if not entries:
        raise ValueError("nothing was measured on this machine; run upt-fast tune first")
    file.write_text(table.dump(machine(kind), entries), encoding="utf-8")
    return len(entries)


def take_over(kind: str, file: Path) -> int:
    """Take the entries of a file into this machine's table; how many.

    Raises:
        ValueError: it is no table, or that of another kind of machine.
    """
    entries = table.load(file, machine(kind))
    for key, entry in entries.items():
        choices.keep(key, entry, kind)
    return len(entries)


def _model(
    clip: nn.Module, tokenizer: Any, method: str, classnames: Sequence[str], precision: str, memory: str
) -> FastPromptedCLIP:
    config, dtype = find_method(method).config.from_options({}), DTYPES[precision]
    options: dict[str, Any] = {"tokenizer": tokenizer, "config": config, "dtype": dtype, "memory": memory}
    return FastPromptedCLIP(clip, classnames, method=method, **options).train()


# the process that measures


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
    """For :func:`upt_fast.tools.isolated.measure_isolated`; the arguments are those of :func:`tune`."""
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
    model = _model(clip, tokenizer, method, classnames, precision, memory)
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
    model = _model(weights.to(device), tokenizer, method, bench_classnames(classes), precision, memory)
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
            model = _model(found, tokenizer, method, bench_classnames(CLASSES), precision, "fast")
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
