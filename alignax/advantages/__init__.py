"""Advantages: from rewards (and values) to how much better than expected each token or sample was.

All results are constants to differentiation: a policy loss must never reach the critic or the reward through them.
"""

from alignax.advantages.critic import gae as gae
from alignax.advantages.group import group_centred as group_centred
from alignax.advantages.group import group_relative as group_relative
