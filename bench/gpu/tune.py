"""Part "tune": what ``upt-fast tune`` chooses, and whether that is the fastest when it is timed apart from it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from gpu.machine import Machine, set_precision
from gpu.models import Clips
from gpu.record import PartFile, Task
from gpu.steps import CLOSE
from torch import Tensor

from upt_fast.common.closeness import relative_rms
from upt_fast.common.files import write_text
from upt_fast.engine.tuning import table
from upt_fast.engine.tuning.candidates import Route
from upt_fast.engine.tuning.machine import machine as described
from upt_fast.engine.tuning.measuring import Entry
from upt_fast.methods import MAIN_METHOD
from upt_fast.steps.measured import INFERENCE, STEP
from upt_fast.tools.isolated import Measurement, measure_isolated
from upt_fast.tools.tune import PATIENCE
from upt_fast.tools.tune_process import measurement_of

BEHIND = 0.03  # of the fastest one's time: a choice that takes more is wrong
SECONDS, NEEDS = 85.0, 115.0  # of the tuner; with its start, a last compilation, and the times apart
DRY_SECONDS = 20.0
DRY_BACKENDS = ("torch", "triton", "torch/triton")
WARMUP = 5  # steps, of which a graph is captured behind three
TURNS = 2  # of the routes that are timed apart


def measurement(
    geometry: str,
    precision: str,
    classes: int,
    batch: int,
    mode: str,
    budget: float,
    dry: bool,
    seed: int,
    open_clip: bool,
    refused: Mapping[str, str],
) -> Measurement:
    """For upt_fast.tools.isolated: what ``upt-fast tune`` measures, on the suite's CLIP; in a dry run few backends."""
    clips = Clips(Machine(dry, seed), open_clip)
    set_precision(precision)
    torch.manual_seed(seed)
    names = clips.names(classes)
    return measurement_of(
        clips.get(geometry, torch.float32),
        names["tokenizer"],
        names["classnames"],
        MAIN_METHOD,
        batch,
        {"tf32": "fp32"}.get(precision, precision),
        "fast",
        mode,
        budget,
        DRY_BACKENDS if dry else None,
    )


class Tuning:
    """The tuner at several sizes.

    Args:
        clips: where models come from.
    """

    def __init__(self, clips: Clips) -> None:
        self.clips, self.machine = clips, clips.machine

    def measure(self, geometry: str, precision: str, classes: int, batch: int, mode: str) -> dict[str, Any]:
        """The tuner's entry, with all candidates, and beside it the times of models of our own."""
        machine, kind = self.machine, self.machine.device
        machine.release()  # the other process has its own memory
        asked = {"geometry": geometry, "precision": precision, "classes": classes, "batch": batch, "mode": mode}
        own = {"dry": machine.dry, "seed": machine.seed, "open_clip": self.clips.open_clip}
        own["budget"] = DRY_SECONDS if machine.dry else SECONDS
        entry = measure_isolated("gpu.tune:measurement", asked | own, PATIENCE[kind])
        dtype, (choice, ms) = set_precision(precision), (entry["choice"], entry["ms"])
        row = {"entry": entry, "choice": choice, "tuner_ms": ms[choice], "machine": described(kind)}
        runs: dict[str, Callable[[], Tensor]] = {}
        for name in apart(entry):
            runs[name], row["route_key"] = self.route(Route.of(name), geometry, dtype, classes, batch, mode)
        logits = {name: run().detach().clone() for name, run in runs.items()}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(TURNS):
            for name, run in runs.items():
                times[name].append(machine.times(run, 0.5)["p50_ms"])
        row["apart_ms"] = {name: min(found) for name, found in times.items()}
        row["error"] = max(relative_rms(logits[choice], found) for found in logits.values())
        row |= verdict(choice, row["apart_ms"])
        if machine.dry:  # times of tiny models tell nothing
            row |= {"status": "ok", "message": ""}
        if not row["error"] <= CLOSE[precision]:
            row |= {"status": "failed", "message": f"{choice}: its logits differ from another's by {row['error']:.2g}"}
        return row

    def route(
        self, route: Route, geometry: str, dtype: torch.dtype, classes: int, batch: int, mode: str
    ) -> tuple[Callable[[], Tensor], str]:
        """What runs a route once and gives the logits, on a model of its own; and the key of the tuner's choice."""
        model: Any = self.clips.build(f"fast {route.backend}", geometry, dtype, classes)
        images, key = self.clips.images(geometry, batch, dtype), model.route_key(mode, batch)
        labels = torch.arange(batch, device=images.device) % classes
        if mode == INFERENCE:
            model.eval()
            run = torch.no_grad()(functools.partial(model, images))
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, fused=images.is_cuda)
            step = model.make_graphed_step(optimizer, batch, capture=route.graph)

            def run() -> Tensor:
                return step(images, labels)[1]

        for _ in range(WARMUP):
            run()
        if route.graph and step.reason:
            raise RuntimeError(f"{route.name}: {step.reason}")
        return run, key


def apart(entry: Entry) -> list[str]:
    """Which candidates are timed once more: the choice, the usual one, and the fastest beside the choice."""
    ms = entry["ms"]
    others = sorted((name for name in ms if name != entry["choice"]), key=ms.__getitem__)
    return [name for name in dict.fromkeys([entry["choice"], entry["usual"], *others[:1]]) if name in ms]


def verdict(choice: str, ms: Mapping[str, float]) -> dict[str, Any]:
    """How far a choice is behind the fastest, as a share of its time, and whether that is too far."""
    fastest = min(ms, key=ms.__getitem__)
    behind = ms[choice] / ms[fastest] - 1
    row: dict[str, Any] = {"p50_ms": ms[choice], "behind": round(behind, 4)}
    if behind > BEHIND:
        row |= {"status": "failed", "message": f"{choice} takes {100 * behind:.1f} % more than {fastest}"}
    return row


def write_choices(folder: Path, file: PartFile, environment: str) -> None:
    """OUT/choices.json: a table of the choices that were right, to be shipped or for ``upt-fast tune --import``.

    Args:
        folder: OUT.
        file: this part's.
        environment: id of the one whose choices are written.
    """
    rows = [row for row in file.rows.values() if row["environment"] == environment and row["status"] == "ok"]
    if rows:
        entries = {row["route_key"]: row["entry"] | {"at": [row["classes"], row["batch"]]} for row in rows}
        write_text(folder / "choices.json", table.dump(rows[0]["machine"], entries))


def configurations(machine: Machine) -> Iterator[tuple[str, str, int, int, str]]:
    """(geometry, precision, classes, batch, mode), the most telling first."""
    if machine.dry:
        yield "tiny", "fp32", 5, 2, STEP
        return
    sizes = ((100, 32), (1000, 32), (397, 128))
    for precision in ("bf16", "tf32", "fp32"):
        for place, (classes, batch) in enumerate(sizes):
            yield "ViT-B/16", precision, classes, batch, STEP
            if precision == "bf16" and place == 1:
                yield "ViT-B/16", precision, *sizes[0], INFERENCE


def tasks(machine: Machine, clips: Clips) -> list[Task]:
    tuning, found = Tuning(clips), []
    for geometry, precision, classes, batch, mode in configurations(machine):
        info = {"model": geometry, "precision": precision, "classes": classes, "batch": batch, "mode": mode}
        run = functools.partial(tuning.measure, geometry, precision, classes, batch, mode)
        key = f"{geometry} {precision} C={classes} B={batch} {mode}"
        found.append(Task(key, run, info, needs=0.0 if machine.dry else NEEDS))
    return found
