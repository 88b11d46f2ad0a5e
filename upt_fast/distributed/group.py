"""The processes of one run, and what they tell each other.

Tensors go through the default process group, NCCL's on GPUs and gloo's on CPUs; words of control through one of gloo's
that waits for hours, because one process may decode a dataset while the others have nothing to do.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from upt_fast.common import processes
from upt_fast.common.processes import OtherProcessError
from upt_fast.distributed.rendezvous import fresh_store

T = TypeVar("T")

STEP_TIMEOUT = timedelta(minutes=30)  # of tensors: a step, or a pass of an evaluation
CONTROL_TIMEOUT = timedelta(hours=24)  # of words: reading a dataset for the first time


class Group:
    """Processes of one run: this class is a process alone, whose methods do nothing and cost nothing.

    Attributes:
        rank: of this process; 0 is the one that writes and speaks.
        size: how many there are.
        device: of this process's tensors, where there are several.
    """

    rank = 0
    size = 1
    device = torch.device("cpu")

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def sizes(self, count: int) -> list[int]:
        """Of each process the part of a count that is its own, equal to within one; where there are too few the first
        has one."""
        ends = [-(-count * (i + 1) // self.size) for i in range(self.size)]
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]

    def share(self, count: int) -> slice:
        """This process's part of so many things in a row."""
        return slice(-(-count * self.rank // self.size), -(-count * (self.rank + 1) // self.size))

    def gather(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """The rows of all processes one behind the other, the same bits on each.

        Args:
            rows: (n, ...) of this process, without a graph; n may be 0.
            sizes: n of each process.
        Returns:
            (sum of sizes, ...)
        """
        return rows

    def sum(self, tensor: Tensor) -> None:
        """Put the sum of all processes' tensors in the place of each."""

    def copy_first(self, tensor: Tensor) -> None:
        """Put the first process's tensor in the place of each."""

    def any(self, value: bool) -> bool:
        """Whether it is true on any process."""
        return value

    def objects(self, value: T) -> list[T]:
        """What each process gives, in their order."""
        return [value]

    def agreed(self, run: Callable[[], T]) -> T:
        """Run something on every process; where it fails on one, it fails on all.

        Args:
            run: must not talk to the other processes.
        Raises:
            OtherProcessError: it failed elsewhere.
        """
        return run()

    def by_first(self, run: Callable[[], T]) -> T:
        """Run something on the first process; all have what it gives, or fail with it."""
        return run()


ONE_PROCESS = Group()


class JoinedGroup(Group):
    """Several processes, through torch.distributed's default group.

    Args:
        device: of this process's tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size, self.device = dist.get_rank(), dist.get_world_size(), device
        self._control: Any = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)

    def gather(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        most = max(sizes)
        if most == 0:
            return rows
        own = rows.new_zeros(most, *rows.shape[1:], device=self.device)
        own[: len(rows)] = rows
        found = [torch.empty_like(own) for _ in sizes]
        with _collective():
            dist.all_gather(found, own)
        return torch.cat([part[:n] for part, n in zip(found, sizes, strict=True)]).to(rows.device)

    def sum(self, tensor: Tensor) -> None:
        with _collective():
            dist.all_reduce(tensor)

    def copy_first(self, tensor: Tensor) -> None:
        with _collective():
            dist.broadcast(tensor, 0)

    def any(self, value: bool) -> bool:
        flag = torch.tensor([int(value)])
        with _collective():
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._control)
        return bool(flag)

    def objects(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.size
        with _collective():
            dist.all_gather_object(found, value, group=self._control)
        return found

    def agreed(self, run: Callable[[], T]) -> T:
        result, error = _try(run)
        said = self.objects(None if error is None else _describe(error))
        self._fail(said, error)
        return result  # type: ignore[return-value]

    def by_first(self, run: Callable[[], T]) -> T:
        result, error = _try(run) if self.first else (None, None)
        found: list[Any] = [result, None if error is None else _describe(error)]
        with _collective():
            dist.broadcast_object_list(found, 0, group=self._control)
        self._fail([found[1]], error)
        return found[0]

    def _fail(self, said: Sequence[tuple[str, int] | None], own: Exception | None) -> None:
        """Raise what went wrong on the first of the processes where something did."""
        place = next((i for i, found in enumerate(said) if found is not None), None)
        if place is None:
            return
        found = said[place]
        assert found is not None
        message, code = found
        # the first tells what a user can put right; of errors of ours each process shows its own traceback
        if own is not None and (code == 1 or (self.first and place == 0)):
            raise own
        raise OtherProcessError(message if place == 0 else f"process {place} of {self.size}: {message}", code) from own


def _try(run: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return run(), None
    except Exception as error:
        return None, error


def _describe(error: Exception) -> tuple[str, int]:
    """An error's message, and the exit code of a command that it ends: 2 where the user can put it right."""
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename is not None else ""
        return f"{error.strerror}{where} (on {socket.gethostname()})", 2
    text = " ".join(str(error).split()) or type(error).__name__
    return text, 2 if isinstance(error, (ValueError, OSError)) else 1


@contextlib.contextmanager
def _collective() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what gloo and NCCL raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OtherProcessError(f"lost another process of this run; its own message says why ({reason})") from error


_joined: JoinedGroup | None = None


def join(device: torch.device | str = "cpu") -> Group:
    """The processes that torchrun or accelerate launch has started; :data:`ONE_PROCESS` where this one is alone.

    Later calls return the same group. A process group that exists already is taken as it is.

    Args:
        device: "cpu", or "cuda" for the GPU of this process's LOCAL_RANK.
    Raises:
        ValueError: Accelerate is not installed; the environment is not that of a launcher; more processes than GPUs.
    """
    global _joined
    device = torch.device(device)
    if not dist.is_available() or not (dist.is_initialized() or processes.count() > 1):
        return ONE_PROCESS
    if _joined is not None and dist.is_initialized():
        return _joined
    if not dist.is_initialized():
        _initialize(device)
    if dist.get_world_size() == 1:
        return ONE_PROCESS
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    _joined = JoinedGroup(device)
    return _joined


def leave() -> None:
    """End the group, behind the last that a process has to say."""
    global _joined
    if _joined is not None and dist.is_initialized():
        dist.destroy_process_group()
    _joined = None


def _initialize(device: torch.device) -> None:
    """The default process group, by Accelerate."""
    wanted = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in wanted if name not in os.environ]:
        raise ValueError(
            f"WORLD_SIZE={processes.count()} in the environment, but no {', '.join(missing)}: start the processes with "
            "torchrun or accelerate launch, or unset WORLD_SIZE"
        )
    if device.type == "cuda" and processes.on_this_host() > torch.cuda.device_count():
        raise ValueError(
            f"{processes.on_this_host()} processes on this host, which has {torch.cuda.device_count()} GPU(s); wanted "
            "at most one process for each, or --device cpu"
        )
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise ValueError(
            f"a run on {processes.count()} processes needs Accelerate: pip install upt_fast[distributed]"
        ) from error
    with _collective():
        store, rank, size = fresh_store(STEP_TIMEOUT)
    found = {"store": store, "rank": rank, "world_size": size, "timeout": STEP_TIMEOUT}
    if device.type == "cpu":
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # or Accelerate sets a number of its own
        PartialState(cpu=True, backend="gloo", **found)
    else:
        PartialState(**found)
