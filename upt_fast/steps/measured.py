"""What FastPromptedCLIP has of routes that are chosen by measuring: looked up, or measured during the first steps."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from upt_fast.engine import graphs
from upt_fast.engine.autograd import composing
from upt_fast.engine.backends import dispatch
from upt_fast.engine.backends.asked import AUTO
from upt_fast.engine.graphs import GraphedStep
from upt_fast.engine.towers import TextTower, VisionTower
from upt_fast.engine.tuning import choices
from upt_fast.engine.tuning.candidates import INFERENCE, STEP, Route, size_class
from upt_fast.engine.tuning.measuring import Entry
from upt_fast.steps.lanes import RunState
from upt_fast.steps.micro_batches import MicroBatches
from upt_fast.steps.tuned import TunedStep

if TYPE_CHECKING:
    from upt_fast.model import FastPromptedCLIP

logger = logging.getLogger("upt_fast")

STEPS = 1000  # of a run that does not say how many it takes
AGAIN = 4.0  # times the seconds that an incomplete measurement had: reason to measure once more


class MeasuredRoutes(nn.Module):
    """Of FastPromptedCLIP; see rerouting.py."""

    text_tower: TextTower
    vision_tower: VisionTower
    method: str
    classnames: tuple[str, ...]
    logit_scale: Tensor
    quantized: bool
    auto: bool
    settled: bool
    reroute: Callable[[str], None]

    if TYPE_CHECKING:

        @property
        def backend(self) -> str: ...

    @property
    def usual_backend(self) -> str:
        """What "auto" is where nothing was measured."""
        blocks = [tower.blocks for tower in (self.vision_tower, self.text_tower)]
        images, texts = ((b.width, b.num_heads) for b in blocks)
        return dispatch.safe(self.logit_scale.device.type, blocks[0].qkv_bias.dtype, images, texts)

    def usual_route(self, mode: str) -> Route:
        """The same with a graph, where steps are captured."""
        return Route(self.usual_backend, mode == STEP and not graphs.refusal(self.logit_scale.device))

    def route_key(
        self,
        mode: str,
        batch_size: int,
        from_features: bool = False,
        classes: int | None = None,
        device: str | None = None,
    ) -> str:
        """What a choice is kept under, beside the machine.

        Args:
            mode: STEP or INFERENCE.
            batch_size: B that run at once.
            from_features: whether image features are given.
            classes: C; None: this model's.
            device: kind of device; None: this model's.
        """
        classes = len(self.classnames) if classes is None else classes
        device = self.logit_scale.device.type if device is None else device
        image, text = self.vision_tower.blocks, self.text_tower.blocks
        dtype = str(image.qkv_bias.dtype).removeprefix("torch.")
        if device == "cuda" and dtype == "float32" and torch.backends.cuda.matmul.allow_tf32:
            dtype = "tf32"
        parts = [
            f"{mode} of {self.method}{' from features' if from_features else ''}",
            f"images {image.num_layers} x {image.width} / {image.num_heads}, {image.length} rows",
            f"texts {text.num_layers} x {text.width} / {text.num_heads}, {image.activation}",
            f"classes {size_class(classes)}",
            f"batch {size_class(batch_size)}",
            f"{dtype}, memory {image.memory}",
        ]
        return "; ".join([*parts, f"{torch.get_num_threads()} threads"] if device == "cpu" else parts)

    def not_measured(self) -> str:
        """Why no route is measured here and now; empty: it may be."""
        if not self.auto:
            return f"backend={self.backend!r} was asked for"
        if not choices.measures():
            return "UPT_FAST_MEASURE=0"
        if self.quantized:
            return "dtype='fp8'"
        if torch.are_deterministic_algorithms_enabled():
            return "torch.use_deterministic_algorithms is on"
        if _is_traced():
            return "torch.compile, a CUDA graph or a transform is at work"
        if threading.current_thread() is not threading.main_thread():
            return "not in the main thread"
        return ""

    def settle(self, key: str, captured: bool = False) -> None:
        """Take the route that was measured here before, if any, for good.

        Args:
            key: :meth:`route_key` of the batches to come.
            captured: whether they are going to be, where that is best.
        """
        if self.settled or _is_traced():
            return
        self.settled = True
        if not self.auto or self.quantized:
            return
        kind = self.logit_scale.device.type
        found = choices.find(key, kind)
        if found is None:
            return
        route = Route.of(found)
        if route.graph and not captured:  # nothing is captured here: the fastest of those that need no graph
            ms = choices.kept(kind).get(key, {}).get("ms", {})
            route = Route(min((name for name in ms if not Route.of(name).graph), key=ms.__getitem__, default=""))
        self._take(route.backend)

    def _settle(self, images: Tensor | None, features: Tensor | None) -> None:
        if not self.settled and not _is_traced():
            batch = images if features is None else features
            mode = STEP if self.training else INFERENCE
            self.settle(self.route_key(mode, 0 if batch is None else len(batch), features is not None))

    def _take(self, backend: str) -> None:
        """Take a route that was measured, if it still runs."""
        if not backend or backend == (self.usual_backend if self.backend == AUTO else self.backend):
            return
        try:
            self.reroute(backend)
        except ValueError as error:  # a package that is gone
            logger.warning("the route that was measured does not run: %s", str(error).splitlines()[0])

    def make_graphed_step(
        self,
        optimizer: torch.optim.Optimizer,
        batch_size: int,
        *,
        scaler: torch.amp.GradScaler | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        warmup: int = 3,
        two_streams: bool | None = None,
        capture: bool = True,
        micro_batches: MicroBatches | None = None,
        from_features: bool = False,
        tune: bool = True,
        steps: int | None = None,
        decided: Callable[[], None] = lambda: None,
    ) -> GraphedStep | TunedStep:
        """A function that trains on a batch: forward, loss, backward and optimizer, in a CUDA graph where that is best.

        On other devices, and where a capture fails, it runs the same step eagerly; its ``reason`` says why. With
        backend="auto" it takes the route that was measured on this machine for such batches. Where none was, its first
        calls measure: each is an ordinary step, by every route that may be the fastest, of which the others' are undone
        (upt_fast/steps/tuned.py); it takes at most a twentieth of the run. Read parameters between steps only behind
        ``settle()`` of what is returned, where it has one.

        Args:
            optimizer: of :meth:`parameters`. Its own step is captured where it can be, with ``fused=True`` (SGD) or
                ``capturable=True`` (Adam, with a scaler fused as well), and its learning rate becomes a tensor, which
                schedulers write to; else it runs behind the graph.
            batch_size: B of the batches that are replayed; others run eagerly.
            scaler: scales the loss, for float16; needs a fused optimizer to be captured.
            loss: of logits (B, C) in float32 and labels (B,); None: mean cross-entropy.
            warmup: steps that run eagerly before the capture, at least 1.
            two_streams: whether to run the text tower beside the image tower; None: whichever is faster.
            capture: False: run every step eagerly.
            micro_batches: what runs at once, as for :meth:`backward_in_parts`; None: the whole step.
            from_features: whether the step is called with image features in the place of images.
            tune: whether a route that was not measured here before is measured.
            steps: that are going to be taken, about; None: 1000.
            decided: is called once the route is chosen.
        Raises:
            ValueError: batch_size, warmup or steps below 1.

        Example:
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.002, momentum=0.9, fused=True)
            >>> step = model.make_graphed_step(optimizer, batch_size=32)
            >>> loss, logits = step(images, labels)  # the next step overwrites both
        """
        model = cast("FastPromptedCLIP", self)
        given: dict[str, Any] = {"scaler": scaler, "loss": loss, "warmup": warmup, "two_streams": two_streams}
        given |= {"micro_batches": micro_batches, "from_features": from_features}

        def make(graph: bool) -> GraphedStep:
            return GraphedStep(model, optimizer, batch_size, **given, capture=graph)

        step = make(capture)  # checks the numbers
        self.settled, kind = True, self.logit_scale.device.type
        if self.auto and not self.quantized:
            at_once = min(batch_size, (micro_batches and micro_batches.images) or batch_size)
            key = self.route_key(STEP, at_once, from_features)
            found = choices.find(key, kind)
            steps = STEPS if steps is None else steps
            if found is not None and not (tune and self._worth_more(key, steps)):
                route = Route.of(found)
                self._take(route.backend)
                return make(capture and (route.graph or route.backend == self.usual_backend))
            usual = self.usual_route(STEP)
            usual = usual._replace(graph=usual.graph and capture)
            if tune and not self.not_measured() and micro_batches is None:

                def chosen(route: Route, entry: Entry | None) -> None:
                    if entry is None:
                        choices.take(key, route.name)
                    else:
                        choices.keep(key, {**entry, "at": [len(self.classnames), batch_size]}, kind)
                        logger.info("%s", describe_choice(route, entry))
                    decided()

                state = RunState(model.prompt_learner, optimizer, scaler)
                return TunedStep(model, state, usual, make, usual.graph, from_features, steps, chosen)
            choices.take(key, usual.name)
        return step

    def _worth_more(self, key: str, steps: int) -> bool:
        """Whether what was measured had too little time for all candidates, and this run has much more."""
        entry = choices.kept(self.logit_scale.device.type).get(key)
        if entry is None or "budget_s" not in entry:  # a run's record, or measured whole
            return False
        left_out = any(reason.startswith("not tried") for reason in entry["refused"].values())
        seconds = entry["ms"].get(entry["choice"], 0.0) / 1e3
        return left_out and 0.05 * steps * seconds > AGAIN * entry["budget_s"]


def describe_choice(route: Route, entry: Entry) -> str:
    """A choice and its margin in a line."""
    ms, usual = entry["ms"], entry["usual"]
    if route.name == usual or usual not in ms:
        others = sorted(value for name, value in ms.items() if name != route.name)
        margin = f", {others[0] / ms[route.name]:.2f} times as fast as the next" if others else ""
    else:
        margin = f", {ms[usual] / ms[route.name]:.2f} times as fast as {usual}"
    return f"route {route.name}: {ms[route.name]:.4g} ms a step{margin} (measured among {len(ms)} routes)"


def _is_traced() -> bool:
    if torch.compiler.is_compiling() or composing.composes():
        return True
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
