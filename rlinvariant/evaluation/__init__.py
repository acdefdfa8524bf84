"""Evaluation: held-out reward and pass@k of a run or a model, with standard errors and every completion."""
