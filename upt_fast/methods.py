"""Every method by its name, those of this package and those that others register. Imports no torch by itself.

A method is a prompt learner: a class of :class:`upt_fast.prompts.PromptLearner` with a name and a config. A class that
:func:`register_method` has seen is known by its name; one that an installed package declares as an entry point of the
group "upt_fast.methods" is, too; and ``FILE.py:CLASS`` or ``package.module:CLASS`` names one from outside
(docs/methods.md).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from upt_fast import config as configs
from upt_fast.config import MethodConfig

if TYPE_CHECKING:
    from upt_fast.prompts import PromptLearner

ENTRY_POINTS = "upt_fast.methods"
L = TypeVar("L", bound="type[PromptLearner]")


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
    """

    name: str
    title: str
    config: type[MethodConfig]
    learner: str | type[PromptLearner]
    source: str = ""
    exact: str = ""

    def load(self) -> type[PromptLearner]:
        """The prompt learner's class."""
        if not isinstance(self.learner, str):
            return self.learner
        module, _, name = self.learner.partition(":")
        found: type[PromptLearner] = getattr(importlib.import_module(module), name)
        return found


UPT_RELEASE, MAPLE_RELEASE = "its release with UPT", "its release with MaPLe"
_METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "upt",
            "UPT",
            configs.UPTConfig,
            "upt_fast.prompts.unified:UnifiedPromptLearner",
            "arXiv 2210.07225",
            "the paper's equations; preset 'released': the authors' code",
        ),
        Method("coop", "CoOp", configs.CoOpConfig, "upt_fast.prompts.coop:CoOp", "arXiv 2109.01134", UPT_RELEASE),
        Method(
            "cocoop", "CoCoOp", configs.CoCoOpConfig, "upt_fast.prompts.cocoop:CoCoOp", "arXiv 2203.05557", UPT_RELEASE
        ),
        Method(
            "vpt_shallow",
            "VPT-shallow",
            configs.VPTConfig,
            "upt_fast.prompts.vpt:ShallowVPT",
            "arXiv 2203.12119",
            UPT_RELEASE,
        ),
        Method(
            "vpt_deep", "VPT-deep", configs.VPTConfig, "upt_fast.prompts.vpt:DeepVPT", "arXiv 2203.12119", UPT_RELEASE
        ),
        Method(
            "maple",
            "MaPLe",
            configs.MaPLeConfig,
            "upt_fast.prompts.maple:MaPLe",
            "arXiv 2210.03117",
            "the authors' code; its float16 rounding with half_prompts",
        ),
        Method(
            "ivlp",
            "IVLP",
            configs.IVLPConfig,
            "upt_fast.prompts.ivlp:IVLP",
            "arXiv 2210.03117",
            f"{MAPLE_RELEASE}; its float16 rounding with half_prompts",
        ),
        Method(
            "mvpt",
            "VPT (MaPLe's)",
            configs.MVPTConfig,
            "upt_fast.prompts.ivlp:MVPT",
            "arXiv 2210.03117",
            f"{MAPLE_RELEASE}; its float16 rounding with half_prompts",
        ),
        Method(
            "zeroshot",
            "zero-shot CLIP",
            configs.ZeroShotConfig,
            "upt_fast.prompts.zeroshot:ZeroShot",
            "arXiv 2103.00020",
            "CLIP on written texts, one template or the mean of several",
        ),
    )
}
BUILTIN_METHODS = tuple(_METHODS)


def register_method(learner: L) -> L:
    """Make a prompt learner known by its ``method`` name; a class decorator.

    Args:
        learner: a subclass of PromptLearner with ``method`` and ``config_class``; may have ``title`` and ``source``.
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
    title = getattr(learner, "title", "") or name
    _METHODS[name] = Method(name, title, config, learner, getattr(learner, "source", ""), getattr(learner, "exact", ""))
    return learner


def _place(learner: type) -> tuple[str, str]:
    """The source file and name of a class: a module that is imported twice gives two classes of one place."""
    module = sys.modules.get(learner.__module__)
    return str(getattr(module, "__file__", learner.__module__)), learner.__qualname__


def list_methods() -> list[str]:
    """Names of all methods known here: this package's, registered ones, installed packages'."""
    installed = [point.name for point in importlib.metadata.entry_points(group=ENTRY_POINTS)]
    return [*_METHODS, *(name for name in installed if name not in _METHODS)]


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
    from upt_fast.prompts import PromptLearner

    where, _, name = place.rpartition(":")
    try:
        module = _import_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except Exception as error:  # someone else's code raises what it likes
        raise ValueError(f"method={place!r}: cannot import {where}: {type(error).__name__}: {error}") from error
    learner = getattr(module, name, None)
    if not (isinstance(learner, type) and issubclass(learner, PromptLearner)):
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
