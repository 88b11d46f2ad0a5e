"""The route of a run: told, taken up from its record, known on this machine, or measured in its first steps."""

from __future__ import annotations

import os
from pathlib import Path

from upt_fast.distributed import ONE_PROCESS, Group
from upt_fast.engine.tuning import choices
from upt_fast.engine.tuning.candidates import INFERENCE, STEP
from upt_fast.model import FastPromptedCLIP
from upt_fast.train.checkpoint import read_json, write_json
from upt_fast.train.config import TrainConfig
from upt_fast.train.setup import CHOICES_FILE, trains_on_features


def take_route(config: TrainConfig, model: FastPromptedCLIP, out: Path, group: Group = ONE_PROCESS) -> None:
    """Put the run's model on its route, before anything is computed by it, and have it recorded.

    It stays open only where the first steps of a new run on one process may measure it; a run that is resumed goes on
    as it began, and processes follow the first.
    """
    learns = any(True for _ in model.parameters())
    size = min(config.batch_size, max(group.sizes(config.step_size))) if learns else config.test_batch_size
    key = model.route_key(STEP if learns else INFERENCE, size, trains_on_features(config, model))
    captured = learns and config.cuda_graph and group.size == 1
    open_ = learns and group.size == 1 and may_measure(config, model)
    take_known_route(model, key, os.path.lexists(out / "last"), captured, open_, group)


def take_known_route(
    model: FastPromptedCLIP,
    key: str,
    began: bool,
    captured: bool = False,
    stays_open: bool = False,
    group: Group = ONE_PROCESS,
) -> None:
    """Put a model on the route that is recorded, or known on this machine, else on the usual one for good.

    Args:
        model: with backend "auto"; others stay as they are, and so do those that are settled.
        key: see :meth:`FastPromptedCLIP.route_key`.
        began: whether training has begun, on a route that its record names, or on the usual one.
        captured: whether steps are, where that is best.
        stays_open: whether nothing is taken where nothing is known.
        group: the processes, which follow the first.
    """
    if not model.auto or model.settled or model.quantized:
        return
    usual = model.usual_route(STEP if captured else INFERENCE).name

    def find() -> str | None:
        known = choices.find(key, model.logit_scale.device.type) if choices.is_taken(key) or not began else None
        return known if known is not None or (stays_open and not began) else usual

    if (found := group.by_first(find)) is not None:
        choices.take(key, found)
        model.settle(key, captured)


def may_measure(config: TrainConfig, model: FastPromptedCLIP) -> bool:
    """Whether a run's first steps may measure routes; an average of the weights would be of several."""
    return config.tune and config.ema is None and config.max_memory is None and not model.not_measured()


def record_choices(out: Path) -> None:
    """Write down what was chosen since the run began."""
    write_json(out / CHOICES_FILE, read_json(out / CHOICES_FILE) | choices.record())
