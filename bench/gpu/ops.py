"""Part "ops": forward and backward of each public op with every backend that has it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from gpu.machine import MIB, Machine, set_precision, significant
from gpu.models import Clips, compiled, require
from gpu.op_cases import Bound, errors, training_cases
from gpu.record import Task

from upt_fast.engine.backends import dispatch
from upt_fast.testing_ops import Case, small_cases


def measure(machine: Machine, case: Case, dtype: torch.dtype, provider: str) -> dict[str, Any]:
    """Errors, then milliseconds of forward and backward with a cold cache and from call to call."""
    backend = "torch" if provider == "compiled" else provider
    require(backend, machine, dtype)
    bound = Bound(case, machine.device, dtype, seed=machine.seed)
    forward = partial(bound.forward, backend)
    if provider == "compiled":
        torch._dynamo.reset()
        forward = compiled(forward, machine)
    row = errors(bound, forward)
    machine.release()
    set_precision("fp32")
    call = partial(bound.run, forward)
    row |= machine.peak(call) | machine.times(call, 0.5, cold=True)
    row["back_to_back_ms"] = machine.times(call, 0.3)["p50_ms"]
    # what moving the inputs and outputs once would take
    row["least_mib"] = significant(bound.least_bytes() / MIB)
    row["of_copy_bandwidth"] = significant(1e-6 * bound.least_bytes() / row["p50_ms"] / machine.copy_bandwidth())
    return row


def tasks(machine: Machine, clips: Clips) -> list[Task]:
    found = []
    cases = list(training_cases())
    if machine.dry:  # one of each op; part "sanitizer" runs the others
        cases = list({case.op: case for case in small_cases()}.values())
    for case in cases:
        backends = [name for name in dispatch.OPS[case.op] if name not in ("torch", "compiled")]
        for dtype in case.dtypes[:1] if machine.dry else case.dtypes:
            for provider in ("torch", *backends, "compiled"):
                name = str(dtype).removeprefix("torch.")
                info = {"op": case.op, "shape": case.name, "dtype": name, "provider": provider}
                run = partial(measure, machine, case, dtype, provider)
                found.append(Task(f"{case.op} {case.name} {name} {provider}", run, info))
    # every op at ViT-B/16's shapes in bfloat16 before the first at another's
    return sorted(found, key=lambda t: ("ViT-L" in t.key, t.info["dtype"] not in ("bfloat16", "float32")))
