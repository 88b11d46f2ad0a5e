"""What the demo compares: each method's options on the tiny CLIP, and its learning rate. Imports no torch.

Four prompt tokens per prompted layer and tower, six in the image tower of VPT-deep and UPT. VPT and UPT start from
random prompts, the others from "a photo of a", which the tiny CLIP's vocabulary has as four tokens; methods that prompt
images only have zero-shot CLIP's caption. Where there was a choice, the methods that UPT is compared with got what did
better on the digits that demo/choose_lr.py measures on, each at its best learning rate: CoOp its words (60.6; random
prompts 58.5), VPT-deep its 6 tokens per layer (66.4; with 3 tokens 65.0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

TEMPLATE = "a photo of the digit {}."  # one caption, fixed in advance, as the field scores zero-shot CLIP
WORDS = "a photo of a"
ZERO_SHOT = "zeroshot"  # always in the table: it trains nothing


@dataclass(frozen=True)
class DemoMethod:
    """A method in the demo.

    Args:
        lr: learning rate.
        options: of its config (upt_fast/config.py).
    """

    lr: float
    options: dict[str, Any]


DEMO_METHODS = {
    "coop": DemoMethod(0.001, {"n_ctx": 4, "ctx_init": WORDS}),
    "cocoop": DemoMethod(0.001, {"n_ctx": 4, "ctx_init": WORDS}),
    "vpt_shallow": DemoMethod(0.001, {"n_ctx": 4, "templates": TEMPLATE}),
    # 24 rows over the image tower's 4 layers: 6 tokens each; with the only other number near 4, 3, it does worse
    "vpt_deep": DemoMethod(0.01, {"n_ctx": 2, "templates": TEMPLATE}),
    "mvpt": DemoMethod(0.01, {"n_ctx": 4, "templates": TEMPLATE}),
    "ivlp": DemoMethod(0.01, {"n_text": 4, "n_visual": 4, "ctx_init": WORDS}),
    "maple": DemoMethod(0.01, {"n_ctx": 4, "depth": None, "ctx_init": WORDS}),  # in 3 layers, all of the text tower's
    # as many image tokens as VPT-deep: 65.0; with 4 of them 64.9
    "upt": DemoMethod(0.02, {"n_text": 4, "n_visual": 6}),
}
DEFAULT_METHODS = ("coop", "vpt_deep", "upt")
ALL_METHODS = tuple(DEMO_METHODS)
UNIMODAL_METHODS = ("coop", "vpt_deep")  # UPT's two halves, which it is compared with in the end


def demo_methods(names: Sequence[str]) -> tuple[str, ...]:
    """The methods to train, in the table's order.

    Args:
        names: keys of DEMO_METHODS; "zeroshot" may be among them, for it is always shown.
    Raises:
        ValueError: an unknown name, one that comes twice, or none to train.
    """
    for name in names:
        if name not in DEMO_METHODS and name != ZERO_SHOT:
            raise ValueError(f"methods: got {name!r}, wanted some of {', '.join(ALL_METHODS)}")
    chosen = tuple(name for name in DEMO_METHODS if name in names)
    if not chosen or len(set(names)) < len(names):
        got = ", ".join(names) or "none"
        raise ValueError(f"methods: got {got}, wanted at least one of {', '.join(ALL_METHODS)} and none twice")
    return chosen
