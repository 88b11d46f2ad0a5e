"""The ways that are chosen by timing: what is kept, what is refused, what a run writes down and takes up again."""

import json
import logging
import os
import subprocess
import sys
import time

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from upt_fast.engine.autograd import functions
from upt_fast.engine.cpu import library
from upt_fast.engine.cpu import ways as cpu_ways
from upt_fast.engine.tuning import choices, table
from upt_fast.engine.tuning.machine import machine
from upt_fast.testing import build, random_clip

REASON = library.refusal(torch.float32)


@pytest.fixture(autouse=True)
def measured(monkeypatch, tmp_path):
    """A machine of which nothing is known yet, and on which ways are timed."""
    monkeypatch.setenv("UPT_FAST_MEASURE", "1")
    monkeypatch.setattr(table, "cache_folder", lambda: tmp_path / "cache")
    known = dict(choices._chosen)
    choices.forget()
    yield tmp_path / "cache"
    choices.forget()
    choices._chosen.update(known)


def way(seconds, calls=None, off=0.0, dtype=torch.float32):
    def run():
        if calls is not None:
            calls.append(seconds)
        time.sleep(seconds)
        return [torch.arange(6, dtype=dtype), torch.tensor([2.0 + off], dtype=dtype)]

    return run


def test_the_fastest_is_kept(measured):
    calls = []
    ways = {"slow": way(0.04, calls), "quick": way(0.001, calls), "middle": way(0.02, calls)}
    assert choices.choose("a", ways) == "quick"
    assert len(calls) < 3 * (choices.ROUNDS + 1)  # those behind sat out in later rounds
    calls.clear()
    assert choices.choose("a", ways) == "quick"
    choices.forget()  # as in another process
    assert choices.choose("a", ways) == "quick"
    assert calls == []
    entry = choices.kept()["a"]
    assert (entry["choice"], entry["usual"], set(entry["ms"])) == ("quick", "slow", set(ways))
    assert 1 <= entry["ms"]["quick"] < entry["ms"]["middle"]
    assert choices.choose("b", ways) == "quick"
    assert set(choices.kept()) == {"a", "b"}
    assert [path.name for path in measured.iterdir() if path.suffix == ".json"] == [table.path(machine()).name]


def test_the_usual_way_stays_where_another_gains_little(monkeypatch):
    monkeypatch.setattr(choices, "_time", lambda ways: {"usual": 1.0, "other": 0.98})
    assert choices.choose("a", {"usual": way(0), "other": way(0)}) == "usual"
    monkeypatch.setattr(choices, "_time", lambda ways: {"usual": 1.0, "other": 0.96})
    assert choices.choose("b", {"usual": way(0), "other": way(0)}) == "other"


@pytest.mark.parametrize(
    ("dtype", "off", "reason"), [(torch.float32, 1e-2, "off by 5"), (torch.bfloat16, 0.1, "off by")]
)
def test_other_results_are_refused(dtype, off, reason):
    ways = {"usual": way(0.03, dtype=dtype), "wrong": way(0, off=off, dtype=dtype), "nan": way(0, off=float("nan"))}
    if dtype == torch.bfloat16:
        del ways["nan"]
    assert choices.choose("a", ways) == "usual"
    entry = choices.kept()["a"]
    assert entry["refused"]["wrong"].startswith(reason)
    assert set(entry["refused"]) == set(ways) - {"usual"}
    assert set(entry["ms"]) == {"usual"}


def test_what_fails_is_refused():
    def fails():
        raise NotImplementedError("no such instruction\nmore")

    assert choices.choose("a", {"usual": way(0), "fails": fails}) == "usual"
    assert choices.kept()["a"]["refused"] == {"fails": "NotImplementedError: no such instruction"}


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"choices": 3}', '{"choices": {"a": 1}}', '{"choices": {"a": {"choice": "gone"}}}']
)
def test_a_damaged_file_is_measured_anew(measured, text):
    path = table.path(machine())
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert choices.choose("a", {"usual": way(0.03), "quick": way(0)}) == "quick"
    assert json.loads(path.read_text())["choices"]["a"]["choice"] == "quick"


def test_without_a_place_to_keep_it(measured):
    measured.write_text("a file")
    assert choices.choose("a", {"usual": way(0.03), "quick": way(0)}) == "quick"


def test_nothing_is_measured(monkeypatch, measured):
    monkeypatch.setenv("UPT_FAST_MEASURE", "0")
    calls = []
    assert choices.choose("a", {"usual": way(1, calls), "quick": way(0, calls)}) == "usual"
    assert calls == []
    assert not measured.exists()


def test_measuring_changes_nothing():
    """Random numbers, gradients, modes around the call."""
    seen = []

    def run():
        seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), type(torch.randn(2))))
        return [torch.zeros(1)]

    torch.manual_seed(3)
    with FakeTensorMode():
        choices.choose("a", {"usual": run, "other": run})
    after = torch.randn(3)
    torch.manual_seed(3)
    assert torch.equal(after, torch.randn(3))
    assert set(seen) == {(False, False, torch.Tensor)}
    assert torch.is_grad_enabled()


SCRIPT = """
import sys, time, torch
from upt_fast.engine.tuning import choices
def way(seconds):
    def run():
        time.sleep(seconds)
        return [torch.zeros(1)]
    return run
for i in range(4):
    print(choices.choose(f"key {i}", {"usual": way(0.03), "quick": way(0.001)}))
"""


def test_processes_that_measure_at_once(tmp_path):
    """Each ends with the same choices, and the file is whole."""
    environment = os.environ | {"UPT_FAST_CACHE": str(tmp_path), "UPT_FAST_MEASURE": "1"}
    started = [
        subprocess.Popen([sys.executable, "-c", SCRIPT], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    found = [process.communicate(timeout=120)[0].split() for process in started]
    assert found[0] == found[1]
    (path,) = tmp_path.glob("choices-*.json")
    assert set(json.loads(path.read_text())["choices"]) == {f"key {i}" for i in range(4)}


def test_the_machine(monkeypatch):
    """Another instruction set is another machine."""
    files = set()
    for isa in ("AVX2", "SSE41"):
        choices.forget()
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
        assert choices.machine()["ONEDNN_MAX_CPU_ISA"] == isa
        files.add(table.path(machine()))
    assert len(files) == 2


def test_records(caplog):
    ways = {"usual": way(0.03), "quick": way(0)}
    assert choices.choose("a", ways) == "quick"
    recorded = json.loads(json.dumps(choices.record()))
    choices.forget()
    choices.restore(recorded | {"choices": {"a": "usual"}})
    assert choices.choose("a", ways) == "usual"
    assert caplog.records == []
    recorded["machine"]["processor"] = "another"
    with caplog.at_level(logging.WARNING):
        choices.restore(recorded)
    assert "processor: 'another' there" in caplog.text
    for damaged in ({}, {"machine": {}, "choices": []}, {"machine": None, "choices": {}}):
        with pytest.raises(ValueError, match="damaged"):
            choices.restore(damaged)


def test_a_recorded_way_that_is_gone_is_chosen_anew():
    choices.restore({"machine": choices.machine(), "choices": {"a": "gone"}})
    assert choices.choose("a", {"usual": way(0), "slow": way(0.03)}) == "usual"


def test_float32_product(monkeypatch):
    """The choice rules the products, whatever made it."""
    x, w = torch.randn(5, 8), torch.randn(3, 8)
    for name in ("mm", "onednn"):
        monkeypatch.setattr(cpu_ways, "float32_product", lambda name=name: name)
        assert functions.takes_onednn(x) == (name == "onednn")
        torch.testing.assert_close(functions.product(x, w), x @ w.t())


@pytest.mark.skipif(bool(REASON), reason=f"CPU operations: {REASON}")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_tower_takes_what_was_recorded(dtype, monkeypatch):
    """Every way gives the features of the others; the same way again gives the same bits."""
    if dtype == "bf16" and library.refusal(torch.bfloat16):
        pytest.skip(library.refusal(torch.bfloat16))
    monkeypatch.setattr(library, "MIN_WIDTH", 64)
    clip, images = random_clip(vision_width=128, text_width=128), torch.randn(2, 3, 32, 32)

    def features():
        torch.manual_seed(0)
        model = build("fast", clip, ["cat", "traffic light"], "upt", dtype=dtype)
        *layers, last = (model.vision_tower.blocks.layer(i) for i in range(3))
        packed = [w for b in layers for w in (b.qkv, b.out, b.mlp.fc, b.mlp.proj)] + [last.qkv.kv, last.out]
        panels = {factor.panel for w in packed for factor in (w.forward, w.backward)}
        return panels, layers[0].attention.fill, model.encode_image(images), model.encode_text()

    chosen = features()
    recorded = choices.record()
    keys = [key for key in recorded["choices"] if not key.startswith("product")]
    assert len([key for key in keys if "linear" in key]) >= 8
    found = []
    for panel in library.PANELS:
        name = cpu_ways._name(panel)
        ways = {key: "filled" if key.startswith("attention") else name for key in keys}
        choices.forget()
        choices.restore(recorded | {"choices": recorded["choices"] | ways})
        found.append(features())
        assert found[-1][:2] == ({panel}, dtype == "bf16")
    choices.forget()
    choices.restore(recorded)
    again = features()
    assert again[:2] == chosen[:2]
    assert all(torch.equal(a, b) for a, b in zip(again[2:], chosen[2:], strict=True))
    for other in found:
        for a, b in zip(other[2:], chosen[2:], strict=True):
            torch.testing.assert_close(
                a, b, **({"rtol": 1e-5, "atol": 1e-5} if dtype == "fp32" else {"rtol": 0, "atol": 2e-2})
            )
