"""Which launches are compiled in advance: those of the ``workloads()`` of kernel files, recorded on meta tensors."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from typing import NamedTuple

from upt_fast.kernels._compile import Compilation, message, specialise
from upt_fast.kernels._targets import TARGETS


class NothingToCompileError(Exception):
    """No module has workloads, or no kernel is called as asked."""


class Use(NamedTuple):
    """A kernel as one workload launches it, for one target."""

    file: str
    kernel: str
    workload: str
    compilation: Compilation


def modules_with_kernels(names: Sequence[str] | None) -> list[str]:
    """The modules to look for workloads in: those named, or all of this package but report.py and private ones."""
    if names is not None:
        return list(names)
    package = importlib.import_module("upt_fast.kernels")
    found = (info.name for info in pkgutil.iter_modules(package.__path__))
    return [f"upt_fast.kernels.{name}" for name in found if name != "report" and not name.startswith("_")]


def collect(modules: Sequence[str], targets: Sequence[str], pattern: str) -> tuple[list[Use], list[str], list[str]]:
    """What workloads launch of the kernels with a pattern in file or name, what failed, and all kernels' names."""
    from upt_fast.kernels._launch import record

    found: list[Use] = []
    failures, kernels = [], dict[str, None]()
    for name in modules:
        file, workload = f"{name.rsplit('.', 1)[-1]}.py", "import"
        kernel = file
        try:
            module = importlib.import_module(name)
            for workload, function in module.workloads() if hasattr(module, "workloads") else ():
                for target in targets:
                    with record(TARGETS[target].shared_limit) as launches:
                        function()
                    if not launches:
                        raise RuntimeError("launches no kernel")
                    for launch in launches:
                        kernel = f"{file} {launch.kernel.__name__}"
                        kernels[kernel] = None
                        if pattern not in kernel:
                            continue
                        specialised = specialise(launch.kernel, launch.arguments, TARGETS[target].backend)
                        compilation = Compilation(launch.kernel, *specialised, launch.options, target)
                        found.append(Use(*kernel.split(), workload, compilation))
        except Exception as error:
            if pattern in kernel:
                failures.append(f"{file} {workload}: {message(error)}")
    return found, failures, list(kernels)
