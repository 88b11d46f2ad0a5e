"""CoCoOp (arXiv 2203.05557): CoOp's context, shifted by what a small network makes of the image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from upt_fast.common.checks import require_int
from upt_fast.methods.coop import rows_of_words
from upt_fast.methods.demo import WORDS, DemoSettings
from upt_fast.methods.method import Method
from upt_fast.methods.options import MethodConfig, phrase, require_words, split_words
from upt_fast.methods.release import Release, ReleasedTensors


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
        return phrase(self.ctx_init)

    @property
    def n_text(self) -> int:
        """Prompt tokens in each text."""
        return len(split_words(self.ctx_init)) or self.n_ctx


def _infer(tensors: ReleasedTensors, given: Mapping[str, Any]) -> dict[str, Any]:
    return {"n_ctx": rows_of_words(tensors, given)}


METHODS = (
    Method(
        "cocoop",
        "CoCoOp",
        CoCoOpConfig,
        "upt_fast.prompts.cocoop:CoCoOp",
        source="arXiv 2203.05557",
        exact="its release with UPT",
        order=20,
        recipe="cocoop",
        release=Release(
            trainer="CoCoOp",
            registered="prompt_learner",
            section="COCOOP",
            options={"N_CTX": "n_ctx", "CTX_INIT": "ctx_init"},
            tensors=("ctx", "meta_net.*"),
            marks=("meta_net.*",),
            infer=_infer,
        ),
        demo=DemoSettings(
            row=2,
            lr=0.001,
            measured={0.001: 60.2, 0.003: 59.5, 0.01: 59.8, 0.03: 59.6},
            options={"n_ctx": 4, "ctx_init": WORDS},
        ),
    ),
)
