"""Sampling: prompts in, training rows out. Knows token ids, never text."""

from alignax.sampling.generate import Samples, generate

__all__ = ["Samples", "generate"]
