"""Steps that measure their own route: the winner's training to the bit, what is refused, what is never measured."""

import threading

import pytest
import torch
import torch.nn.functional as F
from captured_steps import capture_on_cpu
from measured_routes import ROUTES, declare_times, kept, unknown_machine

from upt_fast.engine.backends import xformers
from upt_fast.engine.graphs import GraphedStep
from upt_fast.engine.tuning import choices
from upt_fast.engine.tuning.race import ROUNDS
from upt_fast.steps import measured, tuned
from upt_fast.steps.tuned import TunedStep
from upt_fast.testing import build, random_clip

NAMES = ["cat", "dog", "traffic light", "sea horse"]
STEPS = ROUNDS + 4


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    with unknown_machine(monkeypatch, tmp_path):
        yield


@pytest.fixture
def times(monkeypatch):
    return declare_times(monkeypatch)


def make(backend="auto", method="upt", optimizer="sgd", dtype=None, **options):
    torch.manual_seed(0)
    model = build("fast", random_clip(), NAMES, method, backend=backend, dtype=dtype, **options).train()
    if optimizer == "sgd":
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def batches(count=STEPS, size=4, last=None):
    generator = torch.Generator().manual_seed(1)
    for i in range(count):
        b = last if last is not None and i % 3 == 2 else size
        yield torch.randn(b, 3, 32, 32, generator=generator), torch.randint(4, (b,), generator=generator)


def train(model, optimizer, data, step=None, **options):
    """All that training leaves: parameters, the optimizer's tensors, random numbers, the last loss and logits."""
    step = model.make_graphed_step(optimizer, 4, **options) if step is None else step
    for i, (images, labels) in enumerate(data):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (1 + i)
        loss, logits = step(images, labels)
    state = [v for values in optimizer.state.values() for v in values.values() if isinstance(v, torch.Tensor)]
    found = [*model.parameters(), *state, torch.get_rng_state(), loss, logits]
    return step, [t.detach().clone() for t in found]


def assert_same(got, wanted):
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("winner", ROUTES)
@pytest.mark.parametrize(
    "options", [{}, {"optimizer": "adamw", "preset": "released", "dropout": 0.3}], ids=["paper", "drop"]
)
def test_the_winners_training_to_the_bit(winner, options, times):
    times[winner] = 0.5
    step, got = train(*make(**options), batches())
    assert isinstance(step, TunedStep)
    assert step.route.name == winner
    told, wanted = train(*make(backend=winner, **options), batches())
    assert isinstance(told, GraphedStep)
    assert_same(got, wanted)
    # what was found is kept
    (entry,) = kept().values()
    assert (entry["choice"], entry["usual"], entry["at"]) == (winner, "torch", [4, 4])
    assert set(entry["ms"]) == set(ROUTES)
    choices.forget()
    model, optimizer = make(**options)
    again, wanted = train(model, optimizer, batches())
    assert isinstance(again, GraphedStep)
    assert_same(got, wanted)


def test_the_lanes_are_apart(times, monkeypatch):
    """The leader changes while batches come, and some have fewer images."""
    leaders, join = [], TunedStep._join_graphs
    monkeypatch.setattr(TunedStep, "_join_graphs", lambda self: leaders.append(self._race.leader) or join(self))
    times["xformers"] = 0.96
    times["torch/xformers"] = iter([0.9, 0.99, 0.99, 0.99, 0.99, 0.99, 0.99])
    step, got = train(*make(), batches(STEPS + 6, last=2))
    assert {"torch/xformers", "xformers"} <= set(leaders)
    assert step.route.name == "xformers"
    assert_same(got, train(*make(backend="xformers"), batches(STEPS + 6, last=2))[1])


def test_settled_early(times):
    """Whoever looks at the model before the race is over has it decided on the batches so far."""
    times["torch/xformers"] = 0.9
    data = list(batches())
    model, optimizer = make()
    step, _ = train(model, optimizer, data[:2])
    assert step.route is None
    assert step.reason == tuned.MEASURING
    random = torch.get_rng_state()
    step.settle()
    assert torch.equal(torch.get_rng_state(), random)
    assert step.route.name == "torch/xformers"
    other, its = make(backend="torch/xformers")
    told, wanted = train(other, its, data[:2])
    assert_same(list(model.parameters()), list(other.parameters()))
    assert_same(train(model, optimizer, data[2:], step)[1], train(other, its, data[2:], told)[1])
    step.settle()  # nothing is left to do
    assert wanted


def test_from_an_optimizer_that_has_begun(times):
    times["xformers"] = 0.5
    found = []
    for backend in ("auto", "xformers"):
        model, optimizer = make(backend="xformers")
        train(model, optimizer, batches(3))
        torch.manual_seed(0)
        other, its = make(backend=backend)
        other.load_state_dict(model.state_dict())
        its.load_state_dict(optimizer.state_dict())
        found.append(train(other, its, batches())[1])
    assert_same(*found)


@pytest.mark.parametrize("winner", ["xformers, graph", "torch, graph", "torch/xformers"])
def test_graphs_are_measured_too(winner, times, monkeypatch):
    """A route that waits for its launches may win once it is captured; the winner's training, to the bit."""
    graphs = capture_on_cpu(monkeypatch)
    times.update({f"{name}, graph": 0.95 for name in ROUTES} | {"xformers": 1.04, "torch/xformers": 1.02})
    times["xformers/torch"] = 30.0  # hopeless among those without a graph
    times[winner] = 0.5

    def fused(**options):
        model, _ = make(**options)
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)

    step, got = train(*fused(), batches(STEPS + 6))
    assert step.route.name == winner
    (entry,) = kept().values()
    assert (entry["usual"], entry["choice"]) == ("torch, graph", winner)
    assert "xformers/torch, graph" not in entry["ms"]
    if winner != "torch/xformers":
        assert {"xformers, graph", "torch/xformers, graph"} <= set(entry["ms"])
    assert step.reason == ("" if step.route.graph else "capture=False")
    assert graphs
    told = train(*fused(backend=step.route.backend), batches(STEPS + 6), capture=step.route.graph)
    assert_same(got, told[1])


def test_a_capture_that_fails_is_refused(times, monkeypatch):
    capture_on_cpu(monkeypatch)
    record = GraphedStep._record

    def fails(self, two_streams):
        if self.model.backend == "xformers":
            raise RuntimeError("operation not permitted when stream is capturing")
        return record(self, two_streams)

    monkeypatch.setattr(GraphedStep, "_record", fails)
    times.update({f"{name}, graph": 0.8 for name in ROUTES} | {"xformers": 0.7, "xformers, graph": 0.1})
    step, _ = train(*make(), batches(STEPS + 6))
    assert step.route.name == "xformers"
    (entry,) = kept().values()
    assert entry["refused"]["xformers, graph"].startswith("the step cannot be captured: operation not permitted")


def test_a_learning_rate_that_is_a_tensor(times):
    times["xformers"] = 0.5
    model, optimizer = make()
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    step = model.make_graphed_step(optimizer, 4)
    for batch in batches():
        step(*batch)
    assert step.route.name == "xformers"
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_a_wrong_route_is_refused(times, monkeypatch):
    """By 1 % in the output of attention."""
    times["xformers"] = 0.1
    original = xformers.call
    monkeypatch.setattr(xformers, "call", lambda q, k, v, bias: 1.01 * original(q, k, v, bias))
    step, got = train(*make(), batches())
    assert step.route.name == "torch"
    entry = next(iter(kept().values()))
    for name in ROUTES[1:]:
        assert entry["refused"][name].startswith("not close: ")
        assert name not in entry["ms"]
    assert_same(got, train(*make(backend="torch"), batches())[1])


def test_a_wrong_route_is_refused_in_bfloat16(times, monkeypatch):
    """By more than rounding: 30 %."""
    times["xformers"] = 0.1
    original = xformers.call
    monkeypatch.setattr(xformers, "call", lambda q, k, v, bias: 1.3 * original(q, k, v, bias))
    step, _ = train(*make(dtype="bf16"), batches())
    assert step.route.name == "torch"
    assert "not close" in next(iter(kept().values()))["refused"]["xformers"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_right_routes_are_not_refused(dtype, times):
    times["xformers"] = 0.5
    step, _ = train(*make(dtype=dtype), batches())
    assert next(iter(kept().values()))["refused"] == {}
    assert step.route.name == "xformers"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("launch failure")])
def test_a_route_that_fails_on_the_way_is_refused(error, times, monkeypatch):
    calls, original = [], xformers.call

    def call(*args):
        calls.append(1)
        if len(calls) > 60:
            raise error
        return original(*args)

    times["xformers"] = times["torch/xformers"] = times["xformers/torch"] = 0.1
    monkeypatch.setattr(xformers, "call", call)
    step, got = train(*make(), batches())
    assert step.route.name == "torch"
    assert_same(got, train(*make(backend="torch"), batches())[1])


def test_the_usual_routes_errors_are_the_runs(times):
    model, optimizer = make()
    step = model.make_graphed_step(optimizer, 4)
    with pytest.raises(ValueError, match="images of shape"):
        step(torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64))


def test_a_short_run_measures_nothing(monkeypatch, times):
    monkeypatch.setattr(tuned, "SHARE", 0.05)
    times["xformers"] = 0.1
    told = []
    step, got = train(*make(), batches(3), steps=3, decided=lambda: told.append(1))
    assert step.route.name == "torch"
    assert told == [1]
    assert kept() == {}
    # for a run to go on as it began
    assert [name for key, name in choices.record()["choices"].items() if key.startswith("step")] == ["torch"]
    assert_same(got, train(*make(backend="torch"), batches(3))[1])


def test_an_incomplete_measurement_is_made_again_in_a_long_run(times):
    model, optimizer = make()
    key = model.route_key(measured.STEP, 4)
    entry = {"choice": "torch", "usual": "torch", "ms": {"torch": 100.0}, "budget_s": 1.0}
    choices.keep(key, entry | {"refused": {"inductor": "not tried: compiling takes about 60 s, and there are 1"}})
    assert isinstance(model.make_graphed_step(optimizer, 4, steps=100), GraphedStep)
    assert isinstance(model.make_graphed_step(optimizer, 4, steps=100_000), TunedStep)
    choices.keep(key, entry | {"refused": {"inductor": "out of memory"}})
    assert isinstance(model.make_graphed_step(optimizer, 4, steps=100_000), GraphedStep)


def test_where_nothing_is_measured(monkeypatch):
    model, optimizer = make()
    assert model.not_measured() == ""

    def step():
        return model.make_graphed_step(optimizer, 4)

    monkeypatch.setenv("UPT_FAST_MEASURE", "0")
    assert model.not_measured() == "UPT_FAST_MEASURE=0"
    assert isinstance(step(), GraphedStep)
    monkeypatch.setenv("UPT_FAST_MEASURE", "1")
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert "use_deterministic_algorithms" in model.not_measured()
    assert isinstance(step(), GraphedStep)
    torch.use_deterministic_algorithms(False)
    found = []
    thread = threading.Thread(target=lambda: found.append(model.not_measured()))
    thread.start()
    thread.join()
    assert found == ["not in the main thread"]
    seen = []
    torch.func.vmap(lambda x: seen.append(model.not_measured()) or x)(torch.ones(2))
    assert "transform" in seen[0]
    assert isinstance(model.make_graphed_step(optimizer, 4, tune=False), GraphedStep)
    for named in ("torch", "xformers"):
        other, its = make(backend=named)
        assert other.not_measured() == f"backend={named!r} was asked for"
        assert isinstance(other.make_graphed_step(its, 4), GraphedStep)


def test_plain_calls_take_what_is_known():
    images, labels = next(batches(1))
    model, _ = make()
    model(images)
    assert model.backend == "auto"
    entry = {"choice": "xformers, graph", "usual": "torch", "refused": {}}
    ms = {"torch": 3.0, "torch/xformers": 2.0, "xformers": 2.5, "xformers, graph": 1.0}
    choices.keep(model.route_key(measured.STEP, 4), entry | {"ms": ms})
    model(images)
    assert model.backend == "auto"  # it was settled by its first batch
    model, _ = make()
    F.cross_entropy(model(images), labels).backward()
    assert model.backend == "torch/xformers"  # the fastest without a graph
    told, _ = make(backend="torch/xformers")
    F.cross_entropy(told(images), labels).backward()
    assert_same([p.grad for p in model.parameters()], [p.grad for p in told.parameters()])
    model, _ = make()
    model.eval()(images)
    assert model.backend == "auto"  # of inference nothing is known
    choices.keep(model.route_key(measured.INFERENCE, 4), entry | {"choice": "xformers", "ms": {"xformers": 1.0}})
    model, _ = make()
    model.eval().loss(images, labels)
    assert model.backend == "xformers"
    named, _ = make(backend="torch")
    named(images)
    assert named.backend == "torch"


def test_a_known_route_that_does_not_run_any_more(caplog):
    model, _ = make()
    entry = {"choice": "gone", "usual": "torch", "ms": {"gone": 1.0}, "refused": {}}
    choices.keep(model.route_key(measured.STEP, 4), entry)
    model(next(batches(1))[0])
    assert model.backend == "auto"
    assert "the route that was measured does not run" in caplog.text


def test_what_a_choice_hangs_on():
    model, _ = make()
    keys = {model.route_key(measured.STEP, 4), model.route_key(measured.INFERENCE, 4)}
    keys |= {model.route_key(measured.STEP, 5), model.route_key(measured.STEP, 4, classes=5)}
    keys |= {model.route_key(measured.STEP, 4, from_features=True)}
    keys |= {make(dtype="bf16")[0].route_key(measured.STEP, 4), make(memory="lean")[0].route_key(measured.STEP, 4)}
    keys |= {make(method="coop")[0].route_key(measured.STEP, 4)}
    assert len(keys) == 8
    assert model.route_key(measured.STEP, 3) == model.route_key(measured.STEP, 4)
