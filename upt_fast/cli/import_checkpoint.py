"""``upt-fast import-checkpoint``."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

HELP = "read a checkpoint of CoOp's, CoCoOp's, MaPLe's or UPT's repository"


def add_options(parser: ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument("file", type=str, metavar="FILE", help="model.pth.tar-50, model-best.pth.tar, ...")
    parser.add_argument("--clip", type=str, required=True, help="the CLIP it was trained on: open_clip's name")
    parser.add_argument("--pretrained", type=str | None, default=None, help="open_clip's tag, or a checkpoint file")
    parser.add_argument(
        "--quick-gelu",
        type=bool | None,
        default=None,
        help="whether the CLIP has QuickGELU (true) or GELU (false); none: as the tag, the file or else the name says",
    )
    parser.add_argument(
        "--classnames", type=str, required=True, help="file of the class names in their order: one a line, or JSON"
    )
    parser.add_argument("--out", type=str, required=True, help="folder of the model")
    parser.add_argument("--method", type=str | None, default=None, help="none: found from the file")
    parser.add_argument(
        "--options", nargs="+", type=str, default=[], metavar="KEY=VALUE", help="of the method: half_prompts=true ..."
    )


def run(options: Namespace) -> int:
    """Read a released checkpoint."""
    from upt_fast.released.commands import run_import

    run_import(
        options.file,
        options.classnames,
        options.out,
        clip=options.clip,
        pretrained=options.pretrained,
        quick_gelu=options.quick_gelu,
        method=options.method,
        options=options.options,
    )
    return 0
