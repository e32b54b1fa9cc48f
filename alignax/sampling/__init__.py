"""Sampling: prompts in, training rows out. Knows token ids, never text."""

from alignax.sampling.generate import Samples, generate
from alignax.sampling.settings import Settings

__all__ = ["Samples", "Settings", "generate"]
