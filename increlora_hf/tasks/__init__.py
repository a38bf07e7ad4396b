"""What the example scripts need to know of a task: its columns, its data, its metrics, its answers."""
