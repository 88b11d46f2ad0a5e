"""The routes that are measured, one line each, by kind of device; a backend's name is what dispatch.py takes.

IMAGES/TEXTS    who computes the image tower and the text tower, where they differ
", graph"       the training step is replayed from a CUDA graph
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

GRAPH = ", graph"
STEP, INFERENCE = "step", "inference"  # what is measured


class Declared(NamedTuple):
    """A route that may be measured.

    Args:
        backend: as FastPromptedCLIP takes it.
        seconds: that it takes, about, until it runs: compilation.
    """

    backend: str
    seconds: float = 0.0


# neighbours share a tower's packed weights
CPU = (
    Declared("compiled"),
    Declared("compiled/torch"),
    Declared("torch"),
    Declared("torch/compiled"),
    Declared("inductor/compiled", 60),
    Declared("inductor/torch", 60),
    Declared("inductor", 100),
    Declared("compiled/inductor", 60),
)
GPU = (
    Declared("torch"),
    Declared("flash/torch"),
    Declared("cudnn/torch"),
    Declared("efficient/torch"),
    Declared("inductor/torch", 30),
    Declared("inductor", 45),
    Declared("triton", 10),
    Declared("torch/triton", 5),
    Declared("inductor/triton", 35),
    Declared("triton,xformers", 10),
    Declared("xformers/triton", 5),
    Declared("xformers"),
    Declared("torch/xformers"),
    Declared("torch/varlen"),
    Declared("inductor/varlen", 30),
    Declared("flash_attn"),
    Declared("triton,flash_attn", 10),
    Declared("inductor/flash_attn", 30),
)
BY_DEVICE = {"cpu": CPU, "cuda": GPU}


class Route(NamedTuple):
    """A candidate: a backend, and whether its steps are replayed from a graph."""

    backend: str
    graph: bool = False

    @classmethod
    def of(cls, name: str) -> Route:
        """Of :attr:`name`."""
        return cls(name.removesuffix(GRAPH), name.endswith(GRAPH))

    @property
    def name(self) -> str:
        """As choices and messages have it."""
        return f"{self.backend}{GRAPH}" if self.graph else self.backend


def declared(
    device: str,
    usual: str,
    graphs: bool,
    seconds: float = math.inf,
    only: Sequence[str] | None = None,
    beside: Mapping[str, str] | None = None,
) -> tuple[dict[str, Route], dict[str, str]]:
    """The candidates on a kind of device by name, and why others are not tried.

    Args:
        device: "cpu" or "cuda".
        usual: the backend that is taken where nothing is measured; a candidate whether or not it is declared.
        graphs: whether steps can be captured.
        seconds: that a candidate may take until it runs.
        only: other backends than those that are declared for the device.
        beside: backends that are tried behind these, by them.
    """
    found: dict[str, Route] = {}
    left_out: dict[str, str] = {}
    known = BY_DEVICE.get(device, ()) if only is None else tuple(map(Declared, only))

    def all_of() -> Iterator[Declared]:
        for declared in (Declared(usual), *(d for d in known if d.backend != usual)):
            yield declared
            if beside and declared.backend in beside:
                yield declared._replace(backend=beside[declared.backend])

    for backend, needed in all_of():
        routes = [Route(backend, graph) for graph in ((False, True) if graphs else (False,))]
        for route in routes:
            if needed > seconds:
                left_out[route.name] = f"not tried: compiling takes about {needed:.0f} s, and there are {seconds:.0f}"
            else:
                found[route.name] = route
    return found, left_out


def is_route(key: str) -> bool:
    """Whether a choice under this key is of a route: steps/measured.py makes the keys."""
    return key.startswith((f"{STEP} of ", f"{INFERENCE} of "))


def size_class(number: int) -> str:
    """Of classes or images: up to the next power of two."""
    return f"<={1 << max(number - 1, 0).bit_length()}"
