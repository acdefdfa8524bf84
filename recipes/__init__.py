"""One file per experiment: model, data, reward, hyperparameters."""
