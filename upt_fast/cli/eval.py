"""``upt-fast eval``."""

from __future__ import annotations

import json
from dataclasses import asdict

from jsonargparse import ArgumentParser, Namespace

from upt_fast.cli.common import add_model_options

HELP = "accuracy of a trained model on a directory of images"


def add_options(parser: ArgumentParser) -> None:
    """Add the command's options to its parser."""
    add_model_options(parser)
    parser.add_argument("--data", type=str, required=True, help="directory of images, laid out as for train")
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
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: Namespace) -> int:
    """Print the accuracy of a checkpoint."""
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
    )
    if options.json:
        print(json.dumps({"images_from": where, **asdict(evaluation)}, indent=2))
    else:
        print(f"accuracy {100 * evaluation.accuracy:.2f} %")
        print(f"mean over classes {100 * evaluation.mean_class_accuracy:.2f} %")
        print(f"{evaluation.num_images} images: {where}")
    return 0
