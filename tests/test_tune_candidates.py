"""What candidates of upt-fast tune hold, and give back when they are out of the race; on a CLIP that is at hand."""

import gc
import weakref

import pytest
import torch

from upt_fast.clip.loading import clip_with_random_weights
from upt_fast.engine.tuning.candidates import Route
from upt_fast.engine.tuning.measuring import measure
from upt_fast.steps.measured import INFERENCE, STEP
from upt_fast.tools import tune_process

NAMES = ("zero", "one", "two")


def subject(*routes):
    torch.manual_seed(0)
    clip, tokenizer = clip_with_random_weights("tiny-digits")
    model = tune_process.make_model(clip, tokenizer, "upt", NAMES, "fp32", "fast")
    return tune_process._Subject(model, tune_process._small(clip, tokenizer, "upt", "fp32"), 2, STEP, routes)


def test_a_closed_candidate_gives_its_step_back_and_the_last_one_the_way():
    routes = Route("torch"), Route("torch", graph=True), Route("torch/torch")
    shared = subject(*routes)
    first, second, other = (tune_process._Candidate(shared, route._replace(graph=False)) for route in routes)
    for candidate in (first, second, other):
        candidate.prepare()
        candidate.run()
    step, packed = weakref.ref(first._step), weakref.ref(first._way.models[0][1])
    assert first._way is second._way is not other._way
    first.close()
    gc.collect()
    assert step() is None
    assert packed() is not None
    assert second.run() > 0
    other.run()
    second.close()
    gc.collect()
    assert packed() is None
    assert other.run() > 0


@pytest.mark.parametrize("mode", [STEP, INFERENCE])
def test_a_clip_at_hand_is_measured_on_the_backends_that_are_named(mode):
    torch.manual_seed(0)
    clip, tokenizer = clip_with_random_weights("tiny-digits")
    found = tune_process.measurement_of(
        clip, tokenizer, NAMES, "upt", 2, "fp32", "fast", mode, 60.0, ["torch", "torch/torch", "triton=x"]
    )
    entry = measure(found.candidates, found.usual, found.judge, found.budget, refused=found.refused)
    assert set(entry["ms"]) == {found.usual, "torch", "torch/torch"}
    assert entry["choice"] in entry["ms"]
    assert set(entry["refused"]) == {"triton=x"}
    assert all(details["error"] < 1e-4 for details in entry["details"].values())
