"""Tasks as data: how a row becomes a prompt and an answer, and which rows there are."""

from spectr.tasks.rows import read_examples, read_rows
from spectr.tasks.task import Example, Task, shipped_tasks

__all__ = ["Example", "Task", "read_examples", "read_rows", "shipped_tasks"]
