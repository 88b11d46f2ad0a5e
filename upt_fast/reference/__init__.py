"""The papers in plain PyTorch: the truth that everything fast is checked against. Imports nothing fast.

>>> model = ReferencePromptedCLIP(clip_model, ["cat", "dog"], method="coop", n_ctx=4)

A method's file here has the name of its file in upt_fast/methods; its class is known once the file is imported.
"""

import importlib
import pkgutil

from upt_fast.methods import list_methods
from upt_fast.reference.base import TWINS, Prompts, ReferencePromptedCLIP
from upt_fast.reference.upt import ReferenceUPT

__all__ = ["TWINS", "Prompts", "ReferencePromptedCLIP", "ReferenceUPT"]

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)
# in the order of lists
for _name in sorted(TWINS, key=list_methods().index):
    TWINS[_name] = TWINS.pop(_name)
