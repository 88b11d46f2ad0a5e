"""What ``upt-fast demo`` trains a method with. Imports no torch.

Four prompt tokens per prompted layer and tower, six in the image tower of VPT-deep and UPT. VPT and UPT start from
random prompts, the others from "a photo of a", which the tiny CLIP's vocabulary has as four tokens; methods that prompt
images only have zero-shot CLIP's caption. Where there was a choice, the methods that UPT is compared with got what did
better on the digits that demo/choose_lr.py measures on, each at its best learning rate: CoOp its words (60.6; random
prompts 58.5), VPT-deep its 6 tokens per layer (66.4; with 3 tokens 65.0).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TEMPLATE = "a photo of the digit {}."  # one caption, fixed in advance, as the field scores zero-shot CLIP
WORDS = "a photo of a"


@dataclass(frozen=True)
class DemoSettings:
    """A method in the demo.

    Args:
        row: its place in the demo's table.
        lr: learning rate: of those measured the best.
        measured: what demo/choose_lr.py found on one thread of torch 2.14: learning rate -> accuracy in percent.
        options: of its config.
        default: whether it is trained where no method is named.
    """

    row: int
    lr: float
    measured: Mapping[float, float]
    options: Mapping[str, Any] = field(default_factory=dict)
    default: bool = False
