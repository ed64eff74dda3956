"""Models registered with timm. Importing this package registers all of them."""

from timm_xformers.layers.factory import register as _register_attention
from timm_xformers.models import ccx as ccx
from timm_xformers.models import levix as levix
from timm_xformers.models import retrofit as retrofit
from timm_xformers.models import swin_local as swin_local
from timm_xformers.models import vix as vix
from timm_xformers.models import vix_nano as vix_nano

_register_attention()
