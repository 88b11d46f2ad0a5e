"""Prompt learners, one method per file: parameters -> prompts for both towers."""

from upt_fast.prompts.base import Features, LearnerSetting, PromptLearner, Prompts

__all__ = ["Features", "LearnerSetting", "PromptLearner", "Prompts"]
