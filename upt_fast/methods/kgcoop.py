"""KgCoOp (arXiv 2303.13283): CoOp's words, held near the features of written texts.

    loss = cross-entropy + weight (1 - mean over the classes of cos(w, w_0))

w are the features of the classes with learned words, w_0 those of fixed texts through the CLIP as it is. The prompts
are CoOp's, and images are classified as there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from upt_fast.methods.coop import CoOpConfig, rows_of_words
from upt_fast.methods.method import Method
from upt_fast.methods.release import Release, ReleasedTensors
from upt_fast.methods.templates import TemplatesConfig

if TYPE_CHECKING:
    from torch import Tensor

    from upt_fast.prompts import Features, PromptLearner

RELEASED_WORDS = "a photo of a"


@dataclass(frozen=True)
class KgCoOpConfig(CoOpConfig, TemplatesConfig):
    """KgCoOp (arXiv 2303.13283).

    Args:
        n_ctx: prompt tokens.
        ctx_init: words whose embeddings the prompts start from; their number then replaces n_ctx. None or "": random.
        weight: of the distance between learned and fixed class features in the loss: 8 in the paper.
        templates: the fixed texts: a text with one {} for the class name, as a rule the dataset's own; see
            :class:`TemplatesConfig`.
    """

    n_ctx: int = 4
    ctx_init: str | None = RELEASED_WORDS
    weight: float = 8.0

    def __post_init__(self) -> None:
        CoOpConfig.__post_init__(self)
        TemplatesConfig.__post_init__(self)
        number = isinstance(self.weight, (int, float)) and not isinstance(self.weight, bool)
        if not number or not 0 <= self.weight < math.inf:
            raise ValueError(f"weight={self.weight!r}; wanted a number of at least 0")


def distance_to_fixed_texts(learner: PromptLearner, features: Features) -> Tensor:
    """weight (1 - mean cosine) of the class features (C, e) and those of the fixed texts: ()."""
    config: KgCoOpConfig = learner.config
    assert features.texts is not None  # CoOp's words do not depend on the image
    cosines = (features.texts * features.fixed_texts(config.template_texts)).sum(dim=-1)
    return config.weight * (1 - cosines.mean())


def _infer(tensors: ReleasedTensors, given: Mapping[str, Any]) -> dict[str, Any]:
    per_class = len(tensors.shapes.get("ctx", ())) == 3
    found: dict[str, Any] = {"n_ctx": rows_of_words(tensors, given, (2, 3)), "class_specific": per_class}
    if "ctx_init" not in given and (per_class or found["n_ctx"] != len(RELEASED_WORDS.split())):
        found["ctx_init"] = None  # they start from these words, or at random
    return found


def _refuse(config: KgCoOpConfig) -> str:
    if config.class_token_position != "end":
        place = f"class_token_position={config.class_token_position!r}"
        return f"{place}, but the released code has the class name at the end whatever it says"
    return ""


def _settings(config: KgCoOpConfig) -> dict[str, Any]:
    return {"N_CTX": config.n_text, "CTX_INIT": ""}  # with words in it, theirs has four rows whatever they are


def _notes(config: KgCoOpConfig) -> list[str]:
    return ["its width 512 is a literal: CLIPs of another width than ViT-B's do not fit"]


METHODS = (
    Method(
        "kgcoop",
        "KgCoOp",
        KgCoOpConfig,
        "upt_fast.prompts.coop:CoOp",
        source="arXiv 2303.13283",
        exact="the authors' code",
        order=25,
        recipe="kgcoop",
        loss_terms=distance_to_fixed_texts,
        release=Release(
            trainer="KgCoOp",
            registered="prompt_learner",
            section="COOP",
            options={
                "N_CTX": "n_ctx",
                "CTX_INIT": "ctx_init",
                "CSC": "class_specific",
                "CLASS_TOKEN_POSITION": "class_token_position",
                "W": "weight",
            },
            tensors=("ctx", "bias_vectors", "meta_net.*"),
            marks=("bias_vectors",),
            marks_if_named=("ctx",),  # as exported: without what nothing reads
            infer=_infer,
            unused=("bias_vectors", "meta_net.*"),  # of the file's learner; its forward pass reads neither
            refusal=_refuse,
            settings=_settings,
            notes=_notes,
        ),
    ),
)
