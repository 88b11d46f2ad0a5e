"""Every method by its name: its options and its plain form.

>>> model = ReferencePromptedCLIP(clip_model, ["cat", "dog"], method="coop", n_ctx=4)
"""

from __future__ import annotations

from typing import NamedTuple

from upt_fast.config import MethodConfig
from upt_fast.reference.base import TWINS, Prompts, ReferencePromptedCLIP
from upt_fast.reference.cocoop import ReferenceCoCoOp
from upt_fast.reference.coop import ReferenceCoOp
from upt_fast.reference.ivlp import ReferenceIVLP, ReferenceMVPT
from upt_fast.reference.maple import ReferenceMaPLe
from upt_fast.reference.unified import ReferencePromptLearner, ReferenceUPT
from upt_fast.reference.vpt import ReferenceDeepVPT, ReferenceShallowVPT
from upt_fast.reference.zeroshot import ReferenceZeroShot

__all__ = ["METHODS", "Method", "Prompts", "ReferencePromptLearner", "ReferencePromptedCLIP", "ReferenceUPT"]


class Method(NamedTuple):
    """A method's options and its plain form."""

    config: type[MethodConfig]
    reference: type[ReferencePromptedCLIP]


METHODS: dict[str, Method] = {
    reference.method: Method(reference.config_class, reference)
    for reference in (
        ReferenceUPT,
        ReferenceCoOp,
        ReferenceCoCoOp,
        ReferenceShallowVPT,
        ReferenceDeepVPT,
        ReferenceMaPLe,
        ReferenceIVLP,
        ReferenceMVPT,
        ReferenceZeroShot,
    )
}
TWINS.update({name: found.reference for name, found in METHODS.items()})
