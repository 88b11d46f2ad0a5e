"""MaPLe (arXiv 2210.03117): text prompts in the first layers, and visual prompts that are linear maps of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from upt_fast.common.checks import require_bool, require_int
from upt_fast.methods.demo import WORDS, DemoSettings
from upt_fast.methods.method import Method
from upt_fast.methods.options import MethodConfig, phrase, require_depth, require_words
from upt_fast.methods.release import Release, ReleasedTensors


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
        return phrase(self.ctx_init) if self.n_ctx <= 4 else None

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


def _infer(tensors: ReleasedTensors, given: Mapping[str, Any]) -> dict[str, Any]:
    return {"n_ctx": tensors.rows("ctx"), "depth": 2 + tensors.last_index("compound_prompts_text.", -1)}


def _notes(config: MaPLeConfig) -> list[str]:
    return ["its widths 512 and 768 are literals: CLIPs of other widths than ViT-B's do not fit"]


METHODS = (
    Method(
        "maple",
        "MaPLe",
        MaPLeConfig,
        "upt_fast.prompts.maple:MaPLe",
        source="arXiv 2210.03117",
        exact="the authors' code; its float16 rounding with half_prompts",
        order=50,
        recipe="maple",
        release=Release(
            trainer="MaPLe",
            registered="MultiModalPromptLearner",
            section="MAPLE",
            options={"N_CTX": "n_ctx", "CTX_INIT": "ctx_init", "PROMPT_DEPTH": "depth"},
            tensors=("ctx", "proj.*", "compound_prompts_text.*", "compound_prompt_projections.*"),
            marks=("proj.*", "compound_prompts_text.*", "compound_prompt_projections.*"),
            infer=_infer,
            whole=True,
            guesses=({"ctx_init": None},),  # random start: no words beyond the prompts
            notes=_notes,
        ),
        demo=DemoSettings(
            row=7,
            lr=0.01,
            measured={0.001: 60.2, 0.003: 60.2, 0.01: 62.6, 0.03: 61.5},
            options={"n_ctx": 4, "depth": None, "ctx_init": WORDS},  # in 3 layers, all of the text tower's
        ),
    ),
)
