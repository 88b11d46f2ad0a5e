"""The captured training step: its bookkeeping with a stand-in for CUDA's graph, its numbers on a GPU."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from captured_steps import capture_on_cpu

from upt_fast.common.closeness import relative_rms
from upt_fast.engine import graphs
from upt_fast.testing import build, random_clip
from upt_fast.train.schedule import WarmupCosineLR

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
NAMES = ["cat", "dog", "traffic light"]


@pytest.fixture
def captured(monkeypatch):
    return capture_on_cpu(monkeypatch)


def make(method="upt", fused=True, device="cpu", **options):
    torch.manual_seed(0)
    model = build("fast", random_clip().to(device), NAMES, method, **options).train()
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused)


def batches(count, size=4, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        images = torch.randn(size, 3, 32, 32, generator=generator)
        yield images.to(device, dtype), torch.randint(3, (size,), generator=generator).to(device)


def plain_step(model, optimizer, images, labels):
    logits = model(images)
    loss = F.cross_entropy(logits.float(), labels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach(), logits.detach()


def trained(step, data):
    return [tuple(t.clone() for t in step(*batch)) for batch in data]


def test_eager_on_a_cpu():
    model, optimizer = make(fused=False)
    twin, other = make(fused=False)
    step = model.make_graphed_step(optimizer, 4)
    assert step.reason == "cpu (graphs are CUDA's)"
    found = trained(step, batches(4))
    wanted = [plain_step(twin, other, *batch) for batch in batches(4)]
    for (loss, logits), (wanted_loss, wanted_logits) in zip(found, wanted, strict=True):
        assert torch.equal(loss, wanted_loss)
        assert torch.equal(logits, wanted_logits)
        assert not loss.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert isinstance(optimizer.param_groups[0]["lr"], float)
    assert model.make_graphed_step(optimizer, 4, capture=False).reason == "capture=False"


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("warmup", [1, 3])
@pytest.mark.parametrize("method", ["upt", "coop", "cocoop", "vpt_deep"])
def test_same_steps_as_without_a_graph(captured, method, warmup, fused):
    """Schedules, a shorter batch and numbers put into the optimizer between replays."""
    model, optimizer = make(method, fused)
    twin, other = make(method, fused)
    step = model.make_graphed_step(optimizer, 4, warmup=warmup)
    schedules = [WarmupCosineLR(o, 4, 0.1) for o in (optimizer, other)]
    data = [*batches(6), *batches(1, size=3), *batches(5)]
    for i, batch in enumerate(data):
        loss, logits = (t.clone() for t in step(*batch))
        wanted_loss, wanted_logits = plain_step(twin, other, *batch)
        assert torch.allclose(loss, wanted_loss, rtol=1e-5)
        assert relative_rms(logits, wanted_logits) <= 1e-5
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert relative_rms(p.grad, q.grad) <= 1e-4
        if i % 4 == 3:
            for schedule in schedules:
                schedule.step()
        if i == 9:
            for o in (optimizer, other):
                o.param_groups[0]["lr"] = 0.03
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert relative_rms(p, q) <= 1e-4
    assert step.reason == ""
    assert step.optimizer_captured == fused
    assert len(captured) == (1 if method == "cocoop" else 2)  # with and without a second stream
    # eager: until the optimizer's state is there, the warm-up, the shorter batch
    assert max(graph.replays for graph in captured) >= len(data) - warmup - 3


def test_what_changes_is_captured_anew(captured):
    model, optimizer = make()
    step = model.make_graphed_step(optimizer, 4, warmup=1, two_streams=False)
    trained(step, batches(4))
    assert len(captured) == 1
    model.set_classnames(["bird", "fish", "horse", "cow"])
    _, logits = step(*next(batches(1)))
    assert step.reason == graphs.NOT_YET
    assert logits.shape == (4, 4)
    trained(step, batches(2))
    assert len(captured) == 2
    optimizer.param_groups[0]["momentum"] = 0.5
    trained(step, batches(3))
    assert len(captured) == 3
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # other tensors
    trained(step, batches(3))
    assert len(captured) == 4
    assert step.reason == ""


def test_timing_the_streams_changes_nothing(captured, monkeypatch):
    """The replays that are timed leave parameters, momentum and random numbers as they were."""
    model, optimizer = make()
    step = model.make_graphed_step(optimizer, 4, warmup=2)
    seen = []

    def seconds(graph):
        before = [p.detach().clone() for p in model.parameters()], torch.get_rng_state()
        found = original(graph)
        seen.append(graph.replays)
        assert all(torch.equal(a, b) for a, b in zip(before[0], model.parameters(), strict=True))
        assert torch.equal(before[1], torch.get_rng_state())
        return found

    original = step._seconds
    monkeypatch.setattr(step, "_seconds", seconds)
    trained(step, batches(5))
    assert seen == [graphs.REPLAYS + 1] * 2
    assert step.reason == ""


def test_a_step_that_cannot_be_captured_stays_eager(captured, monkeypatch):
    def fail(self, two_streams):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graphs.GraphedStep, "_record", fail)
    model, optimizer = make()
    twin, other = make()
    step = model.make_graphed_step(optimizer, 4, warmup=1)
    found = trained(step, batches(5))
    assert step.reason == "the step cannot be captured: operation not permitted when stream is capturing"
    wanted = [plain_step(twin, other, *batch) for batch in batches(5)]
    assert relative_rms(found[-1][1], wanted[-1][1]) <= 1e-5


@pytest.mark.parametrize(
    ("kind", "options", "alone", "scaled"),
    [
        (torch.optim.SGD, {"fused": True}, True, True),
        (torch.optim.SGD, {"foreach": True}, False, False),
        (torch.optim.AdamW, {"fused": True}, False, False),
        (torch.optim.AdamW, {"capturable": True}, True, False),
        (torch.optim.AdamW, {"fused": True, "capturable": True}, True, True),
    ],
    ids=["sgd-fused", "sgd", "adamw-fused", "adamw-capturable", "adamw-both"],
)
def test_which_optimizers_are_captured(kind, options, alone, scaled):
    """As PyTorch allows: a step that a capture refuses runs behind the graph, instead of keeping all of it eager."""
    model, _ = make()
    optimizer = kind(model.parameters(), lr=0.1, **options)
    assert model.make_graphed_step(optimizer, 4).optimizer_captured == alone
    scaler = torch.amp.GradScaler("cpu")
    assert model.make_graphed_step(optimizer, 4, scaler=scaler).optimizer_captured == scaled


def test_adam_refuses_a_capture_unless_it_is_capturable(monkeypatch):
    """What the choice above rests on, of the PyTorch that is installed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: torch.device("cuda"), raising=False)
    stream = SimpleNamespace(is_capturing=lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda *_: stream, raising=False)
    model, sgd = make()
    adam = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    check = getattr(adam, "_accelerator_graph_capture_health_check", None) or adam._cuda_graph_capture_health_check
    with pytest.raises(RuntimeError, match="capturable"):
        check()
    assert all("capturable" not in group for group in sgd.param_groups)


def test_loss_and_wrong_numbers():
    model, optimizer = make()
    step = model.make_graphed_step(optimizer, 4, loss=lambda logits, labels: logits.square().sum())
    (loss, logits), *_ = trained(step, batches(1))
    assert torch.allclose(loss, logits.square().sum())
    for options in ({"batch_size": 0}, {"batch_size": 4, "warmup": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            model.make_graphed_step(optimizer, **options)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("two_streams", [False, True, None])
@pytest.mark.parametrize(("method", "dtype"), [("upt", "fp32"), ("upt", "bf16"), ("coop", "fp32"), ("cocoop", "fp32")])
def test_on_a_gpu(method, dtype, two_streams):
    model, optimizer = make(method, device="cuda", dtype=dtype)
    twin, other = make(method, device="cuda", dtype=dtype)
    step = model.make_graphed_step(optimizer, 4, two_streams=two_streams)
    schedules = [WarmupCosineLR(o, 4, 0.1) for o in (optimizer, other)]
    for i, batch in enumerate([*batches(8, device="cuda"), *batches(1, 3, "cuda"), *batches(5, device="cuda")]):
        _, logits = step(*batch)
        _, wanted_logits = plain_step(twin, other, *batch)
        assert relative_rms(logits, wanted_logits) <= (1e-4 if dtype == "fp32" else 3e-2)
        if i % 4 == 3:
            for schedule in schedules:
                schedule.step()
    assert step.reason == ""
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert relative_rms(p, q) <= (1e-3 if dtype == "fp32" else 5e-2)


@needs_gpu
@pytest.mark.gpu
def test_float16_with_a_scaler_on_a_gpu():
    model, optimizer = make(device="cuda", dtype="fp16")
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    step = model.make_graphed_step(optimizer, 4, scaler=scaler)
    before = [p.detach().clone() for p in model.parameters()]
    found = trained(step, batches(8, device="cuda"))
    assert step.reason == ""
    assert all(loss.isfinite() for loss, _ in found)
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@needs_gpu
@pytest.mark.gpu
def test_what_waits_for_the_gpu_stays_eager():
    model, optimizer = make(device="cuda")
    step = model.make_graphed_step(
        optimizer, 4, warmup=1, loss=lambda x, y: F.cross_entropy(x, y) * float(x[0, 0] > -9)
    )
    trained(step, batches(4, device="cuda"))
    assert step.reason.startswith("the step cannot be captured: ")
