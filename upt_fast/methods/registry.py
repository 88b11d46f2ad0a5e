"""Every method by its name, those of this package and those that others register. Imports no torch by itself.

Each module of this folder declares what it has as ``METHODS``. A prompt learner that :func:`register_method` has seen
is known by its name; one that an installed package declares as an entry point of the group "upt_fast.methods" is, too;
and ``FILE.py:CLASS`` or ``package.module:CLASS`` names one from outside (docs/methods.md).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import pkgutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from upt_fast.methods.method import Method
from upt_fast.methods.options import MethodConfig
from upt_fast.methods.release import Release

if TYPE_CHECKING:
    from upt_fast.prompts import PromptLearner

MAIN_METHOD = "upt"  # where none is named
ENTRY_POINTS = "upt_fast.methods"
# what a learner from outside may declare, by the same names
DECLARATIONS = ("title", "source", "exact", "loss_terms", "release")
L = TypeVar("L", bound="type[PromptLearner]")


def _builtin_methods() -> dict[str, Method]:
    """What the modules of this folder declare, in the order of lists."""
    found: list[Method] = []
    for module in pkgutil.iter_modules(sys.modules[__package__].__path__, f"{__package__}."):
        found += getattr(importlib.import_module(module.name), "METHODS", ())
    return {method.name: method for method in sorted(found, key=lambda method: method.order)}


_METHODS = _builtin_methods()
BUILTIN_METHODS = tuple(_METHODS)


def register_method(learner: L) -> L:
    """Make a prompt learner known by its ``method`` name; a class decorator.

    Args:
        learner: a subclass of PromptLearner with ``method`` and ``config_class``; may have ``title``, ``source``,
            ``loss_terms`` and ``release`` (upt_fast/methods/method.py).
    Returns:
        the class.
    Raises:
        ValueError: it is no such class, or the name is taken by another.
    """
    name, config = getattr(learner, "method", None), getattr(learner, "config_class", None)
    if not isinstance(learner, type) or not isinstance(name, str) or not name.isidentifier():
        raise ValueError(
            f"{learner!r} with method={name!r}; wanted a PromptLearner class whose method is a name such as 'my_method'"
        )
    if not (isinstance(config, type) and issubclass(config, MethodConfig)):
        raise ValueError(f"{learner.__name__}.config_class={config!r}; wanted a subclass of upt_fast.MethodConfig")
    known = _METHODS.get(name)
    if known is not None and (isinstance(known.learner, str) or _place(known.learner) != _place(learner)):
        raise ValueError(f"method {name!r} exists already; give {learner.__name__} another name")
    declared = {key: getattr(learner, key) for key in DECLARATIONS if getattr(learner, key, None)}
    _METHODS[name] = Method(name, **({"title": name} | declared), config=config, learner=learner)
    return learner


def _place(learner: type) -> tuple[str, str]:
    """The source file and name of a class: a module that is imported twice gives two classes of one place."""
    module = sys.modules.get(learner.__module__)
    return str(getattr(module, "__file__", learner.__module__)), learner.__qualname__


def list_methods() -> list[str]:
    """Names of all methods known here: this package's, registered ones, installed packages'."""
    installed = [point.name for point in importlib.metadata.entry_points(group=ENTRY_POINTS)]
    return [*_METHODS, *(name for name in installed if name not in _METHODS)]


def list_releases() -> dict[str, Release]:
    """The published code of each known method that has some."""
    return {name: method.release for name, method in _METHODS.items() if method.release is not None}


def find_recorded(name: str) -> Method | None:
    """The method of recorded vectors: by its name, else the longest of names recorded that this one begins with."""
    if name in list_methods():
        return find_method(name)
    names = {known: method for method in _METHODS.values() for known in (method.name, *method.recorded_as)}
    fitting = [known for known in names if name.startswith(known)]
    return names[max(fitting, key=len)] if fitting else None


def find_method(name: str | type[PromptLearner]) -> Method:
    """A method by its name.

    Args:
        name: of :func:`list_methods`; ``FILE.py:CLASS`` or ``package.module:CLASS``, whose module is imported; or a
            prompt learner's class, which is registered.
    Raises:
        ValueError: there is no such method, file or class, or importing it fails.
    """
    if isinstance(name, type):
        return _METHODS[register_method(name).method]
    if not isinstance(name, str) or not name:
        raise ValueError(f"method={name!r}; wanted one of {', '.join(map(repr, list_methods()))}")
    if name in _METHODS:
        return _METHODS[name]
    if ":" in name:
        return find_method(_load_class(name))
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        if point.name == name:
            return find_method(_load_class(point.value))
    raise ValueError(
        f"method={name!r}; wanted one of {', '.join(map(repr, list_methods()))}, or FILE.py:CLASS of one of your own"
    )


def _load_class(place: str) -> type[PromptLearner]:
    where, _, name = place.rpartition(":")
    try:
        module = _import_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except Exception as error:  # someone else's code raises what it likes
        raise ValueError(f"method={place!r}: cannot import {where}: {type(error).__name__}: {error}") from error
    learner = getattr(module, name, None)
    prompts: Any = sys.modules.get("upt_fast.prompts")  # whose PromptLearner a learner's module has imported
    if not (isinstance(learner, type) and prompts and issubclass(learner, prompts.PromptLearner)):
        raise ValueError(f"method={place!r}: {name!r} in {where} is {learner!r}; wanted a subclass of PromptLearner")
    return learner


def _import_file(path: Path) -> object:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    name = f"upt_fast_method_{path.stem}"
    path = path.resolve()
    if getattr(sys.modules.get(name), "__file__", None) == str(path):
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def make_config(method: Method, config: MethodConfig | None, options: dict[str, Any]) -> MethodConfig:
    """A method's config from either of the two ways to give options; a ValueError names unknown ones."""
    if config is not None and options:
        raise ValueError(f"config and {', '.join(options)} given; wanted one or the other")
    if config is None:
        return method.config.from_options(options)
    if not isinstance(config, method.config):
        raise ValueError(f"config is {type(config).__name__}; method {method.name!r} wants {method.config.__name__}")
    return config
