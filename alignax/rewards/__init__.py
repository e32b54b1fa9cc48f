"""Rewards with the signature `reward(prompts, completions, **columns) -> list[float]`, and from scores to tokens."""

from alignax.rewards.evaluate import Reward as Reward
from alignax.rewards.evaluate import evaluate as evaluate
from alignax.rewards.preferences import Preference as Preference
from alignax.rewards.preferences import compare as compare
from alignax.rewards.preferences import from_reward as from_reward
from alignax.rewards.preferences import mean_win_rates as mean_win_rates
from alignax.rewards.preferences import pairwise_scores as pairwise_scores
from alignax.rewards.preferences import preference_matrix as preference_matrix
from alignax.rewards.preferences import shift_preference as shift_preference
from alignax.rewards.preferences import symmetric_preference as symmetric_preference
from alignax.rewards.preferences import symmetric_preference_mean as symmetric_preference_mean
from alignax.rewards.preferences import win_rates as win_rates
from alignax.rewards.rules import distinct_words as distinct_words
from alignax.rewards.rules import finished as finished
from alignax.rewards.rules import last_number as last_number
from alignax.rewards.rules import weighted as weighted
from alignax.rewards.shaping import llama2_scores as llama2_scores
from alignax.rewards.shaping import replace_missing_eos as replace_missing_eos
from alignax.rewards.shaping import scale_missing_eos as scale_missing_eos
from alignax.rewards.shaping import shaped_rewards as shaped_rewards
from alignax.rewards.shaping import soft_overlong as soft_overlong
from alignax.rewards.shaping import subtract_missing_eos as subtract_missing_eos
