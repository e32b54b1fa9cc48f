"""Losses: pure functions of arrays, unreduced, grouped by family."""

from alignax.losses.divergence import absolute as absolute
from alignax.losses.divergence import full_kl as full_kl
from alignax.losses.divergence import k1 as k1
from alignax.losses.divergence import k2 as k2
from alignax.losses.divergence import k3 as k3
from alignax.losses.divergence import k3_forward as k3_forward
from alignax.losses.divergence import k3_straight_through as k3_straight_through
from alignax.losses.extras import needed as needed
from alignax.losses.extras import needs as needs
from alignax.losses.f_divergence import f_alpha as f_alpha
from alignax.losses.f_divergence import f_forward_kl as f_forward_kl
from alignax.losses.f_divergence import f_jensen_shannon as f_jensen_shannon
from alignax.losses.f_divergence import f_reverse_kl as f_reverse_kl
from alignax.losses.policy_gradient import ppo_clip as ppo_clip
from alignax.losses.policy_gradient import ppo_penalty as ppo_penalty
from alignax.losses.preference import dpo as dpo
from alignax.losses.preference import ipo as ipo
from alignax.losses.preference import ipo_average as ipo_average
from alignax.losses.reward import bradley_terry as bradley_terry
from alignax.losses.reward import reward_centering as reward_centering
from alignax.losses.routing import load_balancing as load_balancing
from alignax.losses.routing import mean_load as mean_load
from alignax.losses.routing import router_z as router_z
from alignax.losses.supervised import cross_entropy as cross_entropy
from alignax.losses.value import value_clip as value_clip
