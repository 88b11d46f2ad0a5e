"""How much memory the steps of a group may need where nobody says."""

from __future__ import annotations

import os

import torch

SHARE = 0.5  # of what is free: images, allocators and other processes need the rest


def room(device: torch.device) -> int:
    """Bytes for a step beside the weights: a share of the memory that is free now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = _free_on_host()
    return int(free * SHARE)


def _free_on_host() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found = {line.partition(":")[0]: line.split()[1] for line in file}
        return int(found["MemAvailable"]) * 1024
    except (OSError, KeyError, ValueError, IndexError):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
