"""The papers in plain PyTorch: the truth that everything fast is checked against. Imports nothing fast."""

from upt_fast.reference.model import METHODS, Method, ReferencePromptedCLIP, ReferenceUPT

__all__ = ["METHODS", "Method", "ReferencePromptedCLIP", "ReferenceUPT"]
