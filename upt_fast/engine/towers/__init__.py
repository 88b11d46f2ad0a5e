"""Frozen CLIP encoders that take prompts: one residual block stack, the text and the image tower."""

from upt_fast.engine.towers.packing import PackedClasses
from upt_fast.engine.towers.text import TextTower
from upt_fast.engine.towers.vision import VisionTower

__all__ = ["PackedClasses", "TextTower", "VisionTower"]
