"""Losses: pure functions of arrays, unreduced, grouped by family."""

from alignax.losses.divergence import k1 as k1
from alignax.losses.divergence import k2 as k2
from alignax.losses.divergence import k3 as k3
from alignax.losses.policy_gradient import ppo_clip as ppo_clip
from alignax.losses.preference import dpo as dpo
from alignax.losses.preference import ipo as ipo
from alignax.losses.preference import ipo_average as ipo_average
from alignax.losses.supervised import cross_entropy as cross_entropy
