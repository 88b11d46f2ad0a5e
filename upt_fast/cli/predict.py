"""``upt-fast predict``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from upt_fast.cli.common import add_model_options

HELP = "classify image files with a trained model"


def add_options(parser: ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument("images", nargs="+", type=str, metavar="IMAGE", help="image files, shards, or what is in them")
    add_model_options(parser)
    parser.add_argument("--top-k", type=int, default=5, help="classes per image")
    parser.add_argument(
        "--classnames",
        type=str | None,
        default=None,
        help="JSON or CSV file, class folder of training -> what to call the class in the answer",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: Namespace) -> int:
    """Print the most probable classes of images."""
    from upt_fast.data.shards import find_images
    from upt_fast.train.evaluation import predict
    from upt_fast.train.runs import class_names, load_run

    paths = find_images(options.images)
    missing = [str(path) for path in paths if isinstance(path, Path) and not path.exists()]
    if missing:
        raise ValueError(f"{len(missing)} image file(s) do not exist: {', '.join(missing[:10])}")
    model = load_run(options.checkpoint, options.device, options.backend, options.method)
    names = class_names(options.checkpoint, model, options.classnames)
    predictions = predict(model, paths, options.top_k, classnames=names)
    if options.json:
        print(json.dumps([asdict(prediction) for prediction in predictions], indent=2))
        return 0
    for prediction in predictions:
        print(prediction.path)
        for name, probability in zip(prediction.classnames, prediction.probabilities, strict=True):
            print(f"  {100 * probability:6.2f} %  {name}")
    return 0
