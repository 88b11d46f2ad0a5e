"""CLIP without learning, in plain PyTorch (arXiv 2103.00020): one template, or the mean over several."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from upt_fast.clip.frozen import FrozenCLIP
from upt_fast.clip.tokens import ClassTokens, clean_classnames, list_classnames, tokenize_template
from upt_fast.methods.templates import TemplatesConfig
from upt_fast.methods.zeroshot import ZeroShotConfig
from upt_fast.reference.base import ReferencePromptedCLIP


class ReferenceZeroShot(ReferencePromptedCLIP):
    """Zero-shot CLIP; its options are the fields of :class:`ZeroShotConfig`.

    It has no parameters. Methods that prompt images only build on it.
    """

    method = "zeroshot"
    config_class: ClassVar[type[TemplatesConfig]] = ZeroShotConfig
    config: TemplatesConfig
    template_tokens: tuple[ClassTokens, ...]

    def build(self, frozen: FrozenCLIP, classnames: tuple[str, ...]) -> None:
        pass

    def set_classnames(self, classnames: Iterable[str]) -> None:
        """Replace the classes; raises ValueError on an empty name or one that does not fit the context."""
        classnames = list_classnames(classnames)
        self.template_tokens = tuple(
            tokenize_template(classnames, template, self.text_context, self.tokenizer)
            for template in self.config.template_texts
        )
        self.classnames = clean_classnames(classnames)
        self._features: Tensor | None = None

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        self._features = None
        return super()._apply(fn, recurse)

    def _encode_text(self, prompts: Sequence[Tensor], normalize: bool = True) -> Tensor:
        """(C, e) features of the fixed texts; of several templates the mean of the normalised ones."""
        if self._features is None:
            self._features = self.encode_fixed(self.template_tokens)
        return F.normalize(self._features, dim=-1) if normalize else self._features.clone()
