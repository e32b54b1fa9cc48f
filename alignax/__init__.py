"""Aligning language models in JAX: objectives, updates and sampling as pure functions."""

from alignax import advantages as advantages
from alignax import algorithms as algorithms
from alignax import data as data
from alignax import io as io
from alignax import logprobs as logprobs
from alignax import losses as losses
from alignax import models as models
from alignax import reduce as reduce
from alignax import rewards as rewards
from alignax import sampling as sampling
from alignax import sharding as sharding
from alignax import train as train
from alignax import types as types
