"""The command line, one file per command; main.py puts them together."""

from upt_fast.cli.main import main

__all__ = ["main"]
