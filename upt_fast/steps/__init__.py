"""A training step in parts, and the plan of one that stays below a number of bytes."""

from upt_fast.steps.measured import MeasuredRoutes
from upt_fast.steps.micro_batches import MicroBatches
from upt_fast.steps.planning import MemoryPlan
from upt_fast.steps.training import StepsByPlan

__all__ = ["MeasuredRoutes", "MemoryPlan", "MicroBatches", "StepsByPlan"]
