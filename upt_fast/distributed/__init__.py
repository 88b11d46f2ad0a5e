"""One run on several processes: which they are, and a training step that they share."""

from upt_fast.distributed.group import ONE_PROCESS, Group, join
from upt_fast.distributed.step import DistributedStep

__all__ = ["ONE_PROCESS", "DistributedStep", "Group", "join"]
