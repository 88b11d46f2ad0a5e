"""A model's way through its frozen towers, and how it changes in place: of all models on the same towers at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from upt_fast.engine.backends import dispatch
from upt_fast.engine.backends.asked import AUTO, AskedOfTowers
from upt_fast.engine.towers import PackedClasses, TextTower, VisionTower, routes
from upt_fast.engine.towers.route import Route
from upt_fast.engine.towers.stacks import PlainStack
from upt_fast.prompts import PromptLearner


class Siblings:
    """The models on the same towers that are alive; each puts itself in, also one that was copied or unpickled."""

    def __init__(self) -> None:
        self._models: weakref.WeakSet[Any] = weakref.WeakSet()

    def add(self, model: Rerouted) -> None:
        self._models.add(model)

    def __iter__(self) -> Iterator[Rerouted]:
        return iter(list(self._models))

    def __reduce__(self) -> tuple[type[Siblings], tuple[()]]:
        return Siblings, ()  # copies are on towers of their own


class Way(NamedTuple):
    """A route with all that was made for it, to come back to it at once.

    Args:
        towers: route and weights, of the image tower and of the text tower.
        models: on these towers, with their packed classes and their features of fixed texts.
    """

    towers: list[tuple[Route, PlainStack]]
    models: list[tuple[Rerouted, nn.ModuleList, dict[tuple[str, ...], Tensor]]]


class Rerouted(nn.Module):
    """What FastPromptedCLIP has of the routes through its towers.

    Attributes:
        auto: whether backend="auto" was asked for, so that a route may be chosen.
        settled: whether it was, for good.
    """

    text_tower: TextTower
    vision_tower: VisionTower
    prompt_learner: PromptLearner
    packed: nn.ModuleList  # of PackedClasses
    auto: bool
    settled: bool
    _siblings: Siblings
    _kept_features: dict[tuple[str, ...], Tensor]
    _forget_features: Callable[[], None]

    @property
    def backend(self) -> str:
        """Who computes the operations; see :meth:`use_backend`."""
        return str(self._asked)

    @property
    def _asked(self) -> AskedOfTowers:
        return AskedOfTowers(self.vision_tower.route.asked, self.text_tower.route.asked)

    def use_backend(self, backend: str) -> None:
        """Take another route through the towers, as if the model had been built with it.

        Models on the same towers (:meth:`FastPromptedCLIP.sibling`) take it too. Parameters, classes and mode stay;
        weights that were packed for the route before are let go.

        Args:
            backend: as in the constructor.
        Raises:
            ValueError: as the constructor. All stay on the route that they had.
        """
        self.reroute(backend)
        for model in self._siblings:
            model.auto = self.backend == AUTO
            model.settled = False

    def reroute(self, backend: str) -> None:
        """The same without a word of what was asked for: the route of "auto" that was chosen."""
        asked = dispatch.resolve(backend)
        routes.check(asked)
        towers = self.vision_tower, self.text_tower
        ready = [tower.ready(part) for tower, part in zip(towers, asked, strict=True)]
        before = [(tower.route, tower.blocks.stack) for tower in towers]
        models = list(self._siblings)
        try:
            for tower, found in zip(towers, ready, strict=True):
                tower.take(*found)
            # what no prompt can change has the bits of the route that computed it
            packs = [model._packed_again() for model in models]
        except BaseException:
            for tower, found in zip(towers, before, strict=True):
                tower.take(*found)
            raise
        for model, found_packs in zip(models, packs, strict=True):
            model.packed = found_packs
            model._tell_learner()
            model._forget_features()

    def way(self) -> Way:
        """The route of today."""
        towers = [(tower.route, tower.blocks.stack) for tower in (self.vision_tower, self.text_tower)]
        return Way(towers, [(model, model.packed, model._kept_features) for model in self._siblings])

    def take_way(self, way: Way) -> None:
        """Come back to a route that was taken before; memory that steps use again is kept."""
        for tower, (route, stack) in zip((self.vision_tower, self.text_tower), way.towers, strict=True):
            tower.take(route, stack, release=False)
        for model, packed, features in way.models:
            model.packed = packed
            model._tell_learner()
            model._forget_features()
            model._kept_features = features

    def _packed_again(self) -> nn.ModuleList:
        """The same classes, packed on the route of today."""
        packs = []
        for packed in self.packed:
            assert isinstance(packed, PackedClasses)
            of = packed.tokens, packed.n_text, packed.class_token_position
            packs.append(self.text_tower.pack(*of, per_class=packed.per_class))
        return nn.ModuleList(packs)

    def _tell_learner(self) -> None:
        """A learner's own operations follow the image tower's."""
        if hasattr(self.prompt_learner, "backend"):
            object.__setattr__(self.prompt_learner, "backend", str(self._asked.images))  # past nn.Module's types

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._siblings.add(self)
