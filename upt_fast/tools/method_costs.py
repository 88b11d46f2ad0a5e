"""What a step of each method costs by default, as rows of a table: ``upt-fast methods``."""

from __future__ import annotations

import dataclasses
from typing import Any

from upt_fast.clip.loading import clip_without_weights
from upt_fast.common.checks import require_int
from upt_fast.data.benchmark import bench_classnames
from upt_fast.methods import find_method, list_methods
from upt_fast.tools.step_cost import step_cost


def method_costs(clip: str, classes: int, batch_size: int) -> list[dict[str, Any]]:
    """A row for each method known here, with its default options, as plain values.

    Args:
        clip: a name for :func:`upt_fast.clip.loading.clip_without_weights`.
        classes: C, names of Caltech101's classes up to 100, of ImageNet's beyond.
        batch_size: B.
    Raises:
        ValueError: no such CLIP, or a number out of range.
    """
    require_int("classes", classes, 1)
    require_int("batch_size", batch_size, 1)
    frozen, tokenizer = clip_without_weights(clip)
    classnames = bench_classnames(classes)
    rows = []
    for name in list_methods():
        row: dict[str, Any] = {"method": name}
        rows.append(row)
        try:
            method = find_method(name)
            row |= {"title": method.title, "source": method.source, "exact": method.exact, "recipe": method.recipe}
            cost = step_cost(frozen, classnames, method, method.config.from_options({}), batch_size, tokenizer)
        except (ValueError, TypeError) as error:  # it does not fit this CLIP, or needs options
            row["error"] = str(error)
            continue
        row |= {
            "parameters": cost.parameters,
            "prompted_layers": {"text": cost.depth_text, "image": cost.depth_vision},
            "flops": {"engine": dataclasses.asdict(cost.engine), "plain": dataclasses.asdict(cost.plain)},
        }
    return rows
