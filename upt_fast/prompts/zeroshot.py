"""CLIP without learning (arXiv 2103.00020): fixed texts, one template or the mean over several."""

from __future__ import annotations

from upt_fast.methods.templates import TemplatesConfig
from upt_fast.methods.zeroshot import ZeroShotConfig
from upt_fast.prompts.base import LearnerSetting, PromptLearner, Prompts


class FixedText(PromptLearner):
    """A learner whose texts are the config's templates; the methods that prompt images only build on it."""

    state_prefix = ""

    def __init__(self, config: TemplatesConfig, setting: LearnerSetting) -> None:
        super().__init__(config, setting)
        self.templates = config.template_texts


class ZeroShot(FixedText):
    """No parameters, no prompts."""

    method = "zeroshot"
    config_class = ZeroShotConfig

    def forward(self) -> Prompts:
        return Prompts()
