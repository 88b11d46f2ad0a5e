"""The command line, one file per command; app.py puts them together."""

from upt_fast.cli.app import main

__all__ = ["main"]
