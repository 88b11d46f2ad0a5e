"""A CLIP small enough to ship: open_clip's architecture, 1.5 M parameters, and a vocabulary of its own.

The weights come from ``upt_fast.demo.pretrain``. The byte-level BPE vocabulary keeps the words of the pretraining
captions as single tokens and spells everything else in bytes, so any class name works. The end-of-text token has the
largest id, as CLIP's pooling needs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from open_clip import CLIP
    from open_clip.tokenizer import SimpleTokenizer

TINY_CLIP_NAME = "tiny-digits"
WEIGHTS_FILE = "tiny_clip.safetensors"
VOCABULARY_FILE = "bpe_tiny.txt.gz"
METADATA_KEY = "pretraining"
CONTEXT_LENGTH = 77
MEAN = (0.5, 0.5, 0.5)
STD = (0.35, 0.35, 0.35)

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def tiny_clip_config() -> dict[str, Any]:
    """Arguments of ``open_clip.CLIP``, in the form of open_clip's model configs."""
    return {
        "embed_dim": 128,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 4, "width": 128, "head_width": 64},
        "text_cfg": {
            "context_length": CONTEXT_LENGTH,
            "vocab_size": load_tiny_tokenizer().vocab_size,
            "width": 128,
            "heads": 2,
            "layers": 3,
        },
        "quick_gelu": True,
    }


def tiny_preprocess_cfg() -> dict[str, Any]:
    """Image size, normalisation and resize filter that the tiny CLIP was trained with."""
    return {"size": 32, "mean": MEAN, "std": STD, "interpolation": "bicubic"}


def load_tiny_tokenizer() -> SimpleTokenizer:
    """The tiny CLIP's tokenizer; call it on strings to get (N, 77) token ids."""
    from open_clip.tokenizer import SimpleTokenizer

    with as_file(files(__package__) / "assets" / VOCABULARY_FILE) as path:
        return SimpleTokenizer(bpe_path=str(path), context_length=CONTEXT_LENGTH)


def build_tiny_clip(cast_dtype: torch.dtype | None = None) -> CLIP:
    """The tiny CLIP with random weights, float32 on the CPU.

    Args:
        cast_dtype: of the activations to come; in half precisions open_clip's LayerNorms compute in float32.
    """
    from open_clip import CLIP

    return CLIP(**tiny_clip_config(), cast_dtype=cast_dtype)


def read_tiny_clip_metadata() -> dict[str, Any]:
    """What the pretraining recorded with the weights: seed, steps, split_seed, domain, pretrain_indices and more."""
    from safetensors import safe_open

    with as_file(files(__package__) / "assets" / WEIGHTS_FILE) as path, safe_open(str(path), framework="pt") as file:
        return json.loads(file.metadata()[METADATA_KEY])


def load_tiny_clip(
    precision: str = "fp32", device: str | torch.device = "cpu"
) -> tuple[CLIP, SimpleTokenizer, dict[str, Any]]:
    """The pretrained tiny CLIP, frozen and in eval mode.

    Args:
        precision: ``fp32``, ``fp16`` or ``bf16``; as in open_clip, norms and embeddings stay float32 at any of them.
        device: where to put it.
    Returns:
        The model, its tokenizer, and the preprocessing: ``size``, ``mean``, ``std``, ``interpolation``.
    Raises:
        ValueError: unknown precision.
    """
    from safetensors.torch import load_file

    if precision not in _DTYPES:
        raise ValueError(f"unknown precision: got {precision!r}, wanted one of {', '.join(_DTYPES)}")
    with as_file(files(__package__) / "assets" / WEIGHTS_FILE) as path:
        state = load_file(str(path))
    half = None if precision == "fp32" else _DTYPES[precision]
    model = build_tiny_clip(cast_dtype=half)
    ids, rows = state.pop("token_embedding.ids"), state.pop("token_embedding.rows")
    weights = {key: value.float() for key, value in state.items()}
    weights["token_embedding.weight"] = _untrained_token_embedding(model)
    weights["token_embedding.weight"][ids] = rows.float()
    model.load_state_dict(weights)
    model.requires_grad_(False).eval()
    if half is not None:
        from open_clip.model import convert_weights_to_lp

        convert_weights_to_lp(model, dtype=half)
    return model.to(device), load_tiny_tokenizer(), tiny_preprocess_cfg()


@contextmanager
def limited_threads(count: int) -> Iterator[None]:
    """Run torch on so many CPU threads: matrices this small gain nothing from more, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _untrained_token_embedding(model: CLIP) -> Tensor:
    """(V, d) rows for tokens that no pretraining caption has: the initial distribution, the same at every load."""
    generator = torch.Generator().manual_seed(0)
    return 0.02 * torch.randn(model.token_embedding.weight.shape, generator=generator)
