"""``upt-fast eval``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from upt_fast.cli.common import add_model_options

if TYPE_CHECKING:
    from upt_fast.train.metrics import Evaluation

SHOWN = 5  # classes, and pairs of them, that are named
TOP = 5  # as upt_fast/train/metrics.py
HELP = "accuracy of a trained model on a directory of images"


def add_options(parser: ArgumentParser) -> None:
    """Add the command's options to its parser."""
    add_model_options(parser)
    parser.add_argument("--data", type=str, required=True, help="directory of images, laid out as for train, or shards")
    parser.add_argument("--split", type=str | None, default=None, help="train, val or test; none: the test images")
    parser.add_argument(
        "--classes-from", type=str | None, default=None, help="which folders are classes: top or leaf; none: as trained"
    )
    parser.add_argument(
        "--classnames",
        type=str | None,
        default=None,
        help="JSON or CSV file, class folder -> name: which class of the model a folder means",
    )
    parser.add_argument("--batch-size", type=int, default=100, help="images per forward pass")
    parser.add_argument("--num-workers", type=int | None, default=None, help="processes that load images")
    parser.add_argument(
        "--feature-store",
        type=str | None,
        default=None,
        help="folder that keeps image features that no prompt changes, or off; none: as for train",
    )
    parser.add_argument("--feature-store-gib", type=float, default=1.0, help="GiB that it may take on disk")
    parser.add_argument(
        "--confusion",
        type=str | None,
        default=None,
        help="CSV file to write: a row per true class, a column per answer",
    )
    parser.add_argument(
        "--cache",
        type=str | None,
        default=None,
        help="decoded images: scaled (on disk, for later evaluations and runs), exact (in memory) or, of shards, "
        "stream (nowhere); results are the same; none: as the run did, without one scaled",
    )
    parser.add_argument("--cache-gib", type=float | None, default=None, help="GiB for decoded images, as for train")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: Namespace) -> int:
    """Print the accuracy of a checkpoint, and what else it is measured by."""
    if options.confusion is not None and not Path(options.confusion).absolute().parent.is_dir():
        raise ValueError(f"confusion={options.confusion!r}: no such folder; wanted a file in a folder that is there")
    from upt_fast.train.runs import evaluate_run

    evaluation, where = evaluate_run(
        options.checkpoint,
        options.data,
        split=options.split,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        device=options.device,
        backend=options.backend,
        method=options.method,
        classes_from=options.classes_from,
        classnames=options.classnames,
        feature_store=options.feature_store,
        feature_store_gib=options.feature_store_gib,
        cache=options.cache,
        cache_gib=options.cache_gib,
    )
    if options.confusion is not None:
        from upt_fast.train.metrics import write_confusion

        write_confusion(Path(options.confusion), evaluation)
    if options.json:
        found = {"images_from": where, **evaluation.to_dict(), "confusion": evaluation.confusions()}
        print(json.dumps(found, indent=2))
    else:
        print("\n".join([*_lines(evaluation), f"{evaluation.num_images} images: {where}"]))
    return 0


def _lines(evaluation: Evaluation) -> list[str]:
    """An evaluation in words: its accuracies, and where it is worst."""
    among = min(TOP, len(evaluation.classnames))
    lines = [
        f"accuracy {100 * evaluation.accuracy:.2f} %",
        f"mean over classes {100 * evaluation.mean_class_accuracy:.2f} %",
        f"among the {among} likeliest {100 * evaluation.top5_accuracy:.2f} %",
        f"calibration error {100 * evaluation.calibration_error:.2f} %",
    ]
    below = [entry for entry in evaluation.class_accuracy.items() if entry[1] < 1]
    if below:
        worst = sorted(below, key=lambda entry: entry[1])[:SHOWN]
        lines.append("least accurate: " + ", ".join(f"{name} {100 * accuracy:.2f} %" for name, accuracy in worst))
    mistaken = [
        (count, true, answer)
        for true, row in evaluation.confusions().items()
        for answer, count in row.items()
        if answer != true
    ]
    if mistaken:
        often = sorted(mistaken, key=lambda entry: -entry[0])[:SHOWN]
        lines.append("taken for another: " + ", ".join(f"{true} for {answer} ({n})" for n, true, answer in often))
    return lines
