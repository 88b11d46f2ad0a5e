"""What a training step of a method costs on a CLIP: the shapes that the formulas of flops.py want, read.

A method's own network is small and trained: its products are counted as they run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from upt_fast.clip.frozen import FrozenCLIP, FrozenText
from upt_fast.clip.tokens import Tokenizer, clean_classnames, tokenize_classnames, tokenize_template
from upt_fast.engine.flops import Blocks, Flops, TextCost, VisionCost
from upt_fast.engine.towers import PackedClasses, TextTower
from upt_fast.features.texts import TEXT_BYTES
from upt_fast.methods import Method, MethodConfig
from upt_fast.prompts import LearnerSetting, PromptLearner, Prompts


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
    text = _text_cost(clip, prompts, _pack(clip.text, classnames, learner, tokenizer))
    vision = _vision_cost(clip, learner, prompts, batch_size)
    # templates are encoded before the first step
    engine_text, plain = (text.on_engine(), text.plain()) if learner.templates is None else (Flops(), Flops())
    if learner.by_image:
        engine_text, plain = engine_text * batch_size, plain * batch_size
        if _images_at_once(clip.text, text, text_batch) < batch_size:  # run again in backward, group by group
            engine_text += Flops(0, engine_text.forward)
    engine_vision, rest = vision.on_engine(), _logits(clip, len(classnames), batch_size, prompts) + own
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
    """The CLIP's, with zeros for embeddings of words: the CLIP may be without values."""
    sizes = len(clip.text.blocks), clip.text.width, len(clip.vision.blocks), clip.vision.width
    names = clean_classnames(classnames)
    return LearnerSetting(*sizes, clip.embed_dim, names, lambda words, count: torch.zeros(count, clip.text.width))


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


def _pack(
    text: FrozenText, classnames: Sequence[str], learner: PromptLearner, tokenizer: Tokenizer | None
) -> PackedClasses:
    """The class names as the engine packs them, without values; of several templates the first."""
    if learner.templates is None:
        tokens = tokenize_classnames(classnames, learner.n_text, text.context, tokenizer, learner.prefix)
    else:
        tokens = tokenize_template(classnames, learner.templates[0], text.context, tokenizer)
    return PackedClasses(
        tokens,
        learner.n_text,
        learner.class_token_position,
        text.token_embedding.to("meta"),
        text.positional_embedding.to("meta"),
        torch.float32,
        per_class=learner.text_per_class or (learner.half_prompts and learner.n_text > 0),
    )


def _text_cost(clip: FrozenCLIP, prompts: Prompts, packed: PackedClasses) -> TextCost:
    return TextCost(
        blocks=Blocks.of(clip.text.blocks),
        packed=packed,
        length=clip.text.context.length,
        features=None if clip.text.projection is None else clip.embed_dim,
        depth=0 if prompts.text is None else prompts.text.shape[1],
        grad=prompts.text is not None and prompts.text.requires_grad,
    )


def _vision_cost(clip: FrozenCLIP, learner: PromptLearner, prompts: Prompts, batch_size: int) -> VisionCost:
    vision, rows = clip.vision, len(clip.vision.positional_embedding)
    depth, length = (0, 0) if prompts.visual is None else prompts.visual.shape[1:3]
    return VisionCost(
        blocks=Blocks.of(vision.blocks),
        batch_size=batch_size,
        rows=rows,
        pooled=1 if vision.pooling == "tok" else rows - 1,
        patch=vision.conv_weight[0].numel(),
        features=None if vision.projection is None else clip.embed_dim,
        sets=batch_size if learner.half_prompts else 1,
        depth=depth,
        length=length,
        grad=prompts.visual is not None and prompts.visual.requires_grad,
    )


def _logits(clip: FrozenCLIP, num_classes: int, batch_size: int, prompts: Prompts) -> Flops:
    product = 2 * batch_size * num_classes * clip.embed_dim
    return Flops(product, product * sum(p is not None and p.requires_grad for p in prompts))


def _images_at_once(text: FrozenText, cost: TextCost, text_batch: int | None) -> int:
    """Of methods whose texts depend on the image, as FastPromptedCLIP runs them."""
    if text_batch is not None:
        return text_batch
    blocks = tuple(_on_meta(block) for block in text.blocks)
    tower = TextTower(dataclasses.replace(text, blocks=blocks), torch.float32)
    return max(1, TEXT_BYTES // sum(tower.need(cost.packed, backward=cost.grad)))


def _on_meta(value: Any) -> Any:
    """A block without the values of its weights."""
    if isinstance(value, Tensor):
        return value.to("meta")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value, **{f.name: _on_meta(getattr(value, f.name)) for f in dataclasses.fields(value)}
        )
    return value


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
