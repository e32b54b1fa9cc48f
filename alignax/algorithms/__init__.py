"""Algorithms: each a `Batch` and a `make_loss(model, ...)` for `alignax.train.make_update`."""

from alignax.algorithms import distillation as distillation
from alignax.algorithms import grpo as grpo
from alignax.algorithms import kto as kto
from alignax.algorithms import nash_md as nash_md
from alignax.algorithms import ppo as ppo
from alignax.algorithms import preference as preference
from alignax.algorithms import reward_model as reward_model
from alignax.algorithms import sft as sft
from alignax.algorithms._routing import expert_load as expert_load
