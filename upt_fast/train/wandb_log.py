"""Weights & Biases: a run's settings, epochs and results in a project, ``train --wandb PROJECT``.

The log is a copy of what the run's own files hold. Where it cannot be written, for there is no network, no login or the
service fails, the run goes on without it, with a warning. wandb is imported when a run asks for it; WANDB_MODE and its
other variables say where it writes. RUN/wandb.json keeps the id, so that a resumed run is the same there.
"""

from __future__ import annotations

import importlib.util
import logging
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upt_fast.train.checkpoint import read_json, write_json

if TYPE_CHECKING:
    from upt_fast.train.config import TrainConfig

logger = logging.getLogger("upt_fast")

ID_FILE = "wandb.json"


def require_wandb(config: TrainConfig) -> None:
    """Raise a ValueError where a run asks for wandb and it is not installed."""
    if config.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"wandb={config.wandb!r}, and wandb is not installed; install it (pip install upt_fast[wandb]), or leave "
            "--wandb out"
        )


class WandbLog:
    """A run in a project; after a failure it does nothing.

    Args:
        config: of the run, with wandb, the project.
        out: the run's folder.
    """

    def __init__(self, config: TrainConfig, out: Path) -> None:
        self._run: Any = None
        self._alive = True
        self._try(lambda: self._open(config, out))

    def _open(self, config: TrainConfig, out: Path) -> None:
        import wandb

        self._run = wandb.init(
            project=config.wandb,
            name=config.wandb_name or out.absolute().name,
            id=_run_id(out / ID_FILE, str(config.wandb)),
            resume="allow",
            reinit="create_new",  # tasks of a job have runs of their own at the same time
            dir=str(out),
            config=config.to_dict(),
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._run.define_metric("*", step_metric="epoch")
        logger.info("Weights & Biases: %s", f"in {self._run.dir}" if self._run.offline else self._run.url)

    def log(self, record: Mapping[str, Any]) -> None:
        """Add the numbers of an epoch, as metrics.jsonl has them."""
        self._try(lambda: self._run.log(dict(record)))

    def finish(self, results: Mapping[str, Any]) -> None:
        """Add what the run came to, and close it."""
        self._try(lambda: self._run.summary.update(_summary(results)))
        self.close()

    def close(self, failed: bool = False) -> None:
        """Close it, if it is open."""
        self._try(lambda: self._run.finish(exit_code=int(failed)))
        self._alive = False

    def _try(self, action: Callable[[], None]) -> None:
        if not self._alive:
            return
        try:
            action()
        except Exception as error:  # whatever the service raises is not the run's
            reason = " ".join(str(error).split()) or type(error).__name__
            logger.warning("nothing more is logged to Weights & Biases (%s); the run goes on", reason)
            self._alive = False


def _run_id(path: Path, project: str) -> str:
    """The id of a run in a project, made where there is none yet."""
    known = read_json(path) if path.is_file() else {}
    if known.get("project") != project:
        known = {"project": project, "id": uuid.uuid4().hex[:8]}
        write_json(path, known)
    return str(known["id"])


def _summary(results: Mapping[str, Any]) -> dict[str, Any]:
    """Plain numbers of a run's results, by "test.accuracy" and so on."""
    found: dict[str, Any] = {"evaluated": results["evaluated"], "epochs_done": results["epochs_done"]}
    groups = {"test": results["test"] or {}, "best": results["best"]}
    groups |= {f"test_of.{name}": values for name, values in results["test_of"].items()}
    for group, values in groups.items():
        found |= {f"{group}.{key}": value for key, value in values.items() if not isinstance(value, dict)}
    return found
