"""Named models that timm does not have. `create_model` makes them; after `import evovit`, so does timm's."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from torch import nn

from evovit.errors import EvoViTError, nearest, shown
from evovit.models.named import refusal

_MODELS: dict[str, Callable[..., nn.Module]] = {}
for _info in iter_modules(__path__):
    _module = import_module(f"{__name__}.{_info.name}")
    _MODELS |= {name: getattr(_module, name) for name in _module.__all__}


def list_models() -> list[str]:
    """Return the names that `create_model` takes."""
    return sorted(_MODELS)


def create_model(name: str, **kwargs: Any) -> Any:
    """Create a named model with random weights: a `ReducedViT`, or the dense host of one.

    Args:
        kwargs: options of the method (such as `keep_ratio`), and arguments of the host (such as
        `num_classes`).
    """
    if not isinstance(name, str) or name not in _MODELS:
        raise EvoViTError(
            f"There is no model {shown(name)}; evovit.list_models() lists them.{nearest(name, list_models())}"
        )
    try:
        return _MODELS[name](**kwargs)
    except EvoViTError:
        raise
    except Exception as error:  # a constructor given a stranger's arguments raises what it likes
        raise refusal(f"evovit cannot make {name}", kwargs, error) from error
