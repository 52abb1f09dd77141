"""What a sample means: one file a task. Everything else asks a `Task` and knows none by name."""

from qlora_kit.tasks.causal import CAUSAL
from qlora_kit.tasks.task import Task

TASKS = {task.name: task for task in (CAUSAL,)}

__all__ = ["CAUSAL", "TASKS", "Task"]
