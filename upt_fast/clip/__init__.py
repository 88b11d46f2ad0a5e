"""Adapters from other libraries' CLIP models to one :class:`FrozenCLIP` description."""

from upt_fast.clip.frozen import FrozenBlock, FrozenCLIP, FrozenNorm, FrozenText, FrozenVision
from upt_fast.clip.loading import LoadedCLIP, load_clip
from upt_fast.clip.open_clip import UnsupportedModelError, frozen_clip

__all__ = [
    "FrozenBlock",
    "FrozenCLIP",
    "FrozenNorm",
    "FrozenText",
    "FrozenVision",
    "LoadedCLIP",
    "UnsupportedModelError",
    "frozen_clip",
    "load_clip",
]
