"""What a training step of each method costs, here and in plain PyTorch: ``upt-fast methods``.

Counted are the FLOPs of matrix products, 2 m n k each, and nothing else: linears and patches, and attention's scores
and sums. The CLIP is frozen, so that

    linear, r rows of a features to b          forward 2 r a b     backward 2 r a b, the rows' gradient
    attention, p pairs of rows of width D      forward 4 p D       backward 8 p D, of q, k, v and the probabilities

and backward has them only where prompts stand before the rows. What flash attention computes again is not counted.

The engine's formulas follow towers/text.py and towers/vision.py with ``memory="fast"``, the plain ones
reference/base.py: all 77 tokens of each class and each image, prompts as rows of every sequence. A method's own network
is small and trained: its products are counted as they run.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from upt_fast.clip.frozen import FrozenBlock, FrozenCLIP
from upt_fast.clip.loading import TINY_CLIP_NAME
from upt_fast.clip.open_clip import frozen_clip, refuse
from upt_fast.clip.tokens import Tokenizer, clean_classnames, tokenize_classnames, tokenize_template
from upt_fast.common.checks import require_int
from upt_fast.engine.towers import PackedClasses, TextTower
from upt_fast.methods import Method, MethodConfig, find_method, list_methods
from upt_fast.prompts import LearnerSetting, PromptLearner, Prompts
from upt_fast.texts import TEXT_BYTES


@dataclass(frozen=True)
class Flops:
    """FLOPs of a forward pass and of its backward pass."""

    forward: int = 0
    backward: int = 0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: int) -> Flops:
        return Flops(self.forward * times, self.backward * times)

    @property
    def total(self) -> int:
        return self.forward + self.backward


@dataclass(frozen=True)
class StepCost:
    """A training step of a method on a CLIP.

    Args:
        parameters: trained numbers.
        depth_text: text layers with prompts of their own.
        depth_vision: image layers with prompts of their own.
        engine: the step by this package.
        engine_text: the text tower's part of it.
        engine_vision: the image tower's part of it.
        plain: the step by upt_fast.reference.
    """

    parameters: int
    depth_text: int
    depth_vision: int
    engine: Flops
    engine_text: Flops
    engine_vision: Flops
    plain: Flops


def step_cost(
    clip: FrozenCLIP,
    classnames: Sequence[str],
    method: Method,
    config: MethodConfig,
    batch_size: int,
    tokenizer: Tokenizer | None = None,
    text_batch: int | None = None,
) -> StepCost:
    """Count one step: logits of a batch of images, their loss, its gradient. A method without parameters: the logits.

    Args:
        clip: shapes are read, values are not.
        classnames: C class names.
        method: the method.
        config: its options.
        batch_size: B images.
        tokenizer: the CLIP's; None: CLIP's byte-pair tokenizer.
        text_batch: as for FastPromptedCLIP.
    Raises:
        ValueError: the method does not fit this CLIP, or a class name does not.
    """
    with torch.random.fork_rng(devices=()):
        learner = method.load()(config, _setting(clip, classnames))
    prompts, own = _run_learner(learner, clip.embed_dim, batch_size)
    depth_text, depth_vision = (0 if p is None else p.shape[1] for p in prompts)
    text = _TextCost(clip, classnames, learner, prompts, tokenizer)
    vision = _VisionCost(clip, learner, prompts, batch_size)
    logits = _logits(clip, len(classnames), batch_size, learner, prompts)
    engine_text, plain = text.on_engine(), text.plain()
    if learner.by_image:
        engine_text, plain = engine_text * batch_size, plain * batch_size
        if text.images_at_once(text_batch) < batch_size:  # run again in backward, group by group
            engine_text += Flops(0, engine_text.forward)
    engine_vision, rest = vision.on_engine(), logits + own
    return StepCost(
        parameters=sum(p.numel() for p in learner.parameters()),
        depth_text=depth_text,
        depth_vision=depth_vision,
        engine=engine_text + engine_vision + rest,
        engine_text=engine_text,
        engine_vision=engine_vision,
        plain=plain + vision.plain() + rest,
    )


def _setting(clip: FrozenCLIP, classnames: Sequence[str]) -> LearnerSetting:
    return LearnerSetting(
        text_layers=len(clip.text.blocks),
        text_width=clip.text.width,
        vision_layers=len(clip.vision.blocks),
        vision_width=clip.vision.width,
        embed_dim=clip.embed_dim,
        classnames=clean_classnames(classnames),
        embed_words=lambda words, count: torch.zeros(count, clip.text.width),
    )


def _run_learner(learner: PromptLearner, embed_dim: int, batch_size: int) -> tuple[Prompts, Flops]:
    """The prompts, and what they and their gradient cost."""
    features = (torch.zeros(batch_size, embed_dim),) if learner.by_image else ()
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        prompts = learner(*features)
        forward = counter.get_total_flops()
        trained = [p.sum() for p in prompts if p is not None and p.requires_grad]
        if trained:
            torch.stack(trained).sum().backward()
    return prompts, Flops(forward, counter.get_total_flops() - forward)


def _linear(rows: int, wide: int, out: int, grad: bool) -> Flops:
    flops = 2 * rows * wide * out
    return Flops(flops, flops if grad else 0)


def _attention(pairs: int, width: int, grad: bool) -> Flops:
    return Flops(4 * pairs * width, 8 * pairs * width if grad else 0)


@dataclass(frozen=True)
class _Blocks:
    """L equal blocks of width D with M hidden features."""

    layers: int
    width: int
    hidden: int

    @classmethod
    def of(cls, blocks: tuple[FrozenBlock, ...]) -> _Blocks:
        hidden, width = blocks[0].fc_weight.shape
        return cls(len(blocks), width, hidden)

    def qkv(self, rows: int, grad: bool, matrices: int = 3) -> Flops:
        return _linear(rows, self.width, matrices * self.width, grad)

    def finish(self, rows: int, grad: bool) -> Flops:
        """Output projection and MLP."""
        return _linear(rows, self.width, self.width, grad) + _linear(rows, self.width, self.hidden, grad) * 2

    def layer(self, rows: int, pairs: int, grad: bool) -> Flops:
        """A whole block: queries, keys, values of all rows, attention over pairs of them, the rest."""
        return self.qkv(rows, grad) + _attention(pairs, self.width, grad) + self.finish(rows, grad)


class _TextCost:
    """The text tower for one prompt set."""

    def __init__(
        self,
        clip: FrozenCLIP,
        classnames: Sequence[str],
        learner: PromptLearner,
        prompts: Prompts,
        tokenizer: Tokenizer | None,
    ) -> None:
        self.text, self.fixed, self.prompts = clip.text, learner.templates is not None, prompts.text
        self.grad = self.prompts is not None and self.prompts.requires_grad
        self.blocks = _Blocks.of(clip.text.blocks)
        self.num_classes, self.features = len(classnames), clip.embed_dim
        context, n_text = clip.text.context, learner.n_text
        if learner.templates is None:
            tokens = tokenize_classnames(classnames, n_text, context, tokenizer, learner.prefix)
        else:
            tokens = tokenize_template(classnames, learner.templates[0], context, tokenizer)
        self.packed = PackedClasses(
            tokens,
            n_text,
            learner.class_token_position,
            clip.text.token_embedding.to("meta"),
            clip.text.positional_embedding.to("meta"),
            torch.float32,
            per_class=learner.text_per_class or (learner.half_prompts and n_text > 0),
        )

    def _head(self, rows: int) -> Flops:
        projected = self.text.projection is not None
        return _linear(rows, self.blocks.width, self.features, self.grad) if projected else Flops()

    def on_engine(self) -> Flops:
        """Packed rows, the prompts in front of the names once; templates are encoded before the first step."""
        if self.fixed:
            return Flops()
        blocks, packed, grad = self.blocks, self.packed, self.grad
        layout, shared, last = packed.layout, packed.num_shared, self.blocks.layers - 1
        depth = 1 if self.prompts is None else self.prompts.shape[1]
        runs = [run for runs in layout.sets for run in runs]
        rows, prefix = layout.num_rows, 1 + shared
        total = blocks.qkv(depth * shared, grad, matrices=2)  # keys and values of the prompts
        for i in range(blocks.layers):
            if i >= depth:
                total += blocks.qkv(shared, grad, matrices=2)
            if depth - 1 <= i < last:  # propagating prompts, behind the start token
                total += blocks.layer(shared, shared * prefix, grad)
            # rows that enter layer 0 are constants, unless they are prompts
            constant = i == 0 and packed.num_inner == 0
            queries = rows if i < last else layout.num_classes
            if i == last:
                total += blocks.qkv(queries, grad and not constant, 1) + blocks.qkv(rows, grad and not constant, 2)
            elif not constant:
                total += blocks.qkv(rows, grad)
            before = prefix * queries
            own = sum(count * length * (length if i < last else 1) for count, length in runs)
            attention = _attention(before + own, blocks.width, grad)
            if constant and grad:  # gradients of the probabilities and of the prefix
                attention = Flops(attention.forward, 2 * blocks.width * (3 * before + own))
            total += attention + blocks.finish(queries, grad)
        return total + self._head(layout.num_classes)

    def plain(self) -> Flops:
        """All rows of all classes; templates are encoded before the first step."""
        if self.fixed:
            return Flops()
        length = self.text.context.length
        rows = self.num_classes * length
        return self.blocks.layer(rows, rows * length, self.grad) * self.blocks.layers + self._head(self.num_classes)

    def images_at_once(self, text_batch: int | None) -> int:
        """Of methods whose texts depend on the image, as FastPromptedCLIP runs them."""
        if text_batch is not None:
            return text_batch
        blocks = tuple(_on_meta(block) for block in self.text.blocks)
        tower = TextTower(dataclasses.replace(self.text, blocks=blocks), torch.float32)
        return max(1, TEXT_BYTES // sum(tower.need(self.packed, backward=self.grad)))


def _on_meta(value: Any) -> Any:
    """A block without the values of its weights."""
    if isinstance(value, Tensor):
        return value.to("meta")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value, **{f.name: _on_meta(getattr(value, f.name)) for f in dataclasses.fields(value)}
        )
    return value


class _VisionCost:
    """The image tower for B images."""

    def __init__(self, clip: FrozenCLIP, learner: PromptLearner, prompts: Prompts, batch_size: int) -> None:
        self.vision, self.prompts, self.batch_size = clip.vision, prompts.visual, batch_size
        self.grad = self.prompts is not None and self.prompts.requires_grad
        self.blocks, self.features = _Blocks.of(clip.vision.blocks), clip.embed_dim
        self.rows = len(clip.vision.positional_embedding)  # class token and patches
        self.pooled = 1 if clip.vision.pooling == "tok" else self.rows - 1
        self.sets = batch_size if learner.half_prompts else 1

    def _ends(self) -> Flops:
        """Patches and projection."""
        patches = _linear(
            self.batch_size * (self.rows - 1), self.vision.conv_weight[0].numel(), self.blocks.width, False
        )
        if self.vision.projection is None:
            return patches
        return patches + _linear(self.batch_size, self.blocks.width, self.features, self.grad)

    def on_engine(self) -> Flops:
        """Prompts that the next layer replaces are keys and values only, once; the last layer has pooled rows only."""
        blocks, batch, grad, last = self.blocks, self.batch_size, self.grad, self.blocks.layers - 1
        depth, length = (1, 0) if self.prompts is None else self.prompts.shape[1:3]
        key_value_only = depth if depth > last else depth - 1
        total = self._ends() + blocks.qkv(key_value_only * self.sets * length, grad, matrices=2)
        for i in range(blocks.layers):
            rows = batch * (self.rows + (length if i >= key_value_only else 0))
            keys = self.rows + length
            varying = grad and (i > 0 or key_value_only == 0)  # not the constants that enter layer 0
            queries = rows if i < last else batch * self.pooled
            if i < last:
                total += blocks.qkv(rows, varying)
            else:
                total += blocks.qkv(queries, varying, 1) + blocks.qkv(rows, varying, 2)
            total += _attention(queries * keys, blocks.width, grad) + blocks.finish(queries, grad)
        return total

    def plain(self) -> Flops:
        """All rows in all layers, prompts among them."""
        length = self.rows + (0 if self.prompts is None else self.prompts.shape[2])
        rows = self.batch_size * length
        return self._ends() + self.blocks.layer(rows, rows * length, self.grad) * self.blocks.layers


def _logits(clip: FrozenCLIP, num_classes: int, batch_size: int, learner: PromptLearner, prompts: Prompts) -> Flops:
    product = 2 * batch_size * num_classes * clip.embed_dim
    return Flops(product, product * sum(p is not None and p.requires_grad for p in prompts))


def _attention_forward(q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    batch, heads, queries, width = q
    return 4 * batch * heads * queries * k[2] * width


def _attention_backward(dout: Any, q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * _attention_forward(q, k, v)


# attention on a CPU, which torch's counter does not know
CPU_ATTENTION: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def clip_without_weights(name: str) -> tuple[FrozenCLIP, Tokenizer | None]:
    """The shapes of a CLIP that open_clip knows by name, or of "tiny-digits", and its tokenizer; nothing is downloaded.

    Raises:
        ValueError: no such name, or a CLIP that the engine does not compute.
    """
    if name == TINY_CLIP_NAME:
        from upt_fast.clip.tiny_clip import build_tiny_clip, load_tiny_tokenizer

        with torch.device("meta"):
            tiny = build_tiny_clip()
        return _frozen(tiny), load_tiny_tokenizer()
    import open_clip

    config = open_clip.get_model_config(name.replace("/", "-"))
    if config is None:
        close = difflib.get_close_matches(name, open_clip.list_models(), n=4, cutoff=0.5) or ["ViT-B-32", "ViT-B-16"]
        raise ValueError(f"unknown CLIP model {name!r}; did you mean {', '.join(close)} or {TINY_CLIP_NAME}?")
    if config.get("text_cfg", {}).get("hf_model_name"):  # its shapes are on the hub
        refuse("text tower", f"HFTextEncoder ({config['text_cfg']['hf_model_name']})")
    with torch.device("meta"), _quiet():
        model = open_clip.create_model(name, pretrained=None, load_weights=False, device="meta")
    return _frozen(model), None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without open_clip's warning that the weights are random."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _frozen(model: Any) -> FrozenCLIP:
    text = getattr(model, "text", model)
    if getattr(text, "attn_mask", None) is not None:  # looked at, to refuse what is not causal
        length = text.attn_mask.shape[0]
        text.attn_mask = torch.full((length, length), float("-inf")).triu_(1)
    return frozen_clip(model)


def method_costs(clip: str, classes: int, batch_size: int) -> list[dict[str, Any]]:
    """A row for each method known here, with its default options, as plain values.

    Args:
        clip: a name for :func:`clip_without_weights`.
        classes: C, names of Caltech101's classes up to 100, of ImageNet's beyond.
        batch_size: B.
    Raises:
        ValueError: no such CLIP, or a number out of range.
    """
    from upt_fast.data.benchmark import bench_classnames

    require_int("classes", classes, 1)
    require_int("batch_size", batch_size, 1)
    frozen, tokenizer = clip_without_weights(clip)
    classnames = bench_classnames(classes)
    rows = []
    for name in list_methods():
        row: dict[str, Any] = {"method": name}
        rows.append(row)
        try:
            method = find_method(name)
            row |= {"title": method.title, "source": method.source, "exact": method.exact, "recipe": method.recipe}
            cost = step_cost(frozen, classnames, method, method.config.from_options({}), batch_size, tokenizer)
        except (ValueError, TypeError) as error:  # it does not fit this CLIP, or needs options
            row["error"] = str(error)
            continue
        row |= {
            "parameters": cost.parameters,
            "prompted_layers": {"text": cost.depth_text, "image": cost.depth_vision},
            "flops": {"engine": dataclasses.asdict(cost.engine), "plain": dataclasses.asdict(cost.plain)},
        }
    return rows
