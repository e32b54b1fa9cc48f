"""Algorithms: each a Batch and a `make_loss(model, ...)`."""
