"""Which step is the fastest of those that stay below a number of bytes: memory level, and what runs at once.

Bytes are those of engine/memory.py, of tensors alive. On top come the gradients and the optimizer's state, features and
logits, the images, and room for what an allocator holds back: up to as much again on a CPU, unless its heap was kept
small (engine/workspace.py). Time is counted in FLOPs (engine/flops.py), those that run again included, and each pass
through a tower as if it had some more rows, for the weights are read anew. Nothing is timed: the same step has the same
plan, today and when a run is resumed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch

from upt_fast.common.checks import require_int
from upt_fast.common.sizes import show_bytes
from upt_fast.engine.flops import Blocks, TextCost, VisionCost
from upt_fast.engine.memory import Need, peak, peak_in_turn
from upt_fast.engine.towers import PackedClasses, groups
from upt_fast.engine.towers.blocks import MEMORY_LEVELS
from upt_fast.engine.workspace import heap_is_small
from upt_fast.prompts import Prompts
from upt_fast.steps.micro_batches import MicroBatches

if TYPE_CHECKING:
    from upt_fast.model import FastPromptedCLIP

# times the tensors alive: on a GPU, on a CPU, on a CPU whose heap keeps what is freed
ROOM_GPU, ROOM, ROOM_HEAP = 1.1, 1.15, 2.0
FIXED = {"cpu": 32 << 20, "cuda": 64 << 20}  # small tensors and the C library's own; workspaces of a GPU's libraries
PASS_ROWS = 64  # what a pass costs beside its rows
WORDS = 8  # rows of a written text beside the class name, where it is not known yet
MOST_PARTS = 64
STATES = 3  # of a trained number: its gradient, and what AdamW keeps


class MemoryPlan(NamedTuple):
    """How a step runs.

    Args:
        memory: level of both towers.
        images: images at once in a step of batch_size.
        classes: classes at once, of num_classes.
        test_images: most images of a forward pass without gradients.
        bytes: what it needs at most beside the weights, room for the allocator included.
        flops: of a step.
        fastest_flops: of the step without a limit.
        batch_size: B.
        num_classes: C.
        texts_by_image: whether class features depend on the images.
    """

    memory: str
    images: int
    classes: int
    test_images: int
    bytes: int
    flops: int
    fastest_flops: int
    batch_size: int
    num_classes: int
    texts_by_image: bool

    @property
    def micro_batches(self) -> MicroBatches | None:
        """For :meth:`FastPromptedCLIP.make_graphed_step`; None: the whole step at once."""
        if self.images >= self.batch_size and self.classes >= self.num_classes and not self.texts_by_image:
            return None
        return MicroBatches(self.images, self.classes)

    def describe(self) -> str:
        """The plan in a line."""
        more = self.flops / self.fastest_flops
        return (
            f"memory={self.memory!r}, {self.images} of {self.batch_size} images and {self.classes} of "
            f"{self.num_classes} classes at once: about {show_bytes(self.bytes)} beside the weights, {more:.2f} times "
            "the work of a step without a limit"
        )


class Step:
    """What a step of a model needs and costs, by formula.

    Args:
        model: the model.
        batch_size: B.
    """

    def __init__(self, model: FastPromptedCLIP, batch_size: int) -> None:
        require_int("batch_size", batch_size, 1)
        self.model, self.batch_size, self.learner = model, batch_size, model.prompt_learner
        features = model.logit_scale.new_zeros(1, model.embed_dim)
        state = torch.get_rng_state()  # dropout
        with torch.enable_grad():
            self.prompts: Prompts = self.learner(features) if self.learner.by_image else self.learner()
        torch.set_rng_state(state)
        self.text_grad, self.visual_grad = (p is not None and p.requires_grad for p in self.prompts)
        self.has_texts = self.learner.templates is None

    @property
    def num_classes(self) -> int:
        return len(self.model.classnames)

    def vision(self, images: int, memory: str | None = None, backward: bool | None = None) -> Need:
        """Bytes of the image tower."""
        visual = self.prompts.visual
        length, depth = (0, 1) if visual is None else (visual.shape[2], visual.shape[1])
        backward = self.visual_grad if backward is None else backward
        return self.model.vision_tower.need(images, length, depth, backward, memory)

    def text(self, sets: int = 1, classes: int = 0, memory: str | None = None, backward: bool | None = None) -> Need:
        """Bytes of the text tower for a group of classes; 0: all."""
        if not self.has_texts:
            return self._fixed(classes)
        depth = None if self.prompts.text is None else self.prompts.text.shape[1]
        backward = self.text_grad if backward is None else backward
        packed = self._groups(classes)[-1].packed if classes else self.model._classes  # the longest names
        return self.model.text_tower.need(packed, backward, sets, depth, memory)

    def _fixed(self, classes: int) -> Need:
        """Of texts without prompts, once and without a graph: what a method's terms of the loss read, or its classes.

        Which texts the terms read is known when they do: WORDS rows more than a class has.
        """
        tower, packs = self.model.text_tower, list(self.model.packed)
        per_row = 4 * tower.blocks.width * tower.blocks.qkv_bias.dtype.itemsize  # rows, and q, k, v of the first layer
        more = 0 if self.learner.templates is not None else WORDS * self.num_classes
        share = min(1.0, (classes or self.num_classes) / self.num_classes)
        needs = []
        for packed in packs:
            assert isinstance(packed, PackedClasses)
            need, rows = tower.need(packed, False), packed.layout.num_rows
            work = int((need.lasting + need.passing) * share * (rows + more) / rows)
            needs.append(Need(work, more and (rows + more) * per_row))
        return max(needs, key=sum)

    @functools.cache  # noqa: B019  # a step is short-lived
    def _groups(self, classes: int) -> list[groups.ClassGroup]:
        return groups.split(self.model._classes, classes, with_places=False)

    def needs(self, memory: str | None = None) -> tuple[Need, ...]:
        """Bytes of each tower that works in the step that is not in parts."""
        vision = self.vision(self.batch_size, memory)
        if not self.has_texts:
            return (vision,)
        sets = min(self.model._group(self.batch_size), self.batch_size) if self.learner.by_image else 1
        return vision, self.text(sets, memory=memory)

    def whole(self, memory: str | None = None) -> int:
        """Peak of tensors alive of the step that is not in parts."""
        return peak(*self.needs(memory))

    def in_parts(self, memory: str, images: int, classes: int) -> int:
        """The same of a step in parts."""
        fixed = [self._fixed(classes)] if self.model._loss_terms is not None else []
        if not self.has_texts:
            return max(peak(self.vision(images, memory)), peak_in_turn(self.text(classes=classes)))
        if self.learner.by_image:
            return peak_in_turn(self.vision(images, memory), self.text(images, classes, memory))
        if classes >= self.num_classes:
            vision, text = self.vision(images, memory), self.text(memory=memory)
            return max(peak(vision, text), text.lasting + sum(sum(need) for need in fixed))
        forward = self.text(classes=classes, backward=False)
        return peak_in_turn(self.vision(images, memory), self.text(1, classes, memory), forward, *fixed)

    def evaluation(self, images: int, classes: int) -> int:
        """Bytes that a process needs for a forward pass without gradients, images and optimizer included."""
        sets = images if self.learner.by_image else 1
        text = self.text(sets, 0 if self.learner.by_image else classes, backward=False)
        alive = peak(self.vision(images, backward=False), text)
        return self.with_room(alive) + images * self._image_bytes()

    def _image_bytes(self) -> int:
        height, width = self.model.vision_tower.image_size
        return 3 * height * width * 9  # bytes as they come, as float32, and while they are normalised

    def rest(self) -> dict[str, int]:
        """Bytes beside the towers': optimizer, features and logits, images."""
        trained = sum(p.nbytes for p in self.learner.parameters() if p.requires_grad)
        batch, classes, itemsize = self.batch_size, self.num_classes, self.model.logit_scale.dtype.itemsize
        features = (batch + classes * (batch if self.learner.by_image else 1)) * self.model.embed_dim
        return {
            "optimizer": STATES * trained,
            "features": (6 * features + 8 * batch * classes) * itemsize,
            "images": batch * self._image_bytes(),
        }

    def with_room(self, alive: int) -> int:
        """Bytes that a process needs for so many of tensors alive."""
        kind = "cuda" if self.model.logit_scale.device.type == "cuda" else "cpu"
        room = ROOM_GPU if kind == "cuda" else ROOM if heap_is_small() else ROOM_HEAP
        return int(room * alive) + FIXED[kind] + sum(self.rest().values())

    def flops(self, memory: str, images: int, classes: int) -> int:
        """Of a step in parts."""
        batches = [end - first for first, end in groups.bounds(self.batch_size, images)]
        texts = self._texts(classes) if self.has_texts else []
        anew = len(texts) > 1 and self.text_grad
        total = 0
        for size in batches:
            total += _cost(self._vision(size), memory, False)
            if self.learner.by_image:
                total += sum(_cost(text, memory, anew, size) for text in texts)
        if not self.learner.by_image:
            total += sum(_cost(text, memory, anew) for text in texts)
        if self.visual_grad and self.model._loss_terms is not None and len(batches) > 1:
            total += sum(self._vision(size).on_engine().forward for size in batches)
        return total

    def _vision(self, images: int) -> VisionCost:
        tower, visual = self.model.vision_tower, self.prompts.visual
        rows = 1 + len(tower.positions)
        depth, length = (0, 0) if visual is None else (visual.shape[1], visual.shape[2])
        return VisionCost(
            blocks=Blocks.on(tower.blocks),
            batch_size=images,
            rows=rows,
            pooled=1 if tower.pooling == "tok" else rows - 1,
            patch=tower.conv_weight[0].numel(),
            features=None if tower.head.norm_only else self.model.embed_dim,
            sets=images if self.learner.half_prompts else 1,
            depth=depth,
            length=length,
            grad=self.visual_grad,
        )

    @functools.cache  # noqa: B019
    def _texts(self, classes: int) -> list[TextCost]:
        tower, text = self.model.text_tower, self.prompts.text
        return [
            TextCost(
                blocks=Blocks.on(tower.blocks),
                packed=group.packed,
                length=0,
                features=None if tower.head.norm_only else self.model.embed_dim,
                depth=0 if text is None else text.shape[1],
                grad=self.text_grad,
            )
            for group in self._groups(classes)
        ]


def _cost(tower: VisionCost | TextCost, memory: str, anew: bool, times: int = 1) -> int:
    """FLOPs of a pass and its backward; anew: forward ran once more without a graph. times: prompt sets."""
    found, blocks = tower.on_engine(), tower.blocks
    passes = 1 + tower.grad + anew
    reading = passes * blocks.layers * (blocks.qkv(PASS_ROWS, False) + blocks.finish(PASS_ROWS, False)).forward
    return times * (found.total + tower.again(memory) + (found.forward if anew else 0)) + reading


def sizes(count: int) -> Iterator[int]:
    """Sizes of the parts of a count: all, a half, a third, and so on, later in steps of a third; up to MOST_PARTS."""
    parts, most = 1, min(count, MOST_PARTS)
    while parts < most:
        yield -(-count // parts)
        parts = max(parts + 1, parts * 4 // 3)
    yield -(-count // most)


def plan(model: FastPromptedCLIP, batch_size: int, max_bytes: int | None = None) -> MemoryPlan:
    """See :meth:`FastPromptedCLIP.plan_memory`."""
    step = Step(model, batch_size)
    if max_bytes is not None:
        require_int("max_bytes", max_bytes, 1)
    classes, seen = step.num_classes, []
    fastest = step.flops("fast", batch_size, classes)
    for memory in MEMORY_LEVELS:
        for at_once in sizes(classes):
            for images in sizes(batch_size):
                # an image at a time can be evaluated, too
                need = max(step.with_room(step.in_parts(memory, images, at_once)), step.evaluation(1, at_once))
                flops = step.flops(memory, images, at_once)
                of = (fastest, batch_size, classes, model.texts_by_image)
                seen.append(MemoryPlan(memory, images, at_once, 1, need, flops, *of))
    fitting = [found for found in seen if max_bytes is None or found.bytes <= max_bytes]
    if not fitting:
        least = min(seen, key=lambda found: found.bytes)
        raise ValueError(
            f"max_memory={show_bytes(max_bytes or 0)} is too little for a step of {batch_size} images and "
            f"{classes} classes; the smallest that does needs {show_bytes(least.bytes)} "
            f"(memory={least.memory!r}, {least.images} images and {least.classes} classes at once)"
        )
    # the least work; of equal ones the largest parts
    found = min(fitting, key=lambda found: (found.flops, -found.images, -found.classes))
    return found._replace(test_images=_most(step, found.classes, max_bytes))


def _most(step: Step, classes: int, max_bytes: int | None) -> int:
    """Images of a forward pass without gradients, up to 4096."""
    low, high = 1, 4096
    if max_bytes is None:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if step.evaluation(middle, classes) <= max_bytes else (low, middle - 1)
    return low
