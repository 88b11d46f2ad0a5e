"""The GPU suite's dry run: every part, on the CPU, so that it works on the day there is a GPU."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

SUITE = str(Path(__file__).parents[1] / "bench" / "gpu_suite.py")


def test_dry_run_writes_every_part(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", str(tmp_path / "out"), "--dry"])
    runpy.run_path(SUITE, run_name="__main__")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    errors = {(row["dtype"], row["provider"]): row for row in results["closeness"]}
    assert len(errors) == 6
    assert errors["float32", "fast"]["gradients"] < 1e-5
    for dtype in ("bfloat16", "float16"):
        assert 1e-4 < errors[dtype, "fast"]["gradients"] < 0.1
    assert {(row["dtype"], row["provider"]) for row in results["timing"]} == {
        (dtype, provider) for dtype in ("float32", "bfloat16") for provider in ("reference", "truncated", "fast")
    }
    assert all(row["median_ms"] > 0 for row in results["timing"])
    assert "addmm" in (tmp_path / "out" / "profile-float32-C5.txt").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run the whole suite")
def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(SUITE, run_name="__main__")
    assert "--dry" in capsys.readouterr().err
