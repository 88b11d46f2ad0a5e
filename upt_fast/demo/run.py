"""``upt-fast demo``: adapt the tiny CLIP from clean paper to tilted, squared notes, with a few images per digit.

The frozen CLIP has never seen such notes. Each method learns its prompts from 1, 4 and 16 images per digit of the
``train`` pool; all accuracies are on the same 701 ``test`` digits, which neither the pretraining nor any prompt has
seen. What comes out is reported as it is.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from upt_fast.clip.tiny_clip import MEAN, STD, TINY_CLIP_NAME, limited_threads
from upt_fast.common.files import write_text
from upt_fast.demo.digits import CLASS_NAMES, load_split, to_model_input
from upt_fast.demo.methods import DEFAULT_METHODS, DEMO_METHODS
from upt_fast.demo.report import compare_with_unimodal, format_comparison, format_table, plot_accuracy, plot_samples
from upt_fast.demo.training import (
    DOMAIN,
    DemoConfig,
    Outcome,
    Training,
    accuracy_of,
    build_model,
    default_workers,
    load_digits,
    load_tiny,
    pick_rows,
    run_trainings,
)
from upt_fast.methods import MAIN_METHOD, find_method
from upt_fast.methods.demo import TEMPLATE


@torch.no_grad()
def zero_shot_logits(
    clip_model: Any,
    tokenizer: Any,
    images: Tensor,
    classnames: Sequence[str],
    template: str = TEMPLATE,
    batch_size: int = 256,
) -> Tensor:
    """Zero-shot classification with an open_clip model.

    Args:
        clip_model: open_clip CLIP.
        tokenizer: its tokenizer.
        images: (N, 3, H, W) normalised.
        classnames: C names.
        template: caption with ``{}`` for the name.
        batch_size: images at a time.
    Returns:
        (N, C) logits.
    """
    text = F.normalize(clip_model.encode_text(tokenizer([template.format(name) for name in classnames])), dim=-1)
    features = torch.cat([F.normalize(clip_model.encode_image(part), dim=-1) for part in images.split(batch_size)])
    return clip_model.logit_scale.exp() * features @ text.T


def run_demo(
    out_dir: str | os.PathLike[str] | None = None,
    methods: Sequence[str] = DEFAULT_METHODS,
    shots: Sequence[int] = DemoConfig.shots,
    seeds: Sequence[int] = DemoConfig.seeds,
    epochs: int = DemoConfig.epochs,
    batch_size: int = DemoConfig.batch_size,
    max_test_images: int | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Zero-shot CLIP against prompt learning on handwritten digits on notes; prints a table and fills a run folder.

    The folder gets ``results.json``, ``table.md``, ``accuracy.png``, ``samples.png`` and each method's prompts of one
    training.

    Args:
        out_dir: the run folder; None for ``runs/demo-<time>``.
        methods: some of ``upt_fast.demo.methods.ALL_METHODS``.
        shots: training images per digit, at most 20.
        seeds: trainings per method and number of shots.
        epochs: passes over the shots, after the warm-up epoch.
        batch_size: images per step.
        max_test_images: test on so many images only.
        workers: processes that train side by side, which no result depends on; None: one per core, at most 4.
        progress: show a progress bar.
    Returns:
        What ``results.json`` holds: ``zero_shot``, ``methods``, ``trainings``, ``summary`` (one entry per method and
        number of shots), ``against_unimodal``, ``config`` and more; accuracies in percent.
    Raises:
        ValueError: bad option, or the run folder's path is a file.
    """
    config = DemoConfig(tuple(methods), tuple(shots), tuple(seeds), epochs, batch_size, max_test_images=max_test_images)
    workers = default_workers() if workers is None else workers
    if workers < 1:
        raise ValueError(f"workers: got {workers}, wanted at least 1")
    run_dir = Path(f"runs/demo-{datetime.now():%Y%m%d-%H%M%S}" if out_dir is None else out_dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"out_dir: got {run_dir}, which is a file, wanted a folder")
    with limited_threads(1):
        return _run(config, run_dir, workers, progress)


def _run(config: DemoConfig, run_dir: Path, workers: int, progress: bool) -> dict[str, Any]:
    started = time.perf_counter()
    run_dir.mkdir(parents=True, exist_ok=True)
    clip, digits = load_tiny(), load_digits("demo", config.max_test_images)
    labels = digits.labels
    rows = pick_rows(len(load_split("test", DOMAIN)[1]), config.max_test_images)
    pixels, upright = load_split("test", DOMAIN)[0][rows], load_split("test", "paper")[0][rows]
    print(f"A tiny CLIP that knows digits on clean paper meets tilted, squared notes: {len(labels)} test images.")
    zero_shot = zero_shot_logits(clip.model, clip.tokenizer, digits.images, CLASS_NAMES).argmax(dim=1)
    on_paper = zero_shot_logits(clip.model, clip.tokenizer, to_model_input(upright, MEAN, STD), CLASS_NAMES)

    kept = max(config.shots), config.seeds[0]
    trainings = [
        Training(method, k, seed, DEMO_METHODS[method].lr, config, keep=(k, seed) == kept)
        for method in config.methods
        for k in config.shots
        for seed in config.seeds
    ]
    print(f"{len(trainings)} trainings, {min(workers, len(trainings))} at a time")
    outcomes = run_trainings(trainings, workers, progress)
    results: dict[str, Any] = {
        "data": {"source": "scikit-learn load_digits", "domain": DOMAIN, "test_images": len(labels)},
        "zero_shot": {
            "accuracy": accuracy_of(zero_shot, labels),
            "template": TEMPLATE,
            "paper_accuracy": accuracy_of(on_paper.argmax(dim=1), labels),
        },
        **_summarise(config, trainings, outcomes),
        "config": asdict(config),
        "clip": TINY_CLIP_NAME,
        "workers": workers,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    results["against_unimodal"] = compare_with_unimodal(results)
    results["seconds"] = round(time.perf_counter() - started, 1)
    table = "\n\n".join(filter(None, (format_table(results), format_comparison(results))))
    write_text(run_dir / "table.md", table + "\n")
    plot_accuracy(results, run_dir / "accuracy.png")
    shown = MAIN_METHOD if MAIN_METHOD in config.methods else config.methods[-1]
    for training, outcome in zip(trainings, outcomes, strict=True):
        if not training.keep:
            continue
        _save_prompts(training, outcome, run_dir / f"{training.method}-{kept[0]}shot-seed{kept[1]}")
        if training.method == shown:
            guess, title = torch.from_numpy(outcome.guess), find_method(shown).title
            plot_samples(pixels, labels, zero_shot, guess, title, kept[0], run_dir / "samples.png")
    write_text(run_dir / "results.json", json.dumps(results, indent=2) + "\n")  # last: its presence means a whole run
    print(f"\n{table}\n\n{results['seconds']:.0f} seconds. Run folder: {run_dir}")
    return results


def _summarise(config: DemoConfig, trainings: list[Training], outcomes: list[Outcome]) -> dict[str, Any]:
    """``methods``, ``trainings`` and ``summary`` of the results."""
    methods: dict[str, Any] = {}
    entries: list[dict[str, Any]] = []
    for training, outcome in zip(trainings, outcomes, strict=True):
        methods.setdefault(
            training.method,
            {
                "title": find_method(training.method).title,
                "parameters": outcome.parameters,
                "lr": training.lr,
                "options": DEMO_METHODS[training.method].options,
            },
        )
        entries.append(
            {
                "method": training.method,
                "shots": training.shots,
                "seed": training.seed,
                "accuracy": outcome.accuracy,
                "lr": training.lr,
                "parameters": outcome.parameters,
                "steps": training.steps,
                "seconds": outcome.seconds,
                "cpu_seconds": outcome.cpu_seconds,
            }
        )
    summary = []
    for method in config.methods:
        for k in config.shots:
            values = [entry["accuracy"] for entry in entries if (entry["method"], entry["shots"]) == (method, k)]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            mean = statistics.fmean(values)
            summary.append({"method": method, "shots": k, "mean": mean, "std": spread, "trainings": len(values)})
    return {"methods": methods, "trainings": entries, "summary": summary}


def _save_prompts(training: Training, outcome: Outcome, folder: Path) -> None:
    assert outcome.state is not None
    model = build_model(training)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in outcome.state.items()})
    model.save_pretrained(folder)
