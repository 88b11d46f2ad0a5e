"""How processes find each other where a launcher may have started them before.

torchrun keeps its store when it starts the processes anew, and with it the addresses of those that are dead: who reads
one waits for nobody. So the first process gives each start a name of its own, under which everything else is stored. A
process asks for the name by a word that is its own, and says when it has it; words of dead processes are answered too,
and nobody minds. How often a launcher has started its processes cannot be the name: launchers of several hosts count
for themselves.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta
from typing import Any

import torch.distributed as dist

PLACE = "upt_fast"
PAUSE = 0.01  # seconds between two looks into the store


def fresh_store(timeout: timedelta) -> tuple[Any, int, int]:
    """The launcher's store, without what an earlier start has left; this process's rank, and how many there are.

    Args:
        timeout: for all processes to be there.
    Raises:
        ValueError: some are not.
    """
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    return dist.PrefixStore(start_name(store, rank, size, timeout), store), rank, size


def start_name(store: Any, rank: int, size: int, timeout: timedelta) -> str:
    """The name of this start, the same in all of its processes."""
    word = uuid.uuid4().hex
    if rank > 0:
        store.set(f"{PLACE}/asks/{rank}", word)
        name: str = store.get(f"{PLACE}/name/{word}").decode()
        store.set(f"{PLACE}/{name}/{rank}", "has it")
        return name
    missing, answered, deadline = set(range(1, size)), set[bytes](), time.monotonic() + timeout.total_seconds()
    while missing:
        for other in sorted(missing):
            if store.check([f"{PLACE}/asks/{other}"]) and (asks := store.get(f"{PLACE}/asks/{other}")) not in answered:
                store.set(f"{PLACE}/name/{asks.decode()}", word)
                answered.add(asks)
        missing = {other for other in missing if not store.check([f"{PLACE}/{word}/{other}"])}
        if missing and time.monotonic() > deadline:
            raise ValueError(f"process {', '.join(map(str, sorted(missing)))} of {size} did not come within {timeout}")
        time.sleep(PAUSE)
    return word
