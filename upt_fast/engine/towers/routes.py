"""The route through a tower's layers that serves what was asked for, and what cannot be asked for together.

Rows            rows in, rows out (rows.py): "auto", "torch", "compiled", and attention by others
Regions         the same with layers that torch.compile has compiled (regions.py): "inductor"
Streams         for kernels that work on sums and LayerNorms, and read the prompts' keys and values in place
ReservedStreams the same beside attention that takes no shared keys (streams.py)
"""

from __future__ import annotations

from upt_fast.engine.backends.asked import Asked, AskedOfTowers
from upt_fast.engine.backends.dispatch import BACKENDS
from upt_fast.engine.towers.regions import Regions
from upt_fast.engine.towers.route import Route
from upt_fast.engine.towers.rows import Rows
from upt_fast.engine.towers.streams import ReservedStreams, Streams

# ops of neither tower, which follow what the image tower was asked for
MODEL_OPS = frozenset({"prompt_transform", "contrastive_loss"})
# named alone: they compute whole layers
WHOLE = ("compiled", "inductor")


def choose(asked: Asked) -> Route:
    """The route of one tower.

    Raises:
        ValueError: backends that cannot be combined.
    """
    for name in WHOLE:
        if name in asked.names and len(asked.names) > 1:
            others = ",".join(other for other in asked.names if other != name)
            raise ValueError(
                f"backend='{asked}': {name} computes whole layers and leaves {others} nothing to do; wanted {name!r} "
                f"alone, or one for each tower: '{name}/{others}'"
            )
    if _wants("buffer_attention", asked):
        return ReservedStreams(asked)
    if _wants("add_layer_norm", asked):
        return Streams(asked)
    return Regions(asked) if "inductor" in asked.names else Rows(asked)


def _wants(op: str, asked: Asked) -> bool:
    """Whether a backend beside PyTorch was asked for that has an op."""
    names = *asked.names, dict(asked.ops).get(op, "torch")
    return any(op in BACKENDS[name].OPS for name in names if name != "torch")


def check(asked: AskedOfTowers) -> None:
    """Raise a ValueError where a tower has no such route, or an op was asked for that its route does not have."""
    images, texts = choose(asked.images), choose(asked.texts)
    of_images, of_texts = images.image_ops | MODEL_OPS, texts.text_ops
    if asked.images == asked.texts:
        of_images = of_texts = of_images | of_texts
    for part, ops in ((asked.images, of_images), (asked.texts, of_texts)):
        for op, name in part.ops:
            if op not in ops:
                raise ValueError(
                    f"backend='{asked}': {op}={name} changes nothing, for this route does not have {op}; "
                    f"wanted one of {', '.join(sorted(ops))}"
                )
