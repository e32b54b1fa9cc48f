"""Sampling: prompts in, training rows out. Knows token ids, never text."""

from alignax.sampling.beam import Beams, beam_search
from alignax.sampling.drafts import Draft, Proposal, draft_model, ngram
from alignax.sampling.engine import Engine, Served, collect, make_engine, serve
from alignax.sampling.generate import Samples, generate
from alignax.sampling.parity import ParityReport, compare_logp, parity_report
from alignax.sampling.settings import Settings
from alignax.sampling.speculative import Speculation, speculate
from alignax.sampling.weights import rollout_params

__all__ = [
    "Beams",
    "Draft",
    "Engine",
    "ParityReport",
    "Proposal",
    "Samples",
    "Served",
    "Settings",
    "Speculation",
    "beam_search",
    "collect",
    "compare_logp",
    "draft_model",
    "generate",
    "make_engine",
    "ngram",
    "parity_report",
    "rollout_params",
    "serve",
    "speculate",
]
