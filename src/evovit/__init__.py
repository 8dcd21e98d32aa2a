"""evovit: vision transformers that spend compute only where it matters."""

from evovit.backbones import check_adapter, list_hosts
from evovit.errors import EvoViTError
from evovit.methods import list_methods
from evovit.model import Outputs, ReducedViT, reduce_tokens
