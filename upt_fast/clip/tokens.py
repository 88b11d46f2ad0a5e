"""Class names -> token ids, checked: what is too long or empty is refused, never cut.

Used by the reference and by the engine alike, for both see the same texts: "X ... X name." (CoOp, UPT), initial words
in the place of the X (CoOp, CoCoOp, MaPLe) or templates around the name (zero-shot CLIP, VPT).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, KeysView, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from upt_fast.clip.frozen import TextContext

Tokenizer = Callable[..., Tensor]  # open_clip's: (texts, context_length=...) -> (C, context_length) int64


@dataclass(frozen=True)
class ClassTokens:
    """Token ids of the prompt texts of C classes in a context of T tokens.

    The n tokens after the first stand for the prompts; their ids are placeholders. Initial words that go on beyond n
    tokens stay in front of the name. A template's texts have n = 0.
    """

    ids: Tensor  # (C, T) int64: [SOS][X] * n [name . EOT pad]
    name_lengths: tuple[int, ...]  # tokens of each bare name
    pooled: tuple[int, ...]  # the row that becomes the class's feature

    @classmethod
    def join(cls, parts: Sequence[ClassTokens]) -> ClassTokens:
        """The classes of all parts, one after another."""
        names = tuple(length for part in parts for length in part.name_lengths)
        pooled = tuple(row for part in parts for row in part.pooled)
        with real_numbers():
            return cls(torch.cat([part.ids for part in parts]), names, pooled)


def clip_tokenizer() -> Tokenizer:
    """CLIP's byte-pair tokenizer (open_clip's SimpleTokenizer, vocabulary 49408)."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def list_classnames(classnames: Iterable[str]) -> list[str]:
    """Class names as a list, from anything that gives strings in an order: class i is the i-th of them.

    Args:
        classnames: a list, tuple, NumPy array, pandas column, dict view, generator, ...
    Raises:
        ValueError: not strings in an order: one string, a mapping, a set, a table, something that is not iterable.
    """

    def refuse(why: str) -> ValueError:
        return ValueError(f"classnames is {type(classnames).__name__}{why}; wanted a list of strings, one per class")

    given: Any = classnames
    if isinstance(given, (str, bytes)):
        raise refuse(f" {given!r:.60}, one text")
    if isinstance(given, Mapping):
        raise refuse(": which class has which index is not told by a mapping (pass .keys() or .values() in that order)")
    if isinstance(given, Set) and not isinstance(given, KeysView):
        raise refuse(", which has no order")
    if getattr(given, "ndim", 1) != 1:
        raise refuse(f" of shape {tuple(given.shape)}")
    try:
        return [str(name) if isinstance(name, str) else name for name in given]
    except TypeError as error:
        raise refuse(", which gives no strings") from error


def clean_classnames(classnames: Iterable[str]) -> tuple[str, ...]:
    """Check class names and replace underscores by spaces, as CoOp and UPT do.

    Raises:
        ValueError: as :func:`list_classnames`; no name at all, something else than a string, or a name with nothing
            in it.
    """
    names = list_classnames(classnames)
    if not names:
        raise ValueError("classnames is empty; wanted at least one class name")
    cleaned = []
    for i, name in enumerate(names):
        if not isinstance(name, str):
            raise ValueError(f"class name {i} is {name!r} ({type(name).__name__}); wanted a string")
        text = name.replace("_", " ").strip()
        if not text:
            raise ValueError(f"class name {i} is {name!r}: nothing is left of it; wanted at least one letter or digit")
        cleaned.append(text)
    return tuple(cleaned)


@contextlib.contextmanager
def real_numbers() -> Iterator[None]:
    """Numbers on the CPU, whatever mode a model is built in: token ids decide on shapes, fake ones tell nothing."""
    with _disable_current_modes(), torch.device("cpu"):
        yield


@real_numbers()
def tokenize_classnames(
    classnames: Iterable[str],
    n_text: int,
    context: TextContext,
    tokenizer: Tokenizer | None = None,
    prefix: str | None = None,
) -> ClassTokens:
    """Token ids of "X ... X name." with n_text placeholders, or of "<prefix> name.".

    Args:
        classnames: C names.
        n_text: placeholder tokens between the start token and the name.
        context: what the tower that will read the ids wants.
        tokenizer: open_clip's tokenizer of that model; None: CLIP's byte-pair tokenizer.
        prefix: words whose first n_text tokens are the placeholders; further ones stay. None: n_text times "X".
    Raises:
        ValueError: a name is empty or does not fit the context, with the name; the prefix has fewer than n_text
            tokens; the tokenizer's ids do not fit the tower's vocabulary.
    """
    classnames = list_classnames(classnames)
    names = clean_classnames(classnames)
    tokenizer = clip_tokenizer() if tokenizer is None else tokenizer
    if prefix is not None:
        count = _count_tokens(prefix, context, tokenizer)
        if count < n_text:
            raise ValueError(
                f"ctx_init={prefix!r} has {count} tokens for {n_text} prompt tokens; wanted at least as many words"
            )
    words = " ".join(["X"] * n_text) if prefix is None else prefix
    texts = [f"{words} {name}." for name in names]
    return _tokenize(texts, names, classnames, context, tokenizer, f"with {n_text} prompt tokens")


@real_numbers()
def tokenize_template(
    classnames: Iterable[str], template: str, context: TextContext, tokenizer: Tokenizer | None = None
) -> ClassTokens:
    """Token ids of a template with the names in it.

    Args:
        classnames: C names.
        template: a text with one {} for the name: "a photo of a {}.".
        context: what the tower that will read the ids wants.
        tokenizer: open_clip's tokenizer of that model; None: CLIP's byte-pair tokenizer.
    Raises:
        ValueError: as :func:`tokenize_classnames`.
    """
    classnames = list_classnames(classnames)
    names = clean_classnames(classnames)
    tokenizer = clip_tokenizer() if tokenizer is None else tokenizer
    texts = [template.replace("{}", name) for name in names]
    return _tokenize(texts, names, classnames, context, tokenizer, f"in the template {template!r}")


@real_numbers()
def tokenize_words(words: str, count: int, context: TextContext, tokenizer: Tokenizer | None = None) -> Tensor:
    """(count,) ids of the first tokens of some words, without the start token.

    Raises:
        ValueError: the words have fewer tokens, or the ids do not fit the tower's vocabulary.
    """
    tokenizer = clip_tokenizer() if tokenizer is None else tokenizer
    found = _count_tokens(words, context, tokenizer)
    if found < count:
        raise ValueError(f"{words!r} has {found} tokens; wanted at least {count}")
    return _ids([words], context, tokenizer)[0, 1 : 1 + count]


def _count_tokens(words: str, context: TextContext, tokenizer: Tokenizer) -> int:
    return int(end_rows(_ids([words], context, tokenizer), context)[0]) - 1


def _ids(texts: list[str], context: TextContext, tokenizer: Tokenizer) -> Tensor:
    """(C, T + 1) ids: a text that is cut at the end of this is too long for the tower's T."""
    length = context.length + 1
    ids = torch.as_tensor(tokenizer(texts, context_length=length)).long()
    if ids.shape != (len(texts), length) or int(ids.max()) >= context.vocabulary or int(ids.min()) < 0:
        raise ValueError(
            f"the tokenizer gave ids of shape {tuple(ids.shape)} from {int(ids.min())} to {int(ids.max())}; "
            f"wanted shape {(len(texts), length)} and ids below {context.vocabulary}: "
            "pass the tokenizer that belongs to this CLIP"
        )
    return ids


def _tokenize(
    texts: list[str],
    names: tuple[str, ...],
    given: Sequence[str],
    context: TextContext,
    tokenizer: Tokenizer,
    where: str,
) -> ClassTokens:
    """Ids of one text for each name, checked; given are the names as the user wrote them."""
    length = context.length
    ids = _ids(texts, context, tokenizer)
    end = end_rows(ids, context)
    for name, row in zip(names, end.tolist(), strict=True):
        if row >= length:
            shown = name if len(name) <= 80 else f"{name[:77]}..."
            raise ValueError(
                f"class name {shown!r} {where} needs more than this CLIP's {length} tokens; "
                "wanted a shorter name (or fewer tokens around it)"
            )
    bare = torch.as_tensor(tokenizer(list(names), context_length=length + 1)).long()
    name_lengths = tuple((end_rows(bare, context) - 1).tolist())
    if 0 in name_lengths:
        i = name_lengths.index(0)
        raise ValueError(f"class name {i} is {given[i]!r}: it has no token; wanted at least one letter or digit")
    pooled = torch.full_like(end, length - 1) if context.pooling == "last" else end
    return ClassTokens(ids[:, :length].contiguous(), name_lengths, tuple(pooled.tolist()))


def end_rows(ids: Tensor, context: TextContext) -> Tensor:
    """(C,) row of each text's end token: by the model's eos id, else the first of the largest ids (CLIP)."""
    if context.pooling == "eos":
        found = torch.eq(ids, -1 if context.eos_id is None else context.eos_id)
        if not bool(found.any(dim=1).all()):
            raise ValueError(
                f"the tokenizer wrote no end token {context.eos_id}: pass the tokenizer that belongs to this CLIP"
            )
        return found.int().argmax(dim=1)
    return ids.argmax(dim=1)
