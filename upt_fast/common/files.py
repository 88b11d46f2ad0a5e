"""Files that are whole or absent, written beside their place, flushed to disk, then renamed; the cache folder."""

from __future__ import annotations

import os
import pickle
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path in the same folder; on success it becomes path, on any failure it is removed."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's files are private
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def fsync_directory(directory: Path) -> None:
    """Make renames inside a directory survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_folder() -> Path:
    """Where what was compiled or timed on this machine is kept: $UPT_FAST_CACHE, by default ~/.cache/upt_fast."""
    return Path(os.environ.get("UPT_FAST_CACHE") or Path.home() / ".cache" / "upt_fast")


def image_cache_folder() -> Path:
    """Where decoded images are kept: $UPT_FAST_IMAGE_CACHE, by default images in :func:`cache_folder`."""
    return Path(os.environ.get("UPT_FAST_IMAGE_CACHE") or cache_folder() / "images")


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors and metadata to a safetensors file, atomically.

    Raises:
        OSError: it cannot be written, as where a disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        try:
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary, metadata)
        except SafetensorError as error:
            code = re.search(r"\(os error (\d+)\)", str(error))
            if code is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def load_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        ValueError: there is no such file, or it is not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


class UnreadableError(ValueError):
    """A file that :func:`load_torch` does not read.

    Args:
        reason: in one line.
        foreign: what it names that is no tensor; empty: the file is damaged, or another format.
    """

    def __init__(self, reason: str, foreign: str = "") -> None:
        super().__init__(reason)
        self.reason, self.foreign = reason, foreign


def load_torch(path: Path, placeholders: Sequence[Any] = (), mmap: bool = False) -> Any:
    """What torch.save wrote, on the CPU, by weights_only: nothing that the file names is imported or run.

    Args:
        path: the file.
        placeholders: (class or function, "module.name") of what stands for objects that are known to be in such files.
        mmap: read tensors when they are used; for zip files.
    Raises:
        UnreadableError: it holds more than tensors and placeholders, or cannot be read.
    """
    try:
        with torch.serialization.safe_globals(list(placeholders)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged file makes torch raise many kinds
        stripped = map(str.strip, str(error).splitlines())
        lines = [line for line in stripped if line and "eights" not in line]  # without advice about weights_only
        found = re.search(r"GLOBAL (\S+) (?:was not|whose module)", str(error))
        foreign = found[1] if found is not None and isinstance(error, pickle.UnpicklingError) else ""
        raise UnreadableError((lines or [type(error).__name__])[0][:120], foreign) from error
