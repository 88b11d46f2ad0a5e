"""One file per method: options, title, source, recipe, released names, the demo's settings. Imports no torch.

A method's learner is the file of the same name in upt_fast/prompts, its plain twin the one in upt_fast/reference.

    method.py     what a method declares; release.py and demo.py: of its published code, and of the demo
    options.py    what all options have; templates.py: those of fixed texts
    registry.py   methods by name, also from outside
"""

from upt_fast.methods.method import Method
from upt_fast.methods.options import MethodConfig
from upt_fast.methods.registry import (
    BUILTIN_METHODS,
    MAIN_METHOD,
    find_method,
    find_recorded,
    list_methods,
    list_releases,
    make_config,
    register_method,
)

__all__ = [
    "BUILTIN_METHODS",
    "MAIN_METHOD",
    "Method",
    "MethodConfig",
    "find_method",
    "find_recorded",
    "list_methods",
    "list_releases",
    "make_config",
    "register_method",
]
