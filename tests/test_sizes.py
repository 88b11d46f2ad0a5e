"""Sizes in bytes as people write them."""

import pytest

from upt_fast.common.sizes import parse_bytes, show_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("600MB", 600 * 10**6),
        ("8GB", 8 * 10**9),
        ("8GiB", 8 * 2**30),
        ("8gib", 8 * 2**30),
        (" 1.5 GiB ", 3 * 2**29),
        (".5KB", 500),
        ("600000000", 600_000_000),
        (600_000_000, 600_000_000),
        ("12 B", 12),
        ("2TB", 2 * 10**12),
    ],
    ids=str,
)
def test_sizes(text, size):
    assert parse_bytes("limit", text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "8 G B", "8GBs", "-3MB", "0", "0.2B", "8GB 1", True, None, "1e9", "nan"], ids=str
)
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match=r"limit=.*; wanted a size such as 600MB, 8GB, 8GiB or a number of bytes"):
        parse_bytes("limit", text)


@pytest.mark.parametrize(
    ("size", "text"), [(1, "1 MB"), (600 * 10**6, "600 MB"), (600 * 10**6 + 1, "601 MB"), (123 * 10**8, "12.3 GB")]
)
def test_shown_sizes_are_enough(size, text):
    assert show_bytes(size) == text
    assert parse_bytes("limit", text) >= size
