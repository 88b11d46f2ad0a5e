"""Class features of fixed texts: computed once for a set of texts, whatever is learned beside them.

Methods without text prompts, and what KgCoOp compares its prompts with, read the features of written texts: of each
template and class one pass through the text tower. They are kept beside the image features (data/feature_store.py).
All texts of a set are kept together, for a feature's last bits may hang on the texts beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from upt_fast.data.feature_store import FeatureStore, Section
from upt_fast.engine.towers.packing import PackedClasses
from upt_fast.features.digests import digest_tensors
from upt_fast.model import FastPromptedCLIP
from upt_fast.train.batches import eval_mode
from upt_fast.train.features import computed_with

PROBE = ("a photo of a {}.", ("dog", "hard-leaved pocket orchid"))  # whose bits tell ways to compute apart


class KeptTexts:
    """The ``text_source`` of a model, and of its siblings.

    Args:
        model: the model; any other on the same CLIP, precision and machine has the same features.
        store: keeps them.
    """

    def __init__(self, model: FastPromptedCLIP, store: FeatureStore) -> None:
        self.store = store
        self._model: FastPromptedCLIP | None = model  # until it has been asked what it computes with
        self._section: Section | None = None

    def __call__(self, packs: Sequence[PackedClasses], at_once: int | None, compute: Callable[[], Tensor]) -> Tensor:
        """(C, e) features of packed texts, so many classes at once, as compute returns them."""
        if self._section is None:
            assert self._model is not None
            self._section, self._model = self.store.section(_about(self._model)), None
        set_of = digest_tensors(
            ((f"{i}.{name}", value) for i, pack in enumerate(packs) for name, value in pack.named_buffers()),
            ([pack.layout.sets for pack in packs], at_once),
        )
        count = len(packs[0].tokens.pooled)
        names = [hashlib.sha256(f"{set_of} {i}".encode()).digest() for i in range(count)]
        found = self._section.read(names)
        if len(found) == count:
            return torch.stack([found[name] for name in names]).to(packs[0].rows.device)
        features = compute()
        self._section.write(names, features)
        return features


def _about(model: FastPromptedCLIP) -> dict[str, Any]:
    """All that the bits of a feature hang on beside the texts."""
    tower, (template, names) = model.text_tower, PROBE
    with eval_mode(model), torch.no_grad():
        (pack,) = model._pack_templates((template,), names)
        bits = tower(None, pack)
    return {
        **computed_with(model, tower),
        "texts": True,
        "weights": model.text_digest(),
        "libraries": {"torch": torch.__version__},
        "bits": digest_tensors([("bits", bits)]),
    }


def keep_texts(model: FastPromptedCLIP, store: FeatureStore | None) -> None:
    """Let a model's fixed texts come from a store, where there is one; before its features are first asked for."""
    known = model.text_source
    if store is None:
        model.text_source = None
    elif not isinstance(known, KeptTexts) or known.store.folder != store.folder:
        model.text_source = KeptTexts(model, store)
