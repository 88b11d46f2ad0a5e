"""The learning rate of each epoch."""

import math

import pytest
import torch

from upt_fast.train import WarmupCosineLR, lr_at_epoch


def test_values():
    assert lr_at_epoch(0, 50) == 1e-5
    assert lr_at_epoch(1, 50) == 0.002
    assert lr_at_epoch(26, 50) == pytest.approx(0.001)
    assert lr_at_epoch(49, 50) == pytest.approx(0.001 * (1 + math.cos(math.pi * 48 / 50)))
    assert min(lr_at_epoch(k, 50) for k in range(1, 50)) > 0


def test_is_the_cosine_schedule_of_the_released_code():
    # torch's own cosine stepped once per epoch, held at the warm-up's constant for the first one
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.002)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    for epoch in range(1, 10):
        assert lr_at_epoch(epoch, 10) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        cosine.step()


@pytest.mark.parametrize("start", [0, 1, 3])
def test_scheduler(start):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = WarmupCosineLR(optimizer, epochs=5, lr=0.1, warmup_lr=0.01, start_epoch=start)
    for epoch in range(start, 5):
        assert optimizer.param_groups[0]["lr"] == lr_at_epoch(epoch, 5, 0.1, 0.01)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(("epoch", "epochs"), [(-1, 5), (0, 0)])
def test_bad_values(epoch, epochs):
    with pytest.raises(ValueError, match="wanted an epoch of at least 0"):
        lr_at_epoch(epoch, epochs)
