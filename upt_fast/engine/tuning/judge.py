"""Whether a candidate's results are right: no further off than the plain computation in the same precision, by rule.

Logits and gradients are held to float64: the error of each tensor is at most 1.5 times that of the plain computation
in the candidate's precision. Where it is more, the plain one may happen to be small; then it is refused unless rounding
explains it (upt_fast/common/closeness.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from upt_fast.common.closeness import Explained

ALLOWED = 1.5  # times the plain computation's error
HOPELESS = 10.0  # times what is allowed: rounding does not explain that
AT_FULL_SIZE = 4.0  # times the same: how far two right ones may be from each other where only they are known
SMALL = 1e-3  # of the root mean square of all gradients: those of smaller tensors are rounding alone
EXACT = 2  # units in the last place that any result may be off


class Verdict(NamedTuple):
    """What was found.

    Args:
        error: of the worst tensor, relative to float64.
        plain_error: the plain computation's for the same tensor.
        reason: why the candidate is refused; empty: it is not.
    """

    error: float
    plain_error: float
    reason: str = ""


class Judge:
    """Holds results to float64; logits first, then gradients, in one order everywhere.

    Args:
        exact: in float64.
        plain: of the plain computation in the candidates' precision.
        names: of the tensors.
        dtype: that precision.
        again: computes exact once more, for the errors that rounding explains; None: the rule decides alone.
    """

    def __init__(
        self,
        exact: Sequence[Tensor],
        plain: Sequence[Tensor],
        names: Sequence[str],
        dtype: torch.dtype,
        again: Callable[[], Sequence[Tensor]] | None = None,
    ) -> None:
        self.exact, self.names, self.dtype, self.again = [t.detach() for t in exact], list(names), dtype, again
        self.own = errors(plain, self.exact)
        self._explained: Explained | None = None

    @property
    def plain_error(self) -> float:
        """The plain computation's, of its worst tensor."""
        return max(self.own, default=0.0)

    def __call__(self, got: Sequence[Tensor]) -> Verdict:
        """Of a candidate's results."""
        found = errors(got, self.exact)
        floor = EXACT * torch.finfo(self.dtype).eps
        # gradients of one computation are about equally off; one of them may be close by chance
        typical = [self.own[:1], self.own[1:]]
        allowed = [
            ALLOWED * max(own, math.sqrt(_mean([e * e for e in typical[place > 0]])), floor)
            for place, own in enumerate(self.own)
        ]
        worst = max(range(len(found)), key=lambda i: found[i] / allowed[i])
        verdict = Verdict(found[worst], self.own[worst])
        if found[worst] <= allowed[worst]:
            return verdict
        if self.again is not None and found[worst] <= HOPELESS * allowed[worst]:
            if self._explained is None:
                self._explained = Explained(self.again, self.dtype)
            if max(self._explained.shares(got)) <= 1:
                return verdict
        return verdict._replace(
            reason=f"not close: {self.names[worst]} is off by {found[worst]:.1e}, plain PyTorch's by "
            f"{self.own[worst]:.1e} (allowed: {ALLOWED:g} times that)"
        )

    def trust(self, got: Sequence[Tensor]) -> None:
        """Take results of a way that was tested elsewhere for as good a yardstick as the plain ones."""
        self.own = list(map(max, self.own, errors(got, self.exact)))

    def at_full_size(self, got: Sequence[Tensor], usual: Sequence[Tensor]) -> str:
        """Why results at the size that is timed are refused, beside those of the usual way; empty: they are not."""
        found = errors(got, [t.detach().double() for t in usual])
        worst = max(range(len(found)), key=found.__getitem__)
        allowed = AT_FULL_SIZE * max(self.plain_error, EXACT * torch.finfo(self.dtype).eps)
        if found[worst] <= allowed:
            return ""
        return (
            f"not close at full size: {self.names[worst]} differs from the usual way's by {found[worst]:.1e} "
            f"(allowed: {allowed:.1e})"
        )


def errors(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> list[float]:
    """Root mean squares of differences over those of what is wanted; of small gradients over a share of all's."""
    scales = [_rms(t) for t in wanted]
    floor = SMALL * math.sqrt(_mean([s * s for s in scales[1:]]))
    found = []
    for place, (g, w) in enumerate(zip(got, wanted, strict=True)):
        if g.shape != w.shape:
            return [math.inf] * len(scales)
        error, scale = _rms(g.detach().double().to(w.device) - w), max(scales[place], floor if place else 0.0)
        found.append(math.inf if math.isnan(error) else error / scale if scale else error)
    return found


def _rms(t: Tensor) -> float:
    return float(t.detach().double().square().mean().sqrt()) if t.numel() else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
