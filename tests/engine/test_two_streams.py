"""The text tower on a stream beside the image tower's: no read before its write, no memory used again too early.

There is no GPU here, so a simulation: streams with clocks stand in for CUDA's, a dispatch mode sees every operation and
the tensors that it reads and makes, and hooks on the graph's nodes do what autograd's engine does on a GPU, whose
backward runs on the stream of its forward. A tensor that a stream reads must have been written before, as far as
wait_stream orders them; and memory of another stream must be known to the allocator by record_stream, for it goes back
to the stream that it came from as soon as Python lets go of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from upt_fast.engine import graphs
from upt_fast.features.texts import PromptedTexts
from upt_fast.testing import build, random_clip

NAMES = ["cat", "dog", "traffic light"]


class Stream:
    """A stream's name, and up to which of its operations each stream is known to have come."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.seen = {name: 0}

    def wait_stream(self, other: Stream) -> None:
        for name, time in other.seen.items():
            self.seen[name] = max(self.seen.get(name, 0), time)


class World(TorchDispatchMode):
    """What CUDA's streams, its caching allocator and autograd's engine would see; use it as a context.

    Attributes:
        problems: what would be wrong on a GPU.
        crossings: (from, to) of tensors that one stream made and the other read.
        operations: how many ran on each stream.
    """

    def __init__(self) -> None:
        super().__init__()
        self.images, self.texts = Stream("images"), Stream("texts")
        self.current = self.images
        self.made: dict[int, tuple[Stream, int]] = {}
        self.recorded: set[tuple[int, str]] = set()
        self.problems: list[str] = []
        self.crossings: set[tuple[str, str]] = set()
        self.operations = {"images": 0, "texts": 0}
        self._alive: list[Tensor] = []  # so that no address comes twice

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        stream, name = self.current, func.overloadpacket.__name__
        given = [t for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)]
        out = func(*args, **(kwargs or {}))
        storages = {t.untyped_storage()._cdata for t in given}
        if not func.is_view and name != "detach":  # others look at no number
            for storage in storages:
                self._read(storage, name)
        stream.seen[stream.name] += 1
        self.operations[stream.name] += 1
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self._alive.append(t)
                if (storage := t.untyped_storage()._cdata) not in storages:
                    self.made[storage] = stream, stream.seen[stream.name]
        return out

    def _read(self, storage: int, name: str) -> None:
        stream = self.current
        maker, time = self.made.get(storage, (stream, 0))  # those from before the step live on behind it
        if maker is stream:
            return
        self.crossings.add((maker.name, stream.name))
        if stream.seen.get(maker.name, 0) < time:
            self.problems.append(f"{name} on {stream.name} reads what {maker.name} may not have written")
        if (storage, stream.name) not in self.recorded:
            self.problems.append(f"{name} on {stream.name} reads what the allocator may give to {maker.name} again")

    def record_stream(self, x: Tensor, stream: Stream) -> None:
        self.recorded.add((x.untyped_storage()._cdata, stream.name))

    @contextlib.contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def let_autograd_switch(self, loss: Tensor, texts: set) -> None:
        """Run the backward of the nodes in texts as the engine would on a GPU."""

        def switch(stream: Stream, grads: tuple[Tensor | None, ...]) -> None:
            stream.wait_stream(self.current)
            self.current = stream
            for grad in grads:
                if grad is not None:
                    self.record_stream(grad, stream)

        def begin(grads: tuple[Tensor | None, ...]) -> None:
            switch(self.texts, grads)

        def end(grads: tuple[Tensor | None, ...], _: object) -> None:
            switch(self.images, grads)

        for node in nodes(loss.grad_fn, set()) & texts:
            node.register_prehook(begin)
            node.register_hook(end)


def nodes(node, stop: set) -> set:
    """A graph's nodes from one on, without those of stop and what is behind them."""
    found, todo = set(), [node]
    while todo:
        node = todo.pop()
        if node is not None and node not in found and node not in stop:
            found.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return found


@pytest.fixture
def world(monkeypatch):
    found = World()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: found.current)
    monkeypatch.setattr(torch.cuda, "stream", found.on)
    monkeypatch.setattr(Tensor, "record_stream", lambda x, stream: found.record_stream(x, stream))
    return found


def run(world: World, method: str, with_logits: bool, backend: str = "torch", **options) -> None:
    """Forward and backward of a step with the text tower beside the image tower."""
    torch.manual_seed(0)
    model = build("fast", random_clip(), NAMES, method, backend=backend, **options).train()
    images, labels = torch.randn(3, 3, 32, 32), torch.tensor([2, 0, 1])

    def loss() -> Tensor:
        return model.loss_and_logits(images, labels)[0] if with_logits else model.loss(images, labels)

    wanted = torch.autograd.grad(loss(), list(model.parameters()))
    model.text_stream = world.texts
    texts: set = set()
    given: list[Tensor | None] = []
    beside, join = model._beside_images, model._join_texts

    def beside_images(prompts: Tensor | None) -> contextlib.AbstractContextManager[None]:
        given.append(prompts)
        return beside(prompts)

    def join_texts(features: Tensor) -> None:
        before = nodes(None if given[0] is None else given[0].grad_fn, set())
        texts.update(nodes(features.grad_fn, before))
        join(features)

    object.__setattr__(model, "_beside_images", beside_images)
    object.__setattr__(model, "_join_texts", join_texts)
    with world:
        value = loss()
        world.let_autograd_switch(value, texts)
        value.backward()
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        assert torch.equal(parameter.grad, gradient)


CASES = [
    ("upt", {}),
    ("upt", {"backend": "torch,triton"}),
    ("upt", {"depth_text": 1, "memory": "lean"}),
    ("upt", {"class_token_position": "middle", "memory": "balanced"}),
    ("coop", {}),
    ("maple", {"depth": 2}),
    ("kgcoop", {}),
    ("ivlp", {}),
]


@pytest.mark.parametrize("with_logits", [False, True])
@pytest.mark.parametrize(("method", "options"), CASES, ids=[f"{m}-{'-'.join(map(str, o.values()))}" for m, o in CASES])
def test_two_streams_in_order(world, method, options, with_logits):
    run(world, method, with_logits, **options)
    assert world.problems == []
    assert world.crossings == {("images", "texts"), ("texts", "images")}
    assert min(world.operations.values()) > 50


@pytest.mark.parametrize("method", ["vpt_deep", "zeroshot"])
def test_fixed_texts_are_made_once(world, method):
    """Where no prompt enters the texts nothing runs beside the images, and nothing is waited for."""
    model = build("fast", random_clip(), NAMES, method).train()
    images, labels = torch.randn(3, 3, 32, 32), torch.tensor([2, 0, 1])
    model.loss(images, labels)
    model.text_stream = world.texts
    with world:
        model.loss(images, labels)
    assert world.problems == []
    assert world.operations["texts"] <= 2


BROKEN = {
    "texts do not wait": (Stream, "wait_stream", lambda self, other: None, "may not have written"),
    "images do not wait": (PromptedTexts, "_join_texts", lambda self, features: None, "may not have written"),
    "nothing is recorded": (Tensor, "record_stream", lambda x, stream: None, "may give to"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_what_is_missing_is_seen(world, monkeypatch, broken):
    place, name, replacement, said = BROKEN[broken]
    monkeypatch.setattr(place, name, replacement)
    run(world, "upt", True)
    assert any(said in problem for problem in world.problems), world.problems


class Recorded:
    """torch.cuda's graphs, streams and device, of which only the calls are kept."""

    def __init__(self, monkeypatch) -> None:
        self.calls: list[tuple] = []
        outer, own = Stream("outer"), Stream("own")
        self.current = outer
        for stream in (outer, own):
            stream.wait_stream = lambda other, stream=stream: self.calls.append((stream.name, other.name))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: own)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: self.calls.append(("synchronize",)))
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        monkeypatch.setattr(torch.cuda, "graph", self.graph)

    @contextlib.contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def graph(self, graph, **options):
        self.calls.append(("graph", options))
        return contextlib.nullcontext()


def test_a_capture_bears_other_threads(monkeypatch):
    """A loader's thread that pins memory asks CUDA for things that a capture in the mode "global" forbids everyone."""
    recorded = Recorded(monkeypatch)
    ran = []
    graphs.CudaGraph(torch.device("cuda"), lambda: ran.append(True))
    assert ran == [True]
    options = {"stream": recorded.current, "capture_error_mode": "thread_local"}
    assert recorded.calls == [("synchronize",), ("graph", options)]


@pytest.mark.parametrize("fails", [False, True])
def test_the_callers_stream_waits_for_a_step(monkeypatch, fails):
    """Also for one that raises: the caller lets go of the batch, whose memory is its own stream's."""
    recorded = Recorded(monkeypatch)
    step = object.__new__(graphs.GraphedStep)
    step.model, step.stream = SimpleNamespace(logit_scale=SimpleNamespace(device=torch.device("cuda"))), None
    with contextlib.suppress(FloatingPointError), step._on_stream():
        assert recorded.current.name == "own"
        recorded.calls.append(("step",))
        if fails:
            raise FloatingPointError
    assert recorded.calls == [("own", "outer"), ("step",), ("outer", "own")]
    assert recorded.current.name == "outer"
