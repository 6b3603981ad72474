"""Tasks as data: how a row becomes a prompt and an answer, and which rows there are."""

from spectr.tasks.rows import data_source, read_examples, read_rows
from spectr.tasks.task import Example, HubData, Task, heldout_tasks, shipped_tasks

__all__ = [
    "Example",
    "HubData",
    "Task",
    "data_source",
    "heldout_tasks",
    "read_examples",
    "read_rows",
    "shipped_tasks",
]
