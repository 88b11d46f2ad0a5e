"""The numeric part of the suite under settings that make one processor pass for others.

    python tests/portable.py [--share N] [--only TEXT] [--jobs N] [-- pytest's arguments]

What PyTorch, oneDNN, MKL and the compiled operations compute with is chosen from the processor's instructions and from
the threads; each setting below makes that choice another one. The kernels' tests, interpreted in NumPy whatever the
setting is, are divided among the settings; all others run under each. With --share N every setting runs an N-th of its
tests, from another beginning. Exit code 0: all passed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = (
    {"ATEN_CPU_CAPABILITY": "avx2"},
    {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    {"UPT_FAST_CPU_OPS": "0"},
    {"UPT_FAST_MEASURE": "1"},
    {"OMP_NUM_THREADS": "2"},
)
KERNELS = ("kernels", "engine/test_streams.py")
NUMERIC = (
    "reference",
    "steps",
    "tasks/test_joint.py",
    "engine/test_compose.py",
    "engine/test_cpu_ops.py",
    "engine/test_fp8.py",
    "engine/test_memory.py",
    "engine/test_ops.py",
    "engine/test_towers.py",
    "test_gpu_suite.py",
    "test_image_features.py",
    "test_kgcoop.py",
    "test_loss_terms.py",
    "test_methods.py",
    "test_model.py",
    "test_prompts.py",
    "test_verify.py",
    "distributed/test_steps.py",
    "train/test_accumulation.py",
    "train/test_averaging.py",
    "train/test_features.py",
    "train/test_metrics.py",
    "train/test_texts.py",
    "train/test_views.py",
)


def run(setting: dict[str, str], files: Sequence[str], share: str, jobs: int, arguments: Sequence[str]) -> int:
    """pytest's exit code under a setting."""
    # threads of several processes that wait for each other's cores would take many times as long
    jobs = 0 if int(setting.get("OMP_NUM_THREADS", "1")) > 1 else jobs
    command = [sys.executable, "-m", "pytest", "-q", "-n", str(jobs), "--share", share, *arguments]
    command += [str(ROOT / "tests" / name) for name in files]
    return subprocess.run(command, cwd=ROOT, env=os.environ | setting, check=False).returncode


def main(argv: Sequence[str] | None = None) -> int:
    """Run the settings that are chosen; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    cut = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--share", type=int, default=1, metavar="N", help="each setting runs one N-th of the tests")
    parser.add_argument("--only", default="", metavar="TEXT", help="settings with this text")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes side by side")
    options = parser.parse_args(given[:cut])
    names = [" ".join(f"{name}={value}" for name, value in setting.items()) for setting in SETTINGS]
    chosen = [(number, name) for number, name in enumerate(names) if options.only in name]
    if not chosen or options.share < 1:
        parser.error(
            f"--only {options.only!r} --share {options.share}; wanted a text in one of {', '.join(names)}; N >= 1"
        )
    codes: dict[str, int] = {}
    for number, name in chosen:
        started = time.monotonic()
        for files, parts in ((NUMERIC, options.share), (KERNELS, options.share * len(SETTINGS))):
            share = f"{number % parts + 1}/{parts}"
            print(f"== {name}, {share} of {' '.join(files)}", flush=True)
            codes[name] = codes.get(name, 0) or run(SETTINGS[number], files, share, options.jobs, given[cut + 1 :])
        print(f"== {name}: exit code {codes[name]} after {time.monotonic() - started:.0f} s", flush=True)
    failed = [name for name, code in codes.items() if code]
    print(f"{len(codes) - len(failed)} of {len(codes)} settings pass{': not ' if failed else ''}{', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
