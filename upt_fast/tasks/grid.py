"""A file of tasks: settings of ``upt-fast train``, of which lists expand to a task for each value. Imports no torch.

    out: runs/grid
    clip: ViT-B-16
    pretrained: openai
    data: [data/pets, data/food]      # a list: tasks for each of its values
    shots: [1, 4, 16]
    seed: [1, 2, 3]
    tasks:                            # further settings, each entry's in front of those above; one may be enough
      - config: upt                   # a recipe or a file of settings, behind all others
      - method: coop
        lr: [0.002, 0.02]
    name: "{method}-{data}-{shots}-{seed}-{lr}"   # of a task's folder in out; left out: of what differs

An option that is a list itself, such as templates, expands where it is a list of lists.
"""

from __future__ import annotations

import itertools
import string
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from upt_fast.common.messages import shorten
from upt_fast.methods import MAIN_METHOD, find_method
from upt_fast.train.config import TrainConfig, check_option_names, train_fields
from upt_fast.train.options import add_run_options, option_error, takes_list
from upt_fast.train.recipes import recipe_path

# what one job decides, not a task
OF_THE_JOB = ("out", "resume", "progress", "max_memory")
FIRST_IN_NAMES = ("method", "data", "shots", "seed")


@dataclass(frozen=True)
class Task:
    """One run of a job.

    Args:
        name: of its folder in the job's.
        config: its settings; out is that folder.
    """

    name: str
    config: TrainConfig

    @property
    def out(self) -> Path:
        """The job's folder."""
        return Path(self.config.out).parent


def read_tasks(path: str | Path, out: str | None = None) -> list[Task]:
    """The tasks of a file, in its order.

    Args:
        path: YAML or JSON.
        out: the job's folder; None: the file's ``out``.
    Raises:
        ValueError: the file cannot be read, or a setting is none, of the wrong kind or missing; two tasks have one
            name. Says in which task.
    """
    values = _read(Path(path))
    entries = values.pop("tasks", None) or [{}]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path}: tasks: wanted a list of settings")
    template = values.pop("name", None)
    out = out or values.get("out")
    if not isinstance(out, str):
        raise ValueError(f"{path}: out={out!r}; wanted the job's folder, in the file or as --out")
    if bad := [key for key in OF_THE_JOB[1:] if key in values or any(key in entry for entry in entries)]:
        raise ValueError(f"{path}: {', '.join(bad)}: wanted on the command line, for all tasks")
    values.pop("out", None)
    own = [values | {key.replace("-", "_"): value for key, value in entry.items()} for entry in entries]
    settings = [(setting, set(entry)) for entry in own for setting in _expand(path, _with_recipe(path, entry))]
    names = _names(path, [{key: s[key] for key in s if key in keys | {"method"}} for s, keys in settings], template)
    return [Task(name, _config(path, name, setting, out)) for name, (setting, _) in zip(names, settings, strict=True)]


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{path}: wanted settings, as NAME: VALUE")
    return {key.replace("-", "_"): value for key, value in values.items()}


def _with_recipe(path: str | Path, entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry's settings, in front of those of the file that its ``config`` names."""
    name = entry.get("config")
    own = {key: value for key, value in entry.items() if key != "config"}
    if name is None:
        return own
    if not isinstance(name, str):
        raise ValueError(f"{path}: config={name!r}; wanted a recipe or a file")
    return _read(recipe_path(name)) | own


def _expand(path: str | Path, entry: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A task's settings for each combination of an entry's lists."""
    methods = entry.get("method", MAIN_METHOD)
    for method in methods if isinstance(methods, list) else [methods]:
        config = find_method(str(method)).config
        axes = []
        for key, value in (dict(entry) | {"method": method}).items():
            is_axis = isinstance(value, list) and (
                not takes_list(config, key) or all(isinstance(item, list) for item in value)
            )
            if is_axis and not value:
                raise ValueError(f"{path}: {key}: an empty list; wanted at least one value")
            axes.append([(key, item) for item in value] if is_axis else [(key, value)])
        for combination in itertools.product(*axes):
            yield dict(combination)


def _names(path: str | Path, settings: Sequence[Mapping[str, Any]], template: str | None) -> list[str]:
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{path}: name={template!r}; wanted a text such as {{method}}-{{data}}-{{seed}}")
    keys = {key for setting in settings for key in setting}
    varied = [key for key in (*FIRST_IN_NAMES, *sorted(keys - {*FIRST_IN_NAMES})) if _varies(key, settings)]
    if template is not None:
        fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
        if unknown := [field for field in fields if field not in keys]:
            raise ValueError(f"{path}: name has {', '.join(unknown)}; wanted some of {', '.join(sorted(keys))}")
    names = []
    for setting in settings:
        if template is None:
            parts = [_in_name(key, setting[key]) for key in varied if key in setting]
            name = "-".join(parts) or str(setting.get("method", MAIN_METHOD))
        else:
            plain = {key: _value_in_name(key, setting.get(key, "")) for key in keys}
            name = template.format(**plain)
        names.append(name.replace("/", "_").replace(" ", "_"))
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path}: two tasks are named {shorten(twice)}; wanted a name: that tells all apart")
    if bad := [name for name in names if name.startswith(".") or not name]:
        raise ValueError(f"{path}: a task's name is {bad[0]!r}; wanted one that a folder can have")
    return names


def _varies(key: str, settings: Sequence[Mapping[str, Any]]) -> bool:
    return len({repr(setting.get(key)) for setting in settings}) > 1


def _value_in_name(key: str, value: Any) -> str:
    return Path(value).name if key in ("data", "test_data") and value else str(value)


def _in_name(key: str, value: Any) -> str:
    if key in ("method", "data"):
        return _value_in_name(key, value)
    return f"{value}shot" if key == "shots" else f"{key}{_value_in_name(key, value)}"


def _config(path: str | Path, name: str, setting: Mapping[str, Any], out: str) -> TrainConfig:
    """A task's settings, read as the command line reads them: 1e-3 is a number."""
    try:
        method = find_method(str(setting.get("method", MAIN_METHOD)))
        check_option_names(method)
        parser = ArgumentParser(exit_on_error=False)
        add_run_options(parser, method)
        known = {*train_fields(), *(action.dest for action in parser._actions)}
        if unknown := [key for key in setting if key not in known]:
            raise ValueError(f"unknown key {', '.join(unknown)}; see upt-fast train --method {method.name} --help")
        values = parser.parse_object({**setting, "out": str(Path(out) / name)}).as_dict()
        return TrainConfig.from_dict(values)
    except (ValueError, TypeError, ArgumentError) as error:
        raise ValueError(f"{path}: task {name}: {option_error(' '.join(str(error).split()))}") from error
