"""``upt-fast export-checkpoint``."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

HELP = "write a checkpoint that those repositories read"


def add_options(parser: ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument(
        "checkpoint", type=str, metavar="CHECKPOINT", help="folder of a run, its last or best, or a saved model"
    )
    parser.add_argument("--out", type=str, required=True, help="folder that becomes their --model-dir")
    parser.add_argument("--epoch", type=int | None, default=None, help="their --load-epoch; none: the run's, else 1")
    parser.add_argument("--clip", type=str | None, default=None, help="another name for the CLIP; none: as saved")
    parser.add_argument("--pretrained", type=str | None, default=None, help="with --clip: open_clip's tag, or a file")
    parser.add_argument(
        "--quick-gelu", type=bool | None, default=None, help="with --clip: its activation, true or false"
    )


def run(options: Namespace) -> int:
    """Write a released checkpoint."""
    from upt_fast.released.commands import run_export

    run_export(
        options.checkpoint,
        options.out,
        epoch=options.epoch,
        clip=options.clip,
        pretrained=options.pretrained,
        quick_gelu=options.quick_gelu,
    )
    return 0
