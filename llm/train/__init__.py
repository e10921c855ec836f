"""Training: the run config, the trainer, strategies, optimizers, losses and callbacks."""
