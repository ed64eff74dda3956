"""Attention mechanisms as layers for timm's models.

Each file holds one mechanism: a function on (B, H, N, D), then a module on (B, N, C) with the
arguments and parameter names of timm's `Attention`.
"""

# timm first: its import loads our models, which need these layers finished, not half imported.
import timm.models  # noqa: F401

from timm_xformers.layers.agent import AgentAttention, agent_attention
from timm_xformers.layers.factory import attention_class, list_attention
from timm_xformers.layers.fnet import FNetMixing, fnet_mixing
from timm_xformers.layers.hedgehog import HedgehogAttention, hedgehog_attention
from timm_xformers.layers.layout import set_token_layout
from timm_xformers.layers.linformer import LinformerAttention, linformer_attention
from timm_xformers.layers.local import Local1dAttention, Local2dAttention, local_attention
from timm_xformers.layers.nystrom import NystromAttention, nystrom_attention
from timm_xformers.layers.performer import (
    PerformerAttention,
    orthogonal_directions,
    performer_attention,
    redraw_features,
)
from timm_xformers.layers.performer.learned import LearnedPerformerAttention
from timm_xformers.layers.positions import sinusoid
from timm_xformers.layers.rotary import RotaryPositions
from timm_xformers.layers.seq_pool import SeqPool
from timm_xformers.layers.softmax import SoftmaxAttention, softmax_attention
from timm_xformers.layers.tokenizer import ConvEmbed, ConvTokenizer

__all__ = [
    "AgentAttention",
    "ConvEmbed",
    "ConvTokenizer",
    "FNetMixing",
    "HedgehogAttention",
    "LearnedPerformerAttention",
    "LinformerAttention",
    "Local1dAttention",
    "Local2dAttention",
    "NystromAttention",
    "PerformerAttention",
    "RotaryPositions",
    "SeqPool",
    "SoftmaxAttention",
    "agent_attention",
    "attention_class",
    "fnet_mixing",
    "hedgehog_attention",
    "linformer_attention",
    "list_attention",
    "local_attention",
    "nystrom_attention",
    "orthogonal_directions",
    "performer_attention",
    "redraw_features",
    "set_token_layout",
    "sinusoid",
    "softmax_attention",
]
