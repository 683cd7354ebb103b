"""Training: models, the one loop, tests, and what to train on next."""
