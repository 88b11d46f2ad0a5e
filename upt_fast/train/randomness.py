"""The states of torch's default generators, which the learner's dropout draws from."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

PREFIX = "random."  # in front of the generators' names


def get_randomness(device: torch.device) -> dict[str, Tensor]:
    """The states, as tensors of a checkpoint: of the CPU's generator and of the device's."""
    states = {f"{PREFIX}cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states[f"{PREFIX}cuda"] = torch.cuda.get_rng_state(device)
    return states


def randomness_in(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The states among a checkpoint's tensors."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}


def set_randomness(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Put back what :func:`get_randomness` gave; of a device without a state nothing is changed."""
    if (state := states.get(f"{PREFIX}cpu")) is not None:
        torch.set_rng_state(state)
    if device.type == "cuda" and (state := states.get(f"{PREFIX}cuda")) is not None:
        torch.cuda.set_rng_state(state, device)


class Randomness:
    """Torch's default generators as one of several runs alone would have them; a context in which they are."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.states = get_randomness(device)

    def __enter__(self) -> None:
        self.outer = get_randomness(self.device)
        set_randomness(self.states, self.device)

    def __exit__(self, *_: object) -> None:
        self.states = get_randomness(self.device)
        set_randomness(self.outer, self.device)
