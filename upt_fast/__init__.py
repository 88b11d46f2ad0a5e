"""upt_fast: prompt learning on a frozen CLIP, exact and fast.

>>> from upt_fast import FastUPT
>>> model = FastUPT.from_pretrained("ViT-B-16", "openai", classnames=["cat", "dog"])
"""

from typing import TYPE_CHECKING

from upt_fast.version import __version__

if TYPE_CHECKING:
    from upt_fast.clip import UnsupportedModelError
    from upt_fast.distributed import DistributedStep
    from upt_fast.methods import MethodConfig, list_methods, register_method
    from upt_fast.methods.upt import UPTConfig
    from upt_fast.model import FastPromptedCLIP, FastUPT
    from upt_fast.prompts import PromptLearner, Prompts
    from upt_fast.reference import ReferencePromptedCLIP, ReferenceUPT
    from upt_fast.tasks.joint import MultiTask

__all__ = [
    "DistributedStep",
    "FastPromptedCLIP",
    "FastUPT",
    "MethodConfig",
    "MultiTask",
    "PromptLearner",
    "Prompts",
    "ReferencePromptedCLIP",
    "ReferenceUPT",
    "UPTConfig",
    "UnsupportedModelError",
    "__version__",
    "list_methods",
    "register_method",
]

_HOMES = {
    "DistributedStep": "upt_fast.distributed",
    "FastPromptedCLIP": "upt_fast.model",
    "FastUPT": "upt_fast.model",
    "MethodConfig": "upt_fast.methods",
    "MultiTask": "upt_fast.tasks.joint",
    "PromptLearner": "upt_fast.prompts",
    "Prompts": "upt_fast.prompts",
    "ReferencePromptedCLIP": "upt_fast.reference",
    "ReferenceUPT": "upt_fast.reference",
    "UPTConfig": "upt_fast.methods.upt",
    "UnsupportedModelError": "upt_fast.clip",
    "list_methods": "upt_fast.methods",
    "register_method": "upt_fast.methods",
}


def __getattr__(name: str) -> object:
    # torch takes seconds to import: `upt-fast --help` must not wait for it
    if name not in _HOMES:
        raise AttributeError(f"module 'upt_fast' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
