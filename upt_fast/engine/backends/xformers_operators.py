"""Which of xformers' operators a GPU would run, asked of its dispatcher; no GPU is needed.

The dispatcher looks at shapes, dtypes, strides and the GPU's compute capability alone, so that fake tensors, and a
capability that is given, do for it.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from upt_fast.engine.backends import packages, xformers

CARDS = {"sm_80": (8, 0), "sm_90": (9, 0), "sm_100": (10, 0)}  # classes of data-centre GPUs
USES = ("images", "texts")  # without bias; packed, under BlockDiagonalCausalFromBottomRightMask


class Chosen(NamedTuple):
    """Names of the operators, empty where there is none; then why each was refused."""

    forward: str
    backward: str
    refused: dict[str, list[str]]


def problem() -> str:
    """Why xformers cannot be asked; empty: it can."""
    reason = packages.missing("xformers", "xformers.ops", True)
    return reason or ("" if torch.version.cuda else "torch was built without CUDA")


def cards_here() -> dict[str, tuple[int, int]]:
    """Compute capabilities of this machine's GPUs by class; of those of CARDS where there is none."""
    if not torch.cuda.is_available():
        return CARDS
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return {f"sm_{major}{minor}": (major, minor) for major, minor in sorted(found)}


def choose(capability: tuple[int, int], dtype: torch.dtype, use: str, head_width: int = 64) -> Chosen:
    """The operators of a training step's attention.

    Args:
        capability: of the GPU.
        dtype: of queries, keys and values.
        use: one of USES.
        head_width: K.
    """
    fmha = xformers.operations().fmha
    bias = None
    if use == "texts":
        bias = fmha.attn_bias.BlockDiagonalCausalFromBottomRightMask.from_seqlens([3, 4], [8, 9])
    with FakeTensorMode(), mock.patch.object(torch.cuda, "get_device_capability", return_value=capability):
        batch, queries, keys = (1, 7, 17) if bias else (2, 17, 17)
        q, k = (torch.empty(batch, n, 4, head_width, dtype=dtype, device="cuda") for n in (queries, keys))
        inputs = fmha.Inputs(q, k, k, attn_bias=bias, scale=1.0)
        forward, refused = _ask(fmha.dispatch._dispatch_fw, inputs, True)
        if forward is None:
            return Chosen("", "", refused)
        packed = forward.VARLEN_LSE_PACKED if bias else None  # what forward keeps, backward must read
        backward, refused = _ask(fmha.dispatch._dispatch_bw, inputs, packed)
    return Chosen(forward.NAME, "" if backward is None else backward.NAME, refused)


def _ask(dispatch: Any, *arguments: Any) -> tuple[Any, dict[str, list[str]]]:
    """The operator that the dispatcher names, or why it refuses each."""
    try:
        return dispatch(*arguments), {}
    except NotImplementedError as error:
        parts = re.findall(r"`([^`]+)` is not supported because:\n((?:    .+\n?)+)", str(error))
        found: dict[str, list[str]] = {}
        for name, reasons in parts:
            found[name] = [*found.get(name, []), *(line.strip() for line in reasons.splitlines())]
        return None, found
