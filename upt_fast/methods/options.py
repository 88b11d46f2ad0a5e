"""What the options of every method have, and the checks that several share. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

CLASS_TOKEN_POSITIONS = ("end", "middle", "front")

C = TypeVar("C", bound="MethodConfig")


@dataclass(frozen=True)
class MethodConfig:
    """Options of a method: a frozen dataclass that checks itself. This one has none; each method's adds its own."""

    @classmethod
    def from_options(cls: type[C], options: Mapping[str, Any]) -> C:
        """A config from keywords; a ValueError names unknown ones."""
        known = [option.name for option in fields(cls)]
        unknown = [name for name in options if name not in known]
        if unknown:
            raise ValueError(f"unknown option {', '.join(unknown)}; wanted some of {', '.join(known)}")
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def require_words(name: str, value: object) -> None:
    """Raise a ValueError unless value is a text with words in it, empty, or None."""
    if value is not None and (not isinstance(value, str) or (value and not split_words(value))):
        raise ValueError(f"{name}={value!r}; wanted words, for example 'a photo of a', or None")


def split_words(phrase: str | None) -> list[str]:
    """Words of an initial phrase; underscores are spaces, as in released configurations."""
    return (phrase or "").replace("_", " ").split()


def phrase(ctx_init: str | None) -> str | None:
    """The words of an initial phrase with spaces between them, or None."""
    return " ".join(split_words(ctx_init)) or None


def require_depth(name: str, depth: int | None, layers: int, minimum: int = 1) -> int:
    """The depth, None being all layers; a ValueError if the tower has fewer layers."""
    if depth is None:
        return layers
    if depth > layers:
        raise ValueError(f"{name}={depth}; this CLIP's tower has {layers} layers: wanted {minimum} to {layers}")
    return depth
