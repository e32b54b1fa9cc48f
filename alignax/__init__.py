"""Aligning language models in JAX: objectives, updates and sampling as pure functions."""
