"""A training step as one CUDA graph: forward, loss, backward and optimizer, replayed by one launch.

At small batches a step is bound by its launches, a few thousand of some microseconds each. A graph records them once;
what changes from step to step, images, labels and learning rate, is copied into tensors that the graph reads. Where a
graph cannot be had, on a CPU or after an operation that waits for the GPU, the same step runs eagerly and says why.

The first steps run eagerly in any case, as real steps: they allocate the optimizer's state and let libraries choose
their algorithms, which a capture must not do.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from upt_fast.common.checks import require_int

REPLAYS = 10  # of each way to lay a step out, when they are timed
NOT_YET = "the first steps run eagerly"


class Trained(Protocol):
    """A model whose steps are captured."""

    training: bool
    logit_scale: Tensor
    text_stream: torch.cuda.Stream | None

    @property
    def packed(self) -> Any:
        """The classes of today; other ones are another graph."""

    @property
    def texts_by_image(self) -> bool:
        """Whether class features depend on the images, so that the towers cannot run side by side."""

    def loss_and_logits(
        self,
        images: Tensor | None,
        labels: Tensor,
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        image_features: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What a step minimises, and the logits."""

    def backward_in_parts(
        self,
        images: Tensor,
        labels: Tensor,
        micro_batches: Any,
        loss: Callable[[Tensor, Tensor], Tensor],
        scale: Callable[[Tensor], Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """Forward and backward, some images and some classes at once; the loss and the logits."""

    def parameters(self) -> Iterator[torch.nn.Parameter]: ...


class CudaGraph:
    """A captured function of static tensors.

    Args:
        device: a GPU.
        run: what is captured; it must not wait for the GPU.
    """

    def __init__(self, device: torch.device, run: Callable[[], None]) -> None:
        self._graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(device)
        # what other threads ask of CUDA, as a loader's that pins memory, neither breaks the capture nor fails in it
        stream, mode = torch.cuda.current_stream(device), "thread_local"
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode=mode):
            run()

    def replay(self) -> None:
        self._graph.replay()


def refusal(device: torch.device) -> str:
    """Why steps on a device are not captured; empty: they are."""
    return "" if device.type == "cuda" else f"{device.type} (graphs are CUDA's)"


class GraphedStep:
    """One training step of a model; see :meth:`FastPromptedCLIP.make_graphed_step` for the arguments.

    Attributes:
        reason: why steps run eagerly at present; empty while the graph is replayed.
        refused: why they do for good; empty: they do not.
        optimizer_captured: whether the optimizer's step is part of the graph.
        stream: on which steps run; several steps of one optimizer share it.
        two_streams: whether the graph runs the text tower beside the image tower.
    """

    def __init__(
        self,
        model: Trained,
        optimizer: torch.optim.Optimizer,
        batch_size: int,
        scaler: torch.amp.GradScaler | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        warmup: int = 3,
        two_streams: bool | None = None,
        capture: bool = True,
        micro_batches: Any = None,
        from_features: bool = False,
    ) -> None:
        require_int("batch_size", batch_size, 1)
        require_int("warmup", warmup, 1)
        self.model, self.optimizer, self.batch_size, self.scaler = model, optimizer, batch_size, scaler
        self.loss = F.cross_entropy if loss is None else loss
        self.warmup, self._asked_streams, self.micro_batches = warmup, two_streams, micro_batches
        self.optimizer_captured = _can_be_captured(optimizer, scaler)
        self.two_streams, self.from_features = False, from_features
        self.refused = refusal(model.logit_scale.device) if capture else "capture=False"
        self.stream: torch.cuda.Stream | None = None
        self._forget()

    def _forget(self) -> None:
        self._graph: CudaGraph | None = None
        self._key: tuple[Any, ...] | None = None
        self._eager_steps = 0
        self._inputs: tuple[Tensor, Tensor] | None = None
        self._outputs: tuple[Tensor, Tensor] | None = None
        self._gradients: list[Tensor | None] = []
        self._rates: list[Tensor] = []

    @property
    def reason(self) -> str:
        return self.refused or ("" if self._graph is not None else NOT_YET)

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Train on one batch; the model's parameters have their gradients afterwards, as the optimizer saw them.

        Args:
            images: (B, 3, H, W), normalised with the CLIP's mean and standard deviation, or with from_features (B, e);
                a B other than batch_size runs eagerly.
            labels: (B,) int64.
        Returns:
            the loss (), and the logits (B, C) in float32, without gradients; the next step overwrites both.
        """
        if self.refused:
            return self._eager(images, labels)
        with self._on_stream():
            key = self._state_key(images, labels)
            if len(images) != self.batch_size:
                return self._eager(images, labels)
            if key != self._key:
                self._forget()
                self._key = key
            if self._graph is None and self._eager_steps < self.warmup:
                self._eager_steps += 1
                return self._eager(images, labels)
            if self._graph is None and not self._capture(images, labels):
                return self._eager(images, labels)
            return self._replay(images, labels)

    def _state_key(self, images: Tensor, labels: Tensor) -> tuple[Any, ...]:
        """What a captured step holds fixed; where it changed, that is other classes, options or tensors."""
        tensors = [*self.model.parameters(), self.model.logit_scale, *self._state_tensors()]
        options = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in self.optimizer.param_groups]
        shape = images.dtype, images.shape[1:], images.device, labels.dtype
        return *shape, self.model.training, self.model.packed, options, [t.data_ptr() for t in tensors]

    @contextlib.contextmanager
    def _on_stream(self) -> Iterator[None]:
        """Run on one stream of our own: gradients are accumulated on the stream that saw their parameter first."""
        device = self.model.logit_scale.device
        if device.type != "cuda":
            yield
            return
        if self.stream is None:
            self.stream = torch.cuda.Stream(device)
        outer = torch.cuda.current_stream(device)
        self.stream.wait_stream(outer)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:  # the batch's memory is the outer stream's: it is used again behind this step's reads
            outer.wait_stream(self.stream)

    def _forward_backward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        if self.micro_batches is not None:
            scale = None if self.scaler is None else self.scaler.scale
            return self.model.backward_in_parts(images, labels, self.micro_batches, self.loss, scale)
        if self.from_features:
            loss, logits = self.model.loss_and_logits(None, labels, self.loss, image_features=images)
        else:
            loss, logits = self.model.loss_and_logits(images, labels, self.loss)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return loss.detach(), logits.detach()

    def _update(self) -> None:
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def _eager(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self._forward_backward(images, labels)
        self._update()
        return outputs

    def _replay(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        assert self._graph is not None
        assert self._inputs is not None
        for static, value in zip(self._inputs, (images, labels), strict=True):
            static.copy_(value, non_blocking=True)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=False):
            if group["lr"] is not rate:  # a number, or another tensor, was put there
                rate.fill_(group["lr"])
                group["lr"] = rate
        self._graph.replay()
        for parameter, gradient in zip(self.model.parameters(), self._gradients, strict=True):
            parameter.grad = gradient  # an eager step in between has put others there
        if not self.optimizer_captured:
            self._update()
        assert self._outputs is not None
        return self._outputs

    def _capture(self, images: Tensor, labels: Tensor) -> bool:
        """Capture the step; where that fails, note why and stay eager."""
        self._inputs = images.detach().clone(), labels.clone()
        if self.optimizer_captured:
            for group in self.optimizer.param_groups:  # a number would be captured as it is now
                rate = torch.as_tensor(group["lr"], dtype=torch.float32, device=images.device)
                group["lr"] = rate
                self._rates.append(rate)
        try:
            self._graph = self._best_graph()
        except (RuntimeError, ValueError, NotImplementedError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._forget()
            self.refused = f"the step cannot be captured: {first}"
            return False
        return True

    def _best_graph(self) -> CudaGraph:
        """With the text tower beside the image tower, or behind it, whichever is asked for or faster."""
        # texts that depend on the image features cannot run beside them, and in parts all run one after another
        ways = [False] if self.model.texts_by_image or self.micro_batches is not None else [False, True]
        if self._asked_streams is not None:
            ways = [self._asked_streams and len(ways) > 1]
        found = [(self._record(two_streams), two_streams) for two_streams in ways]
        if len(found) > 1:
            found.sort(key=lambda graph: self._seconds(graph[0][0]))
        (graph, self._outputs, self._gradients), self.two_streams = found[0]
        return graph

    def _record(self, two_streams: bool) -> tuple[CudaGraph, tuple[Tensor, Tensor], list[Tensor | None]]:
        assert self._inputs is not None
        images, labels = self._inputs

        def run() -> None:
            self._outputs = self._forward_backward(images, labels)
            if self.optimizer_captured:
                self._update()

        device = images.device
        self.model.text_stream = torch.cuda.Stream(device) if two_streams and device.type == "cuda" else None
        try:
            self.optimizer.zero_grad(set_to_none=True)
            graph = CudaGraph(device, run)
        finally:
            self.model.text_stream = None
        assert self._outputs is not None
        return graph, self._outputs, [parameter.grad for parameter in self.model.parameters()]

    def _seconds(self, graph: CudaGraph) -> float:
        """Of a replay; parameters, the optimizer's state and random numbers are put back afterwards."""
        device = self.model.logit_scale.device
        tensors = [*self.model.parameters(), *self._state_tensors()]
        before = [tensor.detach().clone() for tensor in tensors]
        random = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
        graph.replay()
        synchronize(device)
        start = time.perf_counter()
        for _ in range(REPLAYS):
            graph.replay()
        synchronize(device)
        seconds = (time.perf_counter() - start) / REPLAYS
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
        if device.type == "cuda":
            torch.cuda.set_rng_state(random, device)
        else:
            torch.set_rng_state(random)
        return seconds

    def _state_tensors(self) -> Iterator[Tensor]:
        """What the optimizer and the loss scaler change in a step, parameters aside."""
        for state in self.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))
        yield from scaler_tensors(self.scaler)


def _can_be_captured(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> bool:
    """Whether an optimizer's step neither waits for the GPU nor refuses a capture.

    Those that count steps, as Adam, refuse unless they are capturable, fused or not; SGD has to be fused, for else its
    learning rate is a number. Behind a loss scaler, one that is not fused waits to know whether gradients are finite.
    """

    def can(group: dict[str, Any]) -> bool:
        fused = bool(group.get("fused"))
        return bool(group.get("capturable", fused)) and (fused or scaler is None)

    return all(map(can, optimizer.param_groups))


def scaler_tensors(scaler: torch.amp.GradScaler | None) -> Iterator[Tensor]:
    """What a loss scaler changes in a step."""
    for name in ("_scale", "_growth_tracker"):
        value = getattr(scaler, name, None)
        if isinstance(value, Tensor):
            yield value


def synchronize(device: torch.device) -> None:
    """Wait for all that was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
