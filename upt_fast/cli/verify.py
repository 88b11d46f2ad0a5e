"""``upt-fast verify``."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

HELP = "check this installation against test vectors"


def add_options(parser: ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument(
        "directory", nargs="?", type=str | None, default=None, metavar="DIR", help="folder of test vectors"
    )
    parser.add_argument("--device", type=str, default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", type=str, default="float64", help="float64, float32, bfloat16, float16 or fp8")
    parser.add_argument("--backend", type=str, default="auto", help="how operations are computed")


def run(options: Namespace) -> int:
    """Check vectors, a line for each file."""
    from upt_fast.tools.verify import run_verify

    directory = None if options.directory is None else Path(options.directory)
    return run_verify(directory, options.device, options.dtype, options.backend)
