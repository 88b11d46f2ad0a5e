"""CoOp (arXiv 2109.01134): learned words around the class name, at the text tower's input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from upt_fast.common.checks import require_bool, require_choice, require_int
from upt_fast.methods.demo import WORDS, DemoSettings
from upt_fast.methods.method import Method
from upt_fast.methods.options import CLASS_TOKEN_POSITIONS, MethodConfig, phrase, require_words, split_words
from upt_fast.methods.release import Release, ReleasedTensors


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
        return phrase(self.ctx_init)

    @property
    def n_text(self) -> int:
        """Prompt tokens in each text."""
        return len(split_words(self.ctx_init)) or self.n_ctx

    @property
    def per_class(self) -> bool:
        """Whether each class has prompts of its own."""
        return self.class_specific and self.prefix is None


def rows_of_words(tensors: ReleasedTensors, given: Mapping[str, Any], axes: tuple[int, ...] = (2,)) -> int:
    """Rows of a released ``ctx``, all of which the initial words fill, where there are any."""
    rows = tensors.rows("ctx", axes)
    require_words("ctx_init", given.get("ctx_init"))
    words, shape = split_words(given.get("ctx_init")), tensors.shapes["ctx"]
    if words and (len(shape) == 3 or len(words) != rows):
        raise ValueError(
            f"ctx_init={given['ctx_init']!r} has {len(words)} words; ctx is {shape}: "
            "wanted as many words as rows, one context for all classes, or no ctx_init"
        )
    return rows


def _infer(tensors: ReleasedTensors, given: Mapping[str, Any]) -> dict[str, Any]:
    return {"n_ctx": rows_of_words(tensors, given, (2, 3)), "class_specific": len(tensors.shapes["ctx"]) == 3}


METHODS = (
    Method(
        "coop",
        "CoOp",
        CoOpConfig,
        "upt_fast.prompts.coop:CoOp",
        source="arXiv 2109.01134",
        exact="its release with UPT",
        order=10,
        recipe="coop",
        release=Release(
            trainer="CoOp",
            registered="prompt_learner",
            section="COOP",
            options={
                "N_CTX": "n_ctx",
                "CTX_INIT": "ctx_init",
                "CSC": "class_specific",
                "CLASS_TOKEN_POSITION": "class_token_position",
            },
            tensors=("ctx",),
            marks=("ctx",),
            infer=_infer,
        ),
        demo=DemoSettings(
            row=1,
            lr=0.001,
            measured={0.0003: 55.7, 0.001: 60.6, 0.003: 59.7, 0.01: 60.1, 0.03: 58.0, 0.1: 54.6},
            options={"n_ctx": 4, "ctx_init": WORDS},
            default=True,
        ),
    ),
)
