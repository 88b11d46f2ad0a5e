"""Features of images, kept on disk from one process to the next.

    FOLDER/<key>/about.json              what the features were computed with; the key is its digest
    FOLDER/<key>/<digest>.safetensors    a pack: names of images (N, 32), their features (N, e)

A pack is never changed. It is written whole or not at all, and called by the digest of its key and of its contents: one
that is damaged, or in another key's folder, is not called as it should be, and counts as absent. So writers need no
lock: those of the same features write the same file. Where all packs are larger than the limit, those are removed that
were used longest ago.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from upt_fast.common.files import atomic_path, cache_folder, write_text

logger = logging.getLogger("upt_fast")

FORMAT = 1
SUFFIX = ".safetensors"
ABOUT_FILE = "about.json"
OFF = "off"
VARIABLE = "UPT_FAST_FEATURE_STORE"
NAME_BYTES = 32  # of a SHA-256
LEFTOVER_SECONDS = 24 * 3600  # after which a file that was never finished is removed


def open_store(where: str | None, limit_gib: float) -> FeatureStore | None:
    """The store that an option asks for.

    Args:
        where: a folder, or "off"; None: as UPT_FAST_FEATURE_STORE says, else the folder features of the cache.
        limit_gib: of all packs; 0: no store.
    Returns:
        None where there is to be none.
    """
    where = where or os.environ.get(VARIABLE) or str(cache_folder() / "features")
    if where == OFF or limit_gib <= 0:
        return None
    return FeatureStore(Path(where), int(limit_gib * 2**30))


class FeatureStore:
    """Features by key and name in a folder, which need not exist; a folder that fails only means nothing is kept.

    Args:
        folder: of the store.
        limit_bytes: of all its files.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        self._warned = False

    def section(self, about: Mapping[str, Any]) -> Section:
        """Where features are kept that were computed with what about says, values of JSON."""
        return Section(self, {"format": FORMAT, **about})

    def warn(self, error: OSError) -> None:
        """Say once that nothing is kept."""
        if not self._warned:
            logger.warning("image features are not kept in %s: %s", self.folder, error.strerror or error)
        self._warned = True

    def trim(self) -> None:
        """Remove what was used longest ago until the rest is within the limit."""
        files = []
        for path in self.folder.glob("*/*"):
            with contextlib.suppress(OSError):  # another process removed it
                found = path.stat()
                files.append((found.st_mtime, found.st_size, path))
        used = sum(size for _, size, _ in files)
        unfinished = time.time() - LEFTOVER_SECONDS
        for modified, size, path in sorted(files):
            leftover = path.name.startswith(".") and modified < unfinished
            if leftover or (used > self.limit_bytes and path.suffix == SUFFIX):
                with contextlib.suppress(OSError):
                    path.unlink()
                used -= size


class Section:
    """The features of one key.

    Args:
        store: that it is in.
        about: what they were computed with.
    """

    def __init__(self, store: FeatureStore, about: Mapping[str, Any]) -> None:
        self.store = store
        self._about = json.dumps(about, sort_keys=True)
        self._key = hashlib.sha256(self._about.encode()).digest()
        self.folder = store.folder / self._key.hex()[:NAME_BYTES]

    def fact(self, name: str) -> Any:
        """What :meth:`note` wrote, None if nothing."""
        try:
            found = json.loads((self.folder / ABOUT_FILE).read_text(encoding="utf-8"))
            return found["facts"].get(name) if found["about"] == json.loads(self._about) else None
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def note(self, name: str, value: Any) -> None:
        """Write down something about the key, a value of JSON."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            facts = {"about": json.loads(self._about), "facts": {name: value}}
            write_text(self.folder / ABOUT_FILE, json.dumps(facts, indent=1) + "\n")
        except OSError as error:
            self.store.warn(error)

    def read(self, names: Sequence[bytes]) -> dict[bytes, Tensor]:
        """Those of the features that are there: name -> (e,).

        Args:
            names: of NAME_BYTES bytes each.
        """
        wanted, found = set(names), dict[bytes, Tensor]()
        for path, their_names, rows in self._packs():
            used = False
            for name, row in zip(their_names, rows, strict=True):
                if name in wanted and name not in found:
                    found[name], used = row.clone(), True
            if used:
                with contextlib.suppress(OSError):
                    os.utime(path)
            if len(found) == len(wanted):
                break
        return found

    def write(self, names: Sequence[bytes], rows: Tensor) -> None:
        """Keep features, if they can be kept.

        Args:
            names: N of NAME_BYTES bytes each.
            rows: (N, e).
        """
        rows = rows.detach().cpu().contiguous()
        if not len(rows) or rows.nbytes > self.store.limit_bytes:
            return
        packed = torch.frombuffer(bytearray(b"".join(names)), dtype=torch.uint8).view(len(rows), NAME_BYTES)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_path(self.folder / f"{self._digest(packed, rows)}{SUFFIX}") as temporary:
                temporary.write_bytes(save({"names": packed, "rows": rows}))
            self.store.trim()
        except OSError as error:
            self.store.warn(error)

    def _packs(self) -> Iterator[tuple[Path, list[bytes], Tensor]]:
        """The packs that are whole, those written or used last first; others are removed."""
        paths = []
        with contextlib.suppress(OSError):
            for path in self.folder.glob(f"[!.]*{SUFFIX}"):
                with contextlib.suppress(OSError):
                    paths.append((-path.stat().st_mtime, path))
        for _, path in sorted(paths):
            try:
                # read, not mapped: another process may cut the file
                found = load(path.read_bytes())
                names, rows = found["names"], found["rows"]
                whole = path.name == f"{self._digest(names, rows)}{SUFFIX}"
            except OSError:
                continue
            except (SafetensorError, KeyError, ValueError, RuntimeError):
                whole = False
            if whole:
                yield path, [bytes(name) for name in names.numpy()], rows
            else:
                logger.debug("%s is damaged or from elsewhere: computed anew", path)
                with contextlib.suppress(OSError):
                    path.unlink()

    def _digest(self, names: Tensor, rows: Tensor) -> str:
        digest = hashlib.sha256(self._key + f"{rows.dtype} {tuple(rows.shape)} {tuple(names.shape)}".encode())
        for tensor in (names, rows):
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()[:NAME_BYTES]
