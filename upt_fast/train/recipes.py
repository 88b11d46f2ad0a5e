"""The published recipes that ship as YAML files: ``upt-fast train --config NAME``. Imports no torch."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

# the folder configs/ of the repository, installed under this name (setup.py)
PACKAGE = "upt_fast.configs"


def list_recipes() -> list[str]:
    """Names of the shipped recipes, sorted."""
    return sorted(file.name.removesuffix(".yaml") for file in files(PACKAGE).iterdir() if file.name.endswith(".yaml"))


def recipe_path(name: str) -> Path:
    """The file that ``--config NAME`` means: a file of the user's, else the shipped recipe of that name.

    Raises:
        ValueError: there is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    if name not in list_recipes():
        raise ValueError(
            f"--config {name}: no such file; wanted a YAML or JSON file, or a recipe: {', '.join(list_recipes())}"
        )
    return Path(str(files(PACKAGE) / f"{name}.yaml"))
