"""VPT, shallow and deep, as released with UPT (arXiv 2203.12119, 2210.07225): image prompts beside a fixed text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any

from upt_fast.common.checks import require_int
from upt_fast.methods.demo import TEMPLATE, DemoSettings
from upt_fast.methods.method import Method
from upt_fast.methods.release import Release, ReleasedTensors
from upt_fast.methods.templates import TemplatesConfig, one_template


@dataclass(frozen=True)
class VPTConfig(TemplatesConfig):
    """VPT, shallow or deep, as released with UPT (arXiv 2203.12119, 2210.07225).

    Args:
        templates: see :class:`TemplatesConfig`.
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


def _infer_shallow(tensors: ReleasedTensors, given: Mapping[str, Any]) -> dict[str, Any]:
    return {"n_ctx": tensors.rows("visual_ctx")}


def _infer_deep(tensors: ReleasedTensors, given: Mapping[str, Any]) -> dict[str, Any]:
    return {"n_ctx": tensors.rows("visual_ctx") // 12}


def _fits_deep(tensors: ReleasedTensors) -> bool:
    """12 n rows, which the layers divide."""
    rows = next(iter(tensors.shapes["visual_ctx"]), 0)
    return rows > 0 and rows % 12 == 0 and rows % max(1, tensors.vision_layers) == 0


def _template_note(config: VPTConfig) -> list[str]:
    return [f"its text is CUSTOM_TEMPLATES[DATASET.NAME], which must be {config.template_texts[0]!r}"]


def _shallow_notes(config: VPTConfig) -> list[str]:
    missing = "as released the trainer calls encode_image_prompt_shallow, which is missing; VPT computes the same"
    return [*_template_note(config), missing]


METHODS = (
    Method(
        "vpt_shallow",
        "VPT-shallow",
        VPTConfig,
        "upt_fast.prompts.vpt:ShallowVPT",
        source="arXiv 2203.12119",
        exact="its release with UPT",
        order=30,
        recipe="vpt_shallow",
        release=Release(
            trainer="VPT_shallow",
            registered="model",
            section="COOP",
            options={"N_CTX": "n_ctx"},
            tensors=("visual_ctx", "mlp.*"),
            marks=("visual_ctx",),
            infer=_infer_shallow,
            whole=True,
            unused=("mlp.*",),  # a network of a loss whose weight is 0
            refusal=one_template,
            notes=_shallow_notes,
        ),
        demo=DemoSettings(
            row=3,
            lr=0.001,
            measured={0.001: 61.9, 0.003: 61.5, 0.01: 61.7, 0.03: 59.5},
            options={"n_ctx": 4, "templates": TEMPLATE},
        ),
        recorded_as=("vpt",),
    ),
    Method(
        "vpt_deep",
        "VPT-deep",
        VPTConfig,
        "upt_fast.prompts.vpt:DeepVPT",
        source="arXiv 2203.12119",
        exact="its release with UPT",
        order=40,
        recipe="vpt_deep",
        release=Release(
            trainer="VPT_deep",
            registered="model",
            section="COOP",
            options={"N_CTX": "n_ctx"},
            tensors=("visual_ctx",),
            marks=("visual_ctx",),
            infer=_infer_deep,
            whole=True,
            fits=_fits_deep,
            refusal=one_template,
            notes=_template_note,
        ),
        # 24 rows over the image tower's 4 layers: 6 tokens each; with the only other number near 4, 3, it does worse
        demo=DemoSettings(
            row=4,
            lr=0.01,
            measured={0.0003: 64.1, 0.001: 65.0, 0.003: 66.0, 0.01: 66.4, 0.03: 65.1, 0.1: 63.4},
            options={"n_ctx": 2, "templates": TEMPLATE},
            default=True,
        ),
    ),
)
