"""Put our mechanisms into models that are there already, and take them out again."""

# timm first: its import loads our models, and one of them needs these modules whole.
import timm.models  # noqa: F401

from timm_xformers.replace.replacing import replace_attention, replacement_of, restore_attention
from timm_xformers.replace.report import Replacement, Row
from timm_xformers.replace.sites import Site, attention_sites

__all__ = [
    "Replacement",
    "Row",
    "Site",
    "attention_sites",
    "replace_attention",
    "replacement_of",
    "restore_attention",
]
