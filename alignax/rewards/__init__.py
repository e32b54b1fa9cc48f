"""Rewards with the signature `reward(prompts, completions, **columns) -> list[float]`."""

from alignax.rewards.evaluate import Reward as Reward
from alignax.rewards.evaluate import evaluate as evaluate
from alignax.rewards.rules import distinct_words as distinct_words
from alignax.rewards.rules import finished as finished
from alignax.rewards.rules import last_number as last_number
from alignax.rewards.rules import weighted as weighted
