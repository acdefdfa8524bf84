"""What can be known before the engine starts, looked at once: the rows of the data, and every part that a run will build."""
