"""Class names -> token ids: CoOp's prompt text, and every name that would be cut or lost is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from upt_fast.clip.frozen import TextContext
from upt_fast.clip.tokens import clean_classnames, clip_tokenizer, tokenize_classnames

START, END, X = 49406, 49407, 343
CLIP = TextContext(77, 49408, "argmax", None)


def test_clean():
    assert clean_classnames(["a_b", " c ", "d"]) == ("a b", "c", "d")
    assert clean_classnames(("_x_",)) == ("x",)


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        ("cat", "str 'cat', one text; wanted a list of strings"),
        (None, "NoneType, which gives no strings; wanted"),
        ({"cat"}, "set, which has no order; wanted"),
        ([], "empty"),
        (["a", "  "], "class name 1 is '  '"),
        (["___"], "class name 0 is '___'"),
        (["a", "b", b"c"], r"class name 2 is b'c' \(bytes\); wanted a string"),
    ],
)
def test_clean_refuses(names, wanted):
    with pytest.raises(ValueError, match=wanted):
        clean_classnames(names)


@pytest.mark.parametrize("n_text", [1, 4, 16])
def test_ids_are_those_of_the_written_prompt(tokenizer, n_text):
    names = ["cat", "hard-leaved_pocket orchid", "Boeing 747-400", "?!", "日本犬"]
    tokens = tokenize_classnames(names, n_text, CLIP, tokenizer)
    texts = [" ".join(["X"] * n_text) + f" {name.replace('_', ' ')}." for name in names]
    assert torch.equal(tokens.ids, tokenizer(texts))
    assert tokens.ids.shape == (5, 77)
    for row, name, length, pooled in zip(tokens.ids, names, tokens.name_lengths, tokens.pooled, strict=True):
        assert row[0] == START
        assert row[1 : 1 + n_text].eq(X).all()
        assert length == len(tokenizer.encode(name.replace("_", " ")))
        assert row[pooled] == END
        assert not row[:pooled].eq(END).any()


@settings(max_examples=60)
@given(st.lists(st.text("abc XYZ_0189-'.,!?é日&#", min_size=1, max_size=12), min_size=1, max_size=5), st.integers(1, 8))
def test_any_name_is_whole_or_refused(names, n_text):
    tokenizer = clip_tokenizer_once()
    if any(not name.replace("_", " ").strip() for name in names):
        with pytest.raises(ValueError, match="nothing is left"):
            tokenize_classnames(names, n_text, CLIP, tokenizer)
        return
    tokens = tokenize_classnames(names, n_text, CLIP, tokenizer)
    for i, name in enumerate(clean_classnames(names)):
        inner = tokens.ids[i, 1 + n_text : tokens.pooled[i]]
        assert tokenizer.decode(inner.tolist()).replace(" ", "") == tokenizer.decode(
            tokenizer.encode(f"{name}.")
        ).replace(" ", "")


_tokenizers: list = []


def clip_tokenizer_once():
    if not _tokenizers:
        _tokenizers.append(clip_tokenizer())
    return _tokenizers[0]


@pytest.mark.parametrize(("words", "n_text"), [(70, 4), (73, 1), (10, 64)])
def test_the_context_may_be_full(tokenizer, words, n_text):
    tokens = tokenize_classnames(["cat " * words], n_text, CLIP, tokenizer)
    assert tokens.pooled == (76,)
    assert tokens.ids[0, 76] == END
    with pytest.raises(ValueError, match=f"{n_text} prompt tokens needs more than this CLIP's 77 tokens"):
        tokenize_classnames(["dog", "cat " * (words + 1)], n_text, CLIP, tokenizer)


def test_long_names_are_named_in_short(tokenizer):
    with pytest.raises(ValueError, match="class name 'word word") as error:
        tokenize_classnames(["word " * 500], 4, CLIP, tokenizer)
    assert len(str(error.value)) < 250
    with pytest.raises(ValueError, match="class name 'cat dog'"):
        tokenize_classnames(["cat", "cat_dog"], 4, TextContext(8, 49408, "argmax", None), tokenizer)


def test_a_name_without_a_token(tokenizer):
    with pytest.raises(ValueError, match="class name 1 is '&nbsp;': it has no token"):
        tokenize_classnames(["cat", "&nbsp;"], 4, CLIP, tokenizer)


def test_poolings(tokenizer):
    names = ["cat", "snow leopard"]
    ends = tokenize_classnames(names, 2, CLIP, tokenizer).pooled
    assert ends == (5, 6)
    assert tokenize_classnames(names, 2, TextContext(77, 49408, "eos", END), tokenizer).pooled == ends
    assert tokenize_classnames(names, 2, TextContext(20, 49408, "last", None), tokenizer).pooled == (19, 19)


def test_an_end_token_that_is_not_the_largest_id():
    def fake(texts, context_length):
        ids = torch.zeros(len(texts), context_length, dtype=torch.long)
        ids[:, :4] = torch.tensor([START, 320, 7, 500])
        return ids

    assert tokenize_classnames(["cat"], 1, TextContext(77, 49408, "eos", 7), fake).pooled == (2,)


@pytest.mark.parametrize(
    ("fake", "wanted"),
    [
        (lambda texts, context_length: torch.full((len(texts), context_length), 60000), "60000.*ids below 49408"),
        (lambda texts, context_length: torch.full((len(texts), context_length), -1), "from -1"),
        (lambda texts, context_length: torch.zeros(len(texts), 77, dtype=torch.long), r"\(1, 77\).*\(1, 78\)"),
        (lambda texts, context_length: torch.zeros(3, context_length, dtype=torch.long), r"\(3, 78\).*\(1, 78\)"),
    ],
    ids=["too_large", "negative", "short", "other_count"],
)
def test_tokenizer_of_another_model(fake, wanted):
    with pytest.raises(ValueError, match=f"{wanted}.*tokenizer that belongs to this CLIP"):
        tokenize_classnames(["cat"], 4, CLIP, fake)


def test_tokenizer_without_the_end_token(tokenizer):
    with pytest.raises(ValueError, match="no end token 12345"):
        tokenize_classnames(["cat"], 4, TextContext(77, 49408, "eos", 12345), tokenizer)


def test_lists_are_taken_as_ids(tokenizer):
    """Hugging Face tokenizers may return lists."""
    tokens = tokenize_classnames(["cat"], 4, CLIP, lambda *args, **kw: tokenizer(*args, **kw).tolist())
    assert torch.equal(tokens.ids, tokenize_classnames(["cat"], 4, CLIP, tokenizer).ids)
    assert tokens.ids.dtype == torch.int64
