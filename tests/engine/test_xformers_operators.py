"""What xformers' dispatcher says of our two uses, asked without a GPU: the statements of docs/kernels.md."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from upt_fast.engine.backends import xformers, xformers_operators
from upt_fast.engine.backends.xformers_operators import CARDS, USES, choose

pytestmark = pytest.mark.skipif(bool(xformers_operators.problem()), reason=xformers_operators.problem() or "-")
HALF = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def not_deterministic():
    """As in training; the suite asks for deterministic operations."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("head_width", [64, 80, 88, 104])
@pytest.mark.parametrize("card", CARDS)
def test_half_precision_is_pytorchs_flash_attention_2(card, head_width, use):
    version = torch.nn.attention._get_flash_version()
    assert version.startswith("2.")
    for dtype in HALF:
        assert choose(CARDS[card], dtype, use, head_width) == (f"fa2F@{version}-pt", f"fa2B@{version}-pt", {})


@pytest.mark.parametrize("use", USES)
def test_float32_is_cutlass_up_to_sm_90(use):
    for card in ("sm_80", "sm_90"):
        assert choose(CARDS[card], torch.float32, use) == ("cutlassF-pt", "cutlassB-pt", {})
    found = choose(CARDS["sm_100"], torch.float32, use)
    assert found[:2] == ("", "")
    assert any("too new" in reason for reason in found.refused["cutlassF-pt"])


def test_other_cards_and_head_widths():
    assert choose((7, 5), torch.float16, "images").forward == "cutlassF-pt"
    assert choose((9, 0), torch.float16, "images", 60).forward == ""
    assert any("% 8" in reason for reason in choose((9, 0), torch.float16, "images", 60).refused["cutlassF-pt"])


def test_deterministic_algorithms_leave_texts_without_a_backward():
    """Flash's backward is not deterministic, and cutlass cannot read what flash's forward keeps of packed texts."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert choose((9, 0), torch.bfloat16, "images")[1] == "cutlassB-pt"
    assert choose((9, 0), torch.bfloat16, "texts")[1] == ""
    assert choose((9, 0), torch.float32, "texts")[1] == "cutlassB-pt"


def test_no_wheel_brings_flash_attention_3():
    operations = xformers.operations()
    assert not operations.fmha.flash3.FwOp.is_available()
    assert not list(Path(operations.__file__).parents[1].glob("flash_attn_3/*.so"))


def test_an_extension_that_does_not_load_is_not_needed():
    """In a process of its own: as xformers is after its import, and after ours."""
    code = """
import torch
from upt_fast.engine.backends import packages, xformers, xformers_operators
with packages.quiet_import():
    from xformers.ops.fmha import common
common._built_with_cuda = False  # beside a PyTorch for another CUDA than that it was built for
operations, xformers.operations = xformers.operations, lambda: __import__("xformers.ops").ops
print(xformers_operators.choose((9, 0), torch.bfloat16, "texts"))
xformers.operations = operations
print(xformers_operators.choose((9, 0), torch.bfloat16, "texts"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = done.stdout.splitlines()
    assert before.startswith("Chosen(forward='', backward=''")
    assert "xFormers wasn't build with CUDA support" in before
    assert "fa2F@" in after
    assert after.endswith("refused={})")
