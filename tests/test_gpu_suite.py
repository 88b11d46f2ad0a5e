"""The GPU suite's dry run, every part of it on the CPU, so that it works on the day there is a GPU."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from upt_fast.common.closeness import relative_rms
from upt_fast.engine.backends import dispatch
from upt_fast.engine.tuning import table
from upt_fast.engine.tuning.measuring import measure

ROOT = Path(__file__).parents[1]
SUITE = str(ROOT / "bench" / "gpu_suite.py")
PARTS = ("environment", "closeness", "tests", "steps", "tune", "ops", "profile", "memory", "sanitizer")
ON_A_GPU = ("flash", "efficient", "cudnn", "varlen", "flash_attn")
KERNELS = {path.stem for path in ROOT.glob("kernels/[!_]*.py")} - {"report"}


def run_suite(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, SUITE, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)


def rows(folder: Path, part: str) -> dict[str, dict]:
    return json.loads((folder / f"{part}.json").read_text())["measurements"]


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """Folder, exit code and output of one dry run of everything, which pytest-xdist's workers share."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, result = base / "gpu-suite", base / "gpu-suite.json"
    with (base / "gpu-suite.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            process = run_suite(folder, "--dry")
            result.write_text(json.dumps([process.returncode, process.stdout + process.stderr]))
    return folder, *json.loads(result.read_text())


@pytest.fixture
def suite(monkeypatch):
    """The suite's modules, importable."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return lambda name: __import__(f"gpu.{name}", fromlist=[name])


@pytest.mark.slow
def test_dry_run_makes_every_measurement(dry_run):
    folder, code, output = dry_run
    assert code == 0, output
    for part in PARTS:
        stored = json.loads((folder / f"{part}.json").read_text())
        assert stored["left"] == []
        assert {row["environment"] for row in stored["measurements"].values()} == set(stored["environments"])
        for key, row in stored["measurements"].items():
            assert row["status"] in ("ok", "skipped"), (key, row)
            # what cannot run here: bfloat16 in Triton's interpreter, what is not installed, a GPU's own attention
            here = row.get("provider") not in ON_A_GPU
            reasons = ("bfloat16", "not installed") if here else ("runs on cuda", "not installed")
            assert row["status"] == "ok" or any(reason in row["message"] for reason in reasons), row
    (described,) = stored["environments"].values()
    assert described["dry"] is True
    assert described["packages"]["torch"] == torch.__version__.split("+")[0]


@pytest.mark.slow
def test_closeness(dry_run):
    found = rows(dry_run[0], "closeness")
    providers = {"reference", "truncated", "fast torch", "fast triton", "fast xformers", "fast triton,xformers"}
    assert {(r["precision"], r["provider"]) for r in found.values()} == {
        (precision, provider) for precision in ("fp32", "tf32", "bf16", "fp16") for provider in providers
    }
    bounds = {"fp32": (1e-8, 1e-5), "tf32": (1e-8, 1e-5), "fp16": (1e-4, 3e-2), "bf16": (1e-3, 2e-1)}
    for row in found.values():
        if row["status"] == "ok":
            least, most = bounds[row["precision"]]
            assert all(least < error < most for error in row["errors"].values()), row
            assert max(row["ratios"].values()) <= row["allowed"]
    assert found["tiny fp32 fast triton"]["errors"] != found["tiny fp32 fast torch"]["errors"]


@pytest.mark.slow
def test_steps_ops_profile_memory(dry_run):
    folder = dry_run[0]
    for key, row in rows(folder, "steps").items():
        if row["status"] == "ok":
            assert row["error"] < 1e-4, key
            assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
            assert row["peak_mib"] > 0
            assert row["images_per_s"] == pytest.approx(2e3 / row["p50_ms"], rel=1e-3)
    assert len(rows(folder, "steps")) == 7
    assert rows(folder, "steps")["tiny fp32 C=5 B=2 truncated"]["of_gemm_peak"] > 0

    found = {(row["op"], row["provider"]): row for row in rows(folder, "ops").values()}
    for op, kernel in (("layer_norm", "triton"), ("contrastive_loss", "triton"), ("stream_attention", "xformers")):
        providers = {provider for name, provider in found if name == op}
        assert providers == {"compiled", *dispatch.OPS[op]}
        assert providers >= {"torch", kernel}
    for row in found.values():
        if row["status"] == "ok":
            assert row["error"] <= 1
            assert max(row["errors"]) < 1e-5
            assert row["p50_ms"] > 0

    (profiled,) = rows(folder, "profile").values()
    assert set(profiled["ms_by_kind"]) >= {"attention", "product"}
    assert sum(kernel["share"] for kernel in profiled["top"]) <= 1.001
    sizes = [row["largest_batch"] for row in rows(folder, "memory").values()]
    assert sizes[0] in range(2, 16)
    assert sizes[0] < sizes[-1]


@pytest.mark.slow
def test_tuner(dry_run):
    """Every candidate is measured or refused; the choice is timed apart, and goes into a table to be taken over."""
    folder = dry_run[0]
    (row,) = rows(folder, "tune").values()
    entry = row["entry"]
    assert set(entry["ms"]) | set(entry["refused"]) == {"torch", "triton", "torch/triton"}
    assert {"torch", row["choice"]} <= set(entry["ms"])
    assert 2 <= len(row["apart_ms"]) <= 3
    assert row["error"] < 1e-4
    for name, details in entry["details"].items():
        if name in entry["ms"]:
            assert details["error"] < 1e-4
            assert "peak_mib" in details
    entries = table.load(folder / "choices.json", row["machine"])
    assert entries == {row["route_key"]: entry | {"at": [5, 2]}}
    assert row["route_key"].startswith("step of upt; images 2 x 64 / 2, 5 rows; texts 2 x 64 / 2, quick_gelu;")
    details, page = ((folder / name).read_text() for name in ("details.md", "report.md"))
    assert "### tiny fp32 C=5 B=2 step\n" in details
    assert f"| {row['choice']} | " in details
    assert f"- tiny fp32 C=5 B=2 step: {row['choice']}: " in page


@pytest.mark.slow
def test_kernels_are_tested_and_exercised(dry_run):
    folder = dry_run[0]
    (tested,) = rows(folder, "tests").values()
    files = [path for path in ROOT.glob("tests/kernels/test_*.py") if path.name != "test_report.py"]
    assert tested["passed"] + tested["skipped"] == len(files)
    assert tested["failed"] == 0
    exercised = rows(folder, "sanitizer")
    assert {key.split()[0] for key in exercised} == KERNELS
    assert {op for row in exercised.values() for op in row["ops"]} == {
        "layer_norm",
        "add_layer_norm",
        "activation",
        "prompt_insert",
        "insert_shared",
        "prompt_transform",
        "contrastive_loss",
        "linear_gelu",
        "prefix_attention",
        "packed_attention",
    }


@pytest.mark.slow
def test_report_shows_every_part(dry_run):
    details, report = ((dry_run[0] / name).read_text() for name in ("details.md", "report.md"))
    for part in PARTS:
        assert f"\n## {part}\n" in details
    assert "### tiny fp32, 5 classes, batch 2" in details
    assert "WRONG" not in details
    assert all("dry run" in text for text in (details, report))
    assert "## Wrong\n\n- nothing\n" in report
    assert "| step, C=100, against reference | 4x |  | not measured |" in report  # of a tiny model


@pytest.mark.slow
def test_resumes(dry_run, tmp_path):
    """What is there is kept; what is missing, of another environment or broken off is measured; --only chooses."""
    folder = tmp_path / "out"
    shutil.copytree(dry_run[0], folder)
    path = folder / "ops.json"
    before = {part: (folder / f"{part}.json").read_text() for part in PARTS}
    stored = json.loads(before["ops"])
    kept, other, running, gone, twice = list(stored["measurements"])[:5]
    for key, row in stored["measurements"].items():
        row["mark"] = key
    stored["measurements"][other]["environment"] = "another"
    stored["environments"]["another"] = {}
    stored["measurements"][running] |= {"status": "running"}
    stored["measurements"][twice] |= {"status": "killed", "attempts": 2}
    del stored["measurements"][gone]
    path.write_text(json.dumps(stored))

    process = run_suite(folder, "--dry", "--only", "ops")
    assert process.returncode == 0, process.stdout + process.stderr
    now = json.loads(path.read_text())
    assert now["current"] == stored["current"], "the sources changed while the test ran"
    assert process.stdout.count("ops: ") == 3
    found = rows(folder, "ops")
    assert {key for key, row in found.items() if "mark" not in row} == {other, running, gone}
    assert found[kept]["mark"] == kept
    assert found[running]["attempts"] == 2
    assert found[running]["status"] == found[gone]["status"] == "ok"
    assert found[twice]["status"] == "killed"
    assert json.loads(path.read_text())["left"] == []
    for part in set(PARTS) - {"ops"}:
        assert (folder / f"{part}.json").read_text() == before[part]


def test_no_time_leaves_all(tmp_path):
    process = run_suite(tmp_path, "--dry", "--only", "closeness", "--minutes", "0")
    assert process.returncode == 0, process.stdout + process.stderr
    stored = json.loads((tmp_path / "closeness.json").read_text())
    assert len(stored["left"]) == 24
    assert stored["measurements"] == {}
    assert "24 measurements left" in process.stdout
    assert all("24 left to measure" in (tmp_path / name).read_text() for name in ("details.md", "report.md"))
    assert [path.name for path in tmp_path.glob("*.json")] == ["closeness.json"]


def test_unknown_part(tmp_path):
    process = run_suite(tmp_path, "--dry", "--only", "steps", "speed")
    assert process.returncode == 2
    assert "'speed'" in process.stderr
    assert all(part in process.stderr for part in PARTS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run the whole suite")
def test_without_a_gpu_it_says_so(tmp_path):
    process = run_suite(tmp_path / "out")
    assert process.returncode == 2
    assert "--dry" in process.stderr
    assert not (tmp_path / "out").exists()


def tasks_of(record, **functions):
    return [record.Task(name, function) for name, function in functions.items()]


def test_failures_are_recorded_and_stop_nothing(suite, tmp_path, capsys):
    record = suite("record")

    def breaks():
        raise RuntimeError("out of memory\nlong story")

    def refuses():
        raise record.Skipped("no such device")

    def wrong():
        return {"status": "failed", "error": 2.0, "message": "twice too much"}

    tasks = tasks_of(record, breaks=breaks, refuses=refuses, right=lambda: {"p50_ms": 1.5}, wrong=wrong)
    file = record.PartFile(tmp_path, "steps")
    assert record.run_part(file, tasks, ("here", {"device": "x"}), 1.0, lambda: True)
    found = record.PartFile(tmp_path, "steps")
    assert {key: row["status"] for key, row in found.rows.items()} == {
        "breaks": "error",
        "refuses": "skipped",
        "right": "ok",
        "wrong": "failed",
    }
    assert found.rows["breaks"]["message"] == "RuntimeError: out of memory"
    assert "long story" in found.rows["breaks"]["traceback"]
    assert not found.passed("here")
    assert found.passed("there")
    del found.rows["wrong"]
    assert found.passed("here")  # an error is a failed check only in the parts that check
    found.part = "closeness"
    assert not found.passed("here")
    assert "steps: right: ok, p50_ms 1.5" in capsys.readouterr().out


def test_a_lost_device_asks_for_a_new_process(suite, tmp_path):
    record = suite("record")
    calls = []

    def breaks():
        calls.append("breaks")
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    tasks = tasks_of(record, breaks=breaks, after=lambda: calls.append("after") or {})
    for sound in (False, True):
        file = record.PartFile(tmp_path, "steps")
        assert record.run_part(file, tasks, ("here", {}), 1.0, lambda: False) is sound
    assert calls == ["breaks", "after"]


def test_killed_measurements_are_tried_twice(suite, tmp_path):
    record = suite("record")

    def dies():
        raise SystemExit

    for attempt in (1, 2):
        file = record.PartFile(tmp_path, "steps")
        with pytest.raises(SystemExit):
            record.run_part(file, tasks_of(record, dies=dies), ("here", {}), 1.0, lambda: True)
        file = record.PartFile(tmp_path, "steps")
        file.bury("its process ended with -11")
        row = record.PartFile(tmp_path, "steps").rows["dies"]
        assert (row["status"], row["attempts"], row["message"]) == ("killed", attempt, "its process ended with -11")
    record.run_part(file, tasks_of(record, dies=dies), ("here", {}), 1.0, lambda: True)  # no third time


def test_supervisor_starts_another_process(suite, tmp_path, monkeypatch):
    """After a crash; not for ever, and not beyond the part's time."""
    suite("processes")
    import gpu_suite
    from gpu import worker

    codes, buried = [], []

    def run(command, seconds, env):
        commands.append(command)
        assert not {"TRITON_INTERPRET", "UPT_FAST_MEASURE"} & set(env)
        assert env["UPT_FAST_CACHE"] == str(tmp_path / "cache")
        return codes.pop(0), ""

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(gpu_suite.processes, "run", run)
    monkeypatch.setattr(worker, "bury", lambda folder, part, reason: buried.append(reason))
    for codes, code, starts in (([0], 0, 1), ([-11, 75, 1], 1, 3), ([2], 2, 1), ([None], 1, 1), ([-9] * 8, 1, 8)):
        commands = []
        codes = list(codes)
        args = gpu_suite.parser().parse_args([str(tmp_path)])
        assert gpu_suite.supervise(args, ["ops"]) == code
        assert len(commands) == starts
    assert buried == ["killed at the end of the part's time", "its process ended with -9"]
    assert commands[1][-2:] == ["--died", "its process ended with -9"]


def test_a_measurement_that_needs_more_than_is_left_waits(suite, tmp_path):
    record, file = suite("record"), suite("record").PartFile(tmp_path, "tune")
    made = []
    tasks = [
        record.Task(name, lambda n=name: {"n": made.append(n)}, needs=needs) for name, needs in (("a", 50), ("b", 70))
    ]
    assert record.run_part(file, tasks, ("here", {}), 1.0, lambda: True)
    assert (made, file.left) == (["a"], ["b"])
    assert record.run_part(file, tasks, ("here", {}), 2.0, lambda: True)
    assert (made, file.left) == (["a", "b"], [])


def test_processes_end_with_what_they_started(suite, tmp_path):
    run = suite("processes").run
    script = f"sleep 60 & echo $! > {tmp_path}/pid; wait"
    assert run(["sh", "-c", script], 1.0, os.environ, capture=True) == (None, "")
    pid = int((tmp_path / "pid").read_text())
    status, end = Path(f"/proc/{pid}/stat"), time.monotonic() + 10
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # gone, or a killed one that nobody waits for
        while status.read_text().split()[2] != "Z" and time.monotonic() < end:
            time.sleep(0.05)
        assert status.read_text().split()[2] == "Z"
    assert run(["sh", "-c", "echo found; echo wrong >&2; exit 3"], 9.0, os.environ, capture=True) == (
        3,
        "found\nwrong\n",
    )


SANITIZER = """#!/bin/sh
echo "========= COMPUTE-SANITIZER"
echo "$PYTORCH_NO_CUDA_MEMORY_CACHING $*"
echo "========= {summary}"
exit {code}
"""


@pytest.mark.parametrize(
    ("summary", "code", "status"),
    [
        ("ERROR SUMMARY: 0 errors", 0, None),
        ("RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, None),
        ("RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)", 0, None),
        ("ERROR SUMMARY: 12 errors", 86, "failed"),
        ("RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warnings)", 0, "failed"),
        ("ERROR SUMMARY: 0 errors", 1, "failed"),
        ("Error: Device not supported.", 255, "error"),
    ],
)
def test_sanitizer(suite, tmp_path, summary, code, status):
    binary = tmp_path / "compute-sanitizer"
    binary.write_text(SANITIZER.format(summary=summary, code=code))
    binary.chmod(0o755)
    row = suite("outside").sanitize("activation", "memcheck", str(binary))
    assert row.get("status") == status, row
    if status == "failed":
        assert "1 --tool memcheck --error-exitcode 86" in row["output"]
        assert row["output"].split("\n")[1].endswith("gpu_suite.py --exercise activation")
        assert row["reports"][-1] == f"========= {summary}"
    with pytest.raises(suite("record").Skipped, match="not installed"):
        suite("outside").sanitize("activation", "memcheck", None)


def test_exercise_finds_a_wrong_kernel(suite, monkeypatch):
    outside, machine = suite("outside"), suite("machine").Machine(dry=True)
    assert "status" not in outside.exercise("layer_norm", machine)
    assert outside.exercise("unknown", machine)["status"] == "failed"
    from upt_fast.kernels import layer_norm as kernel

    right = kernel.layer_norm
    monkeypatch.setattr(kernel, "layer_norm", lambda x, eps: right(x, eps) * 1.001)
    row = outside.exercise("layer_norm", machine)
    assert row["status"] == "failed"
    assert all(wrong.startswith("layer_norm ") for wrong in row["wrong"])


def test_junit(suite):
    report = """<testsuites><testsuite><testcase classname="a" name="right"/>
    <testcase classname="a" name="wrong"><failure message="differs"/></testcase>
    <testcase classname="b" name="broken"><error message="no module"/></testcase>
    <testcase classname="b" name="left"><skipped message="needs a GPU"/></testcase></testsuite></testsuites>"""
    row = suite("outside").read_junit(report)
    assert (row["passed"], row["failed"], row["skipped"], row["status"]) == (1, 2, 1, "failed")
    assert row["failures"] == {"a::wrong": "differs", "b::broken": "no module"}
    assert row["skip_reasons"] == ["needs a GPU"]


def test_profile_summary(suite):
    """Two streams that overlap, a gap of 3 us between two kernels, two steps."""
    summarise = suite("profile").summarise

    def event(name, start, duration):
        return {"name": name, "ts": start, "dur": duration}

    events = [event("nvjet_hsh", 100, 10), event("flash_fwd", 105, 15), event("nvjet_hsh", 123, 7)]
    row = summarise(events[::-1], steps=2)
    assert row["span_ms"] == pytest.approx(0.015)
    assert row["busy_ms"] == pytest.approx(0.0135)
    assert row["idle_share"] == pytest.approx(0.1)
    assert (row["gaps"], row["longest_gap_us"], row["launches"]) == (0, 3.0, 2)
    assert row["ms_by_kind"] == {"product": 0.0085, "attention": 0.0075}
    assert [kernel["name"] for kernel in row["top"]] == ["nvjet_hsh", "flash_fwd"]
    assert row["top"][0]["share"] == pytest.approx(17 / 32, rel=1e-3)
    with pytest.raises(ValueError, match="no kernel"):
        summarise([], 1)


def test_a_choice_that_is_behind_fails(suite):
    tune = suite("tune")
    assert tune.verdict("a", {"a": 10.0, "b": 12.0}) == {"p50_ms": 10.0, "behind": 0.0}
    assert "status" not in tune.verdict("a", {"a": 10.2, "b": 10.0})
    row = tune.verdict("a", {"a": 10.5, "b": 10.0, "c": 11.0})
    assert (row["status"], row["behind"], row["message"]) == ("failed", 0.05, "a takes 5.0 % more than b")


def test_what_is_timed_apart(suite):
    apart, ms = suite("tune").apart, {"u": 4.0, "a": 1.0, "b": 2.0, "c": 3.0}
    assert apart({"choice": "a", "usual": "u", "ms": ms}) == ["a", "u", "b"]
    assert apart({"choice": "a", "usual": "b", "ms": ms}) == ["a", "b"]
    assert apart({"choice": "b", "usual": "b", "ms": ms}) == ["b", "a"]  # the usual one, where another is little faster
    assert apart({"choice": "a", "usual": "broken", "ms": {"a": 1.0}}) == ["a"]


@pytest.mark.parametrize("mode", ["step", "inference"])
def test_a_wrong_choice_is_found(suite, monkeypatch, mode):
    """What the tuner says is held against models of our own: their times, and their logits."""
    tune, models = suite("tune"), suite("models")
    entry = {"choice": "torch/torch", "usual": "torch", "ms": {"torch/torch": 1.0, "torch": 2.0}, "refused": {}}
    asked = []
    monkeypatch.setattr(tune, "measure_isolated", lambda *arguments: asked.append(arguments) or entry)
    machine = suite("machine").Machine(dry=True)
    tuning = tune.Tuning(models.Clips(machine, open_clip=False))
    row = tuning.measure("tiny", "fp32", 5, 2, mode)
    assert asked[0][0] == "gpu.tune:measurement"
    assert asked[0][1].items() >= {"classes": 5, "batch": 2, "mode": mode, "open_clip": False}.items()
    assert (row["status"], set(row["apart_ms"])) == ("ok", {"torch", "torch/torch"})
    assert row["route_key"].startswith(f"{mode} of upt;")
    build = tuning.clips.build

    def wrong(provider, *rest):
        model = build(provider, *rest)
        if "/" in provider:
            with torch.no_grad():
                model.prompt_learner.uni_ctx.mul_(3)
        return model

    monkeypatch.setattr(tuning.clips, "build", wrong)
    row = tuning.measure("tiny", "fp32", 5, 2, mode)
    assert row["status"] == "failed"
    assert row["message"].startswith("torch/torch: its logits differ")


def test_the_tuner_takes_the_suites_clip(suite, monkeypatch):
    """Where open_clip is missing: in other processes the same factory makes what is measured."""
    tune = suite("tune")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    clip = {"geometry": "tiny", "precision": "fp32", "classes": 5, "batch": 2, "seed": 0, "open_clip": False}
    found = tune.measurement(**clip, mode="inference", budget=20.0, dry=True, refused={})
    assert set(found.candidates) == {found.usual, *tune.DRY_BACKENDS}
    refused = {"triton": "slow", "torch/triton": "slow"}
    entry = measure(found.candidates, found.usual, found.judge, found.budget, refused=refused)
    assert set(entry["ms"]) == {found.usual, "torch"}
    assert entry["refused"] == refused


def test_a_choice_that_failed_is_in_no_table(suite, tmp_path):
    tune, record = suite("tune"), suite("record")
    entry = {"choice": "a", "usual": "a", "ms": {"a": 1.0}, "refused": {}}
    row = {"entry": entry, "classes": 100, "batch": 32, "machine": {"gpu": "card"}}
    stored(tmp_path, "tune", 1.0, a=row | {"route_key": "k"}, slow=row | {"route_key": "s", "status": "failed"})
    tune.write_choices(tmp_path, record.PartFile(tmp_path, "tune"), "e")
    assert table.load(tmp_path / "choices.json", {"gpu": "card"}) == {"k": entry | {"at": [100, 32]}}


@pytest.mark.parametrize(
    ("backend", "refused"),
    [
        ("torch/torch", None),
        ("torch,layer_norm=torch/torch", None),
        ("torch/flash_attn", "flash_attn"),
        ("flash_attn/torch", "flash_attn"),
        ("torch,attention=flash_attn", "flash_attn"),
    ],
)
def test_all_backends_of_a_text_have_to_run(suite, monkeypatch, backend, refused):
    models, record = suite("models"), suite("record")
    machine = suite("machine").Machine(dry=True)
    if refused is None:
        models.require(backend, machine, torch.float32)
        return
    with pytest.raises(record.Skipped, match=f"^{refused}: "):
        models.require(backend, machine, torch.float32)


@pytest.mark.parametrize("answer", [0, 8, 64, 1000, 4096, 8192])
@pytest.mark.parametrize("guess", [8, 72, 1000, 8192])
def test_largest_batch(suite, answer, guess):
    tried = []

    def fits(batch):
        tried.append(batch)
        assert batch % 8 == 0
        assert 8 <= batch <= 8192
        return batch <= answer

    found = suite("memory").largest(fits, guess, 8, 8192)
    assert answer - max(8, answer // 50) <= found <= answer
    assert len(tried) == len(set(tried))
    if guess == answer:
        assert len(tried) <= 8


def test_built_in_clip_is_open_clips(suite):
    """Where open_clip is missing the suite's own CLIP takes its place: same names, same results."""
    from upt_fast import ReferenceUPT
    from upt_fast.testing import random_clip

    models = suite("models")
    geometry = models.GEOMETRIES["tiny"]
    theirs, ours = random_clip(**geometry), models.random_plain_clip(**geometry)
    ours.load_state_dict(theirs.state_dict())
    images, found = torch.randn(2, 3, 32, 32), []
    for clip in (theirs, ours):
        torch.manual_seed(0)
        model = ReferenceUPT(clip, ["cat", "sea lion"], tokenizer=models.WordTokenizer())
        found.append((models.step(model, images, torch.arange(2)), models.gradients(model)))
    for ours_found, wanted in zip(*found, strict=True):
        assert relative_rms(ours_found, wanted) < 1e-6


def test_without_open_clip(suite, monkeypatch):
    machine, models = suite("machine").Machine(dry=True), suite("models")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    clips = models.Clips(machine)
    assert not clips.open_clip
    wanted = None
    for provider in ("truncated", "reference", "fast torch"):
        model = clips.build(provider, "tiny", torch.float32, 7)
        logits = models.step(model, clips.images("tiny", 2, torch.float32), torch.arange(2))
        found = logits, models.gradients(model)
        wanted = wanted or found
        assert all(relative_rms(*pair) < 1e-5 for pair in zip(found, wanted, strict=True))


def test_built_in_names_are_as_long(suite):
    """The number of tokens of every name is as in the names that the benchmarks use with open_clip."""
    from collections import Counter

    from upt_fast.clip.tokens import clip_tokenizer
    from upt_fast.data.benchmark import bench_classnames

    models = suite("models")
    for classes, lengths in models.NAME_LENGTHS.items():
        names = models.plain_classnames(classes), [name.replace("_", " ") for name in bench_classnames(classes)]
        for texts, tokenizer in zip(names, (models.WordTokenizer(), clip_tokenizer()), strict=True):
            assert Counter((tokenizer(list(texts)).argmax(1) - 1).tolist()) == lengths
    assert len(set(models.plain_classnames(20))) == 20


def test_configurations_start_with_the_most_telling(suite):
    """The real lists, which only a GPU can run: made, and in order."""
    machine, models = suite("machine").Machine(dry=False), suite("models")
    clips = models.Clips(machine)
    keys = [task.key for task in suite("steps").tasks(machine, clips)]
    assert len(keys) == len(set(keys)) == 2 * 3 * 3 * 3 * 7
    assert keys[0] == "ViT-B/16 bf16 C=100 B=32 truncated"
    assert keys[7] == "ViT-B/16 bf16 C=1000 B=32 truncated"
    tuned = [task.key for task in suite("tune").tasks(machine, clips)]
    assert tuned[:2] == ["ViT-B/16 bf16 C=100 B=32 step", "ViT-B/16 bf16 C=1000 B=32 step"]
    for part in ("closeness", "tune", "ops", "profile", "memory"):
        keys = [task.key for task in suite(part).tasks(machine, clips)]
        assert len(keys) == len(set(keys))
    dtypes = [task.info["dtype"] for task in suite("ops").tasks(machine, clips)]
    assert set(dtypes) == {"bfloat16", "float32"}
    kernels = [task.key for task in suite("outside").sanitizer_tasks(machine, clips)]
    assert set(kernels) == {f"{kernel} {tool}" for kernel in KERNELS for tool in ("memcheck", "racecheck")}


def stored(folder: Path, part: str, seconds: float, left: int = 0, **rows: dict) -> None:
    """A part's file, with a measurement that took so long."""
    every = {"a": {"status": "ok", "environment": "e", "version": "", "seconds": seconds}}
    every |= {key: {"environment": "e", "version": "", "status": "ok", **row} for key, row in rows.items()}
    content = {"current": "e", "environments": {"e": {}}, "measurements": every, "left": ["b"] * left}
    (folder / f"{part}.json").write_text(json.dumps(content))


def test_plan_shares_out_the_time(suite, tmp_path):
    plan = suite("plan")
    assert plan.PARTS == PARTS
    turns = plan.turns(tmp_path, PARTS, 28.0)
    assert [part for part, _ in turns] == [*PARTS, *PARTS]
    assert sum(minutes for _, minutes in turns[: len(PARTS)]) == pytest.approx(28.0)
    # each part's time of earlier calls is taken from its share, and from what there is for a second turn
    stored(tmp_path, "closeness", 60 * plan.planned("closeness", 28.0), left=3)
    stored(tmp_path, "steps", 120.0)
    turns = plan.turns(tmp_path, PARTS, 28.0)
    first = dict(turns[: len(PARTS) - 1])
    assert "closeness" not in first
    assert first["steps"] == pytest.approx(plan.planned("steps", 28.0) - 2)
    assert dict(turns)["closeness"] == pytest.approx(28.0 - plan.planned("closeness", 28.0) - 2)
    assert plan.todo(tmp_path, "closeness")
    assert plan.todo(tmp_path, "ops")
    assert not plan.todo(tmp_path, "steps")
    # of one part alone the time is all its own
    assert plan.turns(tmp_path, ["ops"], 10.0) == [("ops", 10.0), ("ops", 10.0)]
    stored(tmp_path, "ops", 600.0, left=1)
    assert plan.turns(tmp_path, ["ops"], 10.0) == []


def test_calls_end_in_time_and_go_on(suite, tmp_path, monkeypatch):
    """Three calls of ten minutes by a clock that measurements turn; a part that is done has no second turn."""
    suite("plan")
    import gpu_suite

    now, needs, done = [0.0], {"environment": 0.5, "closeness": 9.0, "steps": 20.0, "ops": 3.0}, {}

    def supervise(args, parts):
        (part,) = parts
        minutes = min(args.minutes, needs.get(part, 0.1) - done.get(part, 0.0))
        done[part] = done.get(part, 0.0) + minutes
        now[0] += 60 * minutes
        stored(tmp_path, part, 60 * done[part], left=int(done[part] < needs.get(part, 0.1) - 1e-9))
        order.append(part)
        return 0

    monkeypatch.setattr(gpu_suite, "supervise", supervise)
    monkeypatch.setattr(gpu_suite.time, "monotonic", lambda: now[0])
    args, used = gpu_suite.parser().parse_args([str(tmp_path)]), []
    for _ in range(4):
        order, begin = [], now[0]
        gpu_suite.take_turns(args, PARTS)
        used.append((now[0] - begin) / 60)
        assert used[-1] <= args.call_minutes + 1e-6
        assert order == sorted(order, key=PARTS.index) or len(used) > 1
    assert sum(used) == pytest.approx(28.0, abs=0.35)
    assert set(done) == set(PARTS)
    assert done["steps"] > done["closeness"] > done["ops"] == 3.0


def step_row(provider: str, classes: int = 100, **row: float) -> dict:
    return {"model": "ViT-B/16", "precision": "bf16", "batch": 32, "classes": classes, "provider": provider, **row}


def test_the_page(suite, tmp_path):
    """Targets met and missed, and what the figures point to."""
    record, summary = suite("record"), suite("summary")
    rows = {
        "reference": step_row("reference", p50_ms=100.0, text_ms=50.0),
        "truncated": step_row("truncated", p50_ms=30.0, text_ms=9.0),
        "compiled": step_row("compiled", p50_ms=18.0),
        "torch": step_row("fast torch", p50_ms=24.0, graph_ms=20.0, text_ms=4.0, graph="one stream"),
        "triton": step_row("fast triton", p50_ms=20.0, graph_ms=10.0, graph="two streams", tflop=1.0, of_gemm_peak=0.5),
        "wrong": step_row("fast xformers", p50_ms=1.0) | {"status": "failed", "message": "differs"},
        "large": step_row("fast torch", 1000, p50_ms=9.0, peak_mib=5000.0),
    }
    stored(tmp_path, "steps", 1.0, 2, **rows)
    op = {"op": "layer_norm", "shape": "(8, 8)", "dtype": "bfloat16"}
    ops = {p: {**op, "provider": p, "p50_ms": ms} for p, ms in (("torch", 2.0), ("compiled", 1.5), ("triton", 1.0))}
    stored(tmp_path, "ops", 1.0, 0, **ops)
    size = {"model": "ViT-B/16", "precision": "bf16", "classes": 100, "batch": 32, "mode": "step"}
    tuned = {"entry": {"usual": "torch, graph"}, "choice": "triton, graph"}
    tuned["apart_ms"] = {"triton, graph": 10.0, "torch, graph": 20.0}
    stored(tmp_path, "tune", 1.0, 0, a=size | tuned)
    page = summary.markdown([record.PartFile(tmp_path, part) for part in PARTS], "e")
    for line in (
        "| step, C=100, against reference | 4x | 10x | met |",
        "| step, C=100, against truncated with torch.compile | 1.3x | 1.8x | met |",
        "| text tower, C=100, against reference | 20x | 12.5x | **not met** |",
        "| peak memory of a step, C=1000 | at most 4096 MiB | 5000 MiB | **not met** |",
        "| share of the best plain product, any batch | 60 % | 50 % | **not met** |",
        "| step, C=1000, against truncated | 3x |  | not measured |",
        "- steps: wrong: failed: differs",
        "- C=100: triton is the fastest backend: its ops are candidates for the default",
        "- C=100: bound by launches: as a CUDA graph 2.00 times as fast (two streams)",
        "- C=100: torch.compile of truncated is faster than the engine, eager: compile its blocks",
        "- C=1000: the step is no graph: not tried",
        "- 1 kernels beat the library: layer_norm (8, 8) bfloat16, triton: 1.50 times the library's speed",
        "- a: triton, graph: 10 ms, 2.00 times as fast as torch, graph, 1.80 times as fast as truncated with "
        "torch.compile",
        "Not done: steps 2 left to measure.",
    ):
        assert line in page.splitlines()
    assert len(page.splitlines()) < 60
