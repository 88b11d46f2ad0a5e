"""``upt-fast plan``."""

import json

import pytest

from upt_fast import FastPromptedCLIP
from upt_fast.cli import main
from upt_fast.clip.loading import load_clip
from upt_fast.data.benchmark import bench_classnames
from upt_fast.engine.workspace import heap_is_small
from upt_fast.steps.planning import Step
from upt_fast.tools.plan import collect, product_rate

TINY = ["--clip", "tiny-digits", "--classes", "40", "--batch-size", "16"]


def read(capsys, *arguments):
    assert main(["plan", *TINY, *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("method", ["upt", "cocoop", "kgcoop", "vpt_shallow", "zeroshot"])
def test_without_weights_it_says_what_the_model_says(method, memory, precision):
    found = collect("tiny-digits", method, 40, 16, precision, memory)
    model = FastPromptedCLIP.from_loaded(
        load_clip("tiny-digits"), bench_classnames(40), method=method, dtype=precision, memory=memory
    )
    assert found["bytes"]["peak_alive"] == model.train().predict_peak_memory(16)
    step = Step(model, 16)
    assert {name: found["bytes"][name] for name in step.rest()} == step.rest()
    assert found["flops"] == step.flops(memory, 16, 40)
    assert found["bytes"]["weights"] >= sum(b.nbytes for b in model.buffers())
    assert found["estimated_seconds"] == pytest.approx(found["flops"] / found["flops_per_second"], rel=1e-6)


def test_a_limit(capsys):
    free = read(capsys)
    assert free["plan"] is None
    assert free["at_once"] == {"images": 16, "classes": 40}
    limit = free["bytes"]["peak"] - 10**6
    found = read(capsys, "--max-memory", str(limit))
    assert found["bytes"]["peak"] <= found["plan"]["bytes"] <= limit
    assert found["at_once"] != free["at_once"] or found["memory"] != "fast"
    assert heap_is_small() or found["plan"]


def test_for_people(capsys):
    assert main(["plan", *TINY, "--max-memory", "1GB"]) == 0
    out = capsys.readouterr().out
    for words in ("plan below 1GB: 16 images and 40 classes at once", "weights", "text tower, kept for backward"):
        assert words in out
    for words in ("image tower, passing", "gradients and optimizer", "GFLOP", "an estimate", "allocator included"):
        assert words in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-memory", "1MB"], "max_memory=1 MB is too little for a step of 16 images and 40 classes"),
        (["--max-memory", "1XB"], "max_memory='1XB'; wanted a size"),
        (["--classes", "0"], "classes=0"),
        (["--precision", "fp64"], "precision='fp64'; wanted one of 'fp32', 'bf16'"),
        (["--memory", "slim"], "memory='slim'"),
        (["--method", "nothing"], "nothing"),
        (["--clip", "ViT-Z"], "ViT-Z"),
    ],
    ids=str,
)
def test_bad_options(arguments, message, capsys):
    assert main(["plan", *TINY, *arguments]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert message in errors[0]


def test_the_rate_is_measured():
    import torch

    assert product_rate(torch.float32) > 1e8
