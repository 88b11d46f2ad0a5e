"""Independent vision-language prompting, MaPLe's baseline (arXiv 2210.03117), and its image part alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from upt_fast.common.checks import require_bool, require_int
from upt_fast.methods.demo import TEMPLATE, WORDS, DemoSettings
from upt_fast.methods.method import Method
from upt_fast.methods.options import MethodConfig, phrase, require_depth, require_words
from upt_fast.methods.release import Release, ReleasedTensors
from upt_fast.methods.templates import DEFAULT_TEMPLATE, TemplatesConfig, one_template

TEXT_LAYER, VISION_LAYER = (f"{tower}_encoder.transformer.resblocks." for tower in ("text", "image"))


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
        return phrase(self.ctx_init) if self.n_text <= 4 else None

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
class MVPTConfig(TemplatesConfig):
    """VPT as released with MaPLe: IVLP's visual prompts and a fixed text (arXiv 2210.03117, 2203.12119).

    Args:
        templates: see :class:`TemplatesConfig`.
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


def _infer_ivlp(tensors: ReleasedTensors, given: Mapping[str, Any]) -> dict[str, Any]:
    depth_text = 1 + tensors.last_index(TEXT_LAYER, 0)
    found = {"n_text": tensors.rows("ctx"), "depth_text": depth_text, "depth_vision": 0}
    if tensors.matching("image_encoder.*"):
        depth_vision = 1 + tensors.last_index(VISION_LAYER, 0)
        found |= {"n_visual": tensors.rows("image_encoder.VPT"), "depth_vision": depth_vision}
    return found


def _fits_ivlp(tensors: ReleasedTensors) -> bool:
    """Prompts in a layer's place; or a context alone, in a file of a whole model."""
    if tensors.matching("text_encoder.*", "image_encoder.*"):
        return True
    return tensors.whole and len(tensors.shapes["ctx"]) == 2


def _infer_mvpt(tensors: ReleasedTensors, given: Mapping[str, Any]) -> dict[str, Any]:
    return {"n_ctx": tensors.rows("image_encoder.VPT"), "depth": 1 + tensors.last_index(VISION_LAYER, 0)}


def _refuse_mvpt(config: MVPTConfig) -> str:
    if config.template_texts == (DEFAULT_TEMPLATE,):
        return ""
    template = config.template_texts[0]
    return one_template(config) or f"its template is {template!r}, the released code's {DEFAULT_TEMPLATE!r}"


METHODS = (
    Method(
        "ivlp",
        "IVLP",
        IVLPConfig,
        "upt_fast.prompts.ivlp:IVLP",
        source="arXiv 2210.03117",
        exact="its release with MaPLe; its float16 rounding with half_prompts",
        order=60,
        recipe="ivlp",
        release=Release(
            trainer="IVLP",
            registered="VLPromptLearner",
            section="IVLP",
            options={
                "N_CTX_TEXT": "n_text",
                "N_CTX_VISION": "n_visual",
                "CTX_INIT": "ctx_init",
                "PROMPT_DEPTH_TEXT": "depth_text",
                "PROMPT_DEPTH_VISION": "depth_vision",
            },
            tensors=("ctx", "text_encoder.*", "image_encoder.*"),
            marks=("ctx", "text_encoder.*"),
            infer=_infer_ivlp,
            whole=True,
            fits=_fits_ivlp,
            guesses=({"ctx_init": None},),  # random start: no words beyond the prompts
        ),
        demo=DemoSettings(
            row=6,
            lr=0.01,
            measured={0.001: 61.5, 0.003: 62.5, 0.01: 62.8, 0.03: 61.9},
            options={"n_text": 4, "n_visual": 4, "ctx_init": WORDS},
        ),
    ),
    Method(
        "mvpt",
        "VPT (MaPLe's)",
        MVPTConfig,
        "upt_fast.prompts.ivlp:MVPT",
        source="arXiv 2210.03117",
        exact="its release with MaPLe; its float16 rounding with half_prompts",
        order=70,
        recipe="mvpt",
        release=Release(
            trainer="VPT",
            registered="prompt_learner",
            section="VPT",
            options={"N_CTX_VISION": "n_ctx", "PROMPT_DEPTH_VISION": "depth"},
            tensors=("image_encoder.*",),
            marks=("image_encoder.*",),
            infer=_infer_mvpt,
            whole=True,
            refusal=_refuse_mvpt,
        ),
        demo=DemoSettings(
            row=5,
            lr=0.01,
            measured={0.001: 64.5, 0.003: 65.8, 0.01: 66.6, 0.03: 63.6},
            options={"n_ctx": 4, "templates": TEMPLATE},
        ),
    ),
)
