"""FastPromptedCLIP: a prompt learner and two prompted frozen towers; FastUPT is its Unified Prompt Tuning face."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upt_fast.clip.open_clip import frozen_clip, has_quick_gelu
from upt_fast.clip.tokens import Tokenizer, clean_classnames, list_classnames
from upt_fast.common.checks import require_choice, require_int
from upt_fast.engine import fp8, ops
from upt_fast.engine.backends import dispatch
from upt_fast.engine.backends.asked import AUTO
from upt_fast.engine.towers import routes
from upt_fast.engine.towers.blocks import MEMORY_LEVELS
from upt_fast.engine.towers.text import TextTower
from upt_fast.engine.towers.vision import VisionTower
from upt_fast.features.images import PromptedImages
from upt_fast.features.rerouting import Rerouted, Siblings
from upt_fast.features.texts import PromptedTexts
from upt_fast.methods import MAIN_METHOD, Method, MethodConfig, find_method, make_config
from upt_fast.methods.upt import UPTConfig
from upt_fast.prompts import Features, LearnerSetting, PromptLearner, Prompts
from upt_fast.saving import SavedWithCLIP, use_released_names
from upt_fast.steps import MeasuredRoutes, StepsByPlan

DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": fp8.DTYPE,
}


class FastPromptedCLIP(PromptedImages, PromptedTexts, Rerouted, SavedWithCLIP, StepsByPlan, MeasuredRoutes):
    """A frozen CLIP prompted by any method, on the fast engine: logits of images over class names.

    Only the learner has parameters and a state dict, under the names of the released code; the CLIP's weights are
    constants that follow ``.to()``. :class:`upt_fast.reference.ReferencePromptedCLIP` takes the same arguments, has the
    same state dict and computes the same in plain PyTorch.

    Args:
        clip_model: open_clip ``CLIP`` or ``CustomTextCLIP`` with a ViT and a causal text tower. Left untouched; its
            weights are copied where folding changes them.
        classnames: C class names; underscores become spaces.
        method: a name of :func:`upt_fast.list_methods`, ``FILE.py:CLASS``, or a PromptLearner class.
        tokenizer: the tokenizer of clip_model; None: CLIP's byte-pair tokenizer.
        config: all of the method's options at once, instead of the keywords.
        dtype: of the frozen towers, "fp32", "bf16", "fp16", "fp64" or PyTorch's; None: clip_model's. The learner and
            all reductions stay in float32 beside half precision. "fp8": as "bf16", but the products of the blocks with
            their frozen weights take both factors in float8_e4m3fn (engine/fp8.py); not exact, about 4 % off in each.
        memory: "fast", "balanced" or "lean": backward recomputes nothing, the MLPs' hidden features, whole blocks.
        backend: who computes the operations. "auto": what upt-fast tune, or a training run, has measured to be the
            fastest here, else the compiled CPU operations where they run, else PyTorch's. Or a name ("torch",
            "compiled", "inductor", "triton", "xformers" and others: docs/kernels.md), or several with commas
            ("triton,xformers"), which never fall back.
            OP=NAME among them overrides who computes one operation ("triton,linear_gelu=torch"), a slash gives the
            image tower and the text tower different ones ("torch/compiled"); see upt_fast/engine/backends/asked.py.
        text_batch: for methods whose texts depend on the image: images whose texts run at once; more are computed
            group by group, and again in backward. None: as many as need 512 MiB.
        options: the fields of the method's config (upt_fast/methods).
    Raises:
        ValueError: unknown method, unsupported model, bad option or class name; the message says what was wanted.

    Example:
        >>> model = FastPromptedCLIP.from_pretrained("ViT-B-16", "openai", classnames=["cat", "dog"], method="coop")
        >>> loss = F.cross_entropy(model(images), labels)  # images (B, 3, 224, 224), labels (B,)
        >>> loss.backward()  # gradients of model.parameters(): the prompts and their networks
    """

    def __init__(
        self,
        clip_model: nn.Module,
        classnames: Iterable[str],
        *,
        method: str | type[PromptLearner] = MAIN_METHOD,
        tokenizer: Tokenizer | None = None,
        config: MethodConfig | None = None,
        dtype: torch.dtype | str | None = None,
        memory: str = "fast",
        backend: str = "auto",
        text_batch: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        require_choice("memory", memory, MEMORY_LEVELS)
        if text_batch is not None:
            require_int("text_batch", text_batch, 1)
        found = find_method(method)
        config = make_config(found, config, options)  # before the towers are folded
        classnames = list_classnames(classnames)
        clip = frozen_clip(clip_model)
        dtype = clip.dtype if dtype is None else _dtype(dtype)
        self.quantized = dtype == fp8.DTYPE
        if self.quantized:
            fp8.require(clip.device)
            dtype = fp8.ROWS
        asked = dispatch.resolve(backend)
        routes.check(asked)
        self.tokenizer, self.text_batch = tokenizer, text_batch
        self.auto, self.settled = str(asked) == AUTO, False
        self.text_context, self.embed_dim = clip.text.context, clip.embed_dim
        self.text_tower = TextTower(clip.text, dtype, memory, asked.texts, self.quantized)
        self.vision_tower = VisionTower(clip.vision, dtype, memory, asked.images, self.quantized)
        # scalars stay in single precision beside half-precision towers, as the learner does
        scalars = torch.float64 if dtype == torch.float64 else torch.float32
        self.register_buffer("logit_scale", clip.logit_scale.to(scalars, copy=True), persistent=False)
        logit_bias = None if clip.logit_bias is None else clip.logit_bias.to(scalars, copy=True)
        self.register_buffer("logit_bias", logit_bias, persistent=False)
        self._siblings = Siblings()
        self._siblings.add(self)
        self._learn(found, config, clean_classnames(classnames))
        self.clip_name: str | None = None
        self.clip_pretrained: str | None = None
        self.clip_quick_gelu = has_quick_gelu(clip)  # for checkpoints: a name alone does not say it
        self.preprocess_cfg: dict[str, Any] | None = getattr(
            getattr(clip_model, "visual", None), "preprocess_cfg", None
        )
        self._forget_features()
        self.set_classnames(classnames)

    logit_bias: Tensor | None  # ()

    def _learn(self, method: Method, config: MethodConfig, names: tuple[str, ...]) -> None:
        """Make the learner, and with it all that is the method's."""
        self.method, self.config, self._loss_terms = method.name, config, method.loss_terms
        text, vision = ((tower.blocks.num_layers, tower.blocks.width) for tower in (self.text_tower, self.vision_tower))
        tokens = self.text_tower.token_embedding, self.text_context, self.tokenizer
        setting = LearnerSetting.of(text, vision, self.embed_dim, names, *tokens)
        self.prompt_learner = method.load()(config, setting)
        self.prompt_learner.place(self.logit_scale.device, self.logit_scale.dtype)
        self._tell_learner()
        use_released_names(self)

    def sibling(
        self,
        classnames: Iterable[str],
        *,
        method: str | type[PromptLearner] = MAIN_METHOD,
        config: MethodConfig | None = None,
        **options: Any,
    ) -> FastPromptedCLIP:
        """A model with a new learner, and classes of its own, on the same frozen towers: moving one moves both.

        :class:`upt_fast.MultiTask` runs the batches of such models through the towers together.

        Args:
            classnames: as in the constructor, and so are the others.
        Raises:
            ValueError: as the constructor.
        """
        found, names = find_method(method), list_classnames(classnames)
        other = FastPromptedCLIP.__new__(FastPromptedCLIP)
        nn.Module.__init__(other)
        vars(other).update({name: value for name, value in vars(self).items() if name not in vars(other)})
        for name in ("logit_scale", "logit_bias"):
            other.register_buffer(name, getattr(self, name), persistent=False)
        other.text_tower, other.vision_tower = self.text_tower, self.vision_tower
        other._learn(found, make_config(found, config, options), clean_classnames(names))
        other._forget_features()
        other.set_classnames(names)
        if other.classnames == self.classnames:
            other._kept_features = dict(self._kept_features)  # of written texts, whatever is learned
        self._siblings.add(other)
        return other

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        for tower in (self.text_tower, self.vision_tower):
            tower.check_move(fn)  # before anything has changed
        self._forget_features()
        return super()._apply(fn, recurse)

    def prompts(self, images: Tensor | None = None) -> dict[str, Tensor]:
        """The prompts by name, "text_ctx", "visual_ctx", "text_deep.0" and so on; images where they depend on those."""
        if images is None or not self.texts_by_image:
            return self.prompt_learner.named_prompts()
        return self.prompt_learner.named_prompts(self.encode_image(images))

    def forward(self, images: Tensor | None = None, *, image_features: Tensor | None = None) -> Tensor:
        """Logits.

        Args:
            images: (B, 3, H, W), normalised with the CLIP's mean and standard deviation.
            image_features: (B, e) in the place of the images, where :attr:`images_are_fixed`.
        Returns:
            (B, C): exp(logit_scale) times the cosine of image and class features, plus the CLIP's logit_bias if any.
        """
        self._settle(images, image_features)
        logits, _, _ = self._logits_and_features(images, image_features)
        return logits

    def _logits_and_features(self, images: Tensor | None, given: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits (B, C), and the normalised features that they come of: (B, e), and (C, e) or None by image."""
        texts = None
        if self.texts_by_image:
            features = self._image_features(images, given, Prompts())
        else:
            prompts = self._prompts()
            with self._beside_images(prompts.text):
                texts = F.normalize(self._class_features(prompts), dim=-1)
            features = self._image_features(images, given, prompts)
            self._join_texts(texts)
        return self._logits(features, texts), features, texts

    def _logits(self, features: Tensor, texts: Tensor | None) -> Tensor:
        """(B, C) of normalised features (B, e) and (C, e), or None by image."""
        logits = self._logits_by_image(features) if texts is None else self.logit_scale.exp() * features @ texts.t()
        return self._with_bias(logits)

    def _with_bias(self, logits: Tensor) -> Tensor:
        return logits if self.logit_bias is None else logits + self.logit_bias

    def loss(self, images: Tensor | None, labels: Tensor, *, image_features: Tensor | None = None) -> Tensor:
        """Mean cross-entropy of :meth:`forward`'s logits, and what the method adds to it.

        Where a kernel computes it, and the method adds nothing, no logits are stored.

        Args:
            images: (B, 3, H, W), normalised with the CLIP's mean and standard deviation.
            labels: (B,) int64, indices of the class names.
            image_features: see :meth:`forward`.
        Returns:
            (), float32 (float64 in a float64 CLIP).
        """
        self._settle(images, image_features)
        if self.texts_by_image or self._loss_terms is not None:
            return self.loss_and_logits(images, labels, image_features=image_features)[0]
        prompts = self._prompts()
        with self._beside_images(prompts.text):
            classes = self._class_features(prompts)
        features = self._image_features(images, image_features, prompts, normalize=False)
        self._join_texts(classes)
        scale, backend = self.logit_scale.exp(), self._asked.images
        return ops.contrastive_loss(features, classes, scale, labels, backend=backend).mean()

    def loss_and_logits(
        self,
        images: Tensor | None,
        labels: Tensor,
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        *,
        image_features: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What a training step minimises, and the logits.

        Args:
            images: (B, 3, H, W), normalised with the CLIP's mean and standard deviation.
            labels: (B,) int64, indices of the class names.
            loss: of logits (B, C) and labels (B,); the method's own terms come on top.
            image_features: see :meth:`forward`.
        Returns:
            the loss (), and the logits (B, C), float32 (float64 in a float64 CLIP).
        """
        self._settle(images, image_features)
        if self._loss_terms is None:
            given = {} if image_features is None else {"image_features": image_features}
            logits = self(images, **given).to(self.logit_scale.dtype)  # forward may be a subclass's, of images alone
            return loss(logits, labels), logits
        logits, features, texts = self._logits_and_features(images, image_features)
        logits = logits.to(self.logit_scale.dtype)
        terms = self._added_terms(images, labels, features, texts, logits, image_features=image_features)
        return loss(logits, labels) + terms, logits

    def _added_terms(
        self,
        images: Tensor | None,
        labels: Tensor,
        features: Tensor,
        texts: Tensor | None,
        logits: Tensor,
        at_once: int | None = None,
        image_features: Tensor | None = None,
        fixed_images: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """What the method adds to the loss: (); its images without prompts run at_once images at once.

        Where it is given, fixed_images computes these images' features.
        """
        scalars = self.logit_scale.dtype

        def of_these_images() -> Tensor:
            with torch.no_grad():
                if images is None:
                    return self._image_features(images, image_features, Prompts()).to(scalars)
                parts = images.split(at_once or len(images))
                return torch.cat([self._encode_image(part, Prompts()).to(scalars) for part in parts])

        of = Features(
            images=features.to(scalars),
            texts=None if texts is None else texts.to(scalars),
            logits=logits,
            labels=labels,
            fixed_images=of_these_images if fixed_images is None else fixed_images,
            fixed_texts=lambda templates: self.fixed_text_features(templates).to(scalars),
        )
        assert self._loss_terms is not None
        return self._loss_terms(self.prompt_learner, of)


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A dtype of the towers by either of its names."""
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        raise ValueError(f"dtype={dtype!r}; wanted {', '.join(map(repr, DTYPES))} or PyTorch's dtype of the same")
    assert found is not None
    return found


class FastUPT(FastPromptedCLIP):
    """Unified Prompt Tuning (arXiv 2210.07225) on the fast engine; swaps in for :class:`ReferenceUPT`.

    Args:
        clip_model: open_clip ``CLIP`` or ``CustomTextCLIP`` with a ViT and a causal text tower; like this, classnames,
            tokenizer, dtype, memory and backend are those of :class:`FastPromptedCLIP`.
        config: all of UPT's options at once, instead of the keywords.
        options: the fields of :class:`UPTConfig`: preset, n_text, n_visual, depth_text, depth_vision,
            class_token_position, attention_heads, dropout; transform, shared, joint, layerwise for the ablations.
    Raises:
        ValueError: unsupported model, bad option or class name; the message says what was wanted.

    Example:
        >>> model = FastUPT.from_pretrained("ViT-B-16", "openai", classnames=["cat", "dog"])
        >>> loss = F.cross_entropy(model(images), labels)  # images (B, 3, 224, 224), labels (B,)
        >>> loss.backward()  # gradients of model.parameters(): the prompts and their transform
    """

    only_method = MAIN_METHOD

    def __init__(
        self,
        clip_model: nn.Module,
        classnames: Iterable[str],
        *,
        method: str = MAIN_METHOD,
        tokenizer: Tokenizer | None = None,
        config: UPTConfig | None = None,
        **options: Any,
    ) -> None:
        if method != MAIN_METHOD:
            raise ValueError(f"method={method!r}; FastUPT is 'upt': FastPromptedCLIP takes any method")
        super().__init__(clip_model, classnames, method=method, tokenizer=tokenizer, config=config, **options)
