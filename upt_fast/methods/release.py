"""What a method says of its published code, so that checkpoints come from there and go there. Imports no torch.

The released trainers save ``model.pth.tar-<epoch>`` files (upt_fast/released reads and writes them).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from upt_fast.common.messages import shorten

Options = dict[str, Any]


@dataclass(frozen=True)
class ReleasedTensors:
    """The trained tensors of a released checkpoint.

    Args:
        shapes: by name, without ``prompt_learner.``.
        token_shapes: of the token buffers, the embedded class names.
        whole: the registered object was the whole model, not the prompt learner alone.
        context_length: T of the CLIP's text tower.
        vision_layers: of its image tower; 0: not known.
    """

    shapes: Mapping[str, tuple[int, ...]]
    token_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    whole: bool = False
    context_length: int = 77
    vision_layers: int = 0

    def matching(self, *patterns: str) -> list[str]:
        """The names that match one of some patterns ("meta_net.*")."""
        return [name for name in self.shapes if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]

    def rows(self, name: str, axes: tuple[int, ...] = (2,)) -> int:
        """The second last size of a tensor of so many axes; a ValueError where it is missing or has others."""
        if name not in self.shapes:
            raise ValueError(f"{name} is missing; its trained tensors are {shorten(sorted(self.shapes)) or 'none'}")
        if len(self.shapes[name]) not in axes:
            raise ValueError(f"{name} is {self.shapes[name]}; wanted {' or '.join(map(str, axes))} axes")
        return self.shapes[name][-2]

    def last_index(self, start: str, none: int) -> int:
        """The largest number behind a start that names have ("resblocks."), or none."""
        numbers = [name.removeprefix(start).partition(".")[0] for name in self.shapes if name.startswith(start)]
        return max((int(number) for number in numbers if number.isdecimal()), default=none)


def _always(tensors: ReleasedTensors) -> bool:
    return True


def _empty(config: Any) -> str:
    return ""


def _nothing(config: Any) -> Options:
    return {}


def _no_notes(config: Any) -> list[str]:
    return []


@dataclass(frozen=True)
class Release:
    """A method in its published code.

    Args:
        trainer: name of the trainer.
        registered: name of the object that it saves, which is a folder of its output.
        section: of its options, below cfg.TRAINER.
        options: names of its options -> ours.
        tensors: patterns of its trained tensors' names, without ``prompt_learner.``.
        marks: patterns of which a file of this method has one.
        marks_if_named: patterns of which one is enough where the user names the method.
        infer: (tensors, options given) -> the options that shapes tell; raises a ValueError where they contradict.
        whole: the saved object is the whole model; False: the prompt learner.
        fits: further conditions on a file's shapes.
        unused: patterns of tensors that no logits depend on.
        guesses: options that the file's token buffers can tell, to be tried in turn where none was given.
        refusal: of a config, why the published code computes something else; empty: it does not.
        settings: of a config, further options that it needs, or other values of those.
        notes: of a config, lines to know beside its options.
    """

    trainer: str
    registered: str
    section: str
    options: Mapping[str, str]
    tensors: tuple[str, ...]
    marks: tuple[str, ...]
    infer: Callable[[ReleasedTensors, Mapping[str, Any]], Options]
    whole: bool = False
    fits: Callable[[ReleasedTensors], bool] = _always
    marks_if_named: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    guesses: tuple[Mapping[str, Any], ...] = ()
    refusal: Callable[[Any], str] = _empty
    settings: Callable[[Any], Options] = _nothing
    notes: Callable[[Any], list[str]] = _no_notes
