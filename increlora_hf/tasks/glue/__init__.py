"""GLUE: the table of its tasks, their rows, and their metrics."""
