"""Look, before the engine starts, at what can be known: the rows of the data, and every part that a run will build."""
