"""Language models as `Model`s: the shipped transformer and adapters for any other network."""

from alignax.models import lora as lora
from alignax.models import planning as planning
from alignax.models import quantised as quantised
from alignax.models.activations import gelu as gelu
from alignax.models.activations import gelu_tanh as gelu_tanh
from alignax.models.adapters import from_apply as from_apply
from alignax.models.adapters import from_linen as from_linen
from alignax.models.adapters import from_nnx as from_nnx
from alignax.models.config import LayerKind as LayerKind
from alignax.models.config import TransformerConfig as TransformerConfig
from alignax.models.contrastive import contrastive as contrastive
from alignax.models.contrastive import contrastive_logits as contrastive_logits
from alignax.models.heads import add_score as add_score
from alignax.models.heads import with_score as with_score
from alignax.models.lora import LoraConfig as LoraConfig
from alignax.models.mixture import geometric_mixture_logits as geometric_mixture_logits
from alignax.models.mixture import mixture as mixture
from alignax.models.rope import LinearScaling as LinearScaling
from alignax.models.rope import Llama3Scaling as Llama3Scaling
from alignax.models.segments import segment_positions as segment_positions
from alignax.models.segments import segment_visibility as segment_visibility
from alignax.models.transformer import RULES as RULES
from alignax.models.transformer import transformer as transformer
