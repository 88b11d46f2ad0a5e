"""The learning rate of each epoch: one constant warm-up epoch, then a cosine that never reaches zero."""

from __future__ import annotations

import math

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def lr_at_epoch(epoch: int, epochs: int, lr: float = 0.002, warmup_lr: float = 1e-5) -> float:
    """Learning rate of an epoch, counted from 0.

    Epoch 0 has warmup_lr; epoch k >= 1 has lr / 2 * (1 + cos(pi * (k - 1) / epochs)).

    Raises:
        ValueError: epoch is negative or epochs below 1.
    """
    if epoch < 0 or epochs < 1:
        raise ValueError(f"epoch={epoch} of epochs={epochs}; wanted an epoch of at least 0 and at least 1 epoch")
    if epoch == 0:
        return warmup_lr
    return lr / 2 * (1 + math.cos(math.pi * (epoch - 1) / epochs))


class WarmupCosineLR(LRScheduler):
    """:func:`lr_at_epoch` for an optimizer; call ``step()`` after each epoch.

    Args:
        optimizer: its param groups' lr is set; their own lr is not read.
        epochs: of the whole run.
        lr: after the warm-up.
        warmup_lr: of epoch 0.
        start_epoch: the epoch that is trained next, above 0 in a resumed run.
    """

    def __init__(
        self, optimizer: Optimizer, epochs: int, lr: float, warmup_lr: float = 1e-5, start_epoch: int = 0
    ) -> None:
        self.epochs = epochs
        self.lr = lr
        self.warmup_lr = warmup_lr
        if start_epoch > 0:
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", lr)
        super().__init__(optimizer, last_epoch=start_epoch - 1)

    def get_lr(self) -> list[float | Tensor]:
        """Learning rate of each param group in the epoch that begins."""
        value = lr_at_epoch(self.last_epoch, self.epochs, self.lr, self.warmup_lr)
        return [value for _ in self.optimizer.param_groups]
