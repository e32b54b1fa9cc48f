"""Sampling: prompts in, training rows out. Knows token ids, never text."""

from alignax.sampling.beam import Beams, beam_search
from alignax.sampling.generate import Samples, generate
from alignax.sampling.parity import ParityReport, compare_logp, parity_report
from alignax.sampling.settings import Settings
from alignax.sampling.weights import rollout_params

__all__ = [
    "Beams",
    "ParityReport",
    "Samples",
    "Settings",
    "compare_logp",
    "beam_search",
    "generate",
    "parity_report",
    "rollout_params",
]
