"""Advantages: from rewards (and values) to how much better than expected each token or sample was.

All results are constants to differentiation: a policy loss must never reach the critic or the reward through them.
"""

from alignax.advantages.critic import gae as gae
from alignax.advantages.group import group_centred as group_centred
from alignax.advantages.group import group_relative as group_relative
from alignax.advantages.group import group_relative_batch as group_relative_batch
from alignax.advantages.group import informative_groups as informative_groups
from alignax.advantages.group import leave_one_out as leave_one_out
from alignax.advantages.group import opo as opo
from alignax.advantages.multi_reward import multi_reward_normalised as multi_reward_normalised
from alignax.advantages.multi_reward import multi_reward_sum as multi_reward_sum
from alignax.advantages.process import group_relative_process as group_relative_process
from alignax.advantages.sequence import reinforce_plus_plus as reinforce_plus_plus
from alignax.advantages.sequence import reinforce_plus_plus_baseline as reinforce_plus_plus_baseline
from alignax.advantages.sequence import remax as remax
