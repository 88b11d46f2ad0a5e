"""Where the bytes of an image are: in a file of its own, or in a shard, a tar file of many images."""

from __future__ import annotations

import hashlib
import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path


class SourceError(ValueError):
    """The bytes of an image cannot be had; says why, but not of which image."""


@dataclass(frozen=True, slots=True)
class ShardImage:
    """An image in a shard; no tar header is read for it.

    Args:
        shard: the tar file.
        key: the image's path inside the dataset.
        offset: of its first byte in the tar file.
        size: in bytes.
        digest: SHA-256 of its bytes.
    """

    shard: Path
    key: str
    offset: int
    size: int
    digest: bytes

    def read(self) -> bytes:
        """Its bytes.

        Raises:
            SourceError: there is no such shard, or it has other bytes there.
        """
        try:
            with open(self.shard, "rb", buffering=0) as file:
                content = os.pread(file.fileno(), self.size, self.offset)
        except OSError as error:
            raise SourceError(f"shard {self.shard.name}: {error.strerror}") from error
        if hashlib.sha256(content).digest() != self.digest:
            raise SourceError(
                f"shard {self.shard.name} has other bytes there than were written: it is damaged or was changed; "
                "copy it again, or write the shards anew with upt-fast shard"
            )
        return content

    def __str__(self) -> str:
        return str(self.shard.parent / self.key)


Source = str | Path | ShardImage


def open_source(source: Source) -> Path | io.BytesIO:
    """What a decoder opens: the path of a regular file, or an image's bytes from a shard.

    Raises:
        SourceError: it is no regular file (a named pipe called x.jpg would block for ever), or see ShardImage.read.
        OSError: there is no such file.
    """
    if isinstance(source, ShardImage):
        return io.BytesIO(source.read())
    if not stat.S_ISREG(os.stat(source).st_mode):
        raise SourceError("not a regular file")
    return Path(source)


def read_source(source: Source) -> bytes:
    """The bytes of an image; raises as :func:`open_source`."""
    opened = open_source(source)
    return opened.read_bytes() if isinstance(opened, Path) else opened.getvalue()
