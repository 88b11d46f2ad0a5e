"""All that is to be measured on a machine with a GPU, in one command: ``python bench/gpu_suite.py OUT``.

Parts, the most valuable first, each with a share of --total-minutes (gpu/plan.py):

environment  versions; matrix products, memory and launches at best
closeness    logits and gradients in fp32, tf32, bf16, fp16 against float64: at most 1.5 times the reference's own error
tests        pytest of the kernels on the GPU
steps        training steps: reference, truncated, truncated with torch.compile, fast with each backend
tune         what upt-fast tune chooses, and whether it is the fastest when it is timed apart; OUT/choices.json
ops          every op forward and backward: PyTorch, torch.compile, each backend
profile      a step's kernels, its share of the GEMM peak, its gaps
memory       the largest batch in 16, 24 and 80 GiB
sanitizer    every kernel under compute-sanitizer's memcheck and racecheck

A call ends within --call-minutes; the same command again goes on where it was. OUT/<part>.json is written after every
measurement, so that a call that is killed loses the one in progress; what was measured in the same environment (device,
versions, sources) is not measured again. OUT/report.md is one page, the targets and what to try next; OUT/details.md
shows all. Exits with 1 where a correctness check failed. ``--dry`` runs every part on the CPU at tiny sizes, kernels in
Triton's interpreter.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gpu import checkout, plan, processes

PARTS = plan.PARTS
GRACE = 25.0  # seconds that a measurement may go on after its part's time
STARTS = 8  # of a part's process
RESTART = 75  # gpu/worker.py's exit code: a new process can go on


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("out", type=Path, nargs="?", help="folder for the results")
    found.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"some of {', '.join(PARTS)}")
    found.add_argument("--minutes", type=float, default=9.0, help="after which a part starts no measurement (9)")
    found.add_argument(
        "--call-minutes", type=float, default=plan.CALL_MINUTES, help="after which a call ends (%(default)s)"
    )
    found.add_argument(
        "--total-minutes", type=float, default=plan.TOTAL_MINUTES, help="of all calls together (%(default)s)"
    )
    found.add_argument("--fresh", action="store_true", help="measure the chosen parts again from the beginning")
    found.add_argument("--dry", action="store_true", help="every part on the CPU at tiny sizes")
    found.add_argument("--seed", type=int, default=0, help="of the random weights, prompts and inputs (0)")
    found.add_argument("--exercise", nargs="+", metavar="KERNEL", help=argparse.SUPPRESS)
    found.add_argument("--worker", nargs="+", choices=PARTS, help=argparse.SUPPRESS)
    found.add_argument("--died", default="", help=argparse.SUPPRESS)
    return found


def worker_environment(out: Path, dry: bool) -> dict[str, str]:
    """What is read when modules are imported, so before the process starts; all that is kept goes into OUT/cache."""
    ours = ("TRITON_INTERPRET", "UPT_FAST_BACKEND", "UPT_FAST_MEASURE")
    found = {name: value for name, value in os.environ.items() if name not in ours}
    found["UPT_FAST_CACHE"] = str(out.resolve() / "cache")
    # tiny operations only wait for a second thread; compiling the CPU's operations takes a minute, and tells nothing
    dry_ones = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "UPT_FAST_CPU_OPS": "0", "OMP_NUM_THREADS": "1"}
    return found | (dry_ones if dry else {})


def supervise(args: argparse.Namespace, parts: Sequence[str]) -> int:
    """Run parts in a process of their own, which a measurement may break or block."""
    end = time.monotonic() + 60 * args.minutes * len(parts)
    died = ""
    for _ in range(STARTS):
        minutes = max(end - time.monotonic(), 0.0) / 60 / len(parts)
        command = [sys.executable, __file__, str(args.out), "--worker", *parts, "--minutes", str(minutes)]
        command += ["--seed", str(args.seed)] + ["--dry"] * args.dry + ["--died", died] * bool(died)
        code, _ = processes.run(command, end + GRACE - time.monotonic(), worker_environment(args.out, args.dry))
        if code in (0, 1, 2):
            return code
        died = "killed at the end of the part's time" if code is None else f"its process ended with {code}"
        if code is None:
            break
        if code != RESTART:
            print(f"{', '.join(parts)}: the process ended with {code}; starting another", flush=True)
    from gpu import worker

    passed = [worker.bury(args.out, part, died) for part in parts]
    return 0 if all(passed) else 1


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser()
    args = options.parse_args(arguments)
    checkout.make_importable()
    if args.exercise:
        os.environ |= {"TRITON_INTERPRET": "1"} if args.dry else {}
        from gpu import worker

        return worker.exercise(args.exercise, args.dry)
    if args.out is None:
        options.error("OUT is missing: the folder for the results")
    if args.worker:
        from gpu import worker

        return worker.run(args.out, args.worker, args.dry, args.minutes, args.died, args.seed)
    parts = [part for part in PARTS if args.only is None or part in args.only]
    if args.fresh:
        for part in parts:
            (args.out / f"{part}.json").unlink(missing_ok=True)
    # imports take longer than tiny measurements: a dry run has one process
    codes = [supervise(args, parts)] if args.dry else take_turns(args, parts)
    if 2 in codes:
        return 2
    print(f"results in {args.out}/report.md", flush=True)
    return max(codes, default=0)


def take_turns(args: argparse.Namespace, parts: Sequence[str]) -> list[int]:
    """Run parts one after another as planned, until this call's time or that of all calls is up; their exit codes."""
    end, ran, codes = time.monotonic() + 60 * args.call_minutes, dict.fromkeys(parts, False), []
    for part, planned in plan.turns(args.out, parts, args.total_minutes):
        minutes = min(planned, args.minutes, (end - time.monotonic()) / 60)
        if minutes < plan.LEAST or (ran[part] and not plan.todo(args.out, part)):
            continue
        ran[part] = True
        codes.append(supervise(argparse.Namespace(**{**vars(args), "minutes": minutes}), [part]))
        if codes[-1] == 2:
            return codes
    left = [part for part in parts if plan.todo(args.out, part)]
    if left:
        print(f"left: {', '.join(left)}; the same command goes on, until {args.total_minutes:g} minutes are used")
    return codes


if __name__ == "__main__":
    sys.exit(main())
