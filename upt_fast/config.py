"""Options of a method, as frozen dataclasses that check themselves."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

PRESETS = ("paper", "released")
CLASS_TOKEN_POSITIONS = ("end", "middle", "front")


def require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise a ValueError unless value is one of choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}; wanted one of {', '.join(map(repr, choices))}")


def require_int(name: str, value: object, minimum: int) -> None:
    """Raise a ValueError unless value is an int of at least minimum."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name}={value!r}; wanted a whole number of at least {minimum}")


@dataclass(frozen=True)
class UPTConfig:
    """Unified Prompt Tuning (arXiv 2210.07225).

    Args:
        preset: "paper": prompts interact by self-attention and enter every prompted layer of both towers;
            "released": the transform of the authors' released code, a map of each prompt on its own, input layer only.
        n_text: prompt tokens of the text tower.
        n_visual: prompt tokens of the image tower.
        depth_text: text layers, counted from the input, that get prompts of their own; None: all ("paper") or 1.
        depth_vision: the same for the image tower.
        class_token_position: where the class name stands among the text prompts: "end", "middle" or "front".
        attention_heads: heads of the transform's self-attention; must divide the text width.
        dropout: probability inside the transform, in training mode; None: 0 ("paper"), 0.1 ("released").
    """

    preset: str = "paper"
    n_text: int = 4
    n_visual: int = 4
    depth_text: int | None = None
    depth_vision: int | None = None
    class_token_position: str = "end"
    attention_heads: int = 1
    dropout: float | None = None

    def __post_init__(self) -> None:
        require_choice("preset", self.preset, PRESETS)
        require_choice("class_token_position", self.class_token_position, CLASS_TOKEN_POSITIONS)
        for name in ("n_text", "n_visual", "attention_heads"):
            require_int(name, getattr(self, name), 1)
        for name in ("depth_text", "depth_vision"):
            depth = getattr(self, name)
            if depth is None:
                continue
            require_int(name, depth, 1)
            if self.preset == "released" and depth != 1:
                raise ValueError(f"{name}={depth}; the released code prompts the input layer only: wanted 1 or None")
        number = isinstance(self.dropout, (int, float)) and not isinstance(self.dropout, bool)
        if self.dropout is not None and not (number and 0.0 <= self.dropout < 1.0):
            raise ValueError(f"dropout={self.dropout!r}; wanted a probability in [0, 1)")

    @property
    def dropout_p(self) -> float:
        """The dropout probability with the preset's default filled in."""
        if self.dropout is not None:
            return self.dropout
        return 0.1 if self.preset == "released" else 0.0

    def depths(self, text_layers: int, vision_layers: int) -> tuple[int, int]:
        """(depth_text, depth_vision) for towers of so many layers.

        Raises:
            ValueError: a depth is larger than its tower.
        """
        depths = []
        for name, depth, layers in (
            ("depth_text", self.depth_text, text_layers),
            ("depth_vision", self.depth_vision, vision_layers),
        ):
            if depth is None:
                depth = 1 if self.preset == "released" else layers
            if depth > layers:
                raise ValueError(f"{name}={depth}; this CLIP's tower has {layers} layers: wanted 1 to {layers}")
            depths.append(depth)
        return depths[0], depths[1]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
