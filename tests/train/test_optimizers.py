"""The optimizers of a run against PyTorch's own, and what label smoothing does to its loss."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from upt_fast import FastPromptedCLIP
from upt_fast.engine.graphs import GraphedStep, _can_be_captured
from upt_fast.train.config import TrainConfig
from upt_fast.train.loop import train
from upt_fast.train.optimizers import build_optimizer, restore_state, state_tensors

STATES = {"sgd": {"momentum"}, "adamw": {"exp_avg", "exp_avg_sq", "step"}}


def config(tmp_path: Path, **values) -> TrainConfig:
    given = {"data": str(tmp_path / "data"), "out": str(tmp_path / "out"), "clip": "tiny-digits", "device": "cpu"}
    return TrainConfig(**given, **values)


class Numbers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor([1.0, -2.0, 3.0])), nn.Parameter(torch.tensor(0.5))

    def step(self, optimizer: torch.optim.Optimizer, factor: float) -> None:
        optimizer.zero_grad()
        (factor * (self.a.square().sum() * self.b).sin()).backward()
        optimizer.step()


@pytest.mark.parametrize("name", STATES)
def test_steps_are_pytorch_s(tmp_path, name):
    settings = config(tmp_path, optimizer=name, lr=0.05, weight_decay=0.1, momentum=0.8)
    ours, theirs = Numbers(), Numbers()
    mine = build_optimizer(settings, ours, fused=False)
    if name == "sgd":
        plain = torch.optim.SGD(theirs.parameters(), lr=0.05, momentum=0.8, weight_decay=0.1)
    else:
        plain = torch.optim.AdamW(theirs.parameters(), lr=0.05, weight_decay=0.1)
    for factor in (1.0, -2.0, 0.5):
        ours.step(mine, factor)
        theirs.step(plain, factor)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    assert {key.partition(".")[0] for key in state_tensors(ours, mine)} == STATES[name]


@pytest.mark.parametrize("name", STATES)
def test_a_restored_state_goes_on(tmp_path, name):
    settings = config(tmp_path, optimizer=name, lr=0.05)
    whole, again = Numbers(), Numbers()
    optimizer = build_optimizer(settings, whole, fused=False)
    whole.step(optimizer, 1.0)
    again.load_state_dict(whole.state_dict())
    other = build_optimizer(settings, again, fused=False)
    restore_state(again, other, {key: value.clone() for key, value in state_tensors(whole, optimizer).items()})
    for factor in (-1.0, 3.0):
        whole.step(optimizer, factor)
        again.step(other, factor)
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    untouched = build_optimizer(settings, Numbers(), fused=False)
    restore_state(Numbers(), untouched, {})
    assert not untouched.state


@pytest.mark.parametrize("scaler", [None, torch.amp.GradScaler("cpu")], ids=["plain", "scaled"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", STATES)
def test_a_fused_one_is_part_of_a_captured_step(tmp_path, name, fused, scaler):
    optimizer = build_optimizer(config(tmp_path, optimizer=name), Numbers(), fused)
    assert _can_be_captured(optimizer, scaler) == fused


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_adamw_takes_plain_adamw_s_steps(tmp_path):
    """Also after its state was restored, whose count of steps comes from the CPU."""
    settings = config(tmp_path, optimizer="adamw", lr=0.05, weight_decay=0.1)
    plain, ours = Numbers(), Numbers().cuda()
    theirs = torch.optim.AdamW(plain.parameters(), lr=0.05, weight_decay=0.1)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):  # gradients are accumulated on the stream that saw their parameter first
        mine = build_optimizer(settings, ours, fused=True)
        plain.step(theirs, 1.0)
        ours.step(mine, 1.0)
        state = {key: value.cpu() for key, value in state_tensors(ours, mine).items()}
        mine = build_optimizer(settings, ours, fused=True)
        restore_state(ours, mine, state)
        factor = torch.zeros((), device="cuda")
        for group in mine.param_groups:
            group["lr"] = torch.tensor(group["lr"], device="cuda")
        with torch.cuda.graph(graph, stream=stream):
            ours.step(mine, factor)
        for value in (-2.0, 0.5):
            plain.step(theirs, value)
            factor.fill_(value)
            graph.replay()
        for a, b in zip(plain.parameters(), ours.parameters(), strict=True):
            assert torch.allclose(a, b.cpu(), rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_a_run_minimises_the_smoothed_loss(tmp_path, smoothing):
    for label, name in enumerate(("dark", "light")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(3):
            pixels = np.random.default_rng(10 * label + i).integers(0, 99, (34, 34, 3), dtype=np.uint8)
            Image.fromarray(pixels + np.uint8(150 * label)).save(tmp_path / "data" / name / f"{i}.png")
    seen = []

    def step(self, images, labels):
        model = self.model
        assert isinstance(model, FastPromptedCLIP)
        loss, logits = given(self, images, labels)
        seen.append((loss.clone(), F.cross_entropy(logits, labels, label_smoothing=smoothing)))
        return loss, logits

    given = GraphedStep.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GraphedStep, "__call__", step)
        train(config(tmp_path, method="coop", shots=2, epochs=1, batch_size=2, label_smoothing=smoothing))
    assert seen
    for loss, wanted in seen:
        assert torch.allclose(loss, wanted, rtol=1e-6)
