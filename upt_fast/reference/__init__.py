"""The paper in plain PyTorch: the truth that everything fast is checked against. Imports nothing fast."""

from upt_fast.reference.model import ReferenceUPT

__all__ = ["ReferenceUPT"]
