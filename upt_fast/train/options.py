"""The train command's arguments: which method they name, and that method's config as flags. Imports no torch itself."""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from upt_fast.methods import BUILTIN_METHODS, MAIN_METHOD, Method, MethodConfig, find_method
from upt_fast.train.config import TrainConfig, check_option_names, train_fields
from upt_fast.train.recipes import recipe_path


def flag(name: str) -> str:
    """The command line's form of an option's name."""
    return f"--{name.replace('_', '-')}"


def read_train_arguments(arguments: list[str]) -> tuple[list[str], Method]:
    """Find the method of a train command, and write its arguments as the parser takes them.

    The method is that of the last ``--method``, wherever it stands; else the ``method`` of the last ``--config`` that
    has one; else UPT.

    Args:
        arguments: of the command.
    Returns:
        The arguments, with names of recipes replaced by their files, several values of an option by one JSON list and
        the method at the end; and the method.
    Raises:
        ValueError: no such method, config file or recipe.
    """
    arguments = list(arguments)
    configs = []
    for i, value in _values(arguments, "--config"):
        configs.append(recipe_path(value))
        arguments[i] = f"--config={configs[-1]}" if "=" in arguments[i] else str(configs[-1])
    named = [value for _, value in _values(arguments, "--method")]
    if not named:
        named = [name for name in map(_method_in, configs) if name is not None]
    method = find_method(named[-1] if named else MAIN_METHOD)
    arguments = _join_lists(arguments, method.config)
    return [*arguments, "--method", named[-1]] if named else arguments, method


def _values(arguments: list[str], name: str) -> Iterator[tuple[int, str]]:
    """The values of an option, each with the place of the argument that holds it."""
    for i, argument in enumerate(arguments):
        if argument == name and i + 1 < len(arguments):
            yield i + 1, arguments[i + 1]
        elif argument.startswith(f"{name}="):
            yield i, argument.removeprefix(f"{name}=")


def _method_in(path: Path) -> str | None:
    """The method that a YAML or JSON file names; None where there is none, or where the parser will refuse the file."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    name = values.get("method") if isinstance(values, dict) else None
    return name if isinstance(name, str) else None


def _join_lists(arguments: list[str], config: type[MethodConfig]) -> list[str]:
    """Several values behind an option of the method that takes a list, as one JSON list."""
    items = {flag(name): _list_item(hint) for name, hint in option_types(config).items()}
    joined: list[str] = []
    values: list[str] = []
    for argument in [*arguments, "--"]:
        item, alone = items.get(joined[-1] if joined else "", (None, False))
        if item is not None and not argument.startswith("--"):
            values.append(argument)
            continue
        if len(values) > 1 or (alone and values and not values[0].startswith("[")):
            joined.append(json.dumps(values) if item is str else f"[{', '.join(values)}]")
        else:
            joined += values
        joined.append(argument)
        values = []
    return joined[:-1]


def _list_item(hint: Any) -> tuple[Any, bool]:
    """What a type that takes several values has as items, or None; and whether it takes nothing but several."""
    if get_origin(hint) in (list, tuple):
        return get_args(hint)[0], True
    if get_origin(hint) in (Union, types.UnionType):
        for member in get_args(hint):
            if get_origin(member) in (list, tuple):
                return get_args(member)[0], False
    return None, False


def option_error(message: str) -> str:
    """jsonargparse's message on a value, with the option in the place of its parser key."""
    key = re.fullmatch(r'Parser key "([^"]+)"(?: element \d+)?: *(.*)', message)
    if key is None:
        return message
    option, reason = flag(key[1].rsplit(".", 1)[-1]), key[2]
    union = re.search(r"Subtypes: \[(.*?)\] Errors:.*Given value: (.*)", reason)
    single = re.fullmatch(r"Expected an? (.*?)\. Got value: (.*)", reason)
    got = union or single
    if got is None:
        return f"{option}: {reason}"
    wanted = re.sub(r"<class '(\w+)'>|typing\.Literal\[(.*?)\]", lambda kind: kind[1] or kind[2], got[1])
    return f"{option} {got[2]}: wanted {wanted.replace('NoneType', 'null').replace(', ', ' or ')}"


def takes_list(config: type[MethodConfig], name: str) -> bool:
    """Whether an option of a method may be a list."""
    hint = option_types(config).get(name)
    return hint is not None and _list_item(hint)[0] is not None


def option_types(config: type[MethodConfig]) -> dict[str, Any]:
    """The type of each option of a config class.

    Raises:
        ValueError: the class's annotations cannot be read.
    """
    try:
        hints = get_type_hints(config)
    except Exception as error:  # annotations of someone else's code raise what they like
        raise ValueError(f"cannot read the types of {config.__name__}: {error}") from error
    return {option.name: hints[option.name] for option in fields(config)}


def add_run_options(parser: Any, method: Method) -> None:
    """Give a parser the settings of a run and the options of its method.

    Args:
        parser: jsonargparse's.
        method: the method.
    """
    hints = get_type_hints(TrainConfig)
    for option in (option for option in fields(TrainConfig) if option.name in train_fields()):
        settings: dict[str, Any] = {"help": option.metadata["help"]}
        if option.name == "resume":
            settings["action"] = "store_true"
        else:
            settings["type"] = hints[option.name]
            settings |= {"required": True} if option.default is MISSING else {"default": option.default}
        parser.add_argument(flag(option.name), **settings)
    add_method_options(parser, method)


def add_method_options(parser: Any, method: Method) -> None:
    """Give a parser a group with the options of a method.

    Args:
        parser: jsonargparse's.
        method: the method; the help is its config class's docstring.
    Raises:
        ValueError: an option has the name of a setting of every run.
    """
    check_option_names(method)
    options, hints, help_texts = fields(method.config), option_types(method.config), option_help(method.config)
    title = f"options of method {method.name} ({method.title})"
    group = parser.add_argument_group(title, None if options else "none")
    for option in options:
        settings: dict[str, Any] = {"type": hints[option.name], "help": help_texts.get(option.name, "")}
        if option.default is not MISSING:
            settings["default"] = option.default
        elif option.default_factory is not MISSING:
            settings["default"] = option.default_factory()
        else:
            settings["required"] = True
        group.add_argument(flag(option.name), **settings)


def option_help(config: type[MethodConfig]) -> dict[str, str]:
    """The help of each option, of the docstring of the class that declares it."""
    owners = {find_method(name).config.__name__: name for name in reversed(BUILTIN_METHODS)}

    def plain(text: str) -> str:
        text = re.sub(r":\w+:`~?(?:\w+\.)*(\w+)`", lambda role: owners.get(role[1], role[1]), text)
        return text.replace("``", "").removesuffix(".")

    found: dict[str, str] = {}
    for owner in reversed(config.__mro__):
        written = docstring_args(owner.__doc__ or "")
        declared = inspect.get_annotations(owner)
        found |= {name: plain(text) for name, text in written.items() if name in declared}
    return found


def docstring_args(docstring: str) -> dict[str, str]:
    """The entries under "Args:" of a docstring in Google form, each on one line."""
    lines = iter(inspect.cleandoc(docstring).splitlines())
    found: dict[str, str] = {}
    for line in lines:
        if line.strip() == "Args:":
            break
    name, indent = None, None
    for line in lines:
        depth = len(line) - len(line.lstrip())
        if line.strip() and depth == 0:
            break
        indent = depth if indent is None else indent
        entry = re.match(r"(\w+)(?: \([^)]*\))?:\s*(.*)", line.strip()) if depth == indent else None
        if entry:
            name = entry[1]
            found[name] = entry[2]
        elif name is not None and line.strip():
            found[name] = f"{found[name]} {line.strip()}".strip()
    return found
