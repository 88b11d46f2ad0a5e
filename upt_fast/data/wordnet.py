"""Names of ImageNet's WordNet ids (n01440764), read from text files in timm, which open_clip needs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from functools import cache
from importlib import resources

WORDNET_ID = re.compile(r"[nvars]\d{8}")


@cache
def _table(kind: str) -> dict[str, str]:
    """WordNet id -> "lemma" or "definition"; empty where the file is not there."""
    try:
        file = resources.files("timm.data").joinpath("_info", f"imagenet_synset_to_{kind}.txt")
        lines = file.read_text(encoding="utf-8").splitlines()
    except (ImportError, OSError):
        return {}
    return {wordnet_id: text for wordnet_id, tab, text in (line.partition("\t") for line in lines) if tab}


def lemmas_of(wordnet_id: str) -> tuple[str, ...]:
    """All names of a WordNet id, the usual one first; none if it is no id or not one of ImageNet's 21,844."""
    if not WORDNET_ID.fullmatch(wordnet_id):
        return ()
    return tuple(name for part in _table("lemma").get(wordnet_id, "").split(", ") if (name := part.strip()))


def wordnet_names(ids: Iterable[str]) -> dict[str, str]:
    """One name for each of the ids that are known.

    An id has its first lemma. Where two have the same, whatever the case (cardigan, the dog and the garment), each
    takes the first further lemma that no other id has, else the first and its definition's beginning. Of ImageNet's
    ids two, both echidnas, are alike even then.
    """
    lemmas = {name: found for name in dict.fromkeys(ids) if (found := lemmas_of(name))}
    used = Counter(word.casefold() for found in lemmas.values() for word in {*found})
    firsts = Counter(found[0].casefold() for found in lemmas.values())
    names = {}
    for wordnet_id, found in lemmas.items():
        names[wordnet_id] = found[0]
        if firsts[found[0].casefold()] > 1:
            own = [word for word in found[1:] if used[word.casefold()] == 1]
            names[wordnet_id] = own[0] if own else f"{found[0]}, {_definition(wordnet_id)}"
    return names


def _definition(wordnet_id: str) -> str:
    """The beginning of a definition, without what stands in parentheses, as long as a class name may be."""
    text = re.sub(r"\([^)]*\)", "", _table("definition").get(wordnet_id, "")).split(";")[0]
    return " ".join(text.split()[:10]).rstrip(" ,") or wordnet_id
