"""Options of each method, as frozen dataclasses that check themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from math import gcd
from typing import Any, TypeVar

from upt_fast.common.checks import require_bool, require_choice, require_int

PRESETS = ("paper", "released")
CLASS_TOKEN_POSITIONS = ("end", "middle", "front")
FOLDER_NAMES = "folders"  # classnames of who wants the class folders' own names, whatever they are
TRANSFORMS = ("transformer", "mlp", "none")

DEFAULT_TEMPLATE = "a photo of a {}."
# the seven that CLIP's authors chose for ImageNet
IMAGENET_SELECT = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
TEMPLATES: dict[str, tuple[str, ...]] = {"default": (DEFAULT_TEMPLATE,), "imagenet_select": IMAGENET_SELECT}

C = TypeVar("C", bound="MethodConfig")


def require_words(name: str, value: object) -> None:
    """Raise a ValueError unless value is a text with words in it, empty, or None."""
    if value is not None and (not isinstance(value, str) or (value and not split_words(value))):
        raise ValueError(f"{name}={value!r}; wanted words, for example 'a photo of a', or None")


def split_words(phrase: str | None) -> list[str]:
    """Words of an initial phrase; underscores are spaces, as in released configurations."""
    return (phrase or "").replace("_", " ").split()


def require_depth(name: str, depth: int | None, layers: int, minimum: int = 1) -> int:
    """The depth, None being all layers; a ValueError if the tower has fewer layers."""
    if depth is None:
        return layers
    if depth > layers:
        raise ValueError(f"{name}={depth}; this CLIP's tower has {layers} layers: wanted {minimum} to {layers}")
    return depth


def expand_templates(templates: str | tuple[str, ...]) -> tuple[str, ...]:
    """Templates with names ("imagenet_select") replaced by what they stand for.

    Args:
        templates: texts with one {} for the class name, or keys of TEMPLATES; one or several.
    Raises:
        ValueError: no template, or one that is neither a name nor a text with one {}.
    """
    entries = (templates,) if isinstance(templates, str) else templates
    if not isinstance(entries, (tuple, list)) or not entries:
        raise ValueError(f"templates={templates!r}; wanted a template such as {DEFAULT_TEMPLATE!r}, or several")
    expanded: list[str] = []
    for entry in entries:
        if not isinstance(entry, str) or (entry not in TEMPLATES and entry.count("{}") != 1):
            raise ValueError(
                f"template {entry!r}; wanted a text with one {{}} for the class name, for example "
                f"{DEFAULT_TEMPLATE!r}, or one of {', '.join(map(repr, TEMPLATES))}"
            )
        expanded += TEMPLATES.get(entry, (entry,))
    return tuple(expanded)


@dataclass(frozen=True)
class MethodConfig:
    """What all configs have."""

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


@dataclass(frozen=True)
class UPTConfig(MethodConfig):
    """Unified Prompt Tuning (arXiv 2210.07225), and the learners that the paper compares it with.

    The last four options are those ablations, of the preset "paper"; their defaults are UPT. They combine as follows, U
    being the prompts of a layer and U^ the transformed ones:

    * ``transform`` makes U^ of U: "transformer" by self-attention and feed-forward; "mlp" by the same without the
      attention, U' = norm1(U); "none" leaves U^ = U. What it does not use has no parameters.
    * ``shared``: U is one set of n_text = n_visual prompts; all of U^ goes to the text tower and all of it, through the
      linear map ``mlp``, to the image tower. Otherwise the first n_text rows are the text's, the others the images'.
    * ``layerwise=False``: one U for all layers instead of one each; each prompted layer gets the same prompts.
    * ``joint``: text prompts (d wide) and visual prompts (w wide) are parameters of their own, trained together and
      not transformed (CoOp with deep VPT, at UPT's places). ``transform`` may then be "none" or left alone;
      ``layerwise=False`` makes one set for all layers of each tower.

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
        transform: "transformer", "mlp" or "none".
        shared: one set of prompts for both towers.
        joint: independent prompts of both towers.
        layerwise: whether each prompted layer has prompts of its own.
    """

    preset: str = "paper"
    n_text: int = 4
    n_visual: int = 4
    depth_text: int | None = None
    depth_vision: int | None = None
    class_token_position: str = "end"
    attention_heads: int = 1
    dropout: float | None = None
    transform: str = "transformer"
    shared: bool = False
    joint: bool = False
    layerwise: bool = True

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
        self._check_ablations()

    def _check_ablations(self) -> None:
        require_choice("transform", self.transform, TRANSFORMS)
        for name in ("shared", "joint", "layerwise"):
            require_bool(name, getattr(self, name))
        for name in ("transform", "shared", "joint", "layerwise"):
            value = getattr(self, name)
            if self.preset == "released" and value != getattr(UPTConfig, name):
                raise ValueError(f"{name}={value!r} with preset='released'; wanted preset='paper'")
        if self.shared and self.n_text != self.n_visual:
            raise ValueError(
                f"n_text={self.n_text} and n_visual={self.n_visual} with shared=True: one set of prompts feeds both "
                "towers; wanted equal numbers"
            )
        if self.joint and self.shared:
            raise ValueError("joint=True and shared=True; wanted one or the other")
        if self.joint and self.transform == "mlp":
            raise ValueError("transform='mlp' with joint=True: independent prompts are not transformed; wanted 'none'")

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
            if depth is None and self.preset == "released":
                depth = 1
            depths.append(require_depth(name, depth, layers))
        return depths[0], depths[1]


@dataclass(frozen=True)
class CoOpConfig(MethodConfig):
    """CoOp (arXiv 2109.01134).

    Args:
        n_ctx: prompt tokens.
        ctx_init: words whose embeddings the prompts start from; their number then replaces n_ctx and the prompts are
            shared by the classes, as in the released code. None or "": random.
        class_specific: each class has prompts of its own (random start only).
        class_token_position: where the class name stands among the prompts: "end", "middle" or "front".
    """

    n_ctx: int = 16
    ctx_init: str | None = None
    class_specific: bool = False
    class_token_position: str = "end"

    def __post_init__(self) -> None:
        require_int("n_ctx", self.n_ctx, 1)
        require_words("ctx_init", self.ctx_init)
        require_bool("class_specific", self.class_specific)
        require_choice("class_token_position", self.class_token_position, CLASS_TOKEN_POSITIONS)

    @property
    def prefix(self) -> str | None:
        """The words in front of the class name, or None."""
        return " ".join(split_words(self.ctx_init)) or None

    @property
    def n_text(self) -> int:
        """Prompt tokens in each text."""
        return len(split_words(self.ctx_init)) or self.n_ctx

    @property
    def per_class(self) -> bool:
        """Whether each class has prompts of its own."""
        return self.class_specific and self.prefix is None


@dataclass(frozen=True)
class CoCoOpConfig(MethodConfig):
    """CoCoOp (arXiv 2203.05557).

    Args:
        n_ctx: prompt tokens.
        ctx_init: words whose embeddings the prompts start from ("a photo of a" in the paper); their number then
            replaces n_ctx. None or "": random.
    """

    n_ctx: int = 4
    ctx_init: str | None = None

    def __post_init__(self) -> None:
        require_int("n_ctx", self.n_ctx, 1)
        require_words("ctx_init", self.ctx_init)

    @property
    def prefix(self) -> str | None:
        """The words in front of the class name, or None."""
        return " ".join(split_words(self.ctx_init)) or None

    @property
    def n_text(self) -> int:
        """Prompt tokens in each text."""
        return len(split_words(self.ctx_init)) or self.n_ctx


@dataclass(frozen=True)
class ZeroShotConfig(MethodConfig):
    """CLIP without learning (arXiv 2103.00020), and the fixed text of the methods that prompt images only.

    Args:
        templates: a text with one {} for the class name; several, whose class features are averaged; or a name for
            some: "default", "imagenet_select" (seven). Texts and names may stand together.
    """

    templates: str | tuple[str, ...] = field(default=DEFAULT_TEMPLATE, kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.templates, list):  # as JSON has it
            object.__setattr__(self, "templates", tuple(self.templates))
        expand_templates(self.templates)

    @property
    def template_texts(self) -> tuple[str, ...]:
        """The templates with names replaced by what they stand for."""
        return expand_templates(self.templates)


@dataclass(frozen=True)
class VPTConfig(ZeroShotConfig):
    """VPT, shallow or deep, as released with UPT (arXiv 2203.12119, 2210.07225).

    Args:
        templates: see :class:`ZeroShotConfig`.
        n_ctx: prompt tokens in a tower of 12 layers. The deep method's parameter has 12 * n_ctx rows whatever the
            tower, so that L layers get 12 * n_ctx / L tokens each.
    """

    n_ctx: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int("n_ctx", self.n_ctx, 1)

    def tokens_per_layer(self, layers: int) -> int:
        """Deep prompt tokens of each of so many layers.

        Raises:
            ValueError: they do not divide the 12 * n_ctx rows.
        """
        if 12 * self.n_ctx % layers:
            raise ValueError(
                f"n_ctx={self.n_ctx}; the released parameter has 12 * n_ctx = {12 * self.n_ctx} rows, which this "
                f"CLIP's {layers} layers do not divide: wanted a multiple of {layers // gcd(12, layers)}"
            )
        return 12 * self.n_ctx // layers


@dataclass(frozen=True)
class MaPLeConfig(MethodConfig):
    """MaPLe (arXiv 2210.03117).

    Args:
        n_ctx: prompt tokens of each tower.
        depth: layers with prompts of their own, from the input, in both towers; None: all of the shallower tower.
        ctx_init: words whose first n_ctx embeddings the input layer's text prompts start from, read if n_ctx <= 4. As
            in the released code all of them stand in the text, so that words beyond n_ctx stay between the prompts
            and the class name. None or "": random.
        half_prompts: round visual and deep text prompts, and their gradients by image and class, to float16, as the
            released code does at any precision.
    """

    n_ctx: int = 2
    depth: int | None = 9
    ctx_init: str | None = "a photo of a"
    half_prompts: bool = False

    def __post_init__(self) -> None:
        require_int("n_ctx", self.n_ctx, 1)
        if self.depth is not None:
            require_int("depth", self.depth, 1)
        require_words("ctx_init", self.ctx_init)
        require_bool("half_prompts", self.half_prompts)

    @property
    def prefix(self) -> str | None:
        """The words in front of the class name, or None."""
        return (" ".join(split_words(self.ctx_init)) or None) if self.n_ctx <= 4 else None

    @property
    def n_text(self) -> int:
        """Prompt tokens in each text."""
        return self.n_ctx

    def layers(self, text_layers: int, vision_layers: int) -> int:
        """The depth in towers of so many layers.

        Raises:
            ValueError: it is larger than a tower.
        """
        return require_depth("depth", self.depth, min(text_layers, vision_layers))


@dataclass(frozen=True)
class IVLPConfig(MethodConfig):
    """Independent vision-language prompting (the baseline of MaPLe, arXiv 2210.03117).

    Args:
        n_text: prompt tokens of the text tower.
        n_visual: prompt tokens of the image tower.
        depth_text: text layers with prompts of their own, from the input; None: all.
        depth_vision: the same for the image tower; 0: no visual prompts.
        ctx_init: as for :class:`MaPLeConfig`, read if n_text <= 4.
        half_prompts: as for :class:`MaPLeConfig`: all prompts but the input layer's of the text.
    """

    n_text: int = 2
    n_visual: int = 2
    depth_text: int | None = None
    depth_vision: int | None = None
    ctx_init: str | None = "a photo of a"
    half_prompts: bool = False

    def __post_init__(self) -> None:
        for name in ("n_text", "n_visual"):
            require_int(name, getattr(self, name), 1)
        for name, minimum in (("depth_text", 1), ("depth_vision", 0)):
            if getattr(self, name) is not None:
                require_int(name, getattr(self, name), minimum)
        require_words("ctx_init", self.ctx_init)
        require_bool("half_prompts", self.half_prompts)

    @property
    def prefix(self) -> str | None:
        """The words in front of the class name, or None."""
        return (" ".join(split_words(self.ctx_init)) or None) if self.n_text <= 4 else None

    def depths(self, text_layers: int, vision_layers: int) -> tuple[int, int]:
        """(depth_text, depth_vision) for towers of so many layers.

        Raises:
            ValueError: a depth is larger than its tower.
        """
        return (
            require_depth("depth_text", self.depth_text, text_layers),
            require_depth("depth_vision", self.depth_vision, vision_layers, minimum=0),
        )


@dataclass(frozen=True)
class MVPTConfig(ZeroShotConfig):
    """VPT as released with MaPLe: IVLP's visual prompts and a fixed text (arXiv 2210.03117, 2203.12119).

    Args:
        templates: see :class:`ZeroShotConfig`.
        n_ctx: prompt tokens of the image tower.
        depth: image layers with prompts of their own, from the input; None: all.
        half_prompts: as for :class:`MaPLeConfig`.
    """

    n_ctx: int = 8
    depth: int | None = None
    half_prompts: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int("n_ctx", self.n_ctx, 1)
        if self.depth is not None:
            require_int("depth", self.depth, 1)
        require_bool("half_prompts", self.half_prompts)

    def layers(self, vision_layers: int) -> int:
        """The depth in a tower of so many layers.

        Raises:
            ValueError: it is larger than the tower.
        """
        return require_depth("depth", self.depth, vision_layers)
