"""Models registered with timm. Importing this package registers all of them."""

from timm_xformers.layers.factory import register as _register_attention
from timm_xformers.models import vix as vix

_register_attention()
