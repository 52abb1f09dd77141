"""The tasks, one file each. A task says what a sample means.

All other code asks a `Task` and knows no task by name.
"""

from qlora_kit.tasks.causal import CAUSAL
from qlora_kit.tasks.task import Task

TASKS = {task.name: task for task in (CAUSAL,)}

__all__ = ["CAUSAL", "TASKS", "Task"]
