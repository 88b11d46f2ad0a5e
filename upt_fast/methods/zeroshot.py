"""CLIP without learning (arXiv 2103.00020): fixed texts, one template or the mean over several."""

from __future__ import annotations

from dataclasses import dataclass

from upt_fast.methods.method import Method
from upt_fast.methods.templates import TemplatesConfig


@dataclass(frozen=True)
class ZeroShotConfig(TemplatesConfig):
    """CLIP without learning (arXiv 2103.00020): its fixed texts are all it has."""


METHODS = (
    Method(
        "zeroshot",
        "zero-shot CLIP",
        ZeroShotConfig,
        "upt_fast.prompts.zeroshot:ZeroShot",
        source="arXiv 2103.00020",
        exact="CLIP on written texts, one template or the mean of several",
        order=900,
        recipe="zeroshot",
        recorded_as=("zsclip",),
    ),
)
