"""What a trainer does otherwise where a run is on several processes: own images of each batch, interrupts together."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from upt_fast.common import processes
from upt_fast.data.dataset import EpochBatchSampler
from upt_fast.data.folder import ImageItem
from upt_fast.distributed import Group, join
from upt_fast.train.checkpoint import is_run, read_json
from upt_fast.train.config import TrainConfig
from upt_fast.train.interrupt import InterruptBetweenSteps
from upt_fast.train.setup import CHOICES_FILE, resolve_device

logger = logging.getLogger("upt_fast")


def join_processes(config: TrainConfig) -> Group:
    """The processes of a run, as the launcher has started them.

    Raises:
        ValueError: no such device; one GPU named for several processes; see :func:`join`.
    """
    device = resolve_device(config.device)
    if processes.count() > 1 and device.index is not None:
        raise ValueError(
            f"device={config.device!r} for {processes.count()} processes; wanted auto, cpu, or cuda: each has a GPU"
        )
    return join(device.type)


@contextlib.contextmanager
def first_speaks(group: Group) -> Iterator[None]:
    """Let the log of the first process alone be heard."""

    def heard(record: logging.LogRecord) -> bool:
        return group.first or record.levelno >= logging.ERROR

    logger.addFilter(heard)
    try:
        yield
    finally:
        logger.removeFilter(heard)


class OwnImages(Sampler[list[tuple[int, int]]]):
    """Of each batch the images of one process, where it has any.

    Args:
        batches: of the run, the same on all processes.
        group: the processes.
    """

    def __init__(self, batches: EpochBatchSampler, group: Group) -> None:
        self.batches, self.group = batches, group

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self.batches:
            if own := batch[self.group.share(len(batch))]:
                yield own


def with_all_labels(
    own: Iterable[tuple[Tensor, Tensor]],
    batches: EpochBatchSampler,
    items: Sequence[ImageItem],
    group: Group,
    nothing: Tensor,
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's images (b, ...) of each batch and the labels (B,) of the whole batch.

    Args:
        own: its images and their labels, of batches where it has any.
        batches: of the run.
        items: what they index.
        group: the processes.
        nothing: (0, ...) on the device, where it has no image.
    """
    own = iter(own)
    for batch in batches:
        labels = torch.tensor([items[index].label for _, index in batch], device=nothing.device)
        share = group.share(len(batch))
        images = next(own)[0] if share.stop > share.start else nothing
        yield images, labels


class InterruptTogether(InterruptBetweenSteps):
    """The same where the processes end together, behind the same step; SIGTERM is as Ctrl-C.

    torchrun passes both on to all of them, and each is in another place then.
    """

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group
        self._terminates: Any = None

    def __enter__(self) -> InterruptTogether:
        super().__enter__()
        if self._previous is not None and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            self._terminates = signal.signal(signal.SIGTERM, self._handle)
        return self

    def check(self) -> None:
        if self.group.any(self.requested):
            raise KeyboardInterrupt

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._terminates is not None:
            signal.signal(signal.SIGTERM, self._terminates)
        super().__exit__(kind, error, trace)


def resumed_if_restarted(config: TrainConfig, restarts: int) -> TrainConfig:
    """The config with resume, where the launcher has started the processes anew and there is something to resume.

    Args:
        config: of the run.
        restarts: the most that a launcher has counted. Where a host was lost they may have counted none, but the run
            was begun under the same name.
    """
    out = Path(config.out)
    if processes.count() == 1 or not is_run(out):
        return config
    begun_as = read_json(out / CHOICES_FILE).get("started_as") if (out / CHOICES_FILE).is_file() else None
    again = restarts > 0 or (begun_as is not None and begun_as == processes.started_as())
    return config.changed(resume=True) if again else config
