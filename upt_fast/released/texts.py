"""Whether a released checkpoint's token buffers are those of the class names, initial words and CLIP at hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from upt_fast.clip.loading import LoadedCLIP
from upt_fast.clip.open_clip import frozen_clip
from upt_fast.clip.tokens import ClassTokens, tokenize_classnames
from upt_fast.methods import MethodConfig, find_method, list_releases
from upt_fast.released.file import ReleasedCheckpoint


def check_texts(
    found: ReleasedCheckpoint,
    clip: LoadedCLIP,
    classnames: tuple[str, ...],
    method: str,
    inferred: Mapping[str, Any],
    options: Mapping[str, Any],
) -> tuple[MethodConfig, bool]:
    """The config, with the initial words that the token buffers tell, and whether there were buffers to check."""
    kind, release = find_method(method).config, list_releases()[method]
    given = {**options, **inferred}
    config: Any = kind.from_options(given)
    if getattr(config, "n_text", 0) == 0:  # fixed texts
        return config, False
    guesses = [guess for guess in release.guesses if not guess.keys() & options.keys()]
    candidates = [config, *(kind.from_options({**given, **guess}) for guess in guesses)]
    if not found.tokens:
        return config, False
    problems = []
    for candidate in candidates:
        problem = _token_problem(found.tokens, clip, classnames, candidate.n_text, getattr(candidate, "prefix", None))
        if problem is None:
            return candidate, True
        problems.append(problem)
    raise ValueError(problems[0])


def _token_problem(
    buffers: Mapping[str, Tensor], clip: LoadedCLIP, classnames: tuple[str, ...], n_text: int, prefix: str | None
) -> str | None:
    """What tells the file's token buffers from the embeddings of these class names' texts."""
    text = frozen_clip(clip.model).text
    tokens: ClassTokens = tokenize_classnames(classnames, n_text, text.context, clip.tokenizer, prefix)
    count, length, width = len(classnames), text.context.length, text.width
    wanted = {
        "token_prefix": (count, 1, width),
        "token_suffix": (count, length - 1 - n_text, width),
        "tokenized_prompts": (count, length),
    }
    for name, values in buffers.items():
        shape = tuple(values.shape)
        if shape == wanted[name]:
            continue
        if len(shape) == len(wanted[name]) and shape[0] != count:
            return (
                f"{name} is of {shape[0]} classes; {count} class names were given: wanted those of training "
                "(set_classnames takes others afterwards)"
            )
        return f"{name} is {shape}; these class names, options and this CLIP make {wanted[name]}"
    ids, table = tokens.ids.to(text.token_embedding.device), text.token_embedding
    start = buffers.get("token_prefix")
    if start is not None and not all(_close(row, table[ids[0, :1]]) for row in start):
        return "token_prefix is not this CLIP's start token: the file is of another CLIP"

    def same(file_row: int, our_row: int) -> bool:
        kept = ids[our_row, 1 + n_text :]
        listed, suffix = buffers.get("tokenized_prompts"), buffers.get("token_suffix")
        if listed is not None and not torch.equal(listed[file_row, 1 + n_text :].to(kept), kept):
            return False
        return suffix is None or _close(suffix[file_row], table[kept])

    wrong = [i for i in range(count) if not same(i, i)]
    if not wrong:
        return None
    which = f"{len(wrong)} of {count} class names, first {classnames[wrong[0]]!r} (class {wrong[0]})"
    moved = next((i for i in range(count) if same(i, wrong[0])), None)
    if moved is not None:
        return f"the class names stand in another order than in the file: {which}, is class {moved} there"
    return (
        f"the file's token buffers are of other texts than these: {which}; wanted the class names of training in their "
        f"order, its initial words (ctx_init; here {prefix or 'none'!r}) and its CLIP"
    )


def _close(theirs: Tensor, ours: Tensor) -> bool:
    """Whether two embeddings are equal but for rounding to half precision; NaN is equal to nothing."""
    # the release computes them in float16 even where it stores float32
    eps = max(torch.finfo(dtype).eps for dtype in (torch.float16, theirs.dtype, ours.dtype))
    theirs, ours = theirs.to(ours.device).double(), ours.double()
    return bool(((theirs - ours).abs() <= eps * ours.abs() + 1e-7).all())
