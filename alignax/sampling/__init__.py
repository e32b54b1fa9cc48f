"""Batched autoregressive sampling over token ids."""
