"""Prompt learners, one method per file: parameters -> prompts for both towers."""

from upt_fast.prompts.base import LearnerSetting, PromptLearner, Prompts

__all__ = ["LearnerSetting", "PromptLearner", "Prompts"]
