"""Token ids of initial words and templates."""

import pytest
import torch

from upt_fast.clip.frozen import TextContext
from upt_fast.clip.tokens import tokenize_classnames, tokenize_template, tokenize_words

CLIP = TextContext(77, 49408, "argmax", None)
NAMES = ["cat", "hard-leaved_pocket orchid"]


@pytest.mark.parametrize("n_text", [1, 3, 4])
def test_prefix(tokenizer, n_text):
    tokens = tokenize_classnames(NAMES, n_text, CLIP, tokenizer, "a photo of a")
    assert torch.equal(tokens.ids, tokenizer([f"a photo of a {name.replace('_', ' ')}." for name in NAMES]))
    assert [p - n for p, n in zip(tokens.pooled, tokens.name_lengths, strict=True)] == [6, 6]  # SOS, words, full stop
    x = tokenize_classnames(NAMES, 4, CLIP, tokenizer)
    assert torch.equal(tokens.ids[:, 5:], x.ids[:, 5:])
    assert (tokens.name_lengths, tokens.pooled) == (x.name_lengths, x.pooled)


def test_prefix_with_too_few_tokens(tokenizer):
    with pytest.raises(
        ValueError, match="ctx_init='a photo' has 2 tokens for 3 prompt tokens; wanted at least as many"
    ):
        tokenize_classnames(NAMES, 3, CLIP, tokenizer, "a photo")


def test_template(tokenizer):
    tokens = tokenize_template(NAMES, "art of the {}, a flower.", CLIP, tokenizer)
    assert torch.equal(
        tokens.ids, tokenizer(["art of the cat, a flower.", "art of the hard-leaved pocket orchid, a flower."])
    )
    assert tokens.name_lengths == tokenize_classnames(NAMES, 2, CLIP, tokenizer).name_lengths
    assert tokens.pooled == tuple(tokens.ids.argmax(1).tolist())
    with pytest.raises(ValueError, match=r"class name 'cat cat.* in the template 'a \{\}.' needs more than this CLIP"):
        tokenize_template(["cat " * 76], "a {}.", CLIP, tokenizer)
    with pytest.raises(ValueError, match="class name 1 is ' '"):
        tokenize_template(["cat", " "], "a {}.", CLIP, tokenizer)
    short = TextContext(20, 49408, "last", None)
    assert tokenize_template(NAMES, "a {}.", short, tokenizer).pooled == (19, 19)


def test_words(tokenizer):
    assert tokenize_words("a photo of a", 2, CLIP, tokenizer).tolist() == tokenizer.encode("a photo")
    assert tokenize_words("a photo", 2, TextContext(77, 49408, "eos", 49407), tokenizer).tolist() == [320, 1125]
    with pytest.raises(ValueError, match="'a photo' has 2 tokens; wanted at least 3"):
        tokenize_words("a photo", 3, CLIP, tokenizer)
