"""What several commands share."""

from __future__ import annotations

from jsonargparse import ArgumentParser

DEVICES = "auto, cpu, cuda or cuda:N"


def add_model_options(parser: ArgumentParser) -> None:
    """Add what says which trained model, and how it runs."""
    parser.add_argument(
        "--checkpoint", type=str, required=True, help="folder of a run, its last, best or average, or a saved model"
    )
    parser.add_argument(
        "--method", type=str | None, default=None, help="FILE.py:CLASS of a method from outside: models import no code"
    )
    parser.add_argument("--device", type=str, default="auto", help=DEVICES)
    parser.add_argument("--backend", type=str, default="auto", help="how operations are computed")
