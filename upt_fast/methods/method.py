"""A method, as it declares itself. Imports no torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from upt_fast.methods.demo import DemoSettings
from upt_fast.methods.options import MethodConfig
from upt_fast.methods.release import Release

if TYPE_CHECKING:
    from torch import Tensor

    from upt_fast.prompts import Features, PromptLearner


@dataclass(frozen=True)
class Method:
    """A method.

    Args:
        name: as in ``method="coop"``.
        title: as in tables.
        config: class of its options.
        learner: the prompt learner, or where it is, as "module:class": read when it is needed, because it needs torch.
        source: the paper.
        exact: what it equals.
        order: its place in lists; methods from outside come last.
        recipe: the shipped recipe (configs/) with the authors' numbers.
        loss_terms: what it adds to the cross-entropy of a batch, () of (learner, features); None: nothing.
        release: its published code, if there is any.
        demo: how the demo trains it, if it does.
        recorded_as: other names that recorded vectors have for it; longer names may begin with them.
        recorded_options: (recorded name, options, tensors) -> further options that a file of vectors implies.
    """

    name: str
    title: str
    config: type[MethodConfig]
    learner: str | type[PromptLearner]
    source: str = ""
    exact: str = ""
    order: int = 1000
    recipe: str = ""
    loss_terms: Callable[[PromptLearner, Features], Tensor] | None = None
    release: Release | None = None
    demo: DemoSettings | None = None
    recorded_as: tuple[str, ...] = ()
    recorded_options: Callable[[str, Mapping[str, Any], Mapping[str, Tensor]], dict[str, Any]] | None = None

    def load(self) -> type[PromptLearner]:
        """The prompt learner's class."""
        if not isinstance(self.learner, str):
            return self.learner
        module, _, name = self.learner.partition(":")
        found: type[PromptLearner] = getattr(importlib.import_module(module), name)
        return found
