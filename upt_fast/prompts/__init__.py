"""Prompt learners, one per file: parameters -> prompts for both towers."""

from upt_fast.prompts.unified import Prompts, UnifiedPromptLearner

__all__ = ["Prompts", "UnifiedPromptLearner"]
